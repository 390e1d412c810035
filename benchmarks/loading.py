"""Start-up times, in fresh processes: imports, `delta-llava --help`, and `from_pretrained` against native LLaVA's.

Import and help times are those of whole processes; each round runs all of them. The two checkpoints of
`from_pretrained` have the released tower and a small language model with random weights in bf16, written for the run.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, measure, median_ms, parser, print_table, ratio, start, write_result
from transformers import LlavaConfig, LlavaForConditionalGeneration

from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

PROCESSES = {
    "bare_python": ["-c", "pass"],
    "package": ["-c", "import modeling_delta_llava"],
    "help": ["-m", "delta_llava", "--help"],
    "model_class": ["-c", "from modeling_delta_llava import DeltaLlavaForConditionalGeneration"],
    "llava_model_class": ["-c", "from transformers import LlavaForConditionalGeneration"],
}
TEXT = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}


def process(arguments: list[str]):
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def loading_script(class_path: str, folder: Path) -> list[str]:
    """A process that prints the seconds of `from_pretrained` alone."""
    module, name = class_path.rsplit(".", 1)
    lines = [
        "import time",
        f"from {module} import {name}",
        "begin = time.perf_counter()",
        f"{name}.from_pretrained({str(folder)!r})",
        "print(time.perf_counter() - begin)",
    ]
    return ["-c", "\n".join(lines)]


def loading_seconds(arguments: list[str]) -> float:
    finished = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return float(finished.stdout.split()[-1])


def write_checkpoints(folder: Path) -> dict[str, list[str]]:
    """Both models on disk; returns the command that loads each."""
    config = DeltaLlavaConfig(text_config={**TEXT, "vocab_size": 32001})
    native = LlavaConfig(vision_config=config.vision_config, text_config=config.text_config)
    commands = {}
    torch.set_default_dtype(torch.bfloat16)
    for name, path, model_class, one in (
        (
            "ours",
            "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
            DeltaLlavaForConditionalGeneration,
            config,
        ),
        ("llava", "transformers.LlavaForConditionalGeneration", LlavaForConditionalGeneration, native),
    ):
        model_class(one).save_pretrained(folder / name)
        commands[name] = loading_script(path, folder / name)
    torch.set_default_dtype(torch.float32)
    return commands


def main():
    arguments = parser(__doc__, "loading").parse_args()
    device = start(arguments)
    about = machine(device)
    times = measure(
        {name: lambda command=command: process(command) for name, command in PROCESSES.items()},
        device,
        arguments.repeats,
        warmup=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        commands = write_checkpoints(Path(folder))
        loading = {name: [] for name in commands}
        for repeat in range(-1, arguments.repeats):
            for name, command in commands.items():
                seconds = loading_seconds(command)
                if repeat >= 0:
                    loading[name].append(seconds)
        sizes = {
            name: sum(file.stat().st_size for file in (Path(folder) / name).glob("*.safetensors")) for name in commands
        }
    results = {
        "median_ms": {name: median_ms(seconds) for name, seconds in times.items()},
        "help_above_bare_python_ms": round(median_ms(times["help"]) - median_ms(times["bare_python"]), 1),
        "package_above_bare_python_ms": round(median_ms(times["package"]) - median_ms(times["bare_python"]), 1),
        "import_llava_over_ours": ratio(times["llava_model_class"], times["model_class"]),
        "from_pretrained_ms": {name: median_ms(seconds) for name, seconds in loading.items()},
        "from_pretrained_llava_over_ours": ratio(loading["llava"], loading["ours"]),
        "checkpoint_mb": {name: round(size / 1e6, 1) for name, size in sizes.items()},
    }
    write_result(arguments, device, about, results)
    rows = [[name, value] for name, value in results["median_ms"].items()]
    rows += [[f"from_pretrained {name}", value] for name, value in results["from_pretrained_ms"].items()]
    print_table(["process", "median ms"], rows)


if __name__ == "__main__":
    main()
