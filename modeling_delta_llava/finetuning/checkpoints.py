"""Checkpoints that are either finished or not there, and the identity of the run that wrote them."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.trainer_utils import get_last_checkpoint

from delta_llava.errors import UserError

from ..json_files import ADAPTED_CONFIG, ADAPTER_CONFIG

# Leading underscores: `Trainer.push_to_hub` leaves such files out, and no checkpoint search finds them.
UNFINISHED_FOLDER = "_unfinished"
# Inside it: a result that is whole and only has to be moved.
COMPLETE_FOLDER = "complete"
SETTINGS_FILE = "_finetuning.yaml"
TRAINER_STATE_FILE = "trainer_state.json"
TRAINING_ARGS_FILE = "training_args.bin"
# Without these no library loads a folder.
ENTRY_FILES = ("config.json", "adapter_config.json")
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# What a checkpoint has beyond its Hub files.
RESUME_FILES = (
    *(TRAINER_STATE_FILE, TRAINING_ARGS_FILE, "optimizer*", "scheduler*", "scaler*", "rng_state*"),
    *("global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),
)
# What a run must keep when it is resumed: settings that decide which weights and which data a checkpoint stands for.
IDENTITY = (
    *("model", "language_model", "vision_tower", "train_projector", "train_language_model", "train_vision_tower"),
    *("projector", "num_visual_tokens", "visual_token_budgets", "visual_token_budget_weights"),
    *("lora_rank", "lora_alpha", "lora_target_modules", "quantization"),
    *("data_path", "split", "image_folder", "streaming", "format", "max_length", "image_aspect_ratio"),
    *("train_sampling_strategy", "seed", "data_seed"),
)
# Rows of one optimizer step over all devices: decides the order of the rows, however it is split.
TOTAL_BATCH_SIZE = "total_batch_size"
# Whether the projector was given a learning rate, which may split the optimizer's parameter groups. The rate itself
# comes with the optimizer's state.
PROJECTOR_GROUP = "projector_learning_rate_given"
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


def run_identity(model: Any, data: Any, training: Any) -> dict[str, Any]:
    """What tells a run from others: the values of `IDENTITY`, defaults included, the rows of one step, and whether the
    projector has a learning rate of its own.

    Args:
        model, data, training: the run's arguments, as dataclasses.
    """
    values = {**vars(model), **vars(data), **vars(training)}
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    identity = {name: values[name] for name in IDENTITY}
    if data.streaming:  # how many read it decides the order of a stream of several files
        identity["dataloader_num_workers"] = training.dataloader_num_workers
    return identity | {TOTAL_BATCH_SIZE: rows, PROJECTOR_GROUP: training.projector_learning_rate is not None}


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Stores the settings of a run in a folder, to be compared when it is resumed; they hold no token."""
    # Renamed when it is whole: a folder that holds the file is taken for a run's.
    written = folder / f"{SETTINGS_FILE}.unfinished"
    written.write_text(yaml.safe_dump(settings, sort_keys=True, allow_unicode=True), encoding="utf-8")
    os.replace(written, folder / SETTINGS_FILE)


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
        settings: the run's settings, with its [`run_identity`].
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
    """Raises `UserError` when a checkpoint was written by a run with another [`run_identity`]."""
    if not (checkpoint / SETTINGS_FILE).is_file():
        raise UserError(
            f"{checkpoint}: no {SETTINGS_FILE}, so this is no checkpoint of `finetune`; give another folder"
        )
    stored = read_stored_settings(checkpoint)
    if stored.get("save_only_model"):
        raise UserError(
            f"{checkpoint} was saved with save_only_model, so without what a run goes on from; start anew with it as "
            "--model, and another --output_dir"
        )
    names = [name for name in (*IDENTITY, TOTAL_BATCH_SIZE, PROJECTOR_GROUP) if name in stored]
    names += ["dataloader_num_workers"] if settings.get("streaming") else []
    different = [name for name in names if stored[name] != settings.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{checkpoint} belongs to another run: {', '.join(different)} differ ({name} was {stored.get(name)!r}, "
            f"now {settings.get(name)!r}); give another --output_dir, or the settings of that run"
        )


def check_rows_of_run(checkpoint: Path, rows: int) -> None:
    """Raises `UserError` when a checkpoint's run had another number of rows, and so another order of them."""
    had = read_stored_settings(checkpoint).get("rows", rows)
    if had != rows:
        raise UserError(
            f"{checkpoint} belongs to a run of {had:,} rows, and the data now has {rows:,}; give the rows of that "
            "run, or another --output_dir"
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
    """Moves a finished result, a folder in `folder / UNFINISHED_FOLDER`, into `folder`, in place of an earlier one."""
    os.replace(written, written.with_name(COMPLETE_FOLDER))
    finish_move(folder)


def finish_move(folder: Path) -> None:
    """What is left of a [`move_result`]: all of it, the rest after a process was killed, or nothing.

    The configs go first and come last: until the move is finished the folder loads nowhere, rather than with files of
    two results.
    """
    complete = folder / UNFINISHED_FOLDER / COMPLETE_FOLDER
    moving = complete.with_name("moving")
    if complete.is_dir():
        for name in ENTRY_FILES:
            (folder / name).unlink(missing_ok=True)
        for path in (path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
            path.unlink()
        os.replace(complete, moving)
    if moving.is_dir():
        for path in sorted(moving.iterdir(), key=lambda path: path.name in ENTRY_FILES):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
        moving.rmdir()


def copy_hub_files(checkpoint: Path, folder: Path) -> None:
    """Copies what a finished checkpoint has for the Hub; weights, which nobody changes in place, as hard links."""

    def link_or_copy(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            with suppress(OSError):  # a disk without links
                os.link(source, target)
                return
        shutil.copy2(source, target)

    shutil.copytree(checkpoint, folder, copy_function=link_or_copy, ignore=shutil.ignore_patterns(*RESUME_FILES))


def remove_unfinished(output_dir: Path) -> None:
    """Removes what an interrupted save left behind."""
    shutil.rmtree(output_dir / UNFINISHED_FOLDER, ignore_errors=True)


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises `UserError` when the disk of `folder`, which must exist, has not the `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir: {folder} has {free / 1e9:.1f} GB free, but this run's saves need {needed / 1e9:.1f} GB; "
            "free some space, or give an --output_dir on another disk"
        )


def check_readable(folder: Path) -> None:
    """Opens the config and the headers of the weights in a saved folder.

    Raises:
        OSError, SafetensorError, ValueError: one of them is missing or damaged.
    """
    name = ADAPTED_CONFIG if (folder / ADAPTER_CONFIG).is_file() else "config.json"
    AutoConfig.from_pretrained(str(folder / name), trust_remote_code=False)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt"):
            pass


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(words in str(error).lower() for words in NO_SPACE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
