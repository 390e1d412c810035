"""Data sets of training rows: opened once, each as a `datasets.Dataset` or `datasets.IterableDataset`.

Rows of JSON files, whose columns may hold anything, are kept as their own text with the number of their line; rows of
other data sets keep their columns and get the number of their row. Pictures stay encoded until a batch is made.
"""

import itertools
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError, reason, told

from ..json_files import unique_keys
from .pictures import BrokenImageError, MissingImageError, image_name, is_missing, picture_file
from .rows import RowError, Sample, parse_row

try:
    import datasets
    import pyarrow as pa
except ImportError:
    raise UserError("finetuning needs the `datasets` package; pip install 'delta-llava[finetuning]'") from None

# A row of a JSON file, where it lies, and what rows are grouped by (see `check_rows`).
JSON_COLUMN, LINE_COLUMN, ROW_COLUMN, LENGTH_COLUMN = "_json", "_line", "_row", "_length"
SPACES = re.compile(r"[ \t\r\n]*")


def load_rows(
    data_path: str,
    split: str = "train",
    streaming: bool = False,
    num_parts: int = 1,
    block_size: int = 1,
    passes: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a data set without opening its pictures.

    Args:
        data_path: a LLaVA JSON or JSONL file, a `.parquet` file, a folder written by `save_to_disk`, or the name of a
            data set on the Hub.
        split: the split to read where there are several, and the part of it, such as `train[:80%]`.
        streaming: read the rows one after the other instead of by index.
        num_parts, block_size: number of loader workers that read a stream, and rows that each takes in turn; with more
            than one, the rows come in the order in which one would read them.
        passes: how often a stream is read; without an end when not given.
    Raises:
        UserError: nothing readable is there.
    """
    path = Path(data_path).expanduser()
    names = list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))
    if streaming and (len(names) > 1 or "[" in split):
        raise UserError(f"{data_path}: a stream has no part {split}; name a whole split, or drop --streaming")
    if path.suffix.lower() in (".json", ".jsonl"):
        if is_missing(path):
            raise UserError(f"{path}: no such data file; pass an existing LLaVA JSON or JSONL as --data_path")
        if streaming and is_array(path):
            raise UserError(f"{path}: a .json array cannot be streamed; write it as .jsonl, or drop --streaming")
        if streaming:
            return dealt(path, num_parts, block_size, passes)
        return sliced({names[0]: json_rows(path)}, split, data_path)
    with told(f"{data_path}: no data set could be loaded", "check --data_path and --split"):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, dict) else {names[0]: loaded}
        elif path.suffix.lower() == ".parquet":
            splits = datasets.load_dataset("parquet", data_files={names[0]: str(path)}, streaming=streaming)
        else:
            splits = {name: datasets.load_dataset(data_path, split=name, streaming=streaming) for name in names}
    if streaming and isinstance(splits.get(split), datasets.IterableDataset):
        rows = readable(splits[split], data_path)
        if num_parts > rows.num_shards:
            raise UserError(
                f"dataloader_num_workers: {data_path} is streamed from {rows.num_shards} files, and no more workers "
                f"can share them; set dataloader_num_workers: {rows.num_shards}"
            )
        return rows.map(numbered, with_indices=True).repeat(passes)
    splits = {
        name: rows.add_column(ROW_COLUMN, range(len(rows)))
        for name, rows in ((name, readable(rows, data_path)) for name, rows in splits.items())
    }
    rows = sliced(splits, split, data_path)
    return dealt(rows, num_parts, block_size, passes) if streaming else rows


def readable(rows: Any, data_path: str) -> Any:
    """A data set whose rows are Python's own values, with pictures as their bytes."""
    taken = {JSON_COLUMN, LINE_COLUMN, ROW_COLUMN, LENGTH_COLUMN} & set(rows.column_names or ())
    if taken:
        raise UserError(f"{data_path}: its column {min(taken)} has a name that training uses; rename it")
    if isinstance(rows, datasets.IterableDataset):
        return rows.cast(undecoded(rows.features)) if rows.features else rows
    # Of the same bytes on disk: `Dataset.cast` would write all of them once more.
    return datasets.Dataset(rows.data.cast(undecoded(rows.features).arrow_schema))


def numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The column by which messages name a row of a stream."""
    return {ROW_COLUMN: number}


def sliced(splits: dict[str, datasets.Dataset], split: str, data_path: str) -> datasets.Dataset:
    """The rows of a split such as `train`, `train[80%:]` or `train[:10]+test`."""
    with told(f"{data_path}: no split {split}", f"name one of {', '.join(map(str, splits))}, as in train[:80%]"):
        sizes = {name: len(rows) for name, rows in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
        return datasets.concatenate_datasets(
            [splits[part.splitname].select(range(sizes[part.splitname])[part.from_ : part.to]) for part in parts]
        )


def dealt(rows: Path | datasets.Dataset, num_parts: int, block_size: int, passes: int | None) -> Any:
    """A stream of rows that `num_parts` readers share; each takes a block of `block_size` rows in turn."""
    arguments = {"rows": rows, "num_parts": num_parts, "block_size": block_size, "passes": passes}
    return datasets.IterableDataset.from_generator(dealt_rows, gen_kwargs={**arguments, "parts": [*range(num_parts)]})


def dealt_rows(
    rows: Path | datasets.Dataset, num_parts: int, block_size: int, passes: int | None, parts: list[int]
) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file or a data set, pass after pass, for some of `num_parts` readers."""
    number = 0
    for _ in itertools.count() if passes is None else range(passes):
        first = number
        for row in json_records(rows) if isinstance(rows, Path) else rows:
            if number // block_size % num_parts in parts:
                yield row
            number += 1
        if number == first:
            raise UserError(f"{rows}: no rows; pass another --data_path")


def undecoded(feature: Any) -> Any:
    """A data set's features, with pictures as their bytes, wherever they are."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        changed = {name: undecoded(inner) for name, inner in feature.items()}
        return datasets.Features(changed) if isinstance(feature, datasets.Features) else changed
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(undecoded(feature.feature))
    return feature


# ---- JSON ----


def is_array(path: Path) -> bool:
    """Whether a JSON file holds one array, not a row on each line."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return path.suffix.lower() == ".json" and start.startswith(b"[")


def json_rows(path: Path) -> datasets.Dataset:
    """The rows of a JSON file, each as its own text, with the line on which it begins (from 1).

    Raises:
        UserError: the file cannot be read, or is an array that is no JSON.
    """
    try:
        records = list(json_records(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check --data_path") from None
    types = {JSON_COLUMN: pa.large_binary(), LINE_COLUMN: pa.int64(), ROW_COLUMN: pa.int64()}
    columns = {name: pa.array([record[name] for record in records], type_) for name, type_ in types.items()}
    return datasets.Dataset(pa.table(columns))


def json_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file one after the other, as records of a data set."""
    for number, (line, row) in enumerate(array_rows(path) if is_array(path) else numbered_lines(path)):
        yield {JSON_COLUMN: row, LINE_COLUMN: line, ROW_COLUMN: number}


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and content of each line that is not empty."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if line:
                yield number, line


def array_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number of the first line (from 1) and content of each row of a JSON array."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({reason(error)}); repair the file") from None
    decoder = json.JSONDecoder()
    opening = text.index("[")
    position, counted, line = SPACES.match(text, opening + 1).end(), 0, 1
    for number in itertools.count():
        if text.startswith("]", position):
            break
        line += text.count("\n", counted, position)
        counted = position
        try:
            _, end = decoder.raw_decode(text, position)
            following = SPACES.match(text, end).end()
            if text[following : following + 1] not in (",", "]"):
                raise json.JSONDecodeError("a row is followed by neither comma nor bracket", text, end)
        except json.JSONDecodeError as error:
            problem = f"line {error.lineno} column {error.colno} is no JSON ({error.msg})"
            raise UserError(f"{path}: {problem}; repair the file") from None
        except (ValueError, RecursionError) as error:
            problem = f"line {line} (row {number}) cannot be read ({reason(error)})"
            raise UserError(f"{path}: {problem}; repair the file") from None
        yield line, text[position:end].encode()
        position = following if text[following] == "]" else SPACES.match(text, following + 1).end()
    if SPACES.match(text, position + 1).end() < len(text):
        raise UserError(f"{path}: something follows the array of rows; repair the file")


# ---- rows ----


def place_of(record: dict[str, Any]) -> str:
    """How a message names a row of a data set of [`load_rows`]."""
    row = f"row {record[ROW_COLUMN]}"
    return f"line {record[LINE_COLUMN]} ({row})" if LINE_COLUMN in record else row


def row_of(record: dict[str, Any]) -> Any:
    """The row as its file or data set holds it.

    Raises:
        RowError: it is no JSON.
    """
    if JSON_COLUMN not in record:
        return {name: value for name, value in record.items() if name not in (ROW_COLUMN, LENGTH_COLUMN)}
    try:
        return json.loads(record[JSON_COLUMN].decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({reason(error)})") from None
    except ValueError as error:
        raise RowError(f"no JSON ({reason(error)})") from None


def sample_of(record: dict[str, Any], ignored_keys: Collection[str]) -> Sample:
    """The conversation in a row.

    Raises:
        RowError: it cannot be trained on.
    """
    try:
        return parse_row(row_of(record), ignored_keys)
    except RecursionError:
        raise RowError("nested too deeply") from None


def check_rows(
    rows: datasets.Dataset, collator: Any, num_visual_tokens: int, look_for_images: bool = True
) -> tuple[datasets.Dataset, list[str]]:
    """Reads every row once, before the first step, but opens no picture.

    Args:
        rows: as [`load_rows`] opens them.
        collator: the `DeltaLlavaCollator` that will read them, whose policies decide about what cannot be used.
        num_visual_tokens: tokens of each picture in `LENGTH_COLUMN`.
        look_for_images: whether a picture file that does not exist counts now.
    Returns:
        The rows to train on, with their lengths in words and visual tokens as `LENGTH_COLUMN`, and one message for
        each row left out.
    Raises:
        UserError: a row cannot be used and is not to be skipped, or no row is left.
    """
    good: list[int] = []
    lengths: list[int] = []
    left_out: list[str] = []
    missing: dict[Path, bool] = {}
    for index, record in enumerate(rows):
        length = 0
        try:
            sample = sample_of(record, collator.ignored_keys)
            collator.encoder.check(sample.messages)
            length = sample.num_words + num_visual_tokens * len(sample.images)
            for image in sample.images if look_for_images else ():
                file = picture_file(image, collator.image_folder)
                if file is not None and file not in missing:
                    missing[file] = is_missing(file)
                if file is not None and missing[file]:
                    raise MissingImageError(f"{image_name(file)}: missing, or no file")
            good.append(index)
        except (RowError, BrokenImageError) as error:
            left_out.append(f"{collator.place_of(record)}: {collator.left_out(record, error)}")
        lengths.append(length)
    if not good:
        problem = left_out[0] if left_out else "it is empty"
        raise UserError(f"{collator.name}: no usable row; the first problem: {problem}")
    rows = rows.add_column(LENGTH_COLUMN, lengths)
    return (rows.select(good) if left_out else rows), left_out
