"""`transformers.Trainer` for Delta-LLaVA: parts with their own learning rate, drawn budgets, finished checkpoints."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset
from transformers import AutoConfig, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from ..errors import UserError
from .card import model_card
from .checkpoints import (
    OPTIMIZER_BYTES,
    SAVE_ERRORS,
    TRAINER_STATE_FILE,
    UNFINISHED_FOLDER,
    check_disk_space,
    is_no_space,
    move_result,
    one_line,
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
        card (`dict`, *optional*): facts for the model card that the trainer cannot know, see [`model_card`].
        start_folder (`Path`, *optional*): where the model was loaded from; frozen weights that the run holds in
            another dtype are saved as they are there.
    """

    def __init__(
        self,
        *args,
        settings: dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
        start_folder: Path | None = None,
        **kwargs,
    ):
        self.start_folder = start_folder
        self.settings = settings or {}
        self.card = card or {}
        self.train_sampler: TrainingSampler | None = None
        self.skipped: Counter[str] = Counter()
        self._skipped_since_log = 0
        self._tokens = torch.zeros(2, dtype=torch.int64)
        self._staging = False
        super().__init__(*args, **kwargs)
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
                groups += [{**group, "params": rest}, {**group, "params": projector, "lr": rate}]
            optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    # ---- batches ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        reasons = inputs.pop(SKIPPED_KEY, [])
        for reason in reasons:
            if reason not in self.skipped:
                logger.warning("left out: %s", reason)
            self.skipped[reason] += 1
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
            if self.args.projector_learning_rate is not None and self.lr_scheduler is not None:
                logs["projector_learning_rate"] = max(
                    group["lr"] for group in self.optimizer.param_groups if self._is_projector_group(group)
                )
            self._skipped_since_log = 0
            self._tokens.zero_()
        super().log(logs, *args, **kwargs)

    def _is_projector_group(self, group: dict[str, Any]) -> bool:
        return group.get("initial_lr", group["lr"]) == self.args.projector_learning_rate

    # ---- saving ----

    def begin_run(self) -> None:
        """Checks disk space and writes, reads back and removes one checkpoint, before the first step."""
        if not self.args.trial_save:
            return
        output_dir = Path(self.args.output_dir)
        if self.args.should_save:
            remove_unfinished(output_dir)
            parameters = list(self.model.parameters())
            check_disk_space(
                output_dir,
                weights=sum(number_of_elements(item) * item.element_size() for item in parameters),
                optimizer=0
                if self.args.save_only_model or self.args.save_strategy == "no"
                else OPTIMIZER_BYTES * sum(number_of_elements(item) for item in parameters if item.requires_grad),
                keeps_old=self.args.save_total_limit != 0,
            )
        trial = output_dir / UNFINISHED_FOLDER / "trial"
        try:
            self.save_model(str(trial), _internal_call=True)
        except (*SAVE_ERRORS, ValueError, TypeError) as error:
            raise UserError(f"output_dir: a trial save to {output_dir} failed ({one_line(error)})") from error
        self._wait()
        if self.args.should_save:
            if trial.is_dir():  # FSDP with sharded checkpoints has nothing to save for the Hub
                AutoConfig.from_pretrained(str(trial), trust_remote_code=False)
            remove_unfinished(output_dir)
            logger.info("A trial save to %s succeeded.", output_dir)

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
        super().save_model(str(written), _internal_call=True)
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
        if self.args.should_save:
            best = final_dir / f"checkpoint-{self.state.best_global_step}"
            if best.name == name or best.is_dir():
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(unfinished / TRAINER_STATE_FILE))
            if (final_dir / name).exists():
                os.replace(final_dir / name, final_dir / UNFINISHED_FOLDER / "replaced")
            os.replace(unfinished, final_dir / name)
            remove_unfinished(final_dir)
        self._wait()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(final_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.start_folder is not None and self.args.should_save and state_dict != {}:
            state_dict = with_stored_weights(state_dict or self.model.state_dict(), self.model, self.start_folder)
        super()._save(str(folder), state_dict=state_dict)
        if self.args.should_save:
            if not (folder / "config.json").is_file():
                self.model.config.save_pretrained(folder)
            write_settings(folder, self.settings)
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        text = model_card(
            self.card, self.state, self.args, self.model.config, count_parts(self.model), is_lora=self._is_lora()
        )
        (folder / "README.md").write_text(text, encoding="utf-8")

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
