"""Conversions that are interrupted, terminated or killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import workspace, writer
from modeling_delta_llava.conversion.convert import convert
from modeling_delta_llava.conversion.plan import Options
from modeling_delta_llava.conversion.workspace import remove_leftovers, transaction
from tests.conversion.conftest import assert_same_tensors, read_tensors

REPOSITORY = Path(__file__).resolve().parents[2]
# The real command line, with a pause before each tensor.
SLOW_CONVERSION = """
import sys, time
from modeling_delta_llava.conversion import writer
write = writer._write_all
def slowly(*arguments):
    time.sleep(0.05)
    write(*arguments)
writer._write_all = slowly
from delta_llava.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(source: Path, output: Path, *arguments: str) -> subprocess.Popen:
    """Starts a slow conversion and waits until it writes weights."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW_CONVERSION, "convert", str(source), str(output), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    limit = time.monotonic() + 120
    while not [
        path for path in output.parent.glob(".*.building-*/model*.safetensors") if path.stat().st_size > 60_000
    ]:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.02)
    return process


def test_interrupted(sources, tmp_path, monkeypatch, refused):
    write, written = writer._write_all, []

    def interrupt(*arguments):
        write(*arguments)
        written.append(1)
        if len(written) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_write_all", interrupt)
    line = refused(sources / "stage2", output=tmp_path / "parent" / "output")
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".output.building-{process.pid}", "output"]
    assert_same_tensors(read_tensors(output), read_tensors(converted))
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


# --- the transaction itself ------------------------------------------------------------------------------------------


def test_a_living_run_is_left_alone(tmp_path):
    with transaction(tmp_path / "output") as first:
        (first / "a").write_text("1")
        remove_leftovers(tmp_path / "output")
        assert (first / "a").exists()
    assert (tmp_path / "output" / "a").read_text() == "1"
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["a"]


def test_a_dead_run_of_a_recycled_number_is_removed(tmp_path):
    leftover = tmp_path / f".output.building-{os.getpid()}"
    leftover.mkdir()
    (leftover / ".owner.json").write_text(json.dumps({"pid": os.getpid(), "started": "0"}))
    remove_leftovers(tmp_path / "output")
    assert not leftover.exists()


def test_a_run_of_another_machine_is_left_alone(tmp_path):
    leftover = tmp_path / ".output.building-1"
    leftover.mkdir()
    (leftover / ".owner.json").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere"}))
    remove_leftovers(tmp_path / "output")
    assert leftover.exists()


def test_a_model_set_aside_by_a_killed_overwrite_comes_back(tmp_path):
    aside = tmp_path / f".output.replaced-{2**22 + 1}"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    remove_leftovers(tmp_path / "output")
    assert (tmp_path / "output" / "config.json").read_text() == "old"
    assert not aside.exists()


def test_an_error_inside_leaves_nothing(tmp_path):
    def build():
        with transaction(tmp_path / "deep" / "output") as building:
            (building / "a").write_text("1")
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        build()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before", "after", "between"])
def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch, moment):
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("old")
    rename = os.rename

    def refuse(source, target):
        if (moment == "before" and source == output) or ".building-" in str(source):
            raise OSError("no")
        rename(source, target)
        if moment == "between" and source == output:
            raise OSError("no")

    def build():
        with transaction(output, overwrite=True) as building:
            (building / "config.json").write_text("new")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        build()
    assert (output / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_a_model_set_aside_comes_back_when_its_run_is_dead_and_not_before(tmp_path, monkeypatch):
    output = tmp_path / "output"
    output.mkdir()
    rename = os.rename
    seen = []

    def look(source, target):
        rename(source, target)
        if source == output:
            remove_leftovers(output)
            seen.extend(sorted(path.name for path in tmp_path.iterdir()))

    monkeypatch.setattr(os, "rename", look)
    with transaction(output, overwrite=True) as building:
        (building / "config.json").write_text("new")
    assert [name.partition("-")[0] for name in seen] == [".output.building", ".output.replaced"]
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "config.json"]
    # Killed at that moment, and its number now belongs to another process.
    os.rename(output, tmp_path / seen[1])
    monkeypatch.setattr(workspace, "_start_time", lambda pid: "7")
    remove_leftovers(output)
    assert list(tmp_path.iterdir()) == [output]


def test_leftovers_of_a_name_with_glob_characters(tmp_path):
    (tmp_path / ".hub[v1].building-4194305").mkdir()
    (tmp_path / ".hub[v1].replaced-4194305-7").mkdir()
    (tmp_path / ".hubv.building-4194305").mkdir()
    remove_leftovers(tmp_path / "hub[v1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hubv.building-4194305", "hub[v1]"]
