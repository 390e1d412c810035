"""Writes output tensors as safetensors shards with their index."""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modeling_delta_llava.conversion.safetensors_files import header_bytes
from modeling_delta_llava.conversion.streams import OutputTensor, Span, TensorStream
from modeling_delta_llava.conversion.tensors import item_size
from modeling_delta_llava.errors import UserError

# How far ahead of writing sources are read into the page cache, and how much one request asks for.
READ_AHEAD_BYTES = 512 << 20
READ_AHEAD_STEP = 8 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


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


def plan_shards(tensors: Sequence[OutputTensor], max_bytes: int) -> list[list[OutputTensor]]:
    """Tensors in their order, cut into shards of at most `max_bytes` (a larger tensor gets a shard of its own).

    Inside a shard wider dtypes come first, so that every tensor starts at a multiple of its element size.
    """
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -item_size(tensor.dtype)) for shard in shards]


def shard_names(count: int) -> list[str]:
    """File names that `from_pretrained` looks for."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shards(
    folder: Path,
    tensors: Sequence[OutputTensor],
    max_shard_bytes: int,
    stream: TensorStream,
    advance: Callable[[int], None] = lambda count: None,
    allow_nonfinite: bool = False,
) -> list[Path]:
    """Writes all tensors and, for several shards, the index; every file is on disk when this returns.

    Args:
        advance: called with the number of bytes written since the last call.
        allow_nonfinite: go on when the stream's scan finds NaN or infinity.

    Raises:
        UserError: a value is not finite.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    with ThreadPoolExecutor(1) as flusher, read_ahead([t for shard in shards for t in shard], stream) as reach:
        flushed = []
        for name, shard in zip(names, shards, strict=True):
            with open(folder / name, "wb", buffering=0) as file:
                _write_all(file.fileno(), memoryview(header_bytes({t.name: (t.dtype, t.shape) for t in shard})))
                for tensor in shard:
                    reach(tensor)
                    for chunk in stream.chunks(tensor):
                        _write_all(file.fileno(), chunk)
                        advance(len(chunk))
                    if stream.nonfinite and not allow_nonfinite:
                        raise UserError(nonfinite_message(stream.nonfinite, tensor))
            # Flushing one shard to disk goes on while the next one is copied.
            flushed.append(flusher.submit(flush, folder / name))
        for result in flushed:
            result.result()
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
                "total_size": sum(tensor.nbytes for tensor in tensors),
            },
            "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        flush(path)
        return [*(folder / name for name in names), path]
    return [folder / names[0]]


@contextlib.contextmanager
def read_ahead(tensors: Sequence[OutputTensor], stream: TensorStream) -> Iterator[Callable[[OutputTensor], None]]:
    """Has the kernel read sources before they are needed, on a thread, so that reading and writing overlap.

    Args:
        tensors: in the order in which they are written.

    Yields:
        a function to call with each of them before it is written.
    """
    waiting = iter(tensors)
    ahead: deque[OutputTensor] = deque()
    ahead_bytes = 0

    def advise(descriptor: int, position: int, count: int) -> None:
        with contextlib.suppress(OSError):  # only advice: some file systems take none
            for start in range(position, position + count, READ_AHEAD_STEP):
                os.posix_fadvise(
                    descriptor, start, min(READ_AHEAD_STEP, position + count - start), os.POSIX_FADV_WILLNEED
                )

    def reach(tensor: OutputTensor) -> None:
        nonlocal ahead_bytes
        while ahead_bytes < READ_AHEAD_BYTES and (following := next(waiting, None)) is not None:
            ahead.append(following)
            ahead_bytes += following.nbytes
            for piece in following.pieces:
                if isinstance(piece, Span) and hasattr(os, "posix_fadvise"):
                    stored, size = piece.stored, item_size(piece.dtype)
                    position = stored.offset + piece.start * size
                    reader.submit(advise, stream.descriptor(stored.file), position, piece.count * size)
        while ahead and ahead[0] is not tensor:
            ahead_bytes -= ahead.popleft().nbytes

    with ThreadPoolExecutor(1) as reader:
        try:
            yield reach
        finally:
            reader.shutdown(cancel_futures=True)


def nonfinite_message(found: dict[str, int], tensor: OutputTensor) -> str:
    """One line about the first tensor with values that are not finite."""
    name, count = next(iter(found.items()))
    files = sorted({str(piece.stored.file) for piece in tensor.pieces if isinstance(piece, Span)})
    where = f" (from {files[0]})" if files else ""
    return (
        f"tensor {name!r}{where} holds {count} NaN or infinite value{'s' * (count != 1)} in {tensor.dtype}: "
        "train or save it again, choose a wider --dtype, or pass --allow-nonfinite to convert it as it is"
    )


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def flush(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
