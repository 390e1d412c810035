"""Conversion at disk speed and in constant memory: `delta-llava convert` against `cp` of the same bytes.

Writes a stage-2 checkpoint of Vicuna-7B geometry (random bfloat16 weights, tower inside, shards), then measures, each
in a process of its own and in turns:

* `cp`: copying the checkpoint's files and flushing them to disk, the limit;
* `convert` with and without the scan for NaN and infinity;
* with --before CHECKOUT, the `convert` of another version of this package, with its scan;
* with --whole-model, loading the model whole and calling `save_pretrained`, the usual way (needs memory for all
  weights; skipped with the reason when there is not enough);

for safetensors and for `pytorch_model*.bin` shards. Before each run the checkpoint is dropped from the page cache;
each time includes flushing what was written to disk. Peak memory is the largest anonymous one: mapped pages of files,
which the kernel takes back when memory is short, are not in it. With --answer the converted model is loaded in
bfloat16 and answers a question about a picture.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from common import machine, parser, print_table, start, write_result
from safetensors.torch import save_file

from modeling_delta_llava.conversion.configs import RELEASED_TOWER

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.training_layout import (
    TrainingLayout,
    projector_shapes,
    text_shapes,
    tower_shapes,
    training_config,
    write_generation_config,
    write_json,
    write_tokenizer,
)

ROOT = Path(__file__).resolve().parents[1]
VICUNA_7B = {
    "text_hidden_size": 4096,
    "text_intermediate_size": 11008,
    "text_layers": 32,
    "text_heads": 32,
    "text_key_value_heads": 32,
    "vocab_size": 32000,
}
SIZES = {
    "7b": TrainingLayout.released_projector(tower_intermediate_size=4096, **VICUNA_7B),
    "small": TrainingLayout.released_projector(
        text_hidden_size=1024, text_intermediate_size=2816, text_layers=8, text_heads=8, text_key_value_heads=8
    ),
    "tiny": TrainingLayout(),
}
SHARD_BYTES = {"safetensors": 5_000_000_000, "bin": 2_000_000_000}
TOWER = "openai/clip-vit-large-patch14-336"

WHOLE_MODEL = """
import os, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig
from modeling_delta_llava import DeltaLlavaForConditionalGeneration
from modeling_delta_llava.conversion.tables import new_name, training_table
source, hub, output = map(Path, sys.argv[1:])
weights = {}
for path in sorted([*source.glob("model*.safetensors"), *source.glob("pytorch_model*.bin")]):
    weights |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
state = {}
for key in list(weights):
    tensor, name = weights.pop(key), new_name(key, training_table(plain=False))
    if ".qkv_proj." in name:
        for part, rows in zip("qkv", tensor.chunk(3)):
            state[name.replace("qkv_proj", f"{part}_proj")] = rows
    else:
        state[name] = tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor
config = AutoConfig.from_pretrained(hub)
with torch.device("meta"):
    model = DeltaLlavaForConditionalGeneration(config)
for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
    rows = config.text_config.vocab_size - len(state[name])
    state[name] = torch.cat([state[name], state[name].float().mean(0, keepdim=True).to(state[name]).expand(rows, -1)])
model.load_state_dict(state, assign=True)
model.save_pretrained(output, max_shard_size="5GB")
for path in output.iterdir():
    with open(path, "rb") as file:
        os.fsync(file.fileno())
"""
ANSWER = """
import sys, time, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
begin = time.perf_counter()
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="bfloat16", trust_remote_code=True)
loaded = time.perf_counter() - begin
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is weird here?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open(sys.argv[2]).convert("RGB"), text=prompt, return_tensors="pt").to(torch.bfloat16)
tokens = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1]:].tolist()
assert tokens and model.config.image_token_id not in tokens
print(f"loaded in {loaded:.1f} s, {inputs['input_ids'].shape[1]} prompt tokens, answer {tokens}")
"""


def shapes_of(layout: TrainingLayout) -> dict[str, tuple[int, ...]]:
    """Every tensor of a stage-2 checkpoint, in the order of the model."""
    tower = {f"model.vision_tower.vision_tower.vision_model.{name}": s for name, s in tower_shapes(layout).items()}
    projector = {f"model.mm_projector.{name}": shape for name, shape in projector_shapes(layout).items()}
    return text_shapes(layout) | tower | projector


def shards_of(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        if shard and size + 2 * math.prod(shape) > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += 2 * math.prod(shape)
    yield shard


def write_checkpoint(folder: Path, layout: TrainingLayout, weights_format: str, seed: int) -> int:
    """A stage-2 checkpoint with random bfloat16 weights. Returns the bytes of its weight files."""
    folder.mkdir()
    write_json(folder / "config.json", training_config(layout, TOWER) | {"torch_dtype": "bfloat16"})
    write_tokenizer(folder, layout)
    write_generation_config(folder)
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(1 << 24, generator=generator) * 0.02).bfloat16()
    ones = torch.ones(1 << 16).bfloat16()

    def values(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        source = ones if "norm" in name and name.endswith("weight") else noise
        left = math.prod(shape)
        while left:
            start_at = int(torch.randint(0, max(1, len(source) // 2), (1,), generator=generator)) if left > 1 else 0
            block = source[start_at : start_at + left]
            yield block
            left -= len(block)

    stem = "model" if weights_format == "safetensors" else "pytorch_model"
    shards = list(shards_of(shapes_of(layout), SHARD_BYTES[weights_format]))
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{weights_format}"
        weight_map |= dict.fromkeys(shapes, file)
        tensors = {name: torch.cat(list(values(name, shape))).reshape(shape) for name, shape in shapes.items()}
        if weights_format == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes_of(layout).values()))}, "weight_map": weight_map}
    write_json(folder / f"{stem}.{weights_format}.index.json", index)
    flush(folder)
    return sum((folder / name).stat().st_size for name in set(weight_map.values()))


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], source: Path, package: Path = ROOT) -> dict[str, float]:
    """Seconds and peak anonymous memory (MB) of a process that starts without `source` in the page cache."""
    forget(source)
    begin = time.perf_counter()
    peak = 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(package), cwd=package)
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} failed: {output.read().decode()[-2000:]}")
    return {"seconds": seconds, "peak_mb": peak / 1e6}


def anonymous_memory(pid: int) -> int:
    """What a process holds now beside mapped files, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def environment(package: Path = ROOT) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(package), "TOKENIZERS_PARALLELISM": "false"}


def measure_format(arguments: argparse.Namespace, work: Path, weights_format: str) -> dict[str, object]:
    layout = SIZES[arguments.size]
    source, copy, hub = work / "source", work / "copy", work / "hub"
    nbytes = write_checkpoint(source, layout, weights_format, arguments.seed)
    tower = write_tower_config(work / "tower", layout)
    if arguments.size != "7b":
        write_json(source / "config.json", training_config(layout, tower) | {"torch_dtype": "bfloat16"})
    convert = [sys.executable, "-m", "delta_llava", "convert", str(source), str(hub), "--no-progress"]
    runs = {
        "cp": ["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync "$1"/*', str(source), str(copy)],
        "convert": convert,
        "convert, no scan": [*convert, "--no-scan"],
    }
    packages = {}
    if arguments.before is not None:
        python = arguments.before / ".venv" / "bin" / "python"
        runs["convert, before"] = [str(python) if python.exists() else sys.executable, *convert[1:]]
        packages["convert, before"] = arguments.before
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, command in runs.items():
            for folder in (copy, hub):
                shutil.rmtree(folder, ignore_errors=True)
            measured[name].append(timed(command, source, packages.get(name, ROOT)))
    shutil.rmtree(copy, ignore_errors=True)
    answer = None
    if arguments.answer and weights_format == "safetensors":
        answer = run_answer(hub, nbytes)
    whole: dict[str, object] = {"skipped": "not asked for (--whole-model)"}
    if arguments.whole_model:
        needed = int(1.45 * nbytes)  # all weights, and a shard once more while it is saved
        available = psutil.virtual_memory().available
        if available < needed:
            whole = {"skipped": f"{needed / 1e9:.1f} GB of memory needed, {available / 1e9:.1f} GB available"}
        else:
            for name in ("model*.safetensors", "*.index.json"):
                for path in hub.glob(name):
                    path.unlink()
            script = [sys.executable, "-c", WHOLE_MODEL, str(source), str(hub), str(copy)]
            whole = timed(script, source)
    for folder in (source, copy, hub, tower):
        shutil.rmtree(folder, ignore_errors=True)
    limit = [run["seconds"] for run in measured["cp"]]
    rows = {}
    for name, results in measured.items():
        seconds = [run["seconds"] for run in results]
        rows[name] = {
            "seconds": round(statistics.median(seconds), 2),
            "all_seconds": [round(value, 2) for value in seconds],
            "times_cp": round(statistics.median(s / c for s, c in zip(seconds, limit, strict=True)), 3),
            "gb_per_second": round(nbytes / statistics.median(seconds) / 1e9, 3),
            "peak_mb": round(max(run["peak_mb"] for run in results), 1),
        }
    if "seconds" in whole:
        whole = {key: round(value, 2) for key, value in whole.items()}
        whole["times_cp"] = round(whole["seconds"] / statistics.median(limit), 3)
    rows["whole model + save_pretrained"] = whole
    return {"bytes": nbytes, "runs": rows} | ({"answer": answer} if answer else {})


def write_tower_config(folder: Path, layout: TrainingLayout) -> Path:
    """The tower's config alone: its weights are inside the checkpoint."""
    folder.mkdir()
    sizes = {
        "hidden_size": layout.tower_hidden_size,
        "intermediate_size": layout.tower_intermediate_size,
        "num_hidden_layers": layout.tower_layers,
        "num_attention_heads": layout.tower_heads,
        "image_size": layout.image_size,
        "patch_size": layout.patch_size,
    }
    write_json(folder / "config.json", RELEASED_TOWER | sizes)
    return folder


def run_answer(hub: Path, nbytes: int) -> str:
    available = psutil.virtual_memory().available
    if available < 1.15 * nbytes:
        return f"skipped: {1.15 * nbytes / 1e9:.1f} GB of memory needed, {available / 1e9:.1f} GB available"
    picture = Path(__file__).resolve().parents[1] / "assets" / "cat.jpg"
    command = [sys.executable, "-c", ANSWER, str(hub), str(picture)]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=elsewhere, env=environment())
    if done.returncode:
        raise SystemExit(f"the converted model does not answer: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    arguments_parser = parser(__doc__, "conversion")
    arguments_parser.set_defaults(repeats=3)
    arguments_parser.add_argument("--size", choices=SIZES, default="7b", help="geometry of the checkpoint")
    arguments_parser.add_argument("--formats", nargs="+", choices=SHARD_BYTES, default=list(SHARD_BYTES))
    arguments_parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="disk to measure")
    arguments_parser.add_argument("--before", type=Path, help="checkout of another version to time in turns")
    arguments_parser.add_argument("--whole-model", action="store_true", help="also load the model whole")
    arguments_parser.add_argument("--answer", action="store_true", help="also load the result and ask it")
    arguments = arguments_parser.parse_args()
    device = start(arguments)
    about = machine(device)
    results: dict[str, object] = {}
    folder, arguments.folder = arguments.folder, "(local disk)"
    before = arguments.before
    for weights_format in arguments.formats:
        with tempfile.TemporaryDirectory(dir=folder, prefix="conversion-benchmark-") as work:
            results[weights_format] = measure_format(arguments, Path(work), weights_format)
        arguments.before = None if before is None else "(another checkout)"
        rows = results[weights_format]["runs"]
        header = ["seconds", "times_cp", "gb_per_second", "peak_mb"]
        print(f"\n{weights_format}, {results[weights_format]['bytes'] / 1e9:.2f} GB")
        print_table(["", *header], [[name, *(row.get(key, "-") for key in header)] for name, row in rows.items()])
        print(json.dumps({key: value for key, value in results[weights_format].items() if key == "answer"}))
        write_result(arguments, device, about, results)
        arguments.before = before


if __name__ == "__main__":
    main()
