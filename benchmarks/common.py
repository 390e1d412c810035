"""What the benchmark scripts share: arguments, timing, the machine's own limits, and the result file."""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("delta-llava", "torch", "transformers", "huggingface-hub", "numpy", "pillow")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written, and defaults in the help of every option."""


def parser(description: str, output: str, warmup: int | None = None) -> argparse.ArgumentParser:
    """Argument parser with what every script takes; the result is written to `results/<output>-<device type>.json`.

    `warmup` is the default of `--warmup`, for scripts that offer it.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", default=default_device, help="torch device to measure on")
    result.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch")
    result.add_argument("--repeats", type=int, default=7, help="timed rounds; medians are reported")
    if warmup is not None:
        result.add_argument("--warmup", type=int, default=warmup, help="rounds before the timed ones")
    result.add_argument("--seed", type=int, default=0, help="seed of weights and inputs")
    result.add_argument("--output", type=Path, default=None, help=f"JSON result [results/{output}-DEVICE.json]")
    result.set_defaults(name=output)
    return result


def start(arguments: argparse.Namespace) -> torch.device:
    """Apply the shared arguments; returns the device."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    return torch.device(arguments.device)


def machine(device: torch.device) -> dict[str, object]:
    """Versions and hardware of this run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    description = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = properties.name
        description["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        description["cuda"] = torch.version.cuda
    return {"versions": versions, "machine": description}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', platform.processor())} ({', '.join(extensions)})"


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    functions: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call, by name. The functions take turns, so that drift of the machine hits all of them.

    Garbage is collected before each round, never within one.
    """
    times = {name: [] for name in functions}
    gc.disable()
    try:
        for repeat in range(-warmup, repeats):
            gc.collect()
            for name, function in functions.items():
                synchronize(device)
                begin = time.perf_counter()
                function()
                synchronize(device)
                if repeat >= 0:
                    times[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return times


def median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


def ratio(baseline: list[float], ours: list[float]) -> float:
    """How many times faster than the baseline: the median over rounds of the ratio within each round."""
    return round(statistics.median(slow / fast for slow, fast in zip(baseline, ours, strict=True)), 3)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes together."""
    elements = 2**28 if device.type == "cuda" else 2**26
    source = torch.ones(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, device, repeats=9)["copy"]
    return 2 * source.nbytes / min(seconds)


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB since `reset_peak_memory`: of the GPU, or resident memory of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**10, 1)


def reset_peak_memory(device: torch.device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def write_result(arguments: argparse.Namespace, device: torch.device, about: dict[str, object], results: object):
    """Write the result file: what ran, where, with which settings, and the figures."""
    path = arguments.output or RESULTS / f"{arguments.name}-{device.type}.json"
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "name")}
    document = {"benchmark": arguments.name, **about, "settings": settings, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=str) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def print_table(header: list[str], rows: list[list[object]]):
    """A plain aligned table on standard output."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)
