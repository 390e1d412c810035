"""Whether the heat of `explain` lies on what was asked about: on the demo model, whose pictures' shapes are known.

New pictures of the demo are drawn, and each is asked one question about one of its shapes (its colour, its shape or
its position) at every budget. Columns, each a mean over pictures:

accuracy     share of right answers
asked        share of the heat inside the box around the shape in question, over that box's share of the picture
others       the same for the boxes around the picture's other shapes
no heat      pictures without any heat, which the two means leave out
shuffled     `asked` and `others` of the same network with the values of each of its weights in a random order, another
             order for each picture: the control, whose heat should know nothing of the question

A ratio of 1 is what heat that lies anywhere gives. `make demo` makes the model.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, machine, print_table, write_result

from examples.demo.drawings import IMAGE_SIZE, Question, Scene, distinct_scenes, paint, questions
from modeling_delta_llava.asking import load
from modeling_delta_llava.evaluation.explain import Explanation, explain

ABOUT_ONE_SHAPE = ("colour", "shape", "position")
# Seed of the scenes; the demo draws its own with 0.
SCENE_SEED = 15_000


def asked_thing(scene: Scene, question: Question) -> int:
    """Which thing of a scene a question of `ABOUT_ONE_SHAPE` names: the one that shares the most words with it."""
    words = set(question.text.rstrip("?").split())
    return max(range(len(scene)), key=lambda number: len(words & {scene[number].shape, scene[number].colour}))


def box(covered: np.ndarray) -> np.ndarray:
    """The box around the pixels that are true, as such a map."""
    inside = np.zeros_like(covered)
    rows, columns = (np.flatnonzero(covered.any(axis)) for axis in (1, 0))
    inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return inside


def concentration(heat: np.ndarray, inside: np.ndarray) -> float:
    """Share of the heat `(H, W)` inside a region of pixels, over the region's share of the picture."""
    patch = IMAGE_SIZE // len(heat)
    per_pixel = np.kron(heat, np.ones((patch, patch)))
    return float(per_pixel[inside].sum() / per_pixel.sum() / inside.mean())


def examples(count: int, seed: int):
    """`count` times `(picture, question, box of what is asked, boxes of the other things)`."""
    rng = random.Random(seed)
    for scene in distinct_scenes(2 * count, seed):
        picture, owners = paint(scene, rng)
        question = next((one for one in questions(scene, rng) if one.kind in ABOUT_ONE_SHAPE), None)
        if question is not None and count > 0:
            count -= 1
            boxes = [box(owners == number) for number in range(1, len(scene) + 1)]
            yield picture, question, boxes.pop(asked_thing(scene, question)), boxes


@torch.no_grad()
def shuffle(model: torch.nn.Module, generator: torch.Generator):
    """Puts the values of every weight in a random order."""
    for weight in model.parameters():
        weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))


def summary(measured: list[tuple[Explanation, Question, np.ndarray, list[np.ndarray]]]) -> dict[str, float]:
    """The columns of one network at one budget."""
    warm = [row for row in measured if row[0].heat.any()]
    asked = [concentration(explanation.heat, inside) for explanation, _, inside, _ in warm]
    others = [concentration(explanation.heat, other) for explanation, _, _, boxes in warm for other in boxes]
    return {
        "accuracy": round(float(np.mean([row[0].answer == row[1].answer for row in measured])), 3),
        "asked": round(float(np.mean(asked)), 3),
        "asked_standard_error": round(float(np.std(asked, ddof=1) / len(asked) ** 0.5), 3),
        "others": round(float(np.mean(others)), 3),
        "others_standard_error": round(float(np.std(others, ddof=1) / len(others) ** 0.5), 3),
        "no_heat": len(measured) - len(warm),
    }


def main():
    arguments_parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments_parser.add_argument("--model", default="demo-output/model", help="the demo's model [%(default)s]")
    arguments_parser.add_argument("--pictures", type=int, default=100, help="how many are asked about [%(default)s]")
    arguments_parser.add_argument("--seed", type=int, default=SCENE_SEED, help="of scenes and shuffles [%(default)s]")
    arguments_parser.add_argument("--output", type=Path, default=RESULTS / "explain-demo.json", help="JSON result")
    arguments = arguments_parser.parse_args()
    arguments.name = "explain"
    device = torch.device("cpu")
    about = machine(device)
    model, processor = load(arguments.model, device="cpu", dtype="float32")
    budgets = model.config.legal_num_visual_tokens
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    generator = torch.Generator().manual_seed(arguments.seed)
    measured = {(name, budget): [] for name in ("trained", "shuffled") for budget in budgets}
    for picture, question, inside, others in examples(arguments.pictures, arguments.seed):
        for name in ("trained", "shuffled"):
            if name == "shuffled":
                shuffle(model, generator)
            for explanation in explain(model, processor, picture, question.text, budgets, max_new_tokens=12):
                measured[name, explanation.num_visual_tokens].append((explanation, question, inside, others))
        model.load_state_dict(trained)
    rows = [
        {"num_visual_tokens": budget, **{name: summary(measured[name, budget]) for name in ("trained", "shuffled")}}
        for budget in budgets
    ]
    pictures = len(measured["trained", budgets[0]])
    write_result(arguments, device, about, {"pictures": pictures, "rows": rows})
    columns = ("accuracy", "asked", "others", "no_heat")
    print_table(
        ["tokens", *columns, *(f"shuffled {name}" for name in columns)],
        [[row["num_visual_tokens"], *(row[n][c] for n in ("trained", "shuffled") for c in columns)] for row in rows],
    )


if __name__ == "__main__":
    main()
