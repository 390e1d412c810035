"""Delta-LLaVA in lmms-eval: `lmms-eval --model delta_llava --model_args pretrained=REPO,num_visual_tokens=36`.

The prompt is training's, by the folder's chat template; answers are greedy where a task does not ask for sampling, and
batches are padded on the left. One run may ask for several budgets. A picture's tower features are then computed once,
and so are those of a picture that neighbouring questions share.
"""

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from delta_llava.errors import UserError, told
from modeling_delta_llava.asking import load, model_folder
from modeling_delta_llava.building import check_budgets, check_chat_template

from .answers import Answers, revision_of
from .efficiency import read_config

NAME = "delta_llava"
MANIFEST = ModelManifest(NAME, chat_class_path=f"{__name__}.DeltaLlavaForEvaluation")
# Of an answer whose task names no limit: that of lmms-eval's own LLaVA, which the authors' scripts run.
MAX_NEW_TOKENS = 1024
# Pictures whose tower features are kept: 380 MB for the paper's tower in 16 bit.
KEPT_PICTURES = 64
SAMPLING = ("temperature", "top_p", "top_k")
VERSIONS = {name: version(name) for name in ("torch", "transformers", "delta_llava")}


class DeltaLlavaForEvaluation(lmms):
    """A model that lmms-eval asks, at one budget or at several.

    Args:
        pretrained: Hub folder or id.
        num_visual_tokens: budget, or budgets; by default the config's. lmms-eval gets the answers at
            `num_visual_tokens`, which is the first one until it is set; those at the others are kept in `answers`.
        revision: branch, tag or commit of `pretrained` on the Hub.
        dtype: auto (as saved), bfloat16, float16 or float32.
        batch_size: questions that are answered together.
        device: auto, cpu, cuda or cuda:N. Several processes (`accelerate launch`) take the devices accelerate gives.
        answers: folder of answers that earlier runs left, and this one adds to; by default none is kept.

    Raises:
        UserError: no such model, another model's folder, no weights, an illegal budget or batch size.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_visual_tokens: int | Sequence[int] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        answers: str | Path | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch size {batch_size}: give a number of questions, such as 8")
        if max_batch_size is not None:
            raise UserError("max_batch_size belongs to automatic batch sizes, which this model does not have")
        self.batch_size = int(batch_size)
        folder = model_folder(pretrained, revision)
        config = read_config(str(folder))
        budgets = config.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        self.budgets = [budgets] if isinstance(budgets, int | str) else list(budgets)
        check_budgets(config, self.budgets)
        self.num_visual_tokens = self.budgets[0]
        self.revision = revision_of(folder)

        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.accelerator = Accelerator(cpu=device == "cpu")
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = str(self.accelerator.device)
        self.model, self.processor = load(str(folder), device=device or "auto", dtype=dtype)
        check_chat_template(self.processor, folder)
        for budget in self.budgets:
            self.model.model.check_budgets(budget, 1)  # warns of those it was not trained at
        self.device, self.dtype = self.model.device, self.model.dtype
        self.answers = Answers(None if answers is None else Path(answers), self.rank)
        self._run = uuid.uuid4().hex
        self._features: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers at `num_visual_tokens`, in the order of the requests."""
        data = {names: self._data_of(*names) for names in {request.args[4:6] for request in requests}}
        asked_before = Counter()
        keys = []
        for request in requests:
            prompt, _, settings, doc_id, task, split = request.args
            asked = {"prompt": prompt, "settings": settings, "doc_id": doc_id, **data[task, split]}
            # `--repeats` asks the same several times.
            asked["repeat"] = asked_before[task, split, doc_id]
            asked_before[task, split, doc_id] += 1
            keys.append({budget: Answers.key({**asked, "num_visual_tokens": budget}) for budget in self.budgets})
        missing = [
            (request, known)
            for request, known in zip(requests, keys, strict=True)
            if any(self.answers.get(key) is None for key in known.values())
        ]
        total = sum(self.answers.get(key) is None for _, known in missing for key in known.values())
        with tqdm(total=total, desc="answers", disable=self.rank != 0 or total == 0) as progress:
            for batch in self._batches(missing):
                self._answer(batch, progress)
        return [self.answers.get(known[self.num_visual_tokens]) for known in keys]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError("delta_llava generates answers and rates none: leave out tasks of output type loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("delta_llava answers one question at a time: leave out tasks of several rounds")

    def _data_of(self, task: str, split: str) -> dict[str, Any]:
        """What answers about a task's rows depend on, beside the single question."""
        rows = self.task_dict[task][split]
        # The folder of the cache is named after the commit or the files that the rows were read from. A file in it has
        # another name in every run where a task works on its rows, as GQA does.
        places = sorted({str(Path(file["filename"]).parent) for file in rows.cache_files})
        sizes = {name: part.num_bytes for name, part in (rows.info.splits or {}).items()}
        data = {"task": task, "split": split, "places": places, "sizes": sizes, "written": self._written(rows)}
        return {"model": self.revision, "dtype": str(self.dtype), "versions": VERSIONS, **data}

    def _written(self, rows: Any) -> list:
        """What tells rows outside the cache of `datasets` from others at the same place: when their files were
        written, or, where they lie in memory alone, the run itself."""
        files = [Path(file["filename"]) for file in rows.cache_files]
        if not files:
            return [self._run]
        cache = Path(datasets.config.HF_DATASETS_CACHE).resolve()
        own = [file for file in files if cache not in file.resolve().parents]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in own]

    def clean(self) -> None:
        """Nothing: lmms-eval would drop the model behind the first budget, and one model serves them all."""

    def _batches(self, missing: list) -> Iterator[list]:
        """Consecutive requests of one task with the same settings, `batch_size` at a time."""

        def alike(item) -> tuple[str, str]:
            _, _, settings, _, task, _ = item[0].args
            return task, json.dumps(settings, sort_keys=True, default=str)

        for _, group in groupby(missing, alike):
            rows = list(group)
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    @torch.inference_mode()
    def _answer(self, batch: list, progress: tqdm) -> None:
        """Answers requests at every budget that one of them lacks, and keeps the answers."""
        conversations = []
        for request, _ in batch:
            _, doc_to_messages, settings, doc_id, task, split = request.args
            with told(f"row {doc_id} of task {task} cannot be asked", "mend it, or leave the task out"):
                messages = doc_to_messages(self.task_dict[task][split][doc_id])
                conversations.append(ChatMessages(messages=messages).to_hf_messages())
        for budget in self.budgets:
            rows = [row for row, (_, keys) in enumerate(batch) if self.answers.get(keys[budget]) is None]
            if not rows:
                continue
            with told(f"task {task} cannot be answered at {budget} visual tokens", "leave it out, or mend its rows"):
                texts = self._generate([conversations[row] for row in rows], budget, settings)
            for row, text in zip(rows, texts, strict=True):
                request, keys = batch[row]
                about = {"task": task, "doc_id": request.args[3], "num_visual_tokens": budget}
                self.answers.add(keys[budget], text, **about)
                progress.update()

    def _generate(self, conversations: list, budget: int, settings: dict[str, Any]) -> list[str]:
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": budget, "padding": True, "padding_side": "left"},
        )
        prompt = {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask")}
        if "pixel_values" in inputs:
            streams = self._tower_features(inputs["pixel_values"])
            scale = self.model.config.scale_factor(budget)
            visual_tokens = self.model.model.multi_modal_projector(*streams, scale)  # [images, V, D]
            prompt["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=visual_tokens)}
        output = self.model.generate(**prompt, **generation_settings(settings))
        answers = self.processor.tokenizer.batch_decode(
            output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [until(answer.strip(), settings.get("until")) for answer in answers]

    def _tower_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and memory stream of pictures, computed for those that were not seen a short while ago."""
        names = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pixel_values]
        new = {name: row for row, name in enumerate(names) if name not in self._features}
        if new:
            query, memory, _ = self.model.model.get_patch_features(pixel_values[list(new.values())].to(self.device))
            self._features |= {name: (query[row], memory[row]) for row, name in enumerate(new)}
        query, memory = zip(*(self._features[name] for name in names), strict=True)
        for name in names:  # the last ones used are the last ones dropped
            self._features[name] = self._features.pop(name)
        for name in list(self._features)[: -max(KEPT_PICTURES, len(set(names)))]:
            del self._features[name]
        return torch.stack(query), torch.stack(memory)


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` for a task's `generation_kwargs`: greedy unless they ask for sampling."""
    chosen = {name: settings[name] for name in ("num_beams", "repetition_penalty") if settings.get(name) is not None}
    chosen["max_new_tokens"] = settings.get("max_new_tokens") or MAX_NEW_TOKENS
    sampled = settings.get("do_sample") is not False and (settings.get("temperature") or 0) > 0
    chosen["do_sample"] = sampled
    if sampled:
        chosen |= {name: settings[name] for name in SAMPLING if settings.get(name)}
    return chosen


def until(answer: str, stops: str | Sequence[str] | None) -> str:
    """An answer up to the first of a task's stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        answer = answer.partition(stop)[0] if stop else answer
    return answer.strip()
