"""Tiny training folders, made once and copied or linked by the tests that change them; and how a refusal is tested."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from delta_llava.cli import main
from modeling_delta_llava.conversion.convert import convert
from modeling_delta_llava.conversion.source import read_checkpoint
from tests.training_layout import (
    TrainingLayout,
    write_base_model,
    write_json,
    write_lora,
    write_stage1,
    write_stage2,
    write_tower,
)

LAYOUT = TrainingLayout()


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """`stage2` (two shards, tower inside), `tower`, `base`, `stage1`, `lora`: never written to by a test."""
    root = tmp_path_factory.mktemp("sources")
    write_tower(root / "tower", LAYOUT)
    write_stage2(root / "stage2", LAYOUT, tower=root / "tower", shards=2)
    write_base_model(root / "base", LAYOUT)
    write_stage1(root / "stage1", LAYOUT, tower=root / "tower")
    write_lora(root / "lora", LAYOUT, tower=root / "tower")
    return root


@pytest.fixture
def stage2(sources, tmp_path) -> Path:
    """A stage-2 folder of the test's own."""
    return shutil.copytree(sources / "stage2", tmp_path / "stage2")


@pytest.fixture(scope="session")
def converted(sources, tmp_path_factory) -> Path:
    """The Hub folder of `stage2`: never written to by a test."""
    folder = tmp_path_factory.mktemp("converted") / "hub"
    convert(str(sources / "stage2"), folder, progress=False)
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `delta-llava convert SOURCE OUTPUT ...` and returns its one line of error, after checking what was left."""

    def run(source, *arguments: str, output: Path | None = None, command: str = "convert") -> str:
        output = output or tmp_path / "output"
        existed = output.exists()
        before = sorted(path for path in tmp_path.rglob("*"))
        status = main([command, str(source), str(output), "--no-progress", *arguments])
        lines = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith(("found", "reading", "note"))
        ]
        assert status == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert output.exists() == existed
        assert sorted(path for path in tmp_path.rglob("*")) == before, "something was left behind"
        return lines[0]

    return run


def change_json(path: Path, **changes) -> None:
    """Sets fields of a JSON file; None takes one out."""
    value = json.loads(path.read_text())
    for key, change in changes.items():
        if change is None:
            value.pop(key)
        else:
            value[key] = change
    write_json(path, value)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's checkpoint, by key."""
    return {key: tensor.clone() for key, tensor in read_checkpoint(folder).tensors.items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
