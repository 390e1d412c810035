"""Writes output tensors as safetensors shards with their index."""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.safetensors_files import header_bytes
from modeling_delta_llava.conversion.streams import OutputTensor, Span, TensorStream
from modeling_delta_llava.conversion.tensors import item_size

# How far ahead of writing sources are read into the page cache, and how much one request asks for.
READ_AHEAD_BYTES = 512 << 20
READ_AHEAD_STEP = 8 << 20
# Written bytes after which a file is sent to disk.
FLUSH_BYTES = 256 << 20
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
        ValueError: a tensor's pieces do not make up its shape, or two tensors have one name.
    """
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors to write have the same name")
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    with Flusher() as flusher, read_ahead([t for shard in shards for t in shard], stream) as reach:
        for name, shard in zip(names, shards, strict=True):
            path = folder / name
            with open(path, "wb", buffering=0) as file:
                _write_all(file.fileno(), memoryview(header_bytes({t.name: (t.dtype, t.shape) for t in shard})))
                for chunk in made_ahead(_chunks(shard, stream, reach, allow_nonfinite)):
                    _write_all(file.fileno(), chunk)
                    flusher.wrote(path, len(chunk))
                    advance(len(chunk))
            flusher.submit(path)
        flusher.wait()
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


def _chunks(
    shard: Sequence[OutputTensor],
    stream: TensorStream,
    reach: Callable[[OutputTensor], None],
    allow_nonfinite: bool,
) -> Iterator[memoryview]:
    """The bytes of a shard's tensors; [`write_shards`] says what is raised."""
    for tensor in shard:
        reach(tensor)
        written = 0
        for chunk in stream.chunks(tensor):
            written += len(chunk)
            yield chunk
        if stream.nonfinite and not allow_nonfinite:
            raise UserError(nonfinite_message(stream.nonfinite, tensor))
        if written != tensor.nbytes:
            raise ValueError(f"the pieces of {tensor.name} have {written} bytes, its shape {tensor.nbytes}")


def made_ahead(chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same chunks, each made on a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = maker.submit(next, chunks, None)
            yield chunk


class Flusher:
    """Sends files to disk on a thread while they are written, so that little is left to wait for at the end."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)
        self._running: deque[Future] = deque()
        self._bytes = 0

    def __enter__(self) -> "Flusher":
        return self

    def __exit__(self, *_error) -> None:
        self._thread.shutdown(cancel_futures=True)

    def wrote(self, path: Path, count: int) -> None:
        """To be called when `count` bytes more were written to a file; waits when the disk lags far behind."""
        self._bytes += count
        if self._bytes >= FLUSH_BYTES:
            self.submit(path)
            while len(self._running) > 2:
                self._running.popleft().result()

    def submit(self, path: Path) -> None:
        """Has a file sent to disk as it is now."""
        self._running.append(self._thread.submit(flush, path))
        self._bytes = 0

    def wait(self) -> None:
        """Returns when everything submitted is on disk."""
        while self._running:
            self._running.popleft().result()


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
