"""Tensors of the model as recipes over mapped files, checked against the model, and written as safetensors shards."""

import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.source import FLOATING, Checkpoint, changed_message
from modeling_delta_llava.conversion.tables import PROJECTOR, TOWER, describe_keys
from modeling_delta_llava.json_files import write_json

# Elements of one block of what is computed, in fp32.
BLOCK_ELEMENTS = 16 << 20
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


@dataclass(frozen=True)
class LowRankUpdate:
    """What LoRA adds to a weight: `scale * B @ A`."""

    factor_a: Tensor
    factor_b: Tensor
    scale: float


@dataclass(frozen=True)
class Weight:
    """One tensor of the model: what a file holds, and what is computed from it when it is written.

    Attributes:
        stored: mapped from `file`, where it is called `key`.
        dtype: of the result.
        update: is added in fp32, and the sum rounded once.
        mean_rows: how many copies of the mean row follow the rows. The logit of a mean row is the mean of the other
            rows' logits, so it never exceeds the largest of them.
    """

    stored: Tensor
    key: str
    file: Path
    dtype: torch.dtype
    update: LowRankUpdate | None = None
    mean_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.stored.shape)
        return (shape[0] + self.mean_rows, *shape[1:]) if self.mean_rows else shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of the result are those that lie in the file."""
        as_stored = self.stored.is_contiguous() and self.stored.dtype == self.dtype
        return as_stored and self.update is None and not self.mean_rows

    def value(self, allocate: Callable[[tuple[int, ...], torch.dtype], Tensor] = torch.empty) -> Tensor:
        """The result: the mapped tensor where nothing has to be computed.

        Args:
            allocate: makes the tensor, `(shape, dtype)`, that is filled block by block otherwise.
        """
        if self.is_copy:
            return self.stored
        result = allocate(self.shape, dtype=self.dtype)
        if self.update is None and not self.mean_rows:
            return result.copy_(self.stored)
        total = torch.zeros(self.shape[1:], dtype=torch.float64)
        rows = self.stored.shape[0]
        at_once = max(1, BLOCK_ELEMENTS // math.prod(self.shape[1:]))
        for first in range(0, rows, at_once):
            block = self._rows(first, at_once)
            result[first : first + len(block)] = block
            if self.mean_rows:
                total += block.sum(0, dtype=torch.float64)
        result[rows:] = (total / rows).float()
        return result

    def _rows(self, first: int, count: int) -> Tensor:
        stored = self.stored[first : first + count]
        if self.update is None:
            return stored
        factor_b = self.update.factor_b[first : first + count].float()
        return (factor_b @ (self.update.factor_a.float() * self.update.scale)).add_(stored)


Weights = dict[str, Weight]


def stored_weight(checkpoint: Checkpoint, key: str) -> Weight:
    """A tensor of a checkpoint as it is."""
    tensor = checkpoint.tensors[key]
    return Weight(tensor, key, checkpoint.files[key], tensor.dtype)


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have one dtype and shape, and the same bits, NaN included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(left.dtype.itemsize)
    if bits is None:
        return torch.equal(left, right)
    return torch.equal(left.view(bits), right.view(bits))


# --- parts of tensors ------------------------------------------------------------------------------------------------

# One tensor of training that is several in the model, its rows in this order.
QKV = tuple(f"{PROJECTOR}cross_attention.{part}_proj" for part in ("q", "k", "v"))
QKV_FUSED = f"{PROJECTOR}cross_attention.qkv_proj"
# 1x1 convolutions of training that are Linears in the model.
SQUEEZED = tuple(
    f"{PROJECTOR}query_block.{part}.weight"
    for part in ("input_proj", "local_proj", "local_mixer.out_proj", "mlp.fc1", "mlp.fc2")
)


def with_parts_split(weights: Weights) -> Weights:
    """Tensors of training as the model has them: fused ones split, 1x1 convolutions without their last two axes.

    Raises:
        UserError: a tensor has another number of axes, or rows that cannot be split.
    """
    result: Weights = {}
    for name, weight in weights.items():
        stored = weight.stored
        if name.rpartition(".")[0] == QKV_FUSED:
            if not stored.shape or stored.shape[0] % len(QKV):
                raise UserError(f"{described(weight)}, not {len(QKV)} equal parts")
            for part, rows in zip(QKV, stored.chunk(len(QKV)), strict=True):
                result[f"{part}.{name.rpartition('.')[2]}"] = replace(weight, stored=rows)
        elif name in SQUEEZED and stored.shape[2:] == (1, 1):
            result[name] = replace(weight, stored=stored.flatten(1))
        elif name in SQUEEZED and stored.ndim != 2:
            raise UserError(f"{described(weight)}, not that of a 1x1 convolution")
        else:
            result[name] = weight
    return result


def with_parts_joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back of [`with_parts_split`]: tensors of the model as training has them."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module == QKV[0]:
            result[f"{QKV_FUSED}.{leaf}"] = torch.cat([tensors[f"{part}.{leaf}"] for part in QKV])
        elif module not in QKV:
            result[name] = tensor[..., None, None] if name in SQUEEZED else tensor
    return result


def described(weight: Weight) -> str:
    return f"tensor {weight.key!r} in {weight.file} has shape {tuple(weight.stored.shape)}"


# --- checks ----------------------------------------------------------------------------------------------------------


def check_weights(
    weights: Weights, needed: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compares names, shapes and dtypes with the model's own, before a byte is written.

    Raises:
        UserError: tensors missing, unknown, of another shape, or not floating point.
    """
    missing = [name for name in needed if name not in weights]
    surplus = [name for name in weights if name not in needed and name not in optional]
    if missing:
        raise UserError(
            f"{where} lacks {describe_keys(missing)} of the model that config.json describes{_hint(missing[0])}"
        )
    if surplus:
        keys = [weights[name].key for name in surplus]
        raise UserError(
            f"{where} holds {describe_keys(keys)} beyond the model that config.json describes{_hint(surplus[0])}"
        )
    for name, weight in weights.items():
        shape = needed[name] if name in needed else optional[name]
        if weight.shape != shape:
            raise UserError(f"{described(weight)}, but config.json describes {shape} for {name}{_hint(name)}")
        if weight.stored.dtype not in FLOATING:
            raise UserError(
                f"tensor {weight.key!r} in {weight.file} is {str(weight.stored.dtype).removeprefix('torch.')}: "
                "quantised weights cannot be converted, save the model in 16 or 32 bit"
            )


def _hint(name: str) -> str:
    if name.startswith(TOWER):
        return ": the vision tower is another one; give the right one with --vision-tower"
    if name.startswith(PROJECTOR):
        return ": the projector was trained for another tower or language model than given"
    return ": the language model is another one than config.json says; give the two that belong together"


# --- shards ----------------------------------------------------------------------------------------------------------


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
    allocate = partial(_on_disk, path.parent)
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


def _on_disk(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name, which goes with it: a shard's computed ones may be larger than the memory."""
    count = math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # A full disk is an error here; where it is found out by writing to a mapped page, it ends the process.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


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
