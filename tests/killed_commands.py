"""SIGKILL at many moments of the commands that write a folder; then the same command again.

    python -m tests.killed_commands [--points 50] [COMMAND...]

Each run is a fork of one process that has imported everything, so a moment costs a second and not ten. Two runs are
killed at each moment, so that leftovers meet leftovers, before the third is left alone. A kill must leave OUTPUT
absent or whole; the last run must succeed, give the same files as an undisturbed one, and leave nothing beside them.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from delta_llava.cli import main as command_line
from modeling_delta_llava.conversion.convert import convert
from tests.training_layout import TrainingLayout, write_stage2

# What a command writes may tell the time.
VOLATILE = ("README.md",)


def content(folder: Path) -> dict[str, int]:
    """The files of a folder and their sizes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in VOLATILE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def forked(arguments: list[str], seconds: float | None) -> int:
    """Runs a command in a fork, killed after some time; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            if seconds is not None:
                os.dup2(sink, 2)
            status = command_line(arguments)
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def check(make: Callable[[Path], list[str]], work: Path, points: int) -> tuple[int, int]:
    """Kills one command `points` times; how often it was still running, and how often its OUTPUT was there."""
    expected_folder, output = work / "expected" / "output", work / "out" / "output"
    for folder in (expected_folder.parent, output.parent):
        folder.mkdir(parents=True)
    began = time.monotonic()
    if forked(make(expected_folder), None):
        raise SystemExit(f"{make(expected_folder)} fails undisturbed")
    took = time.monotonic() - began
    expected = content(expected_folder)
    killed = whole = 0
    for point in range(points):
        for _ in range(2):
            status = forked(make(output), took * (point + 0.5) / points)
            killed += status == -signal.SIGKILL
            if output.exists():
                whole += 1
                if content(output) != expected:
                    raise SystemExit(f"{make(output)[0]} left half of OUTPUT when killed at {point}/{points}")
                os.rename(output, work / f"moved-{time.monotonic_ns()}")
        if forked(make(output), None):
            raise SystemExit(f"{make(output)[0]} cannot be run again after a kill at {point}/{points}")
        left = sorted(path.name for path in output.parent.iterdir())
        if left != ["output"] or content(output) != expected:
            raise SystemExit(f"{make(output)[0]} run again leaves {left} or other files")
        os.rename(output, work / f"moved-{time.monotonic_ns()}")
    return killed, whole


def commands(work: Path) -> dict[str, Callable[[Path], list[str]]]:
    """What is run, by name, as a function of OUTPUT; with sources written into `work`."""
    source, hub = work / "source", work / "hub"
    write_stage2(source, TrainingLayout(), shards=2)
    convert(str(source), hub, progress=False)
    shards = ["--max-shard-size", "300KB", "--no-progress"]
    return {
        "convert": lambda output: ["convert", str(source), str(output), *shards],
        "export": lambda output: ["export", str(hub), str(output), *shards],
        "quantize": lambda output: ["quantize", str(hub), str(output), "--base-model", "you/model"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*", help="convert, export, quantize; all by default")
    parser.add_argument("--points", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = commands(Path(folder))
        for name in arguments.commands or made:
            killed, whole = check(made[name], Path(folder) / name, arguments.points)
            runs = 2 * arguments.points
            print(f"{name}: {runs} runs, {killed} killed, {whole} with OUTPUT whole, the others without")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
