"""`python -m examples.demo`: train a small Delta-LLaVA from nothing, and ask it about new pictures.

1. Draw a visual question-answering set as LLaVA JSON.
2. A tiny CLIP tower learns to see (it names the shape and colour of each patch), and a tiny Llama learns to read.
3. `delta-llava finetune`, stage 1 (projector) and stage 2 (projector and language model), each step at a drawn budget.
4. A fresh process loads the Hub folder with transformers alone and answers questions about pictures it never saw.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from delta_llava.errors import UserError, reason
from modeling_delta_llava.folders import check_output_folder

from . import exam
from .drawings import DrawnSet, distinct_scenes, write_set
from .language import make_language_model
from .report import ExamQuestion, ExamResult, accuracy, draw_answers, results_table
from .tower import make_tower

SUMMARY_FILE = "demo.json"
# Lies in every folder that the demo made, and in no other.
MARKER_FILE = ".delta-llava-demo"
BUDGETS = [64, 16, 4, 1]
BUDGET_WEIGHTS = [2, 3, 1, 1]
DEFAULT_BUDGET = 16
BATCH_SIZE = 24
SEED = 0


@dataclass(frozen=True)
class Effort:
    """How much is drawn, learned and asked."""

    train_pictures: int = 2000
    exam_pictures: int = 40
    tower_steps: int = 200
    language_steps: int = 200
    stage1_steps: int = 150
    stage2_steps: int = 400

    def scaled(self, factor: float) -> "Effort":
        return Effort(**{name: max(4, round(value * factor)) for name, value in asdict(self).items()})


def clear_output(output: Path) -> None:
    """Makes an empty folder for the demo; what an earlier demo wrote there is replaced.

    Raises:
        UserError: the folder holds something else, or is a place that must not be replaced.
    """
    is_ours = (output / MARKER_FILE).is_file()
    check_output_folder(output, str(output), "no demo wrote it", is_ours, replaces=True)
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER_FILE).touch()


def finetune_stage(recipe: str, settings: dict[str, Any]) -> Path:
    """Runs a packaged recipe with settings for a small model on a CPU; the same as `delta-llava finetune`."""
    import torch

    from modeling_delta_llava.finetuning.arguments import build_arguments, config_path, read_settings
    from modeling_delta_llava.finetuning.run import run

    # Matrices this small gain nothing from a second thread, and the loader's process has the other core.
    torch.set_num_threads(1)
    small = {
        "format": "template",
        "visual_token_budgets": BUDGETS,
        "visual_token_budget_weights": BUDGET_WEIGHTS,
        "num_visual_tokens": DEFAULT_BUDGET,
        "per_device_train_batch_size": BATCH_SIZE,
        "train_sampling_strategy": "random",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_num_workers": 1,
        "logging_steps": 50,
        "save_strategy": "no",
        "seed": SEED,
    }
    return run(build_arguments({**read_settings(config_path(recipe)), **small, **settings}, where=f"demo, {recipe}"))


def exam_questions(drawn: DrawnSet) -> list[ExamQuestion]:
    """Every question about the drawn pictures."""
    rows = json.loads(drawn.question_file.read_text(encoding="utf-8"))
    return [
        ExamQuestion(row["image"], question.kind, question.text, question.answer)
        for row, questions in zip(rows, drawn.questions, strict=True)
        for question in questions
    ]


def sit_exam(model: Path, drawn: DrawnSet, work: Path) -> tuple[list[ExamQuestion], list[ExamResult]]:
    """Has a fresh process, which does not import this package, answer at every budget and without the picture."""
    questions = exam_questions(drawn)
    asked = {
        "budgets": [*BUDGETS, None],
        "questions": [
            {"image": str((drawn.image_folder / question.image).resolve()), "question": question.question}
            for question in questions
        ],
    }
    question_file, result_file = work / "exam.json", work / "exam_answers.json"
    question_file.write_text(json.dumps(asked, indent=1), encoding="utf-8")
    command = [sys.executable, exam.__file__, *(str(path.resolve()) for path in (model, question_file, result_file))]
    ended = subprocess.run(command, cwd=work, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if ended.returncode:
        raise UserError(f"the exam ended with status {ended.returncode}; what it printed above says why")
    results = [ExamResult(**entry) for entry in json.loads(result_file.read_text(encoding="utf-8"))]
    return questions, results


def demo(output: Path, effort: Effort, console: Console) -> dict[str, Any]:
    """The whole demo.

    Args:
        output: folder for everything it writes; `output / "model"` becomes the Hub folder.
        effort: how much is drawn, learned and asked.
        console: where headings and the table are printed.
    Returns:
        What is also written to `output / "demo.json"`: accuracies by budget, times, and the effort.
    """
    started = time.perf_counter()
    clear_output(output)
    scenes = distinct_scenes(effort.train_pictures + effort.exam_pictures, SEED)
    console.print(f"[bold]1. Drawing[/] {effort.train_pictures} pictures to learn from, {effort.exam_pictures} to ask")
    train = write_set(output / "data", "train", scenes[: effort.train_pictures], SEED + 1)
    held_out = write_set(output / "data", "exam", scenes[effort.train_pictures :], SEED + 2)

    console.print("[bold]2. Tower and language model[/], each on its own and from nothing")
    tower_folder, language_folder = output / "vision-tower", output / "language-model"
    # The parts end silently at Ctrl-C, which this process reports.
    ends = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), signal.signal, ends) as pool:
        seeing = pool.submit(make_tower, tower_folder, effort.tower_steps, effort.train_pictures, SEED)
        reading = pool.submit(make_language_model, language_folder, effort.language_steps, SEED)
        reading.result()
        share = seeing.result()
    console.print(f"   the frozen tower names shape and colour of {share:.0%} of the patches of unseen pictures")

    console.print("[bold]3. Stage 1[/]: the projector learns from captions; tower and language model are frozen")
    data = {"image_folder": str(train.image_folder)}
    stage1 = finetune_stage(
        "stage1",
        {
            **data,
            "language_model": str(language_folder),
            "vision_tower": str(tower_folder),
            # As wide as the language model's own: 0.02 suits a width of 4096, not one of 96.
            "projector": {"drop_path_rate": 0.0, "initializer_range": 0.1},
            "data_path": str(train.caption_file),
            "output_dir": str(output / "stage1"),
            "max_steps": effort.stage1_steps,
            "learning_rate": 3e-3,
        },
    )
    console.print("[bold]4. Stage 2[/]: projector and language model learn from questions; the tower stays frozen")
    model = finetune_stage(
        "stage2",
        {
            **data,
            "model": str(stage1),
            "data_path": str(train.question_file),
            "output_dir": str(output / "model"),
            "max_steps": effort.stage2_steps,
            "learning_rate": 2e-3,
        },
    )
    console.print(f"[bold]5. Exam[/] in a fresh process: pipeline('image-text-to-text', '{model}')")
    questions, results = sit_exam(model, held_out, output)
    console.print(results_table(results, questions))
    picture = output / "answers.png"
    draw_answers(questions, results, held_out.image_folder).save(picture)
    seconds = time.perf_counter() - started
    summary = {
        "accuracy": {result.name: round(accuracy(result, questions), 4) for result in results},
        "seconds_per_answer": {result.name: round(result.seconds, 4) for result in results},
        "questions": len(questions),
        "tower_patch_accuracy": round(share, 4),
        "seconds": round(seconds, 1),
        "effort": asdict(effort),
    }
    (output / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(f"Pictures and answers: {picture}\nThe model, a Hub folder: {model}")
    console.print(
        f"Ask it: delta-llava ask {model} {held_out.image_folder}/exam_00000.png 'How many shapes are there?'"
    )
    console.print(f"{seconds:.0f} seconds in all")
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for an error that the user can mend, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all that is written")
    parser.add_argument(
        "--effort", type=float, default=1.0, help="share of pictures and steps; 0.02 only shows that everything runs"
    )
    options = parser.parse_args(arguments)
    # Not above: the processes that train the two parts import this module too.
    from modeling_delta_llava.finetuning.checkpoints import SAVE_ERRORS, is_no_space

    try:
        demo(options.output, Effort().scaled(options.effort), Console())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, *SAVE_ERRORS) as error:
        if not isinstance(error, (UserError, OSError)) and not is_no_space(error):
            raise
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
