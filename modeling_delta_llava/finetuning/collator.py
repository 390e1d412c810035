"""Batches: rows of a data set, read, encoded, padded on the right, with the pictures of all of them in one tensor."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from delta_llava.errors import UserError

from .arguments import DataArguments
from .data import place_of, sample_of
from .pictures import BrokenImageError, open_image
from .rows import RowError, Sample
from .text import IGNORED_LABEL, ConversationEncoder, EncodedText

# Key of a batch under which the collator names its rows; the trainer takes it off before the model runs.
ROWS_KEY = "rows"


@dataclass(eq=False)
class DeltaLlavaCollator:
    """Collates rows of a data set; rows without a picture and with several mix freely.

    Args:
        processor: a `DeltaLlavaProcessor`.
        encoder: turns a conversation into ids and labels.
        name: how messages name the data set.
        image_folder: where picture names are looked up.
        on_bad_row, on_broken_image: "skip" leaves such a row out and reports it, "stop" raises.
        max_image_pixels: pictures above this many pixels count as broken.
        ignored_keys: see [`parse_row`].
    """

    processor: Any
    encoder: ConversationEncoder
    name: str = "the data"
    image_folder: Path | None = None
    on_bad_row: str = "stop"
    on_broken_image: str = "stop"
    max_image_pixels: int | None = None
    ignored_keys: Collection[str] = ()

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            records: rows of a data set of [`load_rows`].
        Returns:
            `input_ids`, `attention_mask` and `labels` of shape (rows, longest), int64, with one image token for each
            picture, which [`at_budget`] expands; `pixel_values` of shape (pictures, 3, height, width), a black picture
            where there is none; and under `ROWS_KEY`, for each row, how messages name it and why it is left out (None
            when it is not). A row that is left out stays in the batch as one token without a label.
        Raises:
            UserError: a row or a picture cannot be used, and is not to be skipped.
        """
        pad = self.processor.tokenizer.pad_token_id
        rows, pictures, named = [], [], []
        for record in records:
            try:
                problem = None
                _, text, images = self.read(record)
            except (RowError, BrokenImageError) as error:
                problem = self.left_out(record, error)
                text, images = EncodedText([pad], [IGNORED_LABEL]), []
            rows.append(text)
            named.append((self.place_of(record), problem))
            pictures += images
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        width = int(lengths.max())
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([row.input_ids + [pad] * (width - len(row.input_ids)) for row in rows]),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": torch.tensor([row.labels + [IGNORED_LABEL] * (width - len(row.labels)) for row in rows]),
        }
        pictures = pictures or [Image.new("RGB", (1, 1))]
        batch["pixel_values"] = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        batch[ROWS_KEY] = named
        return batch

    def read(self, record: dict[str, Any]) -> tuple[Sample, EncodedText, list[Image.Image]]:
        """One row, its ids and labels, and its decoded pictures.

        Raises:
            RowError, BrokenImageError: it cannot be used.
        """
        sample = sample_of(record, self.ignored_keys)
        images = [open_image(image, self.image_folder, self.max_image_pixels) for image in sample.images]
        text = self.encoder.encode(sample.messages)
        if all(label == IGNORED_LABEL for label in text.labels):
            raise RowError("nothing to learn, every label is masked")
        return sample, text, images

    def place_of(self, record: dict[str, Any]) -> str:
        """How messages name a row."""
        return f"{self.name}: {place_of(record)}"

    def left_out(self, record: dict[str, Any], error: RowError | BrokenImageError) -> str:
        """Why a row is left out.

        Raises:
            UserError: it is not to be left out.
        """
        if isinstance(error, BrokenImageError):
            problem, policy = f"image {error}", self.on_broken_image
            advice = "repair it, check --image_folder, or pass --on_broken_image skip"
        else:
            problem, policy, advice = str(error), self.on_bad_row, "repair the row, or pass --on_bad_row skip"
        if policy == "stop":
            raise UserError(f"{self.place_of(record)}: {problem}; {advice}") from None
        return problem


def expand(
    ids: torch.Tensor, labels: torch.Tensor, image_token_id: int, num_visual_tokens: int, max_length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and labels of one row with each image token `num_visual_tokens` times, cut at `max_length` tokens or before
    a picture that would not fit whole; and which of its pictures are left, of shape (pictures,)."""
    is_image = ids == image_token_id
    widths = torch.where(is_image, num_visual_tokens, 1)
    fits = widths.cumsum(0) <= max_length
    return ids.repeat_interleave(widths * fits), labels.repeat_interleave(widths * fits), fits[is_image]


def at_budget(
    batch: dict[str, torch.Tensor], image_token_id: int, pad_token_id: int, num_visual_tokens: int, max_length: int
) -> dict[str, torch.Tensor]:
    """A batch with its pictures at a visual-token budget.

    Args:
        batch: as [`DeltaLlavaCollator`] makes it, with one image token for each picture.
        num_visual_tokens: V, visual tokens of each picture.
        max_length: tokens after which a row is cut, before a picture that would not fit whole.
    Returns:
        The batch with each image token V times, cut rows, the pictures that are left, and `num_visual_tokens` of shape
        (pictures,). Where no picture is left, the first one stands in masked padding: several processes wait for the
        gradient of every projector weight, and for one another's shards.
    """
    rows, kept = [], []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        ids, labels, fits = expand(ids[:length], labels[:length], image_token_id, num_visual_tokens, max_length)
        rows.append([ids, torch.ones_like(ids), labels])
        kept.append(fits)
    kept = torch.cat(kept)
    if not kept.any():
        for place, value in enumerate((image_token_id, 0, IGNORED_LABEL)):
            rows[0][place] = torch.nn.functional.pad(rows[0][place], (0, num_visual_tokens), value=value)
    expanded = {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
        for name, padding, values in zip(
            ("input_ids", "attention_mask", "labels"),
            (pad_token_id, 0, IGNORED_LABEL),
            zip(*rows, strict=True),
            strict=True,
        )
    }
    pixel_values = batch["pixel_values"][kept] if kept.any() else batch["pixel_values"][:1]
    budgets = torch.full((len(pixel_values),), num_visual_tokens)
    return {**batch, **expanded, "pixel_values": pixel_values, "num_visual_tokens": budgets}


def collator_of(data: DataArguments, processor: Any, name: str, image_folder: str | None) -> DeltaLlavaCollator:
    """What makes batches of the rows of one data set.

    Raises:
        UserError: `image_folder` does not exist, or the processor cannot encode conversations.
    """
    folder = Path(image_folder).expanduser() if image_folder is not None else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"image_folder: {folder} is no folder; give the folder that image names are relative to")
    return DeltaLlavaCollator(
        processor,
        ConversationEncoder(processor, data.format),
        name=name,
        image_folder=folder,
        on_bad_row=data.on_bad_row,
        on_broken_image=data.on_broken_image,
        max_image_pixels=data.max_image_pixels,
        ignored_keys=data.ignored_keys,
    )
