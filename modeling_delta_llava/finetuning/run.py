"""One training run, from its arguments to the saved folder."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from delta_llava.errors import UserError, reason
from delta_llava.redaction import ScrubbedRecords

from ..building import check_budgets
from ..folders import check_output_folder
from ..hub import call, hub_api
from ..sources import local_folder
from .arguments import DeltaLlavaTrainingArguments, ModelArguments, RunArguments, load_arguments
from .check_data import check_data
from .checkpoints import (
    COMPLETE_FOLDER,
    ENTRY_FILES,
    SAVE_ERRORS,
    SETTINGS_FILE,
    UNFINISHED_FOLDER,
    check_rows_of_run,
    checkpoint_to_resume,
    is_no_space,
    write_settings,
)
from .collator import DeltaLlavaCollator, collator_of
from .data import check_rows, load_rows
from .metrics import load_metric
from .parts import set_trained, with_lora
from .start import (
    BASE_FOLDER,
    built_whole,
    check_default_budget,
    compose,
    load_model,
    place_adapter,
    read_start,
)
from .trainer import DeltaLlavaTrainer

logger = logging.getLogger(__name__)
# One object, which a handler takes once.
SCRUBBED = ScrubbedRecords()


def finetune(config: str, overrides: list[str] | None = None) -> Path | None:
    """Trains as a YAML file and `--key value` overrides say; the work behind `delta-llava finetune`.

    Args:
        config: path of a YAML file, or the name of a packaged recipe.
        overrides: arguments such as `["--learning_rate", "2e-5"]`.
    Returns:
        The folder with the trained model; None after `--check_data`, and in processes beside the main one.
    Raises:
        UserError: anything the user can mend, before the first step wherever it can be known then.
    """
    return run(load_arguments(config, overrides or []))


def run(arguments: RunArguments) -> Path | None:
    """[`finetune`] for arguments that are already built."""
    set_up_logging(arguments)
    try:
        if arguments.check_data:
            print(check_data(arguments))
            return None
        trainer, checkpoint = prepare(arguments)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        trainer.save_state()
        trainer.save_model()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on the device ({reason(error)}); lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps likewise), or set gradient_checkpointing: true"
        ) from error
    except SAVE_ERRORS as error:
        if not is_no_space(error):
            raise
        raise UserError(
            f"no space left while saving to {arguments.training.output_dir} ({reason(error)}); finished "
            "checkpoints are whole: free some space and continue with --resume_from_checkpoint auto"
        ) from error
    except UserError as error:
        # What a worker raises carries its traceback in the message; the last line is the message itself.
        last_line = str(error).strip().split("\n")[-1]
        raise UserError(last_line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")) from error
    skipped = trainer.all_skipped()
    if arguments.training.process_index != 0:
        return None
    if skipped:
        logger.warning("%d rows were left out: %s", len(skipped), "; ".join(sorted(skipped)[:5]))
    return Path(arguments.training.output_dir)


def set_up_logging(arguments: RunArguments) -> None:
    """Logs this package's messages as transformers logs its own: at the run's level; other processes only warn."""
    level = arguments.training.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    package_logger = logging.getLogger(__package__)
    package_logger.setLevel(min(level, logging.INFO) if arguments.training.process_index == 0 else logging.WARNING)
    if not package_logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package_logger.addHandler(handler)
        package_logger.propagate = False
    for name in (__package__, "transformers", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(SCRUBBED)


def model_folder(arguments: RunArguments) -> Path:
    """The Delta-LLaVA folder that the run starts from; composed from its parts, by the main process, if need be."""
    model, training = arguments.model, arguments.training
    if model.model is not None:
        return local_folder(model.model, "--model", model.model_revision)
    folder = Path(training.output_dir) / BASE_FOLDER
    with training.main_process_first(local=False, desc="joining language model and vision tower"):
        if training.process_index == 0:
            with built_whole(training):
                compose(folder, model, arguments.data, seed=training.seed)
    return folder


def open_dataset(
    arguments: RunArguments, collator: DeltaLlavaCollator, num_visual_tokens: int, evaluation: bool = False
) -> tuple[Any, list[str]]:
    """The training (or evaluation) data, its rows checked and its picture files looked for; and what was left out.

    Raises:
        UserError: the file, a row or a picture cannot be used.
    """
    data, training = arguments.data, arguments.training
    if evaluation:
        rows = load_rows(data.eval_data_path, data.eval_split)
    else:
        block_size = training.per_device_train_batch_size * training.world_size
        num_parts = max(1, training.dataloader_num_workers)
        rows = load_rows(data.data_path, data.split, data.streaming, num_parts, block_size)
        if data.streaming:
            return rows, []
    rows, left_out = check_rows(rows, collator, num_visual_tokens, data.look_for_images)
    for message in left_out if training.process_index == 0 else ():
        logger.warning("left out: %s", message)
    return rows, left_out


def holds_run(folder: Path) -> bool:
    """Whether `finetune` made a folder, or a checkpoint or the composed model in it."""
    made = (folder, folder / BASE_FOLDER, folder / UNFINISHED_FOLDER / COMPLETE_FOLDER, *folder.glob("checkpoint-*"))
    return any((place / SETTINGS_FILE).is_file() for place in made)


def check_output_dir(output_dir: Path, model: ModelArguments) -> None:
    """Raises `UserError` unless the folder is empty or holds a run, and is a place for one."""
    for name in ("model", "language_model", "vision_tower"):
        start = Path(getattr(model, name) or "").expanduser()
        if getattr(model, name) and start.is_dir() and output_dir.is_dir() and start.samefile(output_dir):
            raise UserError(f"output_dir: {output_dir} is the {name} to start from; give another --output_dir")
    what = "a model" if any((output_dir / name).is_file() for name in ENTRY_FILES) else "files"
    check_output_folder(
        output_dir, f"output_dir: {output_dir}", f"holds {what} that `finetune` did not write", holds_run(output_dir)
    )


def make_repository(training: DeltaLlavaTrainingArguments) -> None:
    """Makes the repository of a run that uploads, as `Trainer` does when the model is loaded already.

    Raises:
        UserError: it cannot be made or written to, or has no such revision.
    """
    name = training.hub_model_id or Path(training.output_dir).absolute().name
    api, token = hub_api(), training.hub_token

    def make() -> None:
        made = api.create_repo(name, token=token, private=training.hub_private_repo, exist_ok=True)
        if training.hub_revision is not None:
            api.repo_info(made.repo_id, revision=training.hub_revision, token=token)

    call("making the repository", name, make, logger.warning)


def prepare(arguments: RunArguments) -> tuple[DeltaLlavaTrainer, Path | None]:
    """Everything before the first step: settings and data checked, model loaded and frozen, trainer built.

    Returns:
        The trainer, and the checkpoint to resume from, if any.
    """
    model_arguments, data, training = arguments.model, arguments.data, arguments.training
    output_dir = Path(training.output_dir)
    check_output_dir(output_dir, model_arguments)
    checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, output_dir, arguments.settings)
    config, processor = read_start(model_arguments, data)
    check_budgets(config, training.visual_token_budgets)
    check_default_budget(config, training.visual_token_budgets)
    collator = collator_of(data, processor, data.data_path, data.image_folder)
    widest = max(training.visual_token_budgets or [processor.num_visual_tokens])
    train_dataset, left_out = open_dataset(arguments, collator, widest)
    if not data.streaming:
        arguments.settings["rows"] = len(train_dataset)
        if checkpoint is not None:
            check_rows_of_run(checkpoint, len(train_dataset))
    eval_dataset, eval_collator, eval_left_out = None, collator, []
    if data.eval_data_path is not None:
        eval_collator = collator_of(data, processor, data.eval_data_path, data.eval_image_folder or data.image_folder)
        eval_dataset, eval_left_out = open_dataset(
            arguments, eval_collator, processor.num_visual_tokens, evaluation=True
        )
    metric = load_metric(training.metric) if training.predict_with_generate else None
    if training.push_to_hub and training.process_index == 0:
        make_repository(training)

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if training.process_index == 0 and not (output_dir / SETTINGS_FILE).is_file():
            write_settings(output_dir, arguments.settings)  # from now on the folder is a run's, also after a kill
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be made ({reason(error)}); give another folder") from None
    folder = model_folder(arguments)
    model = load_model(folder, model_arguments, training)
    set_trained(model, model_arguments)
    if model_arguments.lora_rank:
        transformers.set_seed(training.seed)  # as `Trainer` does, but only after the adapter is drawn
        model = with_lora(model, model_arguments, gradient_checkpointing=bool(training.gradient_checkpointing))
        place_adapter(model, folder, model_arguments)
    callbacks = []
    if training.early_stopping_patience is not None:
        callbacks = [
            transformers.EarlyStoppingCallback(training.early_stopping_patience, training.early_stopping_threshold)
        ]
    trainer = DeltaLlavaTrainer(
        model=model,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        eval_collator=eval_collator,
        processing_class=processor,
        callbacks=callbacks,
        max_length=data.max_length,
        metric=metric,
        left_out=left_out,
        eval_left_out=eval_left_out,
        settings=arguments.settings,
        start_folder=None if model_arguments.lora_rank else folder,
    )
    return trainer, checkpoint
