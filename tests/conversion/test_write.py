"""Weights on their way to shards: copies, casts, merges, new rows, and the scan for NaN and infinity."""

import errno
import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import write
from modeling_delta_llava.conversion.source import read_weight_file
from modeling_delta_llava.conversion.write import (
    LowRankUpdate,
    Weight,
    count_nonfinite,
    parse_size,
    plan_shards,
    write_shards,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def stored(tmp_path):
    def save(dtype=None, **tensors) -> dict[str, Weight]:
        path = tmp_path / "x.safetensors"
        save_file(tensors, path)
        return {key: Weight(t, key, path, dtype or t.dtype) for key, t in read_weight_file(path).items()}

    return save


def weight_of(tensor: torch.Tensor, tmp_path, **options) -> Weight:
    return Weight(tensor, "w", tmp_path, options.pop("dtype", tensor.dtype), **options)


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_scan_agrees_with_isfinite(dtype, data):
    special = {
        torch.float64: [0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1, 0xFFFF << 48, 0x7FEF << 48, 0xFFEF << 48],
        torch.float32: [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x7F7FFFFF, 0xFF7FFFFF],
        torch.float16: [0x7C00, 0xFC00, 0x7C01, 0xFE00, 0x7BFF, 0xFBFF],
        torch.bfloat16: [0x7F80, 0xFF80, 0x7F81, 0xFFC0, 0x7F7F, 0xFF7F],
    }[dtype]
    size = dtype.itemsize
    raw = data.draw(st.lists(st.binary(min_size=size, max_size=size), max_size=20))
    raw += [data.draw(st.sampled_from(special)).to_bytes(size, "little") for _ in range(data.draw(st.integers(0, 3)))]
    if raw:
        values = torch.frombuffer(bytearray(b"".join(raw)), dtype=dtype)
        assert count_nonfinite(values) == int((~torch.isfinite(values)).sum())


@pytest.mark.parametrize("position", [0, 6, 7, 8, 19])
def test_scan_finds_a_value_in_any_part(monkeypatch, position):
    monkeypatch.setattr(write, "SCAN_ELEMENTS", 7)
    values = torch.ones(4, 5)
    values.view(-1)[position] = -torch.inf
    assert count_nonfinite(values) == 1


def test_integers_are_never_reported():
    assert count_nonfinite(torch.full((4,), -1)) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_cast_rounds_as_torch_does(tmp_path, dtype):
    values = torch.randn(37, 5)
    assert torch.equal(weight_of(values, tmp_path, dtype=dtype).value(), values.to(dtype))


def test_what_lies_otherwise_in_the_file_is_no_copy(tmp_path):
    """Whatever torch reads a tensor as is what is written."""
    values = torch.randn(6, 4)
    for tensor in (values.t(), values[:, 1:3], values[0, :1].expand(3, 4)):
        weight = weight_of(tensor, tmp_path)
        assert not weight.is_copy
        result = weight.value()
        assert result.is_contiguous()
        assert torch.equal(result, tensor)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", FLOATS[1:])
def test_a_merge_is_computed_in_fp32_and_rounded_once(tmp_path, base_dtype, target, monkeypatch):
    monkeypatch.setattr(write, "BLOCK_ELEMENTS", 40)
    base = torch.randn(12, 8).to(base_dtype)
    update = LowRankUpdate(torch.randn(3, 8).bfloat16(), torch.randn(12, 3).bfloat16(), 0.5)
    found = weight_of(base, tmp_path, dtype=target, update=update).value()
    exact = base.double() + 0.5 * update.factor_b.double() @ update.factor_a.double()
    assert torch.equal(found, exact.float().to(target)) or torch.allclose(
        found.double(), exact, rtol=torch.finfo(target).eps, atol=1e-6
    )


@pytest.mark.parametrize("block", [1, 24, 1 << 20])
def test_mean_rows_have_the_mean_logit(tmp_path, monkeypatch, block):
    monkeypatch.setattr(write, "BLOCK_ELEMENTS", block)
    values = torch.randn(50, 7)
    weight = weight_of(values, tmp_path, mean_rows=3)
    found = weight.value()
    assert found.shape == weight.shape == (53, 7)
    assert torch.equal(found[:50], values)
    assert torch.allclose(found[50:], values.mean(0).expand(3, 7), atol=1e-6)
    states = torch.randn(1000, 7) * 10
    logits = states @ found.T
    assert (logits[:, 50:].amax(-1) <= logits[:, :50].amax(-1)).all()


def test_a_merged_matrix_gets_the_mean_of_the_merged_rows(tmp_path):
    values, update = torch.randn(9, 4), LowRankUpdate(torch.randn(2, 4), torch.randn(9, 2), 1.0)
    merged = values + update.factor_b @ update.factor_a
    found = weight_of(values, tmp_path, update=update, mean_rows=1).value()
    assert torch.allclose(found[9], merged.mean(0), atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_shards_hold_what_was_planned(stored, tmp_path, scan):
    tensors = {f"t{i}": torch.randn(i + 1, 16).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(12)}
    weights = stored(**tensors)
    advanced = []
    folder = tmp_path / "out"
    folder.mkdir()
    assert write_shards(folder, weights, 1500, scan=scan, advance=advanced.append) == {}
    assert sum(advanced) == sum(weight.nbytes for weight in weights.values())
    files = sorted(folder.iterdir())
    assert files[-1].name == "model.safetensors.index.json"
    found = {}
    for path in files[:-1]:
        assert path.stat().st_size < 1500 + 2000
        assert path.stat().st_mode == files[-1].stat().st_mode, "as readable as any file"
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_is_computed_lies_on_disk_meanwhile_and_goes(stored, tmp_path):
    """In files that have no name left when the shard is done: memory does not grow with the shard."""
    weights = stored(dtype=torch.float16, a=torch.randn(8, 4), b=torch.randn(8, 4))
    folder = tmp_path / "out"
    folder.mkdir()
    write_shards(folder, weights, 10**6)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name], weight.stored.half()) for name, weight in weights.items())


def test_more_computed_tensors_than_files_may_be_open(stored, tmp_path):
    weights = stored(dtype=torch.float16, **{f"t{number}": torch.ones(3) for number in range(100)})
    folder = tmp_path / "out"
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
    try:
        write_shards(folder, weights, 10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(load_file(folder / "model.safetensors")) == 100


def test_tensors_that_share_their_bytes(tmp_path):
    values = torch.randn(6, 4)
    torch.save({"a": values, "tied": values, "rows": values[1:3], "last": values[5]}, tmp_path / "x.bin")
    tensors = read_weight_file(tmp_path / "x.bin")
    weights = {key: Weight(tensor, key, tmp_path, tensor.dtype) for key, tensor in tensors.items()}
    folder = tmp_path / "out"
    folder.mkdir()
    write_shards(folder, weights, 10**6)
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("limit", [10**6, 200])
def test_a_value_that_is_not_finite_is_named_with_its_file(stored, tmp_path, limit):
    """Also in the last of many shards, whose scan nothing follows."""
    poisoned = torch.ones(10)
    poisoned[3] = torch.nan
    weights = stored(a=torch.ones(30), b=torch.ones(30), c=poisoned)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=r"tensor 'c' \(from .*x\.safetensors\) holds 1 NaN or infinite value in fl"):
        write_shards(folder, weights, limit)
    assert write_shards(folder, weights, limit, allow_nonfinite=True) == {"c": 1}
    assert write_shards(folder, weights, limit, scan=False) == {}


def test_a_source_that_is_cut_while_it_is_written_out(stored, tmp_path):
    """The system answers with an error where touching the mapped pages would end the process."""
    weights = stored(a=torch.randn(600_000), b=torch.randn(600_000))
    os.truncate(tmp_path / "x.safetensors", 5000)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=r"x\.safetensors changed while it was read: nothing was kept"):
        write_shards(folder, weights, 10**9)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_the_disk_come_as_such(stored, tmp_path, monkeypatch, code):
    from safetensors import SafetensorError

    def refuse(*_arguments, **_options):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    monkeypatch.setattr(write, "save_file", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        write_shards(tmp_path, stored(a=torch.ones(2)), 10**6)
    assert error.value.errno == code


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(stored):
    weights = stored(small=torch.randn(2), large=torch.randn(100), last=torch.randn(2))
    shards = list(plan_shards(weights, 100).values())
    assert ["large"] in shards
    assert sorted(name for names in shards for name in names) == ["large", "last", "small"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("512MiB", 512 << 20), ("7", 7), ("2kb", 2000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "5XB", "-1GB", "0", "1e999GB"])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)
