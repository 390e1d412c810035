"""Output tensors as recipes over stored bytes, and the stream that carries them out in constant memory.

An [`OutputTensor`] is a list of pieces that follow each other along the first axis. Splitting `in_proj`, squeezing a
1x1 convolution, concatenating q, k and v again and padding rows are all only choices of byte ranges, so their bytes go
from file to file untouched. What has to be computed (another dtype, a LoRA merge, a transposed storage, new rows) is
computed a block at a time, in fp32, and rounded once.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.tensors import DTYPES, FLOATING, StoredTensor, item_size

BUFFER_BYTES = 4 << 20
# Elements of one block of a LoRA merge, in fp32.
MERGE_BLOCK_ELEMENTS = 16 << 20


@dataclass(frozen=True)
class Span:
    """`count` elements of a stored tensor in row-major order, from element `start` on."""

    stored: StoredTensor
    start: int
    count: int

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @classmethod
    def whole(cls, stored: StoredTensor) -> "Span":
        return cls(stored, 0, stored.size)


@dataclass(frozen=True)
class LowRankUpdate:
    """`base + scale * B @ A`, in fp32."""

    base: StoredTensor
    factor_a: StoredTensor
    factor_b: StoredTensor
    scale: float
    dtype = "F32"

    @property
    def count(self) -> int:
        return self.base.size


@dataclass(frozen=True)
class MeanRows:
    """`rows` copies of the mean row of a matrix of `columns` columns, in fp32.

    The logit of a mean row is the mean of the other rows' logits, so it never exceeds the largest of them.
    """

    of: tuple["Span | LowRankUpdate", ...]
    columns: int
    rows: int
    dtype = "F32"

    @property
    def count(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Literal:
    """Bytes given as they are."""

    data: bytes
    dtype: str

    @property
    def count(self) -> int:
        return len(self.data) // item_size(self.dtype)


Piece = Span | LowRankUpdate | MeanRows | Literal


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: pieces follow each other along the first axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * item_size(self.dtype)

    @property
    def copied_bytes(self) -> int:
        """Bytes that reach the output exactly as they lie in a source file."""
        return sum(
            piece.count * item_size(self.dtype)
            for piece in self.pieces
            if isinstance(piece, Span) and piece.dtype == self.dtype and piece.stored.is_contiguous
        )


# dtype -> (signed, unsigned, smallest bit pattern of a positive value that is not finite).
_EXPONENTS = {
    "F64": (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.int32, np.uint32, 0x7F80_0000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F8_E5M2": (np.int8, np.uint8, 0x7C),
    "F8_E4M3": (np.int8, np.uint8, 0x7F),
}


def count_nonfinite(data: memoryview | np.ndarray, dtype: str) -> int:
    """How many values in a buffer are NaN or infinite; 0 for integer dtypes.

    With all exponent bits set, a positive value is the largest of the signed integers of its width and a negative one
    the largest of the unsigned, so two maxima over the buffer decide the usual case without a temporary.
    """
    if dtype not in _EXPONENTS:
        return 0
    signed, unsigned, limit = _EXPONENTS[dtype]
    bits = np.frombuffer(data, signed)
    if not bits.size:
        return 0
    sign_bit = 1 << (8 * item_size(dtype) - 1)
    if bits.max() < limit and bits.view(unsigned).max() < (limit | sign_bit):
        return 0
    return int(((bits & (sign_bit - 1)) >= limit).sum())


class TensorStream:
    """Reads output tensors chunk by chunk; keeps source files open until closed.

    Chunks are views of two buffers in turn: while one is written, the next can be made on another thread.

    Args:
        scan: test every chunk for NaN and infinity, before and after a change of dtype.
    """

    def __init__(self, scan: bool = True):
        self.scan = scan
        self.nonfinite: dict[str, int] = {}
        self._descriptors: dict[Path, int] = {}
        self._buffers = [np.empty(BUFFER_BYTES, np.uint8) for _ in range(2)]

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(self, *_error) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, path: Path) -> int:
        """An open descriptor of a source file."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def chunks(self, tensor: OutputTensor) -> Iterator[memoryview]:
        """The bytes of one output tensor, in order; what the scan finds is added up in `nonfinite`."""
        for piece in tensor.pieces:
            for values in self._piece(piece):
                if self.scan:
                    self._note(tensor.name, count_nonfinite(values, piece.dtype))
                if piece.dtype == tensor.dtype:
                    yield values
                else:
                    changed = cast(values, piece.dtype, tensor.dtype)
                    if self.scan and tensor.name not in self.nonfinite:
                        self._note(tensor.name, count_nonfinite(changed, tensor.dtype))
                    yield changed

    def _note(self, name: str, count: int) -> None:
        if count:
            self.nonfinite[name] = self.nonfinite.get(name, 0) + count

    def _piece(self, piece: Piece) -> Iterator[memoryview]:
        """A piece in its own dtype."""
        if isinstance(piece, Literal):
            yield memoryview(piece.data)
        elif isinstance(piece, MeanRows):
            row = self._mean_row(piece)
            for _ in range(piece.rows):
                yield row
        elif isinstance(piece, LowRankUpdate):
            yield from self._merged(piece)
        elif piece.stored.is_contiguous:
            size = item_size(piece.dtype)
            yield from self._read(piece.stored, piece.start * size, piece.count * size)
        else:
            size = item_size(piece.dtype)
            whole = memoryview(self._gathered(piece.stored)).cast("B")
            yield whole[piece.start * size : (piece.start + piece.count) * size]

    def _read(self, stored: StoredTensor, begin: int, nbytes: int) -> Iterator[memoryview]:
        position, end = stored.offset + begin, stored.offset + begin + nbytes
        while position < end:
            self._buffers.reverse()
            chunk = memoryview(self._buffers[0])[: min(BUFFER_BYTES, end - position)]
            self.read_into(stored.file, position, chunk)
            yield chunk
            position += len(chunk)

    def read_into(self, path: Path, position: int, target: memoryview) -> None:
        """Fills `target` from a source file.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        descriptor = self.descriptor(path)
        while target:
            try:
                count = os.preadv(descriptor, [target], position)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}): check its disk and run again") from error
            if count == 0:
                raise UserError(f"{path} became shorter while it was read: leave the source alone and run again")
            target = target[count:]
            position += count

    def _gathered(self, stored: StoredTensor) -> np.ndarray:
        """A stored tensor of any strides, in row-major order, as unsigned integers of its width."""
        size = item_size(stored.dtype)
        values = np.empty(stored.span, f"u{size}")
        self.read_into(stored.file, stored.offset, memoryview(values).cast("B"))
        steps = tuple(stride * size for stride in stored.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, stored.shape, steps))

    def load(self, stored: StoredTensor):
        """A whole stored tensor as a `torch.Tensor`: for LoRA factors and other small ones."""
        import torch

        values = torch.from_numpy(self._gathered(stored).reshape(-1).view(np.uint8))
        return values.view(getattr(torch, DTYPES[stored.dtype][1])).reshape(stored.shape)

    def _merged(self, piece: LowRankUpdate) -> Iterator[memoryview]:
        import torch

        columns = piece.base.shape[1]
        size = item_size(piece.base.dtype)
        factor_a = self.load(piece.factor_a).float() * piece.scale
        factor_b = self.load(piece.factor_b).float()
        dtype = getattr(torch, DTYPES[piece.base.dtype][1])
        rows_at_once = max(1, MERGE_BLOCK_ELEMENTS // columns)
        base = piece.base if piece.base.is_contiguous else None
        gathered = None if base else self.load(piece.base)
        for first in range(0, piece.base.shape[0], rows_at_once):
            update = factor_b[first : first + rows_at_once] @ factor_a
            rows = update.shape[0]
            if base:
                block = np.empty(rows * columns * size, np.uint8)
                self.read_into(base.file, base.offset + first * columns * size, memoryview(block))
                weight = torch.from_numpy(block).view(dtype).reshape(rows, columns)
            else:
                weight = gathered[first : first + rows]
            yield torch_bytes(update.add_(weight))

    def _mean_row(self, piece: MeanRows) -> memoryview:
        import torch

        total = torch.zeros(piece.columns, dtype=torch.float64)
        count = 0
        for source in piece.of:
            for rows in self._rows(source, piece.columns):
                total += rows.sum(0, dtype=torch.float64)
                count += len(rows)
        return torch_bytes((total / count).float())

    def _rows(self, source: "Span | LowRankUpdate", columns: int) -> Iterator:
        """Whole rows of a matrix as `(rows, columns)` tensors; the buffers of `_read` stay as they are."""
        import torch

        dtype = getattr(torch, DTYPES[source.dtype][1])
        if isinstance(source, LowRankUpdate):
            for values in self._merged(source):
                yield torch.frombuffer(values, dtype=dtype).view(-1, columns)
        elif not source.stored.is_contiguous:
            yield self.load(source.stored).reshape(-1)[source.start : source.start + source.count].view(-1, columns)
        else:
            size = item_size(source.dtype)
            step = max(1, BUFFER_BYTES // (columns * size)) * columns
            for start in range(source.start, source.start + source.count, step):
                values = torch.empty(min(step, source.start + source.count - start), dtype=dtype)
                self.read_into(source.stored.file, source.stored.offset + start * size, torch_bytes(values))
                yield values.view(-1, columns)


def torch_bytes(tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def cast(values: memoryview, dtype: str, target: str) -> memoryview:
    """A chunk in another floating dtype, each value rounded once."""
    import torch

    source = torch.frombuffer(values, dtype=getattr(torch, DTYPES[dtype][1]))
    return torch_bytes(source.to(getattr(torch, DTYPES[target][1])))


def target_dtype(dtype: str, wanted: str | None) -> str:
    """What a tensor of `dtype` becomes: floating ones take the wanted dtype, all others stay."""
    return wanted if wanted and dtype in FLOATING else dtype
