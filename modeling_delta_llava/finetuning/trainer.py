"""`transformers.Trainer` for Delta-LLaVA: parts with their own learning rate, drawn budgets, finished checkpoints."""

import copy
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from delta_llava.errors import UserError, reason

from ..card import EXAMPLE, trained_card
from ..json_files import ADAPTED_CONFIG, ADAPTER_CONFIG
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from .arguments import DeltaLlavaTrainingArguments
from .checkpoints import (
    OPTIMIZER_BYTES,
    SAVE_ERRORS,
    TRAINER_STATE_FILE,
    TRAINING_ARGS_FILE,
    UNFINISHED_FOLDER,
    check_disk_space,
    check_readable,
    copy_hub_files,
    finish_move,
    is_no_space,
    last_finished_checkpoint,
    move_result,
    remove_unfinished,
    with_stored_weights,
    write_settings,
)
from .collator import SKIPPED_KEY
from .parts import PROJECTOR, count_parts, describe_parts, number_of_elements, part_of
from .samplers import TrainingSampler, budget_draw

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """Tells the sampler its epoch, and makes the trial save once model and optimizer are set up on every rank."""

    def __init__(self, trainer: "DeltaLlavaTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_run()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate forwards the epoch too, but not to a sampler behind the loader that skips batches on resuming.
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch + 1e-6))


class DeltaLlavaTrainer(Trainer):
    """Trains a `DeltaLlavaForConditionalGeneration`.

    Beside [`~transformers.Trainer`]:
    - the projector has its own learning rate (`args.projector_learning_rate`);
    - rows are grouped by modality and length (`args.group_by_modality_length`), and a visual-token budget is drawn
      for each optimizer step (`args.visual_token_budgets`), alike on every rank;
    - a checkpoint folder appears under its name only when it is complete;
    - every saved folder has a model card and the run's settings;
    - rows that the collator left out are counted and reported.

    Args:
        settings (`dict`, *optional*): the run's settings, stored with every checkpoint.
        card (`dict`, *optional*): facts for the model card that the trainer cannot know, see [`trained_card`].
        start_folder (`Path`, *optional*): where the model was loaded from; frozen weights that the run holds in
            another dtype are saved as they are there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: DeltaLlavaTrainingArguments,
        *others,
        settings: dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
        start_folder: Path | None = None,
        **kwargs,
    ):
        # `Trainer` and its loggers write the arguments down in many places, so they hold no token.
        self.hub_token = args.hub_token
        args = copy.copy(args)
        args.hub_token = None
        self.start_folder = start_folder
        self.settings = settings or {}
        self.card = card or {}
        self.train_sampler: TrainingSampler | None = None
        self.skipped: Counter[str] = Counter()
        self._skipped_since_log = 0
        self._tokens = torch.zeros(2, dtype=torch.int64)
        self._staging = False
        super().__init__(model, args, *others, **kwargs)
        if self.args.n_gpu > 1:
            raise UserError(
                f"{self.args.n_gpu} GPUs are visible to one process; start with `accelerate launch` or `torchrun`, or "
                "set CUDA_VISIBLE_DEVICES to one of them"
            )
        self.add_callback(RunCallback(self))
        budgets = self.args.visual_token_budgets
        config = self.model.config
        config.trained_num_visual_tokens = sorted(budgets, reverse=True) if budgets else [config.num_visual_tokens]
        logger.info("Trained and frozen parameters:\n%s", describe_parts(count_parts(self.model)))

    # ---- order, budgets, optimizer ----

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, IterableDataset):
            return None
        self.train_sampler = TrainingSampler(
            len(dataset),
            batch_size=self._train_batch_size,
            world_size=self.args.world_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            lengths=dataset.modality_lengths() if self.args.group_by_modality_length else None,
            draw_budget=budget_draw(self.args),
            shuffle=self.args.train_sampling_strategy != "sequential",
        )
        return self.train_sampler

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.projector_learning_rate
        if created and rate is not None:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            groups = []
            for group in optimizer.param_groups:
                projector = [item for item in group["params"] if part_of(names.get(id(item), "")) == PROJECTOR]
                chosen = {id(item) for item in projector}
                rest = [item for item in group["params"] if id(item) not in chosen]
                groups += [{**group, "params": rest}, {**group, "params": projector, "lr": rate, "part": PROJECTOR}]
            optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    # ---- batches ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        reasons = inputs.pop(SKIPPED_KEY, [])
        for problem in reasons:
            if problem not in self.skipped:
                logger.warning("left out: %s", problem)
            self.skipped[problem] += 1
        self._skipped_since_log += len(reasons)
        if self.model.training and "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            self._tokens = self._tokens.to(mask.device)
            self._tokens[0] += mask.sum()
            self._tokens[1] += mask.numel()
        return super()._prepare_inputs(inputs)

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if torch.is_tensor(num_items):
            # A step in which every row was left out has no labels; its loss is 0 / 1, not 0 / 0.
            num_items = num_items.clamp(min=1)
        return batches, num_items

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            counts = torch.tensor([self._skipped_since_log, *self._tokens.tolist()], dtype=torch.int64)
            if self.args.world_size > 1:
                counts = counts.to(self.args.device)
                dist.all_reduce(counts)
            skipped, tokens, places = counts.tolist()
            if skipped:
                logs["skipped_rows"] = skipped
            if places:
                logs["padding_share"] = round(1 - tokens / places, 4)
            rates = [group["lr"] for group in self.optimizer.param_groups if group.get("part") == PROJECTOR]
            if rates:
                logs["projector_learning_rate"] = rates[0]
            self._skipped_since_log = 0
            self._tokens.zero_()
        super().log(logs, *args, **kwargs)

    def all_skipped(self) -> Counter[str]:
        """Why rows were left out and how often, on all ranks together; every rank must call it."""
        counters = [self.skipped]
        if self.args.world_size > 1:
            counters = [None] * self.args.world_size
            dist.all_gather_object(counters, self.skipped)
        return sum(counters, Counter())

    # ---- steps ----

    def _run_epoch(self, *args, **kwargs) -> None:
        """As `Trainer`'s, but a resumed run that has all its steps takes none; `Trainer` looks only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- saving ----

    def begin_run(self) -> None:
        """Ends the move of a result that a killed process left; then checks disk space, and makes a trial save.

        The trial save is opened (config and headers of the weights) and removed again.
        """
        # With checkpointing, transformers has the output of every embedding require gradients, the patch embedding's
        # too: the frozen tower would be run again and backwards for nothing. Only reentrant checkpointing needs that.
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        if not any((getattr(self.args, name, None) or {}).get("use_reentrant") for name in names):
            self.model.disable_input_require_grads()
        output_dir = Path(self.args.output_dir)
        if self.args.should_save:
            finish_move(output_dir)
            remove_unfinished(output_dir)
            (output_dir / TRAINING_ARGS_FILE).unlink(missing_ok=True)  # of another version of this package
        if not self.args.trial_save:
            return
        if self.args.should_save:
            check_disk_space(output_dir, self._bytes_to_save(output_dir))
        trial = output_dir / UNFINISHED_FOLDER / "trial"
        try:
            self.save_model(str(trial), _internal_call=True)
            self._wait()
            if self.args.should_save and trial.is_dir():  # sharded FSDP checkpoints have nothing for the Hub
                check_readable(trial)
        except (*SAVE_ERRORS, ValueError, TypeError) as error:
            raise UserError(f"output_dir: a trial save to {output_dir} failed ({reason(error)})") from error
        if self.args.should_save:
            remove_unfinished(output_dir)
            logger.info("A trial save to %s succeeded.", output_dir)

    def _bytes_to_save(self, output_dir: Path) -> int:
        """Bytes that the disk must still hold at once: the result, or two checkpoints less one that lies there."""
        trained = [item for item in self.model.parameters() if item.requires_grad]
        saved = trained if self._is_lora() else self.model.parameters()
        weights = sum(number_of_elements(item) * item.element_size() for item in saved)
        if self.args.save_strategy == "no":
            return weights
        optimizer = 0 if self.args.save_only_model else OPTIMIZER_BYTES * sum(map(number_of_elements, trained))
        return (weights + optimizer) * (1 if last_finished_checkpoint(output_dir) else 2)

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED_FOLDER) if self._staging else folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; the run's own folder changes only when everything is written."""
        run_folder = Path(self.args.output_dir)
        if output_dir is not None and Path(output_dir) != run_folder:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        written = run_folder / UNFINISHED_FOLDER / "result"
        try:
            super().save_model(str(written), _internal_call=True)
        except SAVE_ERRORS:
            if self.args.should_save:
                remove_unfinished(run_folder)
            raise
        self._wait()
        if self.args.should_save and written.is_dir():  # FSDP with sharded checkpoints has nothing to save for the Hub
            move_result(written, run_folder)
            remove_unfinished(run_folder)
        self._wait()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial) -> None:
        final_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        except SAVE_ERRORS as error:
            if not is_no_space(error):
                raise
            if self.args.should_save:
                remove_unfinished(final_dir)
            raise UserError(
                f"no space left in {final_dir} for the checkpoint of step {self.state.global_step}; earlier "
                "checkpoints are whole: free some space and continue with --resume_from_checkpoint true"
            ) from error
        finally:
            self._staging = False
            self.args.save_total_limit = limit
        self._wait()
        unfinished = final_dir / UNFINISHED_FOLDER / name
        best = final_dir / f"checkpoint-{self.state.best_global_step}"
        if best.name == name or best.is_dir():
            self.state.best_model_checkpoint = str(best)  # on every rank: each loads the best weights itself
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_FILE))
        if self.args.should_save:
            if (final_dir / name).exists():
                os.replace(final_dir / name, final_dir / UNFINISHED_FOLDER / "replaced")
            os.replace(unfinished, final_dir / name)
            remove_unfinished(final_dir)
        self._wait()
        if self.args.push_to_hub:
            self._push_checkpoint(final_dir / name)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(final_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def init_hf_repo(self, token: str | None = None, **kwargs) -> None:
        super().init_hf_repo(token=token or self.hub_token, **kwargs)

    def push_to_hub(self, *args, token: str | None = None, **kwargs):
        return super().push_to_hub(*args, token=token or self.hub_token, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `Trainer` calls this while the checkpoint is still being written."""

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Puts the Hub files of a finished checkpoint into the run's folder and uploads them in the background.

        `Trainer` would copy the weights without the model's code, and file by file.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self._finish_current_push()  # it reads the files that are replaced now
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        run_folder = Path(self.args.output_dir)
        written = run_folder / UNFINISHED_FOLDER / "result"
        copy_hub_files(checkpoint, written)
        move_result(written, run_folder)
        remove_unfinished(run_folder)
        common = {"token": self.hub_token, "revision": self.args.hub_revision, "run_as_future": True}
        message = f"Training in progress, step {self.state.global_step}"
        uploads = [{"folder_path": run_folder, "commit_message": message, "ignore_patterns": ["_*", "checkpoint-*"]}]
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            name = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            uploads.append(
                {"folder_path": checkpoint, "path_in_repo": name, "commit_message": f"{message}, checkpoint"}
            )
        self.push_in_progress = PushInProgress(
            [huggingface_hub.upload_folder(repo_id=self.hub_model_id, **upload, **common) for upload in uploads]
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.start_folder is not None and self.args.should_save and state_dict != {}:
            state_dict = with_stored_weights(state_dict or self.model.state_dict(), self.model, self.start_folder)
        if isinstance(self.model, FSDPModule):
            # FSDP2 derives a class in a module of torch, whose files would be saved in place of the model's code.
            type(self.model).__module__ = DeltaLlavaForConditionalGeneration.__module__
        super()._save(str(folder), state_dict=state_dict)
        if self.args.should_save:
            # A pickle of every argument, with this machine's paths and name. `write_settings` stores what can be read.
            (folder / TRAINING_ARGS_FILE).unlink(missing_ok=True)
            if (folder / ADAPTER_CONFIG).is_file():
                # For `convert`, which merges into the weights as they were before quantisation, and for another run.
                config = copy.deepcopy(self.model.config)
                vars(config).pop("quantization_config", None)
                config.to_json_file(folder / ADAPTED_CONFIG)
            write_settings(folder, self.settings)
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        parts = [(count.part, count.trained, count.frozen) for count in count_parts(self.model)]
        card = trained_card(self.card, self.state, self.args, self.model.config, parts, is_adapter=self._is_lora())
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        if not self._is_lora():
            shutil.copyfile(EXAMPLE, folder / EXAMPLE.name)

    def _is_lora(self) -> bool:
        return type(self.model).__name__.startswith("Peft")

    def create_model_card(self, *args, **kwargs) -> None:
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.model.all_tied_weights_keys)
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            names = [*missing, *load_result.unexpected_keys]
            raise UserError(f"the checkpoint does not fit this model: {len(names)} weights differ, such as {names[0]}")
