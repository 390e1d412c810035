"""Reads `torch.save` files without torch: which tensors they hold and where their bytes lie.

A checkpoint is a pickle, and a pickle can run code. The interpreter here resolves only the names in `_ALLOWED`, to
stand-ins of our own that record shapes and offsets, so a file is never executed and no storage is ever loaded: the
result is one [`StoredTensor`] per tensor, pointing into the file. Both layouts of torch are read: the zip archive of
torch >= 1.6 and the plain sequence of pickles before it.
"""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.tensors import SAFETENSORS_NAME, StoredTensor, contiguous_strides, item_size

# torch's name for a typed storage -> dtype.
_STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
    "UntypedStorage": "U8",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 256_000_000


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: a view of a storage."""

    storage: _Storage
    dtype: str
    offset: int  # elements, of `dtype`
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_unused) -> _View:
    return _View(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_of_dtype(storage, offset, shape, strides, _grad, _hooks, dtype, *_unused) -> _View:
    return _View(storage, dtype.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_unused) -> _View:
    return data


def _allowed() -> dict[tuple[str, str], object]:
    names: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_of_dtype,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    }
    for name, dtype in _STORAGE_DTYPES.items():
        names["torch", name] = _StorageType(dtype)
    names["torch.storage", "UntypedStorage"] = _StorageType("U8")
    for torch_name, dtype in SAFETENSORS_NAME.items():
        names["torch", torch_name] = _StorageType(dtype)
    return names


_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    """Resolves the allow-list and nothing else."""

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        # Python 2 pickles spell the module of built-in names differently, but none of those is allowed anyway.
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"{self.path} is refused: its pickle asks for {module}.{name}, which weights never need; "
                "get the file from a source you trust, as safetensors"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, identifier: object) -> _Storage:
        if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {identifier!r}")
        _, storage_type, key, _location, elements = identifier[:5]
        if len(identifier) > 5 and identifier[5] is not None:
            raise pickle.UnpicklingError("storages that are views of each other are not supported")
        storage = _Storage(str(key), storage_type.dtype, int(elements))
        self.storages[storage.key] = storage
        return storage


def _unpickle(file: BinaryIO, path: Path) -> object:
    try:
        return _Unpickler(file, path).load()
    except UserError:
        raise
    # A damaged pickle can fail in any operation of the interpreter.
    except Exception as error:
        raise UserError(f"{path} holds a damaged pickle ({type(error).__name__}: {error}): save it again") from error


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a state dict saved by `torch.save`, by key; bytes stay in the file.

    A file with the state dict under a `state_dict` or `model` key is read from there. Tensors that share a storage
    (tied weights) point at the same bytes; transposed ones keep their strides.

    Raises:
        UserError: the file is damaged, truncated, compressed, asks for a name outside the allow-list, or does not
            hold a flat table of tensors.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    content, locate = _read_zip(path) if is_zip else _read_legacy(path)
    # The methods of dict itself: a pickle may give an OrderedDict attributes that hide them.
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(dict.get(content, wrapper), dict):
            content = dict.get(content, wrapper)
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a table of tensors")
    tensors = {}
    for key, view in dict.items(content):
        if not isinstance(key, str) or not isinstance(view, _View):
            raise UserError(f"{path} holds {key!r}, which is not a tensor: save a plain state dict")
        try:
            tensors[key] = _located(key, view, path, locate)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} describes tensor {key!r} in no valid way: save it again") from error
    return tensors


def _located(key: str, view: _View, path: Path, locate: Callable[[_Storage], tuple[int, int]]) -> StoredTensor:
    numbers = (view.offset, *view.shape, *view.strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(view.shape) != len(view.strides):
        raise UserError(f"{path} has a bad shape, stride or offset for tensor {key!r}: save it again")
    start, length = locate(view.storage)
    size = item_size(view.dtype)
    tensor = StoredTensor(key, path, view.dtype, view.shape, start + view.offset * size, view.strides)
    if tensor.size and (view.offset + tensor.span) * size > length:
        raise UserError(f"{path}: tensor {key!r} reaches beyond its storage of {length} bytes: save it again")
    return replace(tensor, strides=contiguous_strides(view.shape)) if tensor.is_contiguous else tensor


def _read_zip(path: Path) -> tuple[object, Callable[[_Storage], tuple[int, int]]]:
    """The unpickled table of a zip checkpoint and where in the file each storage lies (position, bytes)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1 or len(members) != len(archive.infolist()):
                raise UserError(f"{path} is a zip archive but not a torch checkpoint: save it again")
            root = pickles[0].removesuffix("data.pkl")
            order = members.get(root + "byteorder")
            if order is not None and archive.read(order).strip() != b"little":
                raise UserError(f"{path} was saved on a big-endian machine: save it again on a little-endian one")
            if members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
                raise UserError(f"{path} holds a pickle too large for a table of tensors: save it again")
            with archive.open(pickles[0]) as file:
                content = _unpickle(file, path)
    except UserError:
        raise
    # zipfile answers a damaged archive with BadZipFile, but also with ValueError, RuntimeError, NotImplementedError...
    except Exception as error:
        raise UserError(f"{path} is truncated or damaged ({error}): download or save it again") from error

    length = os.path.getsize(path)
    starts: dict[str, int] = {}

    def locate(storage: _Storage) -> tuple[int, int]:
        info = members.get(f"{root}data/{storage.key}")
        if info is None:
            raise UserError(f"{path} lacks the data of storage {storage.key!r}: download or save it again")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} is a compressed archive: unpack it and save it again with torch.save")
        if info.filename not in starts:
            with open(path, "rb") as file:
                file.seek(info.header_offset)
                local = file.read(30)
            if len(local) < 30 or local[:4] != b"PK\x03\x04":
                raise UserError(f"{path} is truncated or damaged: download or save it again")
            name_length, extra_length = struct.unpack("<HH", local[26:30])
            starts[info.filename] = info.header_offset + 30 + name_length + extra_length
        start = starts[info.filename]
        if start + info.file_size > length or storage.elements * item_size(storage.dtype) > info.file_size:
            raise UserError(f"{path} is truncated (storage {storage.key!r}): download or save it again")
        return start, info.file_size

    return content, locate


def _read_legacy(path: Path) -> tuple[object, Callable[[_Storage], tuple[int, int]]]:
    """The same for the layout before torch 1.6: pickles in a row, then each storage behind its element count."""
    with open(path, "rb") as file:
        head = file.read(2)
        if head[:1] != b"\x80":
            raise UserError(f"{path} is not a torch checkpoint: download or save it again")
        file.seek(0)
        try:
            if _Unpickler(file, path).load() != _LEGACY_MAGIC or _Unpickler(file, path).load() != _LEGACY_PROTOCOL:
                raise UserError(f"{path} is a pickle but not a torch checkpoint: save it again with torch.save")
            system = _Unpickler(file, path).load()
            if not isinstance(system, dict) or system.get("little_endian") is not True:
                raise UserError(f"{path} was saved on a big-endian machine: save it again on a little-endian one")
            table = _Unpickler(file, path)
            content = table.load()
            order = _Unpickler(file, path).load()
            positions: dict[str, tuple[int, int]] = {}
            end = os.path.getsize(path)
            for key in order:
                storage = table.storages[key]
                count = int.from_bytes(file.read(8), "little")
                nbytes = count * item_size(storage.dtype)
                if count != storage.elements or file.tell() + nbytes > end:
                    raise UserError(f"{path} is truncated (storage {key!r}): download or save it again")
                positions[key] = (file.tell(), nbytes)
                file.seek(nbytes, os.SEEK_CUR)
        except UserError:
            raise
        # A damaged pickle can fail in any operation of the interpreter.
        except Exception as error:
            raise UserError(f"{path} is truncated or damaged ({type(error).__name__}): save it again") from error

    def locate(storage: _Storage) -> tuple[int, int]:
        if storage.key not in positions:
            raise UserError(f"{path} lacks the data of storage {storage.key!r}: download or save it again")
        return positions[storage.key]

    return content, locate
