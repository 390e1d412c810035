"""Training speed and memory of both stages against the visual-token budget, and whether the input keeps up.

For each stage and budget a process of its own trains a few steps with the settings of the packaged recipe, on random
weights, drawn pictures and drawn text. Columns, in the shape of Table 4 of the paper:

  step samples/s   rows trained per second, without reading them: the median over the timed steps
  peak MiB         of the GPU, or resident memory of the process
  input images/s   pictures that one core opens, pads or crops, normalises and batches with their text per second
  input / step     how many times faster one core prepares rows than the device trains on them (above 1: it keeps up)

The share of padding tokens is counted over an epoch of the same rows, shuffled and grouped by modality and length.
The geometry is reduced (a 24 x 24 grid as in the released model, but a narrow tower and language model): compare rows
and columns with each other, not with the paper.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from common import machine, parser, peak_memory, print_table, reset_peak_memory, start, write_result
from PIL import Image
from processor import byte_tokenizer
from transformers import GenerationConfig, TrainerCallback

from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.building import build_processor, read_chat_template
from modeling_delta_llava.finetuning.arguments import CONFIG_FOLDER, build_arguments, read_settings
from modeling_delta_llava.finetuning.run import prepare
from modeling_delta_llava.finetuning.trainer import DeltaLlavaTrainer

BUDGETS = [576, 144, 64, 36, 16, 4, 1]
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}
LANGUAGE_MODEL = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
}
WORDS = ("what", "is", "weird", "in", "the", "picture", "describe", "detail", "and", "say", "why")
# Some rows without a picture, and a long tail of lengths, as in the 665K mix.
TEXT_ONLY_SHARE, MEDIAN_WORDS, SPREAD = 0.06, 12, 0.8


class StepTimer(TrainerCallback):
    """Seconds from the begin of each step, its rows at hand, to its end."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def write_model(folder: Path, seed: int):
    """A Hub folder of the reduced geometry with random weights."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = DeltaLlavaConfig(
        vision_config=TOWER,
        text_config={**LANGUAGE_MODEL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = DeltaLlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    build_processor(config, tokenizer, chat_template=read_chat_template("vicuna_v1")).save_pretrained(folder)


def write_data(folder: Path, rows: int, pictures: int, seed: int):
    """Photo-sized JPEG pictures and a LLaVA JSON whose lengths spread as in the 665K mix."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(pictures):
        coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    conversations = []
    for number in range(rows):
        count = max(1, int(rng.lognormal(np.log(MEDIAN_WORDS), SPREAD)))
        question, answer = (" ".join(rng.choice(WORDS, size)) for size in (8, count))
        has_picture = rng.random() >= TEXT_ONLY_SHARE
        row = {
            "conversations": [
                {"from": "human", "value": "<image>\n" * has_picture + question},
                {"from": "gpt", "value": answer},
            ]
        }
        conversations.append(row | ({"image": f"{number % pictures}.jpg"} if has_picture else {}))
    (folder / "data.json").write_text(json.dumps(conversations))


def run_settings(arguments: argparse.Namespace, folder: Path, stage: str, budget: int) -> dict[str, object]:
    """The packaged recipe of a stage, on this machine."""
    on_cpu = arguments.device == "cpu"
    return {
        **read_settings(CONFIG_FOLDER / f"{stage}.yaml"),
        "model": str(folder / "model"),
        "data_path": str(folder / "data" / "data.json"),
        "image_folder": str(folder / "data"),
        "output_dir": str(folder / f"{stage}-{budget}"),
        "num_visual_tokens": budget,
        "per_device_train_batch_size": arguments.batch_size,
        "max_steps": 1 + arguments.repeats,
        "seed": arguments.seed,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "tf32": not on_cpu,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not on_cpu,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "log_level": "error",
    }


def measure_stage(arguments: argparse.Namespace, folder: Path, stage: str, budget: int) -> dict[str, float]:
    """Speed and memory of one stage at one budget, and the speed of its input; the first step is not counted."""
    device = start(arguments)
    reset_peak_memory(device)
    trainer, _ = prepare(build_arguments(run_settings(arguments, folder, stage, budget)))
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train()
    seconds = timer.seconds[1:]
    result = {
        "step_ms": round(statistics.median(seconds) * 1e3, 1),
        "step_samples_per_s": round(arguments.batch_size / statistics.median(seconds), 2),
        "peak_memory_mib": peak_memory(device),
    }
    torch.set_num_threads(1)
    return result | {"input_images_per_s_per_core": measure_input(trainer, arguments.batch_size)}


def measure_input(trainer: DeltaLlavaTrainer, batch_size: int, batches: int = 8) -> float:
    """Pictures that this thread opens and collates with their text per second: the median over batches."""
    dataset = trainer.train_dataset
    with_picture = [index for index, length in enumerate(dataset.modality_lengths()) if length > 0]
    seconds = []
    for begin in range(0, (1 + batches) * batch_size, batch_size):
        began = time.perf_counter()
        trainer.data_collator([dataset[index] for index in with_picture[begin:][:batch_size]])
        seconds.append((time.perf_counter() - began) / batch_size)
    return round(1 / statistics.median(seconds[1:]), 1)


def count_padding(arguments: argparse.Namespace, folder: Path) -> dict[int, dict[str, float]]:
    """Share of padding tokens over one epoch, by budget and by how rows are put together."""
    shares: dict[int, dict[str, float]] = {budget: {} for budget in arguments.budgets}
    for name, strategy in (("shuffled", "random"), ("grouped", "group_by_length")):
        settings = run_settings(arguments, folder, "stage2", arguments.budgets[0])
        trainer, _ = prepare(build_arguments(settings | {"train_sampling_strategy": strategy}))
        dataset, image_token_id = trainer.train_dataset, trainer.model.config.image_token_id
        encoded = [dataset.encoder.encode(dataset.rows.sample(index).messages) for index in range(len(dataset))]
        order = [drawn.index for drawn in trainer._get_train_sampler()]
        batches = [order[begin:][: arguments.batch_size] for begin in range(0, len(order), arguments.batch_size)]
        for budget in arguments.budgets:
            lengths = [len(text.input_ids) + (budget - 1) * text.input_ids.count(image_token_id) for text in encoded]
            places = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
            shares[budget][name] = round(1 - sum(lengths) / places, 4)
    return shares


def main():
    arguments_parser = parser(__doc__, "finetuning")
    arguments_parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="visual tokens per image")
    arguments_parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    arguments_parser.add_argument("--rows", type=int, default=256, help="rows of the drawn data")
    arguments_parser.set_defaults(repeats=3)
    arguments = arguments_parser.parse_args()
    device = start(arguments)
    about = machine(device)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_delta_llava.finetuning.run"])
    rows = []
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool,
    ):
        folder = Path(name)

        def apart(function, *values):
            return pool.submit(function, *values).result()

        apart(write_model, folder / "model", arguments.seed)
        apart(write_data, folder / "data", arguments.rows, 32, arguments.seed)
        for stage in ("stage1", "stage2"):
            for budget in arguments.budgets:
                row = {"stage": stage, "num_visual_tokens": budget}
                row |= apart(measure_stage, arguments, folder, stage, budget)
                row["input_over_step"] = round(row["input_images_per_s_per_core"] / row["step_samples_per_s"], 2)
                rows.append(row)
                print(row, file=sys.stderr)
        padding = apart(count_padding, arguments, folder)
    results = {
        "geometry": {"vision_config": TOWER, "text_config": LANGUAGE_MODEL, "precision": "fp32 on CPUs, else bf16"},
        "rows": rows,
        "padding_share": padding,
        "input_keeps_up_at_every_budget": all(row["input_over_step"] > 1 for row in rows),
    }
    write_result(arguments, device, about, results)
    print_table(
        ["stage", "tokens", "step samples/s", "peak MiB", "input images/s", "input / step"],
        [
            [
                row["stage"],
                row["num_visual_tokens"],
                row["step_samples_per_s"],
                row["peak_memory_mib"],
                row["input_images_per_s_per_core"],
                row["input_over_step"],
            ]
            for row in rows
        ],
    )
    print_table(
        ["tokens", "padding, shuffled", "padding, grouped"],
        [[budget, f"{share['shuffled']:.1%}", f"{share['grouped']:.1%}"] for budget, share in padding.items()],
    )


if __name__ == "__main__":
    main()
