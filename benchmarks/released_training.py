"""`delta-llava finetune` against the released training loop: the same losses, and samples/s of both in turns.

Writes a stage-1 result of a reduced geometry (the released projector and a tower of its shape with narrow MLPs, on a
small language model), a LLaVA JSON of drawn pictures and text, and trains stage 2 on it in fp32 with the flags of the
released script, once with the authors' own `train()` and once with `delta-llava finetune` and the packaged recipe on
the converted folder, each in a process of its own. Both take the rows in the order of the file, without stochastic
depth. samples/s is Trainer's own figure of either side: the whole loop, input included, without loading and saving.

`--authors` is a checkout of github.com/mzamini92/Delta-LLaVA, `--authors-python` the Python of an environment for it:
torch, transformers 4.37.2, tokenizers 0.15.1, accelerate 0.21, sentencepiece, protobuf, einops, timm, requests and
numpy < 2.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, parser, print_table, ratio, start, write_result
from finetuning import write_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.training_layout import TrainingLayout, write_base_model, write_json, write_stage1, write_tower

ROOT = Path(__file__).resolve().parents[1]
NUM_VISUAL_TOKENS = 144


def layout_of(arguments: argparse.Namespace) -> TrainingLayout:
    """The released projector on a 24 x 24 grid; everything else is small."""
    return TrainingLayout.released_projector(
        tower_intermediate_size=arguments.tower_mlp,
        text_hidden_size=arguments.text_width,
        text_intermediate_size=3 * arguments.text_width,
        text_layers=4,
        text_heads=arguments.text_width // 64,
        text_key_value_heads=arguments.text_width // 64,
        vocab_size=512,  # with a row for `<image>`, which conversion would add to the softmax otherwise
    )


def command(arguments: list[object], folder: Path, python: str | Path, path: Path, threads: int) -> None:
    """Runs a Python command in `folder`; its output is shown when it fails."""
    variables = {"PYTHONPATH": str(path), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    run = [str(python), *map(str, arguments)]
    ended = subprocess.run(run, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(run[:4])} ... failed:\n{ended.stderr[-4000:]}")


def write_start(folder: Path, arguments: argparse.Namespace) -> None:
    """What both sides start from: language model, tower and stage-1 projector, the same converted, and the data.

    The tower's weights are numbers of half precision, so that the released loop rounds nothing away.
    """
    layout = layout_of(arguments)
    write_base_model(folder / "language_model", layout, seed=arguments.seed + 1)
    write_tower(folder / "tower", layout, seed=arguments.seed + 2, dtype=torch.float16)
    write_stage1(folder / "stage1", layout, tower=folder / "tower", seed=arguments.seed + 3)
    parts = ("--base-model", "language_model", "--vision-tower", "tower")
    command(
        ["-m", "delta_llava", "convert", "stage1", "model", *parts], folder, sys.executable, ROOT, arguments.threads
    )
    config = folder / "model" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"drop_path_rate": 0.0})
    write_data(folder / "data", arguments.steps * arguments.batch_size, 32, arguments.seed)


def flags(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """What both sides call alike."""
    return {
        "data_path": "data/data.json",
        "image_folder": "data",
        "image_aspect_ratio": "pad",
        "output_dir": name,
        "num_train_epochs": 1,
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "learning_rate": arguments.learning_rate,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "gradient_checkpointing": True,
        "dataloader_num_workers": arguments.workers,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": arguments.seed,
    }


def released_flags(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    return flags(arguments, name) | {
        "model_name_or_path": "language_model",
        "version": "v1",
        "vision_tower": "tower",
        "pretrain_mm_mlp_adapter": "stage1/mm_projector.bin",
        "mm_projector_type": "delatallava",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "scale_factor": round((576 / NUM_VISUAL_TOKENS) ** 0.5),
        "evaluation_strategy": "no",
        "warmup_ratio": 0.03,
        "model_max_length": 2048,
        "lazy_preprocess": True,
    }


def our_flags(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """Beside the recipe, which has the released settings."""
    return flags(arguments, name) | {
        "model": "model",
        "num_visual_tokens": NUM_VISUAL_TOKENS,
        "train_sampling_strategy": "sequential",
        "tf32": False,
        "trial_save": False,
    }


def as_arguments(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def train(folder: Path, arguments: argparse.Namespace, side: str, name: str) -> tuple[list[float], float]:
    """One run of one side: its losses and its samples/s."""
    if side == "released":
        script = [Path(__file__).with_name("authors_training.py"), *as_arguments(released_flags(arguments, name))]
        command(script, folder, arguments.authors_python, arguments.authors.resolve(), arguments.threads)
    else:
        script = ["-m", "modeling_delta_llava.finetuning", "stage2", *as_arguments(our_flags(arguments, name))]
        command(script, folder, sys.executable, ROOT, arguments.threads)
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    rate = next(entry["train_samples_per_second"] for entry in log if "train_samples_per_second" in entry)
    if side == "released":
        return json.loads((folder / name / "losses.json").read_text()), rate
    return [entry["loss"] for entry in log if "loss" in entry], rate


def main():
    arguments_parser = parser(__doc__, "released_training")
    arguments_parser.add_argument("--authors", type=Path, required=True, help="checkout of the authors' repository")
    arguments_parser.add_argument("--authors-python", type=Path, required=True, help="Python that runs their code")
    arguments_parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run")
    arguments_parser.add_argument("--batch-size", type=int, default=2, help="rows of a step")
    arguments_parser.add_argument("--learning-rate", type=float, default=2e-5, help="the released one by default")
    arguments_parser.add_argument("--workers", type=int, default=2, help="loader processes of either side")
    arguments_parser.add_argument("--text-width", type=int, default=256, help="hidden size of the language model")
    arguments_parser.add_argument("--tower-mlp", type=int, default=64, help="width of the tower's MLPs (CLIP-L: 4096)")
    arguments_parser.set_defaults(repeats=3, device="cpu")
    arguments = arguments_parser.parse_args()
    device = start(arguments)
    about = machine(device)
    losses: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {"released": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_start(folder, arguments)
        for repeat in range(arguments.repeats):
            for side in rates:
                losses[side], rate = train(folder, arguments, side, f"{side}-{repeat}")
                rates[side].append(rate)
                print(f"round {repeat}, {side}: {rate} samples/s", file=sys.stderr)
    pairs = list(zip(losses["released"], losses["ours"], strict=True))
    results = {
        "num_visual_tokens": NUM_VISUAL_TOKENS,
        "losses": losses,
        "largest_relative_difference": max(abs(ours - theirs) / theirs for theirs, ours in pairs),
        "samples_per_second": rates,
        # Seconds per sample, so that the ratio says how many times faster ours is.
        "ours_over_released": ratio(*([1 / rate for rate in rates[side]] for side in ("released", "ours"))),
    }
    write_result(arguments, device, about, results)
    print_table(
        ["step", "released loss", "our loss"],
        [[step, f"{theirs:.6f}", f"{ours:.6f}"] for step, (theirs, ours) in enumerate(pairs, start=1)],
    )
    print(f"losses differ by {results['largest_relative_difference']:.1e} at most, relative")
    print(f"samples/s: {rates}, ours / released {results['ours_over_released']}")


if __name__ == "__main__":
    main()
