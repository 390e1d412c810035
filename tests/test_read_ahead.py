"""read_ahead: reads what fits, and never stands in the way of the command that follows."""

import os
import threading
from types import SimpleNamespace

import psutil
import pytest

from delta_llava import read_ahead as module


@pytest.fixture
def read(monkeypatch):
    """Calls read_ahead, waits for its thread, and gives the names of the files that were read."""
    names = []
    whole = module._read

    def note(files):
        whole(files)
        names.extend(path.name for path in files)

    def call(folder):
        before = set(threading.enumerate())
        monkeypatch.setattr(module, "_read", note)
        module.read_ahead(str(folder))
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()
        return names

    return call


def test_weight_files_are_read(read, tmp_path):
    for name in ("model-2.safetensors", "model-1.safetensors", "mm_projector.bin", "config.json"):
        (tmp_path / name).write_bytes(bytes(3 * module.BLOCK_BYTES // 2))
    assert read(tmp_path) == ["model-1.safetensors", "model-2.safetensors"]


def test_nothing_is_read_that_does_not_fit(read, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert read(tmp_path) == []


def test_what_cannot_be_read_is_left_to_the_command(read, tmp_path):
    assert read("someone/model") == read(tmp_path / "missing") == read("a" * 5000) == []
    (tmp_path / "model-1.bin").symlink_to("model-1.bin")
    (tmp_path / "model-2.bin").mkdir()
    os.mkfifo(tmp_path / "model-3.bin")
    assert read(tmp_path) == []
    (tmp_path / "model-4.bin").write_bytes(b"weights")
    assert read(tmp_path) == ["model-4.bin"]
