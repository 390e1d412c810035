"""Batches for the model: ids padded on the right, pictures of all rows in one tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from .data import SkippedExample, TrainingExample
from .text import IGNORED_LABEL, expand

# Key of a batch under which the collator lists what it left out; the trainer takes it off before the model runs.
SKIPPED_KEY = "skipped_rows"


class DeltaLlavaCollator:
    """Collates `TrainingExample`s; rows without a picture and with several mix freely.

    Args:
        processor: a `DeltaLlavaProcessor`.
        max_length: tokens after which a sequence is cut (never inside a picture).
    """

    def __init__(self, processor: Any, max_length: int):
        self.processor = processor
        self.image_token_id = processor.image_token_id
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.default_budget = processor.num_visual_tokens
        self.max_length = max_length

    def __call__(self, examples: Sequence[TrainingExample | SkippedExample]) -> dict[str, Any]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels` of shape (rows, longest), int64; `pixel_values` of shape
            (pictures, 3, height, width); when the sampler drew a budget, `num_visual_tokens` of shape (pictures,); and
            the reasons of rows left out under `SKIPPED_KEY`.
            A batch in which every row is left out becomes one row that has no labels. A batch without a picture gets a
            black one in masked padding: several processes wait for the gradient of every projector weight.
        """
        skipped: list[str] = []
        rows, pictures, budgets = [], [], []
        drawn = False
        for example in examples:
            if isinstance(example, SkippedExample):
                skipped.append(example.reason)
                continue
            budget = example.num_visual_tokens or self.default_budget
            drawn = drawn or example.num_visual_tokens is not None
            row = expand(example.text, self.image_token_id, budget, self.max_length)
            if not row.has_labels:
                skipped.append(f"a row has nothing to learn within max_length={self.max_length}")
                continue
            rows.append(row)
            pictures += example.images[: row.num_images]
            budgets += [budget] * row.num_images
        width = max((len(row.input_ids) for row in rows), default=1)
        blank = None
        if not pictures:
            start = len(rows[0].input_ids) if rows else 1
            budgets = [next((each.num_visual_tokens for each in examples if drawn), None) or self.default_budget]
            blank = slice(start, start + budgets[0])
            width = max(width, blank.stop)
        batch: dict[str, Any] = {
            "input_ids": torch.full((max(len(rows), 1), width), self.pad_token_id),
            "attention_mask": torch.zeros((max(len(rows), 1), width), dtype=torch.int64),
            "labels": torch.full((max(len(rows), 1), width), IGNORED_LABEL),
        }
        for place, row in enumerate(rows):
            length = len(row.input_ids)
            batch["input_ids"][place, :length] = torch.tensor(row.input_ids)
            batch["attention_mask"][place, :length] = 1
            batch["labels"][place, :length] = torch.tensor(row.labels)
        if not rows:
            batch["attention_mask"][:, 0] = 1
        if blank is not None:
            batch["input_ids"][0, blank] = self.image_token_id
            pictures = [Image.new("RGB", (1, 1))]
        batch["pixel_values"] = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        if drawn:
            batch["num_visual_tokens"] = torch.tensor(budgets)
        batch[SKIPPED_KEY] = skipped
        return batch
