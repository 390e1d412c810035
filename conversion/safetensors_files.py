"""Reads and writes safetensors headers: names, dtypes, shapes and byte ranges, without mapping the file."""

import json
import math
import os
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.tensors import DTYPES, StoredTensor, contiguous_strides, item_size

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000


def _unique_entries(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return entries


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file, checked to fill its data area exactly, without gap or overlap.

    Raises:
        UserError: the header is corrupt, a dtype is unknown, or the file is shorter or longer than the header says.
    """
    length = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a safetensors file (bad header length): download or save it again")
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise UserError(f"{path} is truncated inside its header: download or save it again")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_entries)
        if not isinstance(header, dict):
            raise ValueError("not a table")
        header.pop("__metadata__", None)
        entries = [_entry(key, value) for key, value in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a corrupt header ({error}): download or save it again") from error
    start = 8 + header_bytes
    position = 0
    tensors = {}
    for key, dtype, shape, begin, end in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if begin != position:
            raise UserError(f"{path} has a corrupt header (tensor {key!r} leaves a gap or overlaps): save it again")
        position = end
        tensors[key] = StoredTensor(key, path, dtype, shape, start + begin, contiguous_strides(shape))
    if start + position > length:
        raise UserError(
            f"{path} is truncated: {length} bytes, its header promises {start + position}; download or save it again"
        )
    if start + position < length:
        raise UserError(f"{path} has {length - start - position} bytes after its last tensor: save it again")
    return {key: tensors[key] for key in header}


def _entry(key: str, value: dict) -> tuple[str, str, tuple[int, ...], int, int]:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {key!r} has the unknown dtype {dtype!r}")
    numbers = [*shape, begin, end]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"tensor {key!r} has a bad shape or offset")
    if end - begin != math.prod(shape) * item_size(dtype):
        raise ValueError(f"tensor {key!r}: {end - begin} bytes do not hold shape {shape} in {dtype}")
    return key, dtype, tuple(shape), begin, end


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The head of a safetensors file that holds these tensors (name -> dtype, shape) in this order.

    Padded with spaces so that the data area starts at a multiple of eight bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * item_size(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
