"""Where tensors lie in files, as plain data: nothing here reads weights or needs torch."""

import math
from dataclasses import dataclass
from pathlib import Path

# Name in a safetensors header -> (bytes per element, name in torch).
DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
SAFETENSORS_NAME = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
FLOATING = ("F64", "F32", "F16", "BF16")


def item_size(dtype: str) -> int:
    """Bytes per element of a dtype given by its safetensors name."""
    return DTYPES[dtype][0]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of a shape, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a file.

    Attributes:
        key: its name in the file.
        file: the file that holds its bytes, uncompressed and little-endian.
        dtype: safetensors name (`"BF16"`).
        shape: its axes.
        offset: position of its first element in the file, in bytes.
        strides: steps between elements of each axis, in elements.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * item_size(self.dtype)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps, so that bytes can be copied as they are."""
        expected = contiguous_strides(self.shape)
        return self.size == 0 or all(
            length == 1 or stride == wanted
            for length, stride, wanted in zip(self.shape, self.strides, expected, strict=True)
        )

    @property
    def span(self) -> int:
        """Elements between the first and the last one, both included."""
        if self.size == 0:
            return 0
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))


def format_bytes(count: float) -> str:
    """`13.5 GB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
