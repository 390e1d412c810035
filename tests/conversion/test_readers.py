"""Reading safetensors headers and torch.save files: right byte ranges, and nothing but tensors."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.safetensors_files import header_bytes, read_header
from modeling_delta_llava.conversion.streams import TensorStream
from modeling_delta_llava.conversion.tensors import DTYPES
from modeling_delta_llava.conversion.torch_files import read_torch_file


def loaded(tensors) -> dict[str, torch.Tensor]:
    with TensorStream() as stream:
        return {key: stream.load(stored) for key, stored in tensors.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor.detach()), key


def sample_tensors() -> dict[str, torch.Tensor]:
    weight = torch.randn(5, 7)
    return {
        "matrix": weight,
        "tied": weight,
        "transposed": weight.t(),
        "row": weight[2],
        "columns": weight[:, 2:4],
        "reversed axes": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16)),
        "half": torch.randn(4).half(),
        "integers": torch.arange(4),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_of_all_kinds_of_tensors(tmp_path, zipped):
    tensors = sample_tensors()
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = read_torch_file(tmp_path / "x.bin")
    assert_equal(loaded(found), tensors)
    assert found["tied"].offset == found["matrix"].offset
    assert not found["transposed"].is_contiguous
    assert found["row"].is_contiguous


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_torch_files_with_the_state_dict_inside(tmp_path, wrapper):
    tensors = {"a": torch.randn(2)}
    torch.save({wrapper: tensors}, tmp_path / "x.bin")
    assert_equal(loaded(read_torch_file(tmp_path / "x.bin")), tensors)


def test_torch_file_of_a_module_with_its_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    assert_equal(loaded(read_torch_file(tmp_path / "x.bin")), dict(module.state_dict()))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_runs_code_is_refused_and_named(tmp_path, zipped):
    mark = tmp_path / "ran"
    torch.save({"a": Payload(mark)}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x\.bin is refused: its pickle asks for (posix|nt)\.system"):
        read_torch_file(tmp_path / "x.bin")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "os.system", "numpy.load"])
def test_no_global_outside_the_list_is_resolved(tmp_path, name):
    module, function = name.rsplit(".", 1)
    text = f"c{module}\n{function}\n(V1\ntR.".encode()
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", text)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_torch_file(tmp_path / "x.bin")


def test_a_python_object_in_a_torch_file_is_refused(tmp_path):
    torch.save({"a": torch.randn(2), "epoch": 3}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="'epoch', which is not a tensor"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_torch_files(tmp_path, zipped, kept):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(300, 30)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"x\.bin"):
        read_torch_file(path)


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 0.999), value=st.integers(0, 255), zipped=st.booleans())
def test_a_changed_byte_gives_tensors_or_a_user_error(tmp_path_factory, position, value, zipped):
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    torch.save({"a": torch.randn(4, 3), "b": torch.randn(2).half()}, path, _use_new_zipfile_serialization=zipped)
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] = value
    path.write_bytes(data)
    try:
        found = read_torch_file(path)
    except UserError:
        return
    for stored in found.values():
        assert stored.offset + stored.span * DTYPES[stored.dtype][0] <= len(data)


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"a": torch.randn(3)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as source, zipfile.ZipFile(tmp_path / "y.bin", "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_torch_file(tmp_path / "y.bin")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_views_beyond_their_storage_are_refused(tmp_path):
    class Long:
        def __reduce__(self):
            storage = torch.randn(4).storage()
            return torch._utils._rebuild_tensor_v2, (storage, 2, (4,), (1,), False, {})

    torch.save({"a": Long()}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="beyond its storage"):
        read_torch_file(tmp_path / "x.bin")


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_safetensors_of_all_dtypes(tmp_path):
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(getattr(torch, torch_name)) for name, (_, torch_name) in DTYPES.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert_equal(loaded(read_header(tmp_path / "x.safetensors")), tensors)


def test_our_header_is_read_by_the_library(tmp_path):
    from safetensors import safe_open

    values = np.arange(6, dtype=np.float32)
    head = header_bytes({"a": ("F32", (2, 3)), "b": ("F32", ())})
    assert len(head) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(head + values.tobytes() + values[:1].tobytes())
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert np.array_equal(file.get_tensor("a"), values.reshape(2, 3))
        assert file.get_tensor("b").shape == ()


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", 0, "bad header length"),
        (b"{", 0, "bad header length"),
        (b"not json at all", 8, "corrupt header"),
        (b"[1, 2]", 8, "corrupt header"),
        ('{"a": {"dtype": "F32"}}', 8, "corrupt header"),
        ({"a": entry(dtype="F31")}, 8, "unknown dtype 'F31'"),
        ({"a": entry(shape=(3,))}, 8, "8 bytes do not hold shape"),
        ({"a": entry(shape=(-2,))}, 8, "bad shape or offset"),
        ({"a": entry(shape=(2.0,))}, 8, "bad shape or offset"),
        ({"a": entry(4, 12)}, 12, "gap or overlap"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "gap or overlap"),
        ({"a": entry()}, 7, "truncated: "),
        ({"a": entry()}, 9, "1 bytes after its last tensor"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), 8, "'a' appears twice"),
    ],
)
def test_corrupt_safetensors(tmp_path, header, data, message):
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((10_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="truncated inside its header"):
        read_header(tmp_path / "x.safetensors")


def test_a_pickle_without_torch_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a torch checkpoint"):
        read_torch_file(tmp_path / "x.bin")


class HidingTable:
    """Pickled as an OrderedDict with attributes in place of its methods."""

    def __init__(self, **entries):
        self.entries = entries

    def __reduce__(self):
        return OrderedDict, (), dict.fromkeys(("items", "get", "keys"), 3), None, iter(self.entries.items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_that_hides_the_methods_of_its_table(tmp_path, zipped, wrapped):
    content = table = HidingTable(a=torch.ones(2))
    if wrapped:
        content = HidingTable(state_dict=table)
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    assert_equal(loaded(read_torch_file(tmp_path / "x.bin")), {"a": torch.ones(2)})
