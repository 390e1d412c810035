"""`transformers.Trainer` for Delta-LLaVA: parts with their own learning rate, drawn budgets, finished checkpoints."""

import copy
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from delta_llava.errors import UserError, reason

from ..card import EXAMPLE, trained_card
from ..json_files import ADAPTED_CONFIG, ADAPTER_CONFIG
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from .arguments import DeltaLlavaTrainingArguments, best_metric
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
from .collator import ROWS_KEY, at_budget
from .data import LENGTH_COLUMN
from .metrics import scores
from .parts import PROJECTOR, count_parts, describe_parts, number_of_elements, part_of
from .text import IGNORED_LABEL

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """Tells the sampler its epoch, and makes the trial save once model and optimizer are set up on every rank."""

    def __init__(self, trainer: "DeltaLlavaTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_run()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate forwards the epoch too, but not to a sampler behind the loader that skips batches on resuming.
        if self.trainer.grouped_sampler is not None:
            self.trainer.grouped_sampler.epoch = int(state.epoch + 1e-6)


class GroupedSampler(LengthGroupedSampler):
    """Rows of similar length together, in an order of seed and epoch alone: alike on every rank and after resuming."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class DeltaLlavaTrainer(Trainer):
    """Trains a `DeltaLlavaForConditionalGeneration`.

    Beside [`~transformers.Trainer`]:
    - the projector has its own learning rate (`args.projector_learning_rate`);
    - a visual-token budget is drawn for each optimizer step (`args.visual_token_budgets`), alike on every rank;
    - the evaluation loss is the mean over all tokens, whatever the batches, and answers can be generated and compared
      (`args.predict_with_generate`);
    - a checkpoint folder appears under its name only when it is complete;
    - every saved folder has a model card and the run's settings;
    - rows that were left out are counted and reported.

    Args:
        max_length (`int`): tokens after which a row is cut, never inside a picture.
        eval_collator (`Callable`, *optional*): the collator of the evaluation data, when it is another one.
        metric (`Callable`, *optional*): (predictions, references), two lists of texts, to a number or a dict of them.
        left_out, eval_left_out (`Sequence[str]`): rows that are not in the data sets any more, and why.
        settings (`dict`, *optional*): the run's settings, stored with every checkpoint and shown on its card.
        start_folder (`Path`, *optional*): where the model was loaded from; frozen weights that the run holds in
            another dtype are saved as they are there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: DeltaLlavaTrainingArguments,
        *others,
        max_length: int,
        eval_collator: Callable[[list], dict] | None = None,
        metric: Callable[[list[str], list[str]], Any] | None = None,
        left_out: Sequence[str] = (),
        eval_left_out: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        start_folder: Path | None = None,
        **kwargs,
    ):
        # `Trainer` and its loggers write the arguments down in many places, so they hold no token.
        self.hub_token = args.hub_token
        args = copy.copy(args)
        args.hub_token = None
        args.length_column_name = LENGTH_COLUMN
        self.max_length = max_length
        self.eval_collator = eval_collator
        self.metric = metric
        self.start_folder = start_folder
        self.settings = settings or {}
        self.grouped_sampler: GroupedSampler | None = None
        self.skipped: set[str] = set(left_out)
        self.eval_left_out = eval_left_out
        self._told: set[str] = set()
        self._skipped_since_log = 0
        self._tokens = torch.zeros(3, dtype=torch.int64)
        self._staging = False
        super().__init__(
            model,
            args,
            *others,
            # Trainer's own smoothing shifts labels for no class outside transformers.
            compute_loss_func=self.smoothed_loss if args.label_smoothing_factor else None,
            compute_metrics=self.evaluation_figures,
            **kwargs,
        )
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

    # ---- order, budgets, optimizer, loss ----

    @property
    def data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            sampler = self.grouped_sampler = GroupedSampler(step_size, list(sampler.lengths), self.data_seed)
        return sampler

    def budget_of_step(self, step: int) -> int:
        """The visual tokens of each picture in an optimizer step (from 0); equal on every rank and after resuming."""
        if not self.args.visual_token_budgets:
            return self.model.config.num_visual_tokens
        draw = random.Random(f"{self.data_seed} {step}")
        return draw.choices(self.args.visual_token_budgets, self.args.visual_token_budget_weights)[0]

    def smoothed_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Cross entropy of each next token with `args.label_smoothing_factor` of it spread over the vocabulary."""
        targets = labels[:, 1:].flatten()
        total = cross_entropy(
            outputs["logits"][:, :-1].flatten(0, 1).float(),
            targets,
            ignore_index=IGNORED_LABEL,
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        return total / (num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED_LABEL).sum())

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

    def expanded(self, batch: dict[str, Any], num_visual_tokens: int) -> tuple[dict[str, torch.Tensor], list[str]]:
        """A batch of the collator at a visual-token budget, and what is to be said of its rows without a label."""
        batch = dict(batch)
        rows = batch.pop(ROWS_KEY)
        tokenizer = self.processing_class.tokenizer
        batch = at_budget(
            batch, self.processing_class.image_token_id, tokenizer.pad_token_id, num_visual_tokens, self.max_length
        )
        learned = (batch["labels"] != IGNORED_LABEL).any(1).tolist()
        cut = f"nothing to learn within max_length {self.max_length}"
        left_out = [
            f"{place}: {problem or cut}"
            for (place, problem), has_labels in zip(rows, learned, strict=True)
            if not has_labels
        ]
        for message in left_out:
            if message not in self._told:
                logger.warning("left out: %s", message)
        self._told.update(left_out)
        return batch, left_out

    def training_batches(self, batches: Iterator[dict], num_visual_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of the collator at a budget, their tokens and the rows left out counted."""
        for batch in batches:
            batch, left_out = self.expanded(batch, num_visual_tokens)
            self.skipped.update(left_out)
            self._skipped_since_log += len(left_out)
            mask = batch["attention_mask"]
            learned = int((batch["labels"] != IGNORED_LABEL).sum())
            self._tokens += torch.tensor([int(mask.sum()), mask.numel(), learned])
            yield batch

    def get_batch_samples(self, epoch_iterator: Iterator[dict], *args, **kwargs) -> tuple[list, Any]:
        batches = self.training_batches(epoch_iterator, self.budget_of_step(self.state.global_step))
        batches, num_items = super().get_batch_samples(batches, *args, **kwargs)
        if torch.is_tensor(num_items):
            # A step in which every row was left out has no labels; its loss is 0 / 1, not 0 / 0.
            num_items = num_items.clamp(min=1)
        return batches, num_items

    # ---- evaluation ----

    def get_eval_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        collator = self.data_collator
        self.data_collator = self.eval_collator or collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def prediction_step(self, model, inputs, *args, **kwargs) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor]:
        """Figures of each row, which `Trainer` gathers from all ranks: `evaluation_figures` makes one of them all.

        Returns:
            No loss; the sum of the loss over each row's learned tokens, of shape (rows,), their number (rows,) and the
            generated tokens (rows, longest), when they are asked for; and the tokens of each row's last answer.
        """
        batch, _ = self.expanded(inputs, self.model.config.num_visual_tokens)
        batch = self._prepare_inputs(batch)
        labels = batch.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**batch, use_cache=False).logits
        losses = cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORED_LABEL, reduction="none"
        )
        figures = (losses.sum(1), (labels[:, 1:] != IGNORED_LABEL).sum(1))
        if not self.args.predict_with_generate:
            return None, figures, labels[:, :1]
        was_cut = (inputs["labels"] != IGNORED_LABEL).sum(1).to(labels.device) > (labels != IGNORED_LABEL).sum(1)
        prompts, references = self.last_questions(batch, labels, was_cut)
        with torch.no_grad(), self.compute_loss_context_manager():
            answers = self.model.generate(
                **prompts, max_new_tokens=self.args.generation_max_new_tokens, do_sample=False
            )
        return None, (*figures, answers[:, prompts["input_ids"].shape[1] :]), references

    def last_questions(
        self, batch: dict[str, torch.Tensor], labels: torch.Tensor, was_cut: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What `generate` is asked: each row up to its last answer, padded on the left; and the answers' tokens, of
        shape (rows, longest), without those of rows that were cut, whose last answer is another one."""
        prompts, references = [], []
        image_token_id = self.processing_class.image_token_id
        rows = zip(batch["input_ids"], batch["attention_mask"], labels, was_cut.tolist(), strict=True)
        for ids, mask, row_labels, is_cut in rows:
            learned = (row_labels != IGNORED_LABEL).nonzero()[:, 0]
            breaks = (learned.diff() > 1).nonzero()[:, 0]
            answer = learned[breaks[-1] + 1 :] if len(breaks) else learned
            answer = answer[:0] if is_cut else answer
            asked = (mask == 1).nonzero()[:, 0]
            asked = asked[: answer[0]] if len(answer) else asked
            blank = ((mask == 0) & (ids == image_token_id)).nonzero()[:, 0]
            places = torch.cat([blank, asked])
            prompts.append((ids[places], mask[places]))
            references.append(row_labels[answer])
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        input_ids, attention_mask = (
            pad_sequence(values, batch_first=True, padding_value=padding, padding_side="left")
            for values, padding in zip(
                zip(*prompts, strict=True), (self.processing_class.tokenizer.pad_token_id, 0), strict=True
            )
        )
        pictures = {name: batch[name] for name in ("pixel_values", "num_visual_tokens")}
        references = pad_sequence(references, batch_first=True, padding_value=IGNORED_LABEL)
        return {"input_ids": input_ids, "attention_mask": attention_mask, **pictures}, references

    def evaluation_figures(self, gathered: EvalPrediction) -> dict[str, float]:
        """Loss per token, rows left out, and what the metric says of the generated answers, over all rows."""
        losses, tokens, *generated = gathered.predictions
        figures = {"loss": float(losses.sum(dtype="float64") / max(tokens.sum(), 1))}
        if left_out := int((tokens == 0).sum()) + len(self.eval_left_out):
            figures["skipped_rows"] = left_out
        if generated:
            has_answer = (gathered.label_ids != IGNORED_LABEL).any(1)
            predictions, references = (
                self.processing_class.tokenizer.batch_decode(
                    [row[row != IGNORED_LABEL] for row in rows[has_answer]], skip_special_tokens=True
                )
                for rows in (generated[0], gathered.label_ids)
            )
            figures |= scores(self.metric, predictions, references)
            if cut := len(tokens) - int((tokens == 0).sum()) - len(references):
                figures["cut_answers"] = cut
        best = best_metric(self.args.metric_for_best_model)
        if best not in figures:
            raise UserError(f"metric_for_best_model: {best} is not among what was measured: {', '.join(figures)}")
        return figures

    # ---- log ----

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            counts = torch.tensor([self._skipped_since_log, *self._tokens.tolist()])
            if self.args.world_size > 1:
                counts = counts.to(self.args.device)
                dist.all_reduce(counts)
            skipped, tokens, places, learned = counts.tolist()
            if places and not learned:
                raise UserError(f"max_length: no row has an answer within {self.max_length} tokens; raise it")
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

    def all_skipped(self) -> set[str]:
        """The rows that training left out, and why, on all ranks together; every rank must call it."""
        ranks = [self.skipped]
        if self.args.world_size > 1:
            ranks = [None] * self.args.world_size
            dist.all_gather_object(ranks, self.skipped)
        return set().union(*ranks)

    # ---- steps ----

    def _run_epoch(self, *args, **kwargs) -> None:
        """As `Trainer`'s, but a resumed run that has all its steps takes none; `Trainer` looks only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        if self.control.should_training_stop:
            self._finish_current_push()  # what `Trainer` deletes at the end, it deletes before it waits

    # ---- saving ----

    def begin_run(self) -> None:
        """Ends the move of a result that a killed process left; then checks disk space, and makes a trial save.

        The trial save is opened (config and headers of the weights) and removed again.
        """
        # With checkpointing, transformers has the output of every embedding require gradients, the patch embedding's
        # too: the frozen tower would be run again and backwards for nothing. Only reentrant checkpointing needs that.
        if not (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
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
        # Nothing is uploaded or deleted before the checkpoint is whole.
        pushes, limit = self.args.push_to_hub, self.args.save_total_limit
        self.args.push_to_hub, self.args.save_total_limit = False, None
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
            self.args.push_to_hub, self.args.save_total_limit = pushes, limit
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
        # Without `hub_always_push` this checkpoint is not uploaded while another one is, which must stay until then.
        is_busy = self._is_uploading() and not (self.args.hub_always_push or self.control.should_training_stop)
        if self.args.push_to_hub and not is_busy:
            self._push_checkpoint(final_dir / name)
        if self.args.should_save and not (is_busy and self.args.hub_strategy != HubStrategy.EVERY_SAVE):
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

    def _is_uploading(self) -> bool:
        push = getattr(self, "push_in_progress", None)  # the main process of a run that uploads has it
        return push is not None and not push.is_done()

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Puts the Hub files of a finished checkpoint into the run's folder and uploads them in the background.

        `Trainer` would copy the weights without the model's code, and file by file.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
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
        card = trained_card(self.settings, self.state, self.args, self.model.config, parts, is_adapter=self._is_lora())
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
