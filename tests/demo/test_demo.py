"""`python -m examples.demo`: the whole of it at the least effort, and every way in which it ends early."""

import errno
import json
from concurrent.futures import Future
from unittest import mock

import pytest
from PIL import Image
from safetensors import SafetensorError

from delta_llava.errors import UserError
from examples.demo import __main__ as program
from examples.demo.drawings import distinct_scenes, write_set


class Here:
    """Stands for a pool of processes, whose start takes longer than all they do here; `make demo` has the pool."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.mark.slow
def test_the_whole_demo_runs_and_replaces_an_earlier_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "ProcessPoolExecutor", Here)
    output = tmp_path / "demo"
    program.clear_output(output)
    (output / "left.txt").write_text("by a demo that was interrupted")
    assert program.main(["--output", str(output), "--effort", "0.02"]) == 0
    assert not (output / "left.txt").exists()
    assert "questions about pictures that training never saw" in capsys.readouterr().out
    summary = json.loads((output / "demo.json").read_text())
    assert list(summary["accuracy"]) == ["64", "16", "4", "1", "no picture"]
    assert summary["effort"]["stage2_steps"] == 8
    config = json.loads((output / "model" / "config.json").read_text())
    assert sorted(config["trained_num_visual_tokens"]) == [1, 4, 16, 64]
    with Image.open(output / "answers.png") as sheet:
        assert sheet.width > 1000


def test_a_folder_that_no_demo_made_is_never_removed(tmp_path, capsys):
    (tmp_path / "demo.json").write_text("{}")
    assert program.main(["--output", str(tmp_path)]) == 2
    assert f"error: {tmp_path} exists and no demo wrote it; give another folder" in capsys.readouterr().err
    assert program.main(["--output", str(tmp_path / "demo.json")]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["demo.json"]


def test_a_folder_that_cannot_be_made(capsys):
    assert program.main(["--output", "/proc/demo"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (SafetensorError("I/O error:\nNo space left on device"), 2, "error: I/O error: No space left on device"),
        (UserError("first\nsecond"), 2, "error: first second"),
    ],
)
def test_it_ends_with_one_line(monkeypatch, capsys, raised, status, line):
    monkeypatch.setattr(program, "demo", mock.Mock(side_effect=raised))
    assert program.main([]) == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_fault_of_ours_is_not_disguised(monkeypatch):
    monkeypatch.setattr(program, "demo", mock.Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        program.main([])


def test_an_exam_that_fails_is_named(monkeypatch, tmp_path):
    (tmp_path / "exam.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(program.exam, "__file__", str(tmp_path / "exam.py"))
    drawn = write_set(tmp_path, "exam", distinct_scenes(1, seed=0), seed=0)
    with pytest.raises(UserError, match="the exam ended with status 3"):
        program.sit_exam(tmp_path / "model", drawn, tmp_path)
