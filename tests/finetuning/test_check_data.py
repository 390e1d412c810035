"""What `--check-data` foretells."""

import json

import pytest

from modeling_delta_llava.finetuning.check_data import check_data, weight_bytes
from modeling_delta_llava.finetuning.run import prepare
from modeling_delta_llava.finetuning.start import read_start

LORA = {"train_language_model": False, "lora_rank": 16}
# Gradient and two moments in fp32 beside each trained weight.
BESIDE = 4 + 8


@pytest.mark.parametrize(
    "changes",
    [
        {"train_language_model": False},
        {"train_language_model": True, "train_vision_tower": True},
        LORA,
        {**LORA, "train_projector": False},
        {**LORA, "quantization": "4bit"},
        {**LORA, "quantization": "8bit"},
    ],
    ids=["stage 1", "everything", "LoRA", "LoRA alone", "4 bit", "8 bit"],
)
def test_weights_take_what_was_foretold(arguments, changes):
    """Compared with the weights of the trainer's own model, byte by byte."""
    run = arguments(**changes)
    if run.model.quantization != "none":
        pytest.importorskip("bitsandbytes")
    config, _ = read_start(run.model, run.data)
    trainer, _ = prepare(run)
    taken = sum(
        weight.numel() * (weight.element_size() + BESIDE * weight.requires_grad)
        for name, weight in trainer.model.named_parameters()
        if ".original_module." not in name
    )
    assert weight_bytes(config, run.model, bf16=False) == taken


def test_bf16_halves_what_is_frozen(arguments):
    run = arguments(**LORA)
    config, _ = read_start(run.model, run.data)
    model = prepare(run)[0].model
    frozen = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if not weight.requires_grad and ".original_module." not in name
    )
    whole, half = (weight_bytes(config, run.model, bf16) for bf16 in (False, True))
    assert whole - half == 2 * frozen


def test_rows_that_cannot_be_read_or_shown_are_counted(arguments, tmp_path):
    turns = [{"from": role, "value": "Hi."} for role in ("system", "human", "gpt")]
    rows = [{"conversations": turns}, {"conversations": turns[1:]}]
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "{oops"]))
    settings = {"data_path": str(tmp_path / "rows.jsonl"), "max_steps": 1}
    assert "malformed rows                   2" in check_data(arguments(**settings, format="plain"))
    streamed = check_data(arguments(**settings, format="plain", streaming=True))
    assert "rows.jsonl: line 1 (row 0): the chat template cannot show this conversation" in streamed
    assert "malformed rows                   1" in check_data(arguments(**settings))
