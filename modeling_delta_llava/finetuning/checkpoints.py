"""Checkpoints that are either finished or not there, and the identity of the run that wrote them."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from ..errors import UserError

# Leading underscores: `Trainer.push_to_hub` leaves such files out, and no checkpoint search finds them.
UNFINISHED_FOLDER = "_unfinished"
SETTINGS_FILE = "_finetuning.yaml"
TRAINER_STATE_FILE = "trainer_state.json"
# Without these no library loads a folder.
ENTRY_FILES = ("config.json", "adapter_config.json")
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
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
# What writing files raises: Python itself, safetensors, and torch.save.
SAVE_ERRORS = (OSError, SafetensorError, RuntimeError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SPACE_WORDS = (
    *("no space left", "disk quota", "file too large"),
    # torch.save says no more than this
    *("iostream error", "unexpected pos", "file write failed"),
)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Stores the settings of a run in a folder, to be compared when it is resumed. Secrets are left out."""
    settings = {name: value for name, value in settings.items() if not name.endswith("token")}
    (folder / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=True, allow_unicode=True), encoding="utf-8")


def read_stored_settings(folder: Path) -> dict[str, Any]:
    """What [`write_settings`] stored in a folder."""
    return yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))


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
    if not (checkpoint / SETTINGS_FILE).is_file():
        raise UserError(
            f"{checkpoint}: no {SETTINGS_FILE}, so this is no checkpoint of `finetune`; give another folder"
        )
    stored = read_stored_settings(checkpoint)
    different = [name for name in IDENTITY if stored.get(name) != settings.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{checkpoint} belongs to another run: {', '.join(different)} differ ({name} was {stored.get(name)!r}, "
            f"now {settings.get(name)!r}); give another --output_dir, or the settings of that run"
        )


def with_stored_weights(state: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A model's state with the frozen weights that were rounded on loading as the starting folder stores them.

    Args:
        state: names and tensors of the whole model.
        model: says what is frozen, and which weights are tied.
        folder: Hub folder that the model was loaded from; its tensors are memory-mapped.
    """
    state = dict(state)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad} & state.keys()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in frozen & set(stored.keys()):
                tensor = stored.get_tensor(name)
                if tensor.dtype != state[name].dtype and tensor.shape == state[name].shape:
                    state[name] = tensor
    for target, source in model.all_tied_weights_keys.items():
        if source in frozen and target in state:
            state[target] = state[source]
    return state


def move_result(written: Path, folder: Path) -> None:
    """Moves a finished result into its folder, in place of an earlier one.

    The configs go first and come last: a process that is killed in between leaves a folder that loads nowhere, never
    one with files of two results.
    """
    for name in ENTRY_FILES:
        (folder / name).unlink(missing_ok=True)
    for path in (path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        path.unlink()
    for path in sorted(written.iterdir(), key=lambda path: path.name in ENTRY_FILES):
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        os.replace(path, folder / path.name)


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


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(words in str(error).lower() for words in NO_SPACE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: Exception) -> str:
    """An error's message without line breaks; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
