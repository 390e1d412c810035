"""Tiny training folders, made once and copied or linked by the tests that change them."""

import shutil
from pathlib import Path

import pytest
import torch

from modeling_delta_llava.conversion.checkpoints import read_checkpoint
from modeling_delta_llava.conversion.streams import TensorStream
from tests.training_layout import (
    TrainingLayout,
    write_base_model,
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


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's checkpoint, by key."""
    with TensorStream(scan=False) as stream:
        return {key: stream.load(stored) for key, stored in read_checkpoint(folder).tensors.items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
