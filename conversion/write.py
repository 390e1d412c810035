"""Writes weights as safetensors shards with their index."""

import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.source import changed_message
from modeling_delta_llava.conversion.weights import Weight
from modeling_delta_llava.json_files import write_json

# Elements that the scan looks at together: they stay in the processor's cache.
SCAN_ELEMENTS = 1 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
# dtype -> (signed, unsigned, smallest bit pattern of a positive value that is not finite).
_EXPONENTS = {
    torch.float64: (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.int32, np.uint32, 0x7F80_0000),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `512MiB`.

    Raises:
        UserError: not a positive size.
    """
    digits = text.strip().rstrip("BbIiKkMmGg ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * _UNITS[unit])
        if size <= 0:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--max-shard-size {text!r} is not a size: write for example 5GB or 512MiB") from None
    return size


def plan_shards(weights: Mapping[str, Weight], max_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in their order, each file with at most `max_bytes` or a single tensor."""
    shapes = {name: torch.empty(w.shape, dtype=w.dtype, device="meta") for name, w in weights.items()}
    return split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_bytes
    ).filename_to_tensors


def write_shards(
    folder: Path,
    weights: Mapping[str, Weight],
    max_shard_bytes: int,
    *,
    scan: bool = True,
    allow_nonfinite: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, int]:
    """Writes all weights and, for several shards, the index.

    Two shards at a time, each straight from the mapped sources: while one waits for the disk, the other is read. As it
    was written, a shard is then read for values that are not finite. An interrupt waits for the shards at work. A
    source that is cut while something is computed from it (not copied) ends the process, as for any mapped file.

    Args:
        weights: by the name that they get.
        advance: called with the bytes of each shard when it is done.

    Returns:
        how many values are NaN or infinite, by tensor.

    Raises:
        UserError: a value is not finite and `allow_nonfinite` is not set, or a source was cut while it was read.
        OSError: the disk is full.
    """
    shards = plan_shards(weights, max_shard_bytes)
    nonfinite: dict[str, int] = {}
    pool = ThreadPoolExecutor(2)
    try:
        parts = {name: {key: weights[key] for key in keys} for name, keys in shards.items()}
        running = [pool.submit(_write_shard, folder / name, part, scan) for name, part in parts.items()]
        for shard, part in zip(running, parts.values(), strict=True):
            nonfinite |= shard.result()
            if nonfinite and not allow_nonfinite:
                key = next(iter(nonfinite))
                raise UserError(_nonfinite_message(key, nonfinite[key], weights[key]))
            advance(sum(weight.nbytes for weight in part.values()))
    finally:
        pool.shutdown(cancel_futures=True)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(weight.shape) for weight in weights.values()),
                "total_size": sum(weight.nbytes for weight in weights.values()),
            },
            "weight_map": {key: name for name, keys in shards.items() for key in keys},
        }
        write_json(folder / "model.safetensors.index.json", index)
    return nonfinite


def _write_shard(path: Path, weights: Mapping[str, Weight], scan: bool) -> dict[str, int]:
    allocate = _disk_allocator(path.parent)
    values = {key: weight.value(allocate) for key, weight in weights.items()}
    save(_without_overlap(values, allocate), path, next(iter(weights.values())).file)
    values.clear()  # gives back the disk that computed ones take
    return scanned(path) if scan else {}


def save(tensors: Mapping[str, Tensor], path: Path, source: Path) -> None:
    """Writes one file, with the rights that any new file gets.

    Raises:
        UserError: `source`, which the tensors are mapped from, became shorter meanwhile.
        OSError: the disk is full or broken.
    """
    path.touch()
    rights = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library tells the system's errors by number in its text. EFAULT is a page of a mapped file that is gone.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        if int(number[1]) == 14:
            raise UserError(changed_message(source)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(rights)


def _without_overlap(tensors: dict[str, Tensor], allocate: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Tensors that are parts of one another in the source, such as tied ones, as copies: the library refuses them."""
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            tensors[key] = allocate(tuple(tensor.shape), dtype=tensor.dtype).copy_(tensor)
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return tensors


def _disk_allocator(folder: Path) -> Callable[..., Tensor]:
    """Tensors in files without a name, which go with them: a shard's computed ones may be larger than the memory."""

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            # A full disk is an error here; where it is found out by writing to a mapped page, it ends the process.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)

    return allocate


def scanned(path: Path) -> dict[str, int]:
    """How many values of a safetensors file are NaN or infinite, for the tensors that have any."""
    with safe_open(path, framework="pt") as file:
        counts = {key: count_nonfinite(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 - not a dict
    return {key: count for key, count in counts.items() if count}


def count_nonfinite(tensor: Tensor) -> int:
    """How many values of a contiguous tensor are NaN or infinite; 0 for dtypes other than 16 to 64 bit floats.

    With all exponent bits set, a positive value is the largest of the signed integers of its width and a negative one
    the largest of the unsigned, so two maxima decide the usual case without a temporary.
    """
    if tensor.dtype not in _EXPONENTS or not tensor.numel():
        return 0
    signed, unsigned, limit = _EXPONENTS[tensor.dtype]
    sign_bit = 1 << (8 * tensor.dtype.itemsize - 1)
    bits = tensor.detach().reshape(-1).view(torch.uint8).numpy().view(signed)
    count = 0
    for first in range(0, bits.size, SCAN_ELEMENTS):
        part = bits[first : first + SCAN_ELEMENTS]
        if part.max() >= limit or part.view(unsigned).max() >= (limit | sign_bit):
            count += int(((part & (sign_bit - 1)) >= limit).sum())
    return count


def _nonfinite_message(name: str, count: int, weight: Weight) -> str:
    return (
        f"tensor {name!r} (from {weight.file}) holds {count} NaN or infinite value{'s' * (count != 1)} in "
        f"{str(weight.dtype).removeprefix('torch.')}: train or save it again, choose a wider --dtype, or pass "
        "--allow-nonfinite to convert it as it is"
    )
