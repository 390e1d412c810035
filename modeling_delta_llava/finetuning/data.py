"""Datasets of encoded conversations: on disk or streamed, with pictures opened lazily in the workers."""

import itertools
import logging
import pickle
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from delta_llava.errors import UserError, told

from .pictures import BrokenImageError, open_image, resolve_image
from .rows import RowError, Sample, line_of_row, parse_line, parse_row, read_json_rows
from .text import ConversationEncoder, EncodedText

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawnIndex:
    """What a sampler asks a dataset for: a row, to be shown at a number of visual tokens (None: the default one)."""

    index: int
    num_visual_tokens: int | None = None


@dataclass(frozen=True)
class TrainingExample:
    """One encoded conversation with its decoded pictures, ready for the collator."""

    text: EncodedText
    images: list[Any]
    num_visual_tokens: int | None = None


@dataclass(frozen=True)
class SkippedExample:
    """A row that is left out at run time, and why."""

    reason: str


class PackedRows:
    """A list of Python objects in one byte buffer.

    Forked workers share the buffer; a list of dictionaries would be copied into each of them page by page, because
    reading a Python object writes its reference count.
    """

    def __init__(self, rows: list[Any]):
        buffer = bytearray()
        self._ends = array("Q")
        for row in rows:
            buffer += pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
            self._ends.append(len(buffer))
        self._buffer = np.frombuffer(bytes(buffer), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return pickle.loads(memoryview(self._buffer)[start : self._ends[index]])


class RowSource:
    """Rows of a JSON / JSONL file or of a `datasets.Dataset`, parsed on access and addressed by index."""

    def __init__(self, name: str, rows: Any, json_path: Path | None = None):
        self.name = name
        self._rows = rows
        self._json_path = json_path

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """How an error names row `index`: the file and line, or the dataset and row."""
        if self._json_path is not None:
            return f"{self.name}: line {line_of_row(self._json_path, index)} (row {index})"
        return f"{self.name}: row {index}"

    def raw(self, index: int) -> Any:
        return self._rows[index]

    def sample(self, index: int) -> Sample:
        return parse_row(self._rows[index])

    def select(self, indices: list[int]) -> "SelectedRows":
        return SelectedRows(self, indices)


class SelectedRows:
    """Some rows of a `RowSource`, under new indices."""

    def __init__(self, source: RowSource, indices: list[int]):
        self.name = source.name
        self._source = source
        self._indices = array("Q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def where(self, index: int) -> str:
        return self._source.where(self._indices[index])

    def sample(self, index: int) -> Sample:
        return self._source.sample(self._indices[index])


def load_rows(
    data_path: str, split: str = "train", streaming: bool = False, on_bad_row: str = "stop"
) -> RowSource | Any:
    """Opens a dataset without opening its pictures.

    Args:
        data_path: a LLaVA `.json` / `.jsonl` file, a folder written by `Dataset.save_to_disk`, a `.parquet` file, or
            the name of a dataset on the Hub.
        split: the split to read where the dataset has several.
        streaming: read the rows one after the other instead of by index; returns `JsonLines`, or an iterable of rows.
        on_bad_row: "stop" raises at a JSONL line that is no JSON, "skip" makes it a bad row (see [`parse_line`]).
    Raises:
        UserError: nothing readable is there.
    """
    path = Path(data_path).expanduser()
    if path.suffix in (".json", ".jsonl"):
        if streaming:
            if path.suffix == ".json":
                raise UserError(f"{path}: a .json array cannot be streamed; write it as .jsonl, or drop --streaming")
            if not path.is_file():
                raise UserError(f"{path}: no such data file; pass an existing LLaVA JSONL as --data_path")
            return JsonLines(path)
        return RowSource(str(path), PackedRows(read_json_rows(path, on_bad_row)), json_path=path)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{data_path}: reading this needs the `datasets` package; pip install datasets") from None
    with told(f"{data_path}: no dataset could be loaded", "check --data_path and --split"):
        if path.is_dir() and (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded.to_iterable_dataset() if streaming else loaded
        elif path.is_dir() and (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))[split]
            loaded = loaded.to_iterable_dataset() if streaming else loaded
        elif path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
        else:
            loaded = datasets.load_dataset(data_path, split=split, streaming=streaming)
    loaded = _undecoded(loaded)
    return loaded if streaming else RowSource(data_path, loaded)


def _undecoded(dataset: Any) -> Any:
    """Keeps pictures encoded until a worker asks for them."""
    import datasets

    features = dataset.features or {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, (datasets.List, list)):
            inner = feature.feature if isinstance(feature, datasets.List) else feature[0]
            if isinstance(inner, datasets.Image):
                dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset


class JsonLines:
    """The rows of a `.jsonl` file, read one line at a time."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> Iterator[tuple[int, str]]:
        """The number (from 1) and text of each line that is not empty."""
        with self.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line


def check_rows(
    rows: RowSource, on_bad_row: str = "stop", encoder: ConversationEncoder | None = None
) -> tuple[RowSource | SelectedRows, list[str]]:
    """Parses every row once, before the first step.

    Args:
        rows: the rows.
        on_bad_row: "stop" raises at the first bad row, "skip" leaves bad rows out.
        encoder: also has its chat template render what is new in roles and parts.
    Returns:
        The rows to train on, and one message for each row left out.
    Raises:
        UserError: a row is bad and `on_bad_row` is "stop", or no row is left.
    """
    good: list[int] = []
    messages: list[str] = []
    for index in range(len(rows)):
        try:
            sample = rows.sample(index)
            if encoder is not None:
                encoder.check(sample.messages)
        except RowError as error:
            message = f"{rows.where(index)}: {error}"
            if on_bad_row == "stop":
                raise UserError(f"{message}; repair the row, or pass --on_bad_row skip") from None
            messages.append(message)
        else:
            good.append(index)
    if not good:
        raise UserError(f"{rows.name}: no usable row; the first problem: {messages[0] if messages else 'it is empty'}")
    return (rows if not messages else rows.select(good)), messages


def missing_images(rows: RowSource | SelectedRows, folder: Path | None) -> list[str]:
    """Names of picture files that rows ask for and that do not exist."""
    checked: dict[str, bool] = {}
    for index in range(len(rows)):
        for image in rows.sample(index).images:
            file = resolve_image(image, folder)
            if isinstance(file, Path) and str(file) not in checked:
                checked[str(file)] = file.is_file()
    return [name for name, exists in checked.items() if not exists]


class ConversationDataset(Dataset):
    """Map-style dataset: row index (or `DrawnIndex`) -> `TrainingExample` or `SkippedExample`.

    Args:
        rows: checked rows.
        encoder: turns a conversation into ids and labels.
        image_folder: where picture names are looked up.
        on_broken_image: "skip" leaves the row out and reports it, "stop" raises.
        max_image_pixels: pictures above this many pixels count as broken.
    """

    def __init__(
        self,
        rows: RowSource | SelectedRows,
        encoder: ConversationEncoder,
        image_folder: Path | None = None,
        on_broken_image: str = "stop",
        max_image_pixels: int | None = None,
    ):
        self.rows = rows
        self.encoder = encoder
        self.image_folder = image_folder
        self.on_broken_image = on_broken_image
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | DrawnIndex) -> TrainingExample | SkippedExample:
        drawn = key if isinstance(key, DrawnIndex) else DrawnIndex(int(key))
        return self.build(self.rows.sample(drawn.index), lambda: self.rows.where(drawn.index), drawn.num_visual_tokens)

    def build(
        self, sample: Sample, where: Callable[[], str], num_visual_tokens: int | None = None
    ) -> TrainingExample | SkippedExample:
        """Encodes one sample and opens its pictures; `where()` words its place for a message."""
        try:
            images = [open_image(image, self.image_folder, self.max_image_pixels) for image in sample.images]
        except BrokenImageError as error:
            if self.on_broken_image == "stop":
                raise UserError(
                    f"{where()}: image {error}; repair it, or pass --on_broken_image skip to leave such rows out"
                ) from None
            return SkippedExample(f"{where()}: image {error}")
        try:
            text = self.encoder.encode(sample.messages)
        except RowError as error:
            raise UserError(f"{where()}: {error}; repair the row or the template") from None
        if not text.has_labels:
            return SkippedExample(f"{where()}: nothing to learn, every label is masked")
        return TrainingExample(text=text, images=images, num_visual_tokens=num_visual_tokens)

    def modality_lengths(self) -> list[int]:
        """Words of each row, negative for rows without a picture: what length-grouped sampling sorts by."""
        lengths = []
        for index in range(len(self.rows)):
            sample = self.rows.sample(index)
            words = sum(
                len(part["text"].split())
                for message in sample.messages
                for part in message["content"]
                if part["type"] == "text"
            )
            lengths.append(max(words, 1) if sample.images else -max(words, 1))
        return lengths


class StreamedDataset(IterableDataset):
    """Iterable counterpart of `ConversationDataset` for rows that cannot be addressed by index.

    Its rows come again and again without an end, so that whatever stops and resumes a run counts on in one sequence,
    and no batch is filled up with rows of another one. Consecutive blocks of `block_size` rows (one batch of all
    ranks) go to the workers in turn, so that several workers give the order that one would give.

    Args:
        rows: `JsonLines`, or a `datasets.IterableDataset`, told with `set_epoch` which pass over it begins.
        dataset: builds the examples (its own rows are not read).
        name: how messages name the stream.
        block_size: rows in one micro-batch of all ranks.
        accumulation: micro-batches in one optimizer step.
        num_workers: processes that read the stream.
        draw_budget: (epoch, optimizer step) -> visual tokens, or None for the model's default; the epoch is always 0.
        on_bad_row: "skip" or "stop".
    """

    def __init__(
        self,
        rows: JsonLines | Iterable[Any],
        dataset: ConversationDataset,
        name: str,
        block_size: int,
        accumulation: int = 1,
        num_workers: int = 0,
        draw_budget: Callable[[int, int], int] | None = None,
        on_bad_row: str = "stop",
    ):
        if num_workers > 1 and not isinstance(rows, JsonLines):
            raise UserError(
                f"dataloader_num_workers: {name} is streamed by `datasets`, which splits it among workers in its own "
                "way; set dataloader_num_workers: 1"
            )
        self.rows = rows
        self.dataset = dataset
        self.name = name
        self.block_size = block_size
        self.accumulation = accumulation
        self.draw_budget = draw_budget
        self.on_bad_row = on_bad_row

    def placed_rows(self) -> Iterator[tuple[str, Any]]:
        """How a message names each row, and the row (a line of text from `JsonLines`), pass after pass.

        Raises:
            UserError: the stream is empty.
        """
        for epoch in itertools.count():
            if isinstance(self.rows, JsonLines):
                kind, rows = "line", self.rows.lines()
            else:
                self.rows.set_epoch(epoch)
                kind, rows = "row", enumerate(self.rows)
            place = None
            for place, row in rows:
                yield f"{self.name}: {kind} {place}", row
            if place is None:
                raise UserError(f"{self.name}: no rows; pass another --data_path")

    def __iter__(self) -> Iterator[TrainingExample | SkippedExample]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for number, (place, row) in enumerate(self.placed_rows()):
            block = number // self.block_size
            if block % num_workers != worker_id:
                continue
            try:
                sample = parse_row(parse_line(row) if isinstance(row, str) else row)
                self.dataset.encoder.check(sample.messages)
            except RowError as error:
                if self.on_bad_row == "stop":
                    raise UserError(f"{place}: {error}; repair the row, or pass --on_bad_row skip") from None
                yield SkippedExample(f"{place}: {error}")
                continue
            step = block // self.accumulation
            budget = self.draw_budget(0, step) if self.draw_budget is not None else None
            yield self.dataset.build(sample, lambda place=place: place, budget)
