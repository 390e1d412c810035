"""What a Trainer's own files in a folder say about the training, for the card of a finetune."""

import json
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}): delete it or restore it") from error
    return data if isinstance(data, dict) else {}


def _number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def training_record(folder: Path) -> list[tuple[str, str]]:
    """(label, value) pairs from trainer_state.json and all_results.json, only of what they hold."""
    state, results = _read(folder / "trainer_state.json"), _read(folder / "all_results.json")
    log = [entry for entry in state.get("log_history") or [] if isinstance(entry, dict)]
    losses = [entry for entry in log if "loss" in entry]
    evaluated = [entry for entry in log if "eval_loss" in entry]
    found = [
        ("optimiser steps", state.get("global_step")),
        ("epochs", state.get("epoch")),
        ("batch size per device", state.get("train_batch_size")),
        ("input tokens seen", state.get("num_input_tokens_seen") or None),
        ("last training loss", losses[-1]["loss"] if losses else None),
        ("mean training loss", results.get("train_loss")),
        ("last evaluation loss", evaluated[-1]["eval_loss"] if evaluated else results.get("eval_loss")),
        ("best metric", state.get("best_metric")),
        ("seconds of training", results.get("train_runtime")),
    ]
    return [(label, text) for label, value in found if (text := _number(value)) is not None]
