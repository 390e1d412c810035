"""verify: passes what convert wrote, and finds every single change."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from delta_llava.cli import main
from modeling_delta_llava.conversion.assemble import Options
from modeling_delta_llava.conversion.convert import convert
from modeling_delta_llava.conversion.verify import passed, verify
from tests.conversion.conftest import LAYOUT
from tests.training_layout import write_json, write_stage2

Q_WEIGHT = "model.multi_modal_projector.query_projection.base.weight"


@pytest.fixture
def hub(converted, tmp_path) -> Path:
    return shutil.copytree(converted, tmp_path / "hub")


def failures(folder: Path, against: Path | None = None, **options) -> dict[str, str]:
    checks = verify(folder, None if against is None else str(against), progress=False, **options)
    return {check.name: check.detail for check in checks if check.passed is False}


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_every_check_passes_on_a_fresh_folder(converted, sources, capsys):
    assert main(["verify", str(converted), "--against", str(sources / "stage2"), "--no-progress"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [
        "files",
        "config",
        "code",
        "generation config",
        "processor",
        "tensor names and shapes",
        "finite values",
        "tensors of the source",
        "numbers",
    ]
    assert {row[1] for row in rows} == {"ok"}


def test_a_failed_check_is_the_exit_status(hub, capsys):
    (hub / "chat_template.jinja").unlink()
    assert main(["verify", str(hub), "--no-progress"]) == 1
    assert "files\tFAILED\tchat_template.jinja missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: (folder / "processor_config.json").unlink(), "files"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "processor"),
        (lambda folder: (folder / "modeling_delta_llava.py").write_text("x = 1"), "code"),
        (lambda folder: (folder / "configuration_delta_llava.py").unlink(), "code"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "tensor names and shapes"),
        (lambda folder: (folder / "chat_template.jinja").write_text("no picture"), "processor"),
    ],
)
def test_damaged_files(hub, change, name):
    change(hub)
    assert name in failures(hub)


@pytest.mark.parametrize(
    ("file", "changes", "name"),
    [
        ("config.json", {"auto_map": {}}, "config"),
        ("config.json", {"num_visual_tokens": 5}, "config"),
        ("config.json", {"model_type": "llama"}, "config"),
        ("config.json", {"num_visual_tokens": 16}, "processor"),
        ("generation_config.json", {"temperature": 0.2, "do_sample": False}, "generation config"),
        ("generation_config.json", {"suppress_tokens": None}, "generation config"),
        ("processor_config.json", {"num_visual_tokens": 1}, "processor"),
    ],
)
def test_changed_settings(hub, file, changes, name):
    write_json(hub / file, json.loads((hub / file).read_text()) | changes)
    assert name in failures(hub)


@pytest.mark.parametrize("position", [5, 9000, -1])
def test_one_changed_bit_is_found(hub, sources, position):
    def flip(tensors):
        tensors[Q_WEIGHT].view(-1).view(torch.int32)[position] ^= 1

    change_tensors(hub, flip)
    assert failures(hub) == {}
    assert failures(hub, sources / "stage2") == {
        "tensors of the source": f"1 of 205 tensors differ, first {Q_WEIGHT!r}"
    }


def test_missing_and_renamed_tensors(hub):
    def rename(tensors):
        tensors[Q_WEIGHT + "s"] = tensors.pop(Q_WEIGHT)

    change_tensors(hub, rename)
    assert "tensor names and shapes" in failures(hub)


def test_nan_is_found(hub):
    def poison(tensors):
        tensors[Q_WEIGHT][3, 4] = float("nan")

    change_tensors(hub, poison)
    assert failures(hub)["finite values"] == f"1 tensors with NaN or infinity, first {Q_WEIGHT!r} (1 values)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors["lm_head.weight"].__setitem__(-1, 1e4), "new vocabulary rows has the largest logit"),
        (lambda tensors: tensors["model.language_model.norm.weight"].mul_(1e38), "the logits are not finite"),
        (lambda tensors: tensors["model.multi_modal_projector.linear_2.weight"].mul_(3e38), "visual tokens are not"),
    ],
)
def test_the_models_own_numbers(hub, change, message):
    """Finite weights with which the model computes nonsense."""
    change_tensors(hub, change)
    assert message in failures(hub)["numbers"]
    assert failures(hub, numbers=False) == {}


def test_another_source_is_told_apart(converted, tmp_path):
    write_stage2(tmp_path / "other", LAYOUT, seed=7)
    assert "tensors of the source" in failures(converted, tmp_path / "other")


def test_a_merged_lora_is_compared_with_its_parts(sources, tmp_path):
    options = Options(base_model=str(sources / "base"))
    convert(str(sources / "lora"), tmp_path / "hub", options, progress=False)
    assert failures(tmp_path / "hub", sources / "lora", options=options) == {}

    def undo(tensors):
        tensors["model.language_model.layers.0.self_attn.q_proj.weight"] *= 1.001

    change_tensors(tmp_path / "hub", undo)
    assert "tensors of the source" in failures(tmp_path / "hub", sources / "lora", options=options)


def test_numbers_are_skipped_without_memory(converted, sources, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    checks = verify(converted, str(sources / "stage2"), progress=False)
    assert passed(checks)
    assert checks[-1].passed is None
    assert "1.0 kB free" in checks[-1].detail
