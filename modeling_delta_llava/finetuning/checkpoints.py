"""Checkpoints that are either finished or not there, and the identity of the run that wrote them."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

from ..errors import UserError

# Leading underscores: `Trainer.push_to_hub` leaves such files out, and no checkpoint search finds them.
UNFINISHED_FOLDER = "_unfinished"
SETTINGS_FILE = "_finetuning.yaml"
TRAINER_STATE_FILE = "trainer_state.json"
# What a run must keep when it is resumed: settings that decide which weights and which data a checkpoint stands for.
IDENTITY = (
    "model",
    "language_model",
    "vision_tower",
    "train_projector",
    "train_language_model",
    "train_vision_tower",
    "projector",
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
    "quantization",
    "data_path",
    "split",
    "format",
    "seed",
)
# Bytes per weight beside the weight itself that AdamW keeps of what is trained: two moments in fp32.
OPTIMIZER_BYTES = 8


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Stores the settings of a run in a folder, to be compared when it is resumed. Secrets are left out."""
    settings = {name: value for name, value in settings.items() if not name.endswith("token")}
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=True, allow_unicode=True), encoding="utf-8")


def last_finished_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run; half-written ones live elsewhere and are never found."""
    if not output_dir.is_dir():
        return None
    found = get_last_checkpoint(str(output_dir))
    return Path(found) if found is not None else None


def checkpoint_to_resume(resume: str | bool | None, output_dir: Path, settings: dict[str, Any]) -> Path | None:
    """Decides what a run resumes from.

    Args:
        resume: `True` for the newest checkpoint, "auto" for the newest if there is one, a folder, or nothing.
        output_dir: the run's folder.
        settings: the run's settings.
    Raises:
        UserError: there is nothing to resume from, the folder holds a run that is not being resumed, or the
            checkpoint was written by another run.
    """
    newest = last_finished_checkpoint(output_dir)
    if resume in (None, False, "", "false", "no"):
        if newest is not None:
            raise UserError(
                f"output_dir: {output_dir} already holds {newest.name} of a run; continue it with "
                "--resume_from_checkpoint true, or give another --output_dir"
            )
        return None
    if resume in (True, "true", "yes", "auto"):
        if newest is None:
            if resume == "auto":
                return None
            raise UserError(
                f"resume_from_checkpoint: {output_dir} holds no finished checkpoint; start without it, or use auto"
            )
        checkpoint = newest
    else:
        checkpoint = Path(str(resume)).expanduser()
        if not (checkpoint / TRAINER_STATE_FILE).is_file():
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} is no finished checkpoint; give a checkpoint-N folder"
            )
    check_identity(checkpoint, settings)
    return checkpoint


def check_identity(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raises `UserError` when a checkpoint was written by a run with another model or other data."""
    file = checkpoint / SETTINGS_FILE
    if not file.is_file():
        raise UserError(
            f"{checkpoint}: no {SETTINGS_FILE}, so this is no checkpoint of `finetune`; give another folder"
        )
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    different = [name for name in IDENTITY if stored.get(name) != settings.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{checkpoint} belongs to another run: {', '.join(different)} differ ({name} was {stored.get(name)!r}, "
            f"now {settings.get(name)!r}); give another --output_dir, or the settings of that run"
        )


def remove_unfinished(output_dir: Path) -> None:
    """Removes what an interrupted save left behind."""
    shutil.rmtree(output_dir / UNFINISHED_FOLDER, ignore_errors=True)


def check_disk_space(folder: Path, weights: int, optimizer: int, keeps_old: bool) -> None:
    """Raises `UserError` when the disk cannot hold one finished checkpoint (and the one it replaces).

    Args:
        folder: where checkpoints go; must exist.
        weights: bytes of the saved weights.
        optimizer: bytes of the saved optimizer state.
        keeps_old: whether the previous checkpoint is still there while the next one is written.
    """
    needed = (weights + optimizer) * (2 if keeps_old else 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir: {folder} has {free / 1e9:.1f} GB free, but checkpoints need {needed / 1e9:.1f} GB; "
            "free some space, or give an --output_dir on another disk"
        )
