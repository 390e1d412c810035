"""Tensors of the model as recipes over mapped files: what is copied as it is, and what is computed on the way."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.source import FLOATING, Checkpoint
from modeling_delta_llava.conversion.tables import PROJECTOR, TOWER, describe_keys

# Elements of one block of what is computed, in fp32.
BLOCK_ELEMENTS = 16 << 20


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
