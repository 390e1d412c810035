"""Reading weight files: the tensors that torch would load, mapped, and nothing but tensors."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import source
from modeling_delta_llava.conversion.source import Checkpoint, read_checkpoint, read_weight_file

ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].double(), tensor.detach().double()), key


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


@ZIPPED
def test_torch_files_of_all_kinds_of_tensors(tmp_path, zipped):
    tensors = sample_tensors()
    if zipped:  # the layout before has no such type
        tensors["float8"] = torch.randn(4).to(torch.float8_e4m3fn)
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = read_weight_file(tmp_path / "x.bin")
    assert_equal(found, tensors)
    assert found["tied"].data_ptr() == found["matrix"].data_ptr()


def test_safetensors_of_all_kinds_of_tensors(tmp_path):
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in sample_tensors().items()}
    tensors["float8"] = torch.randn(4).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_equal(read_weight_file(tmp_path / "x.safetensors"), tensors)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_torch_files_with_the_state_dict_inside(tmp_path, wrapper):
    tensors = {"a": torch.randn(2)}
    torch.save({wrapper: tensors}, tmp_path / "x.bin")
    assert_equal(read_weight_file(tmp_path / "x.bin"), tensors)


def test_torch_file_of_a_module_with_its_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    assert_equal(read_weight_file(tmp_path / "x.bin"), dict(module.state_dict()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8), "no dense tensor"),
        (lambda: torch.eye(3).to_sparse(), "no dense tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "no dense tensor"),
        (lambda: torch.empty(3, device="meta"), "no dense tensor"),
        (lambda: torch.randn(3, dtype=torch.complex64).conj().imag, "no dense tensor"),
        (lambda: torch.randn(3, dtype=torch.complex64).conj(), "no dense tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "no dense tensor"),
        (lambda: 3, "is not a tensor"),
        (lambda: [torch.ones(1)], "is not a tensor"),
    ],
    ids=["quantised", "sparse", "csr", "meta", "negated", "conjugated", "nested", "number", "list"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_dense_tensor_is_refused(tmp_path, make, message):
    torch.save({"a": torch.ones(2), "epoch": make()}, tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        read_weight_file(tmp_path / "x.bin")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@ZIPPED
def test_a_pickle_that_runs_code_is_refused_and_named(tmp_path, zipped):
    mark = tmp_path / "ran"
    torch.save({"a": Payload(mark)}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x\.bin is refused: its pickle asks for (posix|nt)\.system"):
        read_weight_file(tmp_path / "x.bin")
    assert not mark.exists()


def rewritten(path, records=None, compression=zipfile.ZIP_STORED) -> None:
    """The archive again with some records replaced."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(content)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as target:
        for name, data in (content | {f"{root}/{name}": data for name, data in (records or {}).items()}).items():
            target.writestr(name, data, compression)


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "os.system", "numpy.load"])
def test_no_global_outside_torchs_list_is_resolved(tmp_path, name):
    module, function = name.rsplit(".", 1)
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", {"data.pkl": f"c{module}\n{function}\n(V1\ntR.".encode()})
    line = rf"x\.bin is refused: its pickle asks for ({module}\.)?{function}, which weights never need"
    with pytest.raises(UserError, match=line) as error:
        read_weight_file(tmp_path / "x.bin")
    assert "weights_only" not in str(error.value), "no advice to load it in spite of that"


@ZIPPED
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_torch_files(tmp_path, zipped, kept):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(300, 30)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"x\.bin"):
        read_weight_file(path)


@settings(max_examples=100, deadline=None)
@given(position=st.floats(0, 0.999), value=st.integers(0, 255), kind=st.sampled_from(["zip", "legacy", "safetensors"]))
@pytest.mark.filterwarnings("ignore")
def test_a_changed_byte_gives_tensors_or_a_user_error(tmp_path_factory, position, value, kind):
    path = tmp_path_factory.mktemp("fuzz") / ("x.safetensors" if kind == "safetensors" else "x.bin")
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(2).half()}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] = value
    path.write_bytes(data)
    try:
        for tensor in read_weight_file(path).values():
            tensor.clone()
    except UserError:
        pass


def test_a_compressed_archive_is_refused(tmp_path):
    """Mapped, its tensors would be the compressed bytes."""
    torch.save({"a": torch.randn(3)}, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_weight_file(tmp_path / "x.bin")


def test_a_record_that_is_shorter_than_its_tensor_is_refused(tmp_path):
    """Mapped, the tensor would go on into the next one's bytes."""
    torch.save({"a": torch.ones(64), "b": torch.full((64,), 2.0)}, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", {"data/0": torch.ones(32).numpy().tobytes()})
    with pytest.raises(UserError, match="larger than its record"):
        read_weight_file(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin", "a") as archive:
        name = next(info.filename for info in archive.infolist() if info.filename.endswith("/data/0"))
        archive.writestr(name, torch.zeros(4).numpy().tobytes())
    with pytest.raises(UserError, match="two records of one name"):
        read_weight_file(tmp_path / "x.bin")


@pytest.mark.parametrize("record", ["byteorder", "version", ".data/serialization_id", "data.pkl"])
def test_large_records_beside_the_tensors_are_not_read(tmp_path, record, monkeypatch):
    monkeypatch.setattr(source, "MOST_PICKLE_BYTES", 100_000)
    torch.save({"a": torch.randn(3)}, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", {record: b"little" * 20_000})
    with pytest.raises(UserError, match=r"120,000 bytes in '" + record.replace(".", r"\.")):
        read_weight_file(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_views_beyond_their_storage_are_refused(tmp_path):
    class Long:
        def __reduce__(self):
            rebuild, (storage, _, *rest) = torch.randn(4).__reduce_ex__(2)
            return rebuild, (storage, 2, *rest)

    torch.save({"a": Long()}, tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"x\.bin is truncated or damaged"):
        read_weight_file(tmp_path / "x.bin")


@pytest.mark.parametrize("data", [pickle.dumps({"a": 1}), b"", b"hello", b"PK\x03\x04"])
def test_what_is_no_torch_file(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.bin"):
        read_weight_file(tmp_path / "x.bin")


class HidingTable:
    """Pickled as an OrderedDict with attributes in place of its methods."""

    def __init__(self, **entries):
        self.entries = entries

    def __reduce__(self):
        return OrderedDict, (), dict.fromkeys(("items", "get", "keys"), 3), None, iter(self.entries.items())


@ZIPPED
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_that_hides_the_methods_of_its_table(tmp_path, zipped, wrapped):
    content = table = HidingTable(a=torch.ones(2))
    if wrapped:
        content = HidingTable(state_dict=table)
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    assert_equal(read_weight_file(tmp_path / "x.bin"), {"a": torch.ones(2)})


# --- safetensors -----------------------------------------------------------------------------------------------------


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", 0),
        (b"{", 0),
        (b"not json at all", 8),
        (b"[1, 2]", 8),
        ('{"a": {"dtype": "F32"}}', 8),
        ({"a": entry(dtype="F31")}, 8),
        ({"a": entry(shape=(3,))}, 8),
        ({"a": entry(shape=(-2,))}, 8),
        ({"a": entry(4, 12)}, 12),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        ({"a": entry()}, 7),
        ({"a": entry()}, 9),
    ],
)
def test_corrupt_safetensors(tmp_path, header, data):
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    with pytest.raises(UserError, match=r"x\.safetensors is truncated or damaged \("):
        read_weight_file(tmp_path / "x.safetensors")


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((10_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="truncated or damaged"):
        read_weight_file(tmp_path / "x.safetensors")


def test_a_key_doubled_at_the_end_of_many(tmp_path):
    """In no time, and whichever the library takes of the two is one of them."""
    entries = [f'"k{number}": {json.dumps(entry(4 * number, 4 * number + 4, (1,)))}' for number in range(40_000)]
    header = ("{" + ",".join([*entries, entries[-1]]) + "}").encode()
    data = torch.arange(40_000, dtype=torch.float32).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert read_weight_file(tmp_path / "x.safetensors")["k39999"].item() == 39_999


def test_far_too_many_tensors_are_refused(tmp_path, monkeypatch):
    tensors = {f"k{number}": torch.ones(1) for number in range(30)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    monkeypatch.setattr(source, "MOST_TENSORS", 10)
    for name in ("x.safetensors", "x.bin"):
        with pytest.raises(UserError, match="no checkpoint of a model"):
            read_weight_file(tmp_path / name)
    monkeypatch.setattr(source, "MOST_TENSORS", 20)
    checkpoint = Checkpoint()
    with pytest.raises(UserError, match="more than 20 tensors"):
        checkpoint.add(tmp_path / "x.bin")


# --- several files ---------------------------------------------------------------------------------------------------


def test_more_shards_than_files_may_be_open(tmp_path):
    import resource

    for number in range(1, 101):
        tensors = {f"k{number}": torch.full((3,), float(number))}
        save_file(tensors, tmp_path / f"model-{number:05d}-of-00100.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
    try:
        checkpoint = read_checkpoint(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [checkpoint.tensors[f"k{number}"][0].item() for number in (1, 100)] == [1, 100]


@pytest.mark.parametrize("change", ["rewritten", "replaced", "cut", "removed"])
def test_a_file_that_changes_after_it_was_opened(tmp_path, change):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(300)}, path)
    checkpoint = read_checkpoint(tmp_path)
    checkpoint.check_unchanged()
    if change == "rewritten":
        path.write_bytes(path.read_bytes())
    elif change == "replaced":
        save_file({"a": torch.ones(300)}, tmp_path / "other")
        os.replace(tmp_path / "other", path)
    elif change == "cut":
        os.truncate(path, 50)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors (changed while it was read|cannot be read)"):
        checkpoint.check_unchanged()
