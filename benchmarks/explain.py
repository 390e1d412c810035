"""Whether the heat of `explain` lies on what was asked about: on the demo model, whose pictures' shapes are known.

New pictures of the demo are drawn, and each is asked one question about one of its shapes (its colour, its shape or
its position) at every budget. Columns, each a mean over pictures:

accuracy    share of right answers
asked       share of the heat inside the box around the shape in question, over that box's share of the picture
others      the same for the boxes around the picture's other shapes
preference  of the heat inside the boxes of all shapes, the share inside the one in question, over its share of their
            area; in pictures of several shapes
no heat     pictures without any heat, which the ratios leave out

Each is measured with Grad-CAM and with HiResCAM, and for a control with shuffled weights too: the same network with
the values of each of its weights in a random order, another order for each picture. Such a network reacts to shapes,
which are all there is on the plain ground, but cannot know which one is asked about.

A ratio of 1 is what heat that lies anywhere gives. `make demo` makes the model.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, machine, print_table, write_result

from examples.demo.drawings import IMAGE_SIZE, Question, Scene, distinct_scenes, paint, questions
from modeling_delta_llava.asking import load
from modeling_delta_llava.evaluation.explain import Explanation, explain

METHODS = ("grad_cam", "hirescam")
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


def share_inside(heat: np.ndarray, inside: np.ndarray, of: np.ndarray | None = None) -> float:
    """Share of the heat `(H, W)`, or of that in the region of pixels `of`, that lies inside a region of pixels."""
    patch = IMAGE_SIZE // len(heat)
    per_pixel = np.kron(heat, np.ones((patch, patch)))
    return float(per_pixel[inside].sum() / (per_pixel if of is None else per_pixel[of]).sum())


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


def mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)


def standard_error(values: list[float]) -> float:
    return round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4)


def summary(measured: list[tuple[Explanation, Question, np.ndarray, list[np.ndarray]]]) -> dict[str, float]:
    """The columns of one network at one budget, and what they are made of."""
    warm = [row for row in measured if row[0].heat.any()]
    shares = [share_inside(explanation.heat, inside) for explanation, _, inside, _ in warm]
    areas = [float(inside.mean()) for _, _, inside, _ in warm]
    asked = [share / area for share, area in zip(shares, areas, strict=True)]
    others = [share_inside(one.heat, other) / float(other.mean()) for one, _, _, boxes in warm for other in boxes]
    several = [(one.heat, inside, np.any([inside, *boxes], axis=0)) for one, _, inside, boxes in warm if boxes]
    several = [row for row in several if share_inside(row[0], row[2]) > 0]
    shares_of_shapes = [share_inside(*row) for row in several]
    areas_of_shapes = [float(inside.sum() / shapes.sum()) for _, inside, shapes in several]
    preference = [share / area for share, area in zip(shares_of_shapes, areas_of_shapes, strict=True)]
    return {
        "accuracy": mean([row[0].answer == row[1].answer for row in measured]),
        "share_of_heat": mean(shares),
        "share_of_area": mean(areas),
        "asked": mean(asked),
        "asked_standard_error": standard_error(asked),
        "others": mean(others),
        "others_standard_error": standard_error(others),
        "share_of_the_shapes_heat": mean(shares_of_shapes),
        "share_of_the_shapes_area": mean(areas_of_shapes),
        "preference": mean(preference),
        "preference_standard_error": standard_error(preference),
        "pictures_of_several_shapes": len(several),
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
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    about = machine(device)
    model, processor = load(arguments.model, device="cpu", dtype="float32")
    budgets = model.config.legal_num_visual_tokens
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    generator = torch.Generator().manual_seed(arguments.seed)
    measured = defaultdict(list)
    for picture, question, inside, others in examples(arguments.pictures, arguments.seed):
        for weights in ("trained", "shuffled"):
            if weights == "shuffled":
                shuffle(model, generator)
            for method in METHODS:
                hirescam = method == "hirescam"
                for one in explain(
                    model, processor, picture, question.text, budgets, max_new_tokens=6, hirescam=hirescam
                ):
                    measured[method, one.num_visual_tokens, weights].append((one, question, inside, others))
        model.load_state_dict(trained)
    rows = [
        {
            "method": method,
            "num_visual_tokens": budget,
            **{weights: summary(measured[method, budget, weights]) for weights in ("trained", "shuffled")},
        }
        for method in METHODS
        for budget in budgets
    ]
    write_result(arguments, device, about, {"rows": rows})
    columns = ("accuracy", "asked", "others", "preference", "no_heat")
    print_table(
        ["method", "tokens", *columns, *(f"shuffled {name}" for name in columns)],
        [
            [row["method"], row["num_visual_tokens"], *(row[w][c] for w in ("trained", "shuffled") for c in columns)]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
