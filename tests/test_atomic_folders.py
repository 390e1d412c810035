"""Folders that appear whole or not at all, whatever ends the process that writes them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from delta_llava.errors import UserError
from modeling_delta_llava.folders import atomic_folder

# Writes a file, says so, waits; what happens then is up to the test.
WRITER = """
import sys
from pathlib import Path
from modeling_delta_llava.folders import atomic_folder
with atomic_folder(Path(sys.argv[1]), overwrite=True) as building:
    (building / "config.json").write_text("new")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def start(output) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    return process


def kill(process) -> None:
    process.kill()
    process.communicate()


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def build(output, overwrite: bool = True) -> None:
    with atomic_folder(output, overwrite) as building:
        (building / "config.json").write_text("new")


def old_model(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("old")
    return output


def test_it_appears_when_it_is_whole(tmp_path):
    output = tmp_path / "deep" / "output"
    with atomic_folder(output) as building:
        (building / "config.json").write_text("new")
        assert not output.exists()
    assert names(tmp_path) == ["deep", "deep/output", "deep/output/config.json"]
    assert output.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777


@pytest.mark.parametrize("error", [UserError("no"), RuntimeError("no")])
def test_an_error_inside_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error), match="no"), atomic_folder(tmp_path / "deep" / "output"):
        raise error
    assert names(tmp_path) == []


@pytest.fixture
def usual_signals():
    """Handlers as in any process: a runner of tests may have changed them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted(tmp_path, usual_signals):
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(UserError, match="interrupted: nothing was kept"), atomic_folder(tmp_path / "output"):
            signal.raise_signal(number)
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_interrupted_when_it_is_done(tmp_path, monkeypatch, usual_signals):
    """What comes during the last rename comes too late: the folder is whole, and nobody says otherwise."""
    rename = os.rename

    def interrupted(source, target):
        rename(source, target)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "rename", interrupted)
    build(old_model(tmp_path))
    assert names(tmp_path) == ["output", "output/config.json"]
    assert (tmp_path / "output" / "config.json").read_text() == "new"


def test_interrupted_while_the_old_folder_is_removed(tmp_path, monkeypatch, usual_signals):
    remove = shutil.rmtree

    def interrupted(path, **options):
        remove(path, **options)
        if (tmp_path / "output" / "config.json").read_text() == "new":
            signal.raise_signal(signal.SIGTERM)

    output = old_model(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        build(output)
    assert names(tmp_path) == ["output", "output/config.json"]


def test_two_processes_and_a_killed_one(tmp_path):
    """Twice in a row, so that leftovers of the second run meet those of the first."""
    output = old_model(tmp_path)
    process = start(output)
    with pytest.raises(UserError, match="another process is writing"):
        build(output)
    kill(process)
    kill(start(output))
    assert (output / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["output"]
    build(output)
    assert names(tmp_path) == ["output", "output/config.json"]
    assert (output / "config.json").read_text() == "new"


def test_killed_between_the_two_renames(tmp_path):
    output = old_model(tmp_path)
    unfinished = tmp_path / ".output.unfinished"
    unfinished.mkdir()
    output.rename(unfinished / "replaced")
    with pytest.raises(UserError, match="no"), atomic_folder(output, overwrite=True):
        raise UserError("no")
    assert names(tmp_path) == ["output", "output/config.json"]
    assert (output / "config.json").read_text() == "old"


def test_leftovers_of_any_content(tmp_path):
    unfinished = tmp_path / ".hub[v1].unfinished"
    (unfinished / "new" / "deep").mkdir(parents=True)
    (unfinished / "new" / "deep" / "model.safetensors").write_bytes(b"half")
    (unfinished / "new" / "loop").symlink_to(unfinished)
    (unfinished / "lock").write_text(json.dumps([{}]))
    (unfinished / "replaced").mkdir()
    (tmp_path / "hub[v1]").mkdir()
    build(tmp_path / "hub[v1]")
    assert names(tmp_path) == ["hub[v1]", "hub[v1]/config.json"]


def test_a_link_in_place_of_the_hidden_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".output.unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        build(tmp_path / "output")
    assert names(tmp_path) == [".output.unfinished", "elsewhere"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch, step):
    output = old_model(tmp_path)
    rename, calls = os.rename, []

    def refuse(source, target):
        calls.append(source)
        if len(calls) == step + 1:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=r"nothing was kept: .*Input/output error"):
        build(output)
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["output", "output/config.json"]


def test_a_folder_that_appears_meanwhile(tmp_path):
    with pytest.raises(UserError, match="appeared meanwhile"), atomic_folder(tmp_path / "output"):
        old_model(tmp_path)
    assert (tmp_path / "output" / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "words"), [(28, "is full"), (122, "is full"), (27, "--max-shard-size"), (13, "no p")]
)
def test_why_it_was_not_written(tmp_path, number, words):
    with pytest.raises(UserError, match=words), atomic_folder(tmp_path / "output"):
        raise OSError(number, os.strerror(number), str(tmp_path / "output" / "model.safetensors"))
    assert names(tmp_path) == []


def test_in_a_thread(tmp_path):
    """Where signals cannot be handled, the rest works."""
    thread = threading.Thread(target=build, args=[tmp_path / "output"])
    thread.start()
    thread.join()
    assert names(tmp_path) == ["output", "output/config.json"]
