"""Conversions that are interrupted, terminated or killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_delta_llava.conversion import write
from modeling_delta_llava.conversion.assemble import Options
from modeling_delta_llava.conversion.convert import convert
from tests.conversion.conftest import assert_same_tensors, read_tensors

REPOSITORY = Path(__file__).resolve().parents[2]
# The real command line, with a pause before each of many shards.
SLOW_CONVERSION = """
import sys, time
from modeling_delta_llava.conversion import write
save = write.save
def slowly(*arguments):
    time.sleep(0.5)
    save(*arguments)
write.save = slowly
from delta_llava.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(source: Path, output: Path, *arguments: str) -> subprocess.Popen:
    """Starts a slow conversion and waits until it writes weights."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW_CONVERSION, "convert", str(source), str(output), *arguments]
    command += ["--max-shard-size", "300KB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    limit = time.monotonic() + 120
    while len(list(output.parent.glob(".*.unfinished/new/model*.safetensors"))) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.02)
    return process


def test_interrupted(sources, tmp_path, monkeypatch, refused):
    save, written = write.save, []

    def interrupt(*arguments):
        save(*arguments)
        written.append(1)
        if len(written) >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(write, "save", interrupt)
    line = refused(sources / "stage2", "--max-shard-size", "300KB", output=tmp_path / "parent" / "output")
    assert line.startswith("error: interrupted: nothing was kept")


def test_terminated(sources, tmp_path):
    output = tmp_path / "parent" / "output"
    process = start(sources / "stage2", output)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: interrupted: nothing was kept")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [], "the folder made for OUTPUT is gone, too"


def test_killed_while_replacing_a_model_and_run_again(sources, converted, tmp_path):
    output = shutil.copytree(converted, tmp_path / "output")
    process = start(sources / "stage2", output, "--overwrite", "--dtype", "bfloat16")
    process.kill()
    process.communicate(timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".output.unfinished", "output"]
    assert_same_tensors(read_tensors(output), read_tensors(converted))
    process = start(sources / "stage2", output, "--overwrite")
    process.kill()
    process.communicate(timeout=60)
    convert(str(sources / "stage2"), output, Options(dtype="bfloat16"), overwrite=True, progress=False)
    assert list(tmp_path.iterdir()) == [output]
    assert {tensor.dtype for tensor in read_tensors(output).values()} == {torch.bfloat16}


def test_everything_is_on_disk_before_it_takes_its_place(sources, tmp_path, monkeypatch):
    """Flushed at its full size, then renamed, then the folder around it flushed: a power cut leaves all or nothing."""
    output = tmp_path / "output"
    fsync, rename, events = os.fsync, os.rename, []

    def note_flush(descriptor):
        events.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        fsync(descriptor)

    def note_rename(source, target):
        events.append(("renamed", source))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note_rename)
    convert(str(sources / "stage2"), output, max_shard_size="500KB", progress=False)
    ((position, building),) = [(place, name) for place, (kind, name) in enumerate(events) if kind == "renamed"]
    flushed = dict(events[:position])
    for path in (output, *output.rglob("*")):
        there = str(building / path.relative_to(output))
        assert there in flushed, path
        assert path.is_dir() or flushed[there] == path.stat().st_size, path
    assert len(list(output.glob("*.safetensors"))) > 1
    assert [name for name, _ in events[position + 1 :]] == [str(tmp_path)]


@pytest.mark.parametrize("moment", ["before it is read", "while it is written", "when all is written"])
def test_a_source_that_is_rewritten_meanwhile(sources, tmp_path, monkeypatch, refused, moment):
    """Zeros of the same layout in place of the weights: what was planned is what is written, or nothing is."""
    source = shutil.copytree(sources / "stage2", tmp_path / "source")
    save, calls = write.save, []

    def rewrite():
        for path in source.glob("*.safetensors"):
            tensors = {key: torch.zeros_like(tensor) for key, tensor in load_file(path).items()}
            save_file(tensors, path, {"format": "pt"})

    def watched(*arguments):
        calls.append(1)
        if moment == "before it is read" and len(calls) == 1:
            rewrite()
        save(*arguments)
        if moment == "while it is written" and len(calls) >= 3:
            rewrite()

    monkeypatch.setattr(write, "save", watched)
    if moment == "when all is written":
        scanned = write.scanned
        monkeypatch.setattr(write, "scanned", lambda path: (rewrite(), scanned(path))[1])
    line = refused(source, "--max-shard-size", "300KB")
    assert "changed while it was read: nothing was kept" in line
    assert str(source) in line
