"""Output tensors as byte streams: copies, casts, merges, new rows, and the scan for NaN and infinity."""

import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import streams, writer
from modeling_delta_llava.conversion.export import load_output
from modeling_delta_llava.conversion.safetensors_files import read_header
from modeling_delta_llava.conversion.streams import (
    Literal,
    LowRankUpdate,
    MeanRows,
    OutputTensor,
    Span,
    TensorStream,
    count_nonfinite,
)
from modeling_delta_llava.conversion.writer import parse_size, plan_shards, write_shards

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def stored(tmp_path):
    def save(**tensors):
        save_file(tensors, tmp_path / "x.safetensors")
        return read_header(tmp_path / "x.safetensors")

    return save


def stream_tensor(output: OutputTensor, scan: bool = True) -> torch.Tensor:
    with TensorStream(scan) as stream:
        return load_output(output, stream)


@pytest.mark.parametrize("dtype", [*FLOATS, "F8_E4M3", "F8_E5M2"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_scan_agrees_with_isfinite(dtype, data):
    size, torch_name = streams.DTYPES[dtype]
    raw = data.draw(st.lists(st.binary(min_size=size, max_size=size), max_size=20))
    special = {
        "F64": [0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1, 0xFFFF << 48, 0x7FEF << 48, 0xFFEF << 48],
        "F32": [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x7F7FFFFF, 0xFF7FFFFF],
        "F16": [0x7C00, 0xFC00, 0x7C01, 0xFE00, 0x7BFF, 0xFBFF],
        "BF16": [0x7F80, 0xFF80, 0x7F81, 0xFFC0, 0x7F7F, 0xFF7F],
        "F8_E4M3": [0x7F, 0xFF, 0x7E, 0xFE],
        "F8_E5M2": [0x7C, 0xFC, 0x7F, 0xFF, 0x7B, 0xFB],
    }[dtype]
    raw += [data.draw(st.sampled_from(special)).to_bytes(size, "little") for _ in range(data.draw(st.integers(0, 3)))]
    buffer = b"".join(raw)
    expected = 0
    if buffer:
        values = torch.frombuffer(bytearray(buffer), dtype=getattr(torch, torch_name))
        expected = int((~torch.isfinite(values.double())).sum())
    assert count_nonfinite(memoryview(buffer), dtype) == expected


def test_integers_are_never_reported():
    assert count_nonfinite(memoryview(b"\xff" * 16), "I64") == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_cast_rounds_as_torch_does(stored, dtype, monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_BYTES", 64)
    values = torch.randn(37, 5)
    span = Span.whole(stored(a=values)["a"])
    found = stream_tensor(OutputTensor("a", dtype, (37, 5), (span,)))
    assert torch.equal(found, values.to(FLOATS[dtype]))


def test_parts_of_tensors_in_a_new_order(stored, monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_BYTES", 16)
    values = torch.randn(6, 4, dtype=torch.bfloat16)
    tensor = stored(a=values)["a"]
    found = stream_tensor(OutputTensor("a", "BF16", (6, 4), (Span(tensor, 12, 12), Span(tensor, 0, 12))))
    assert torch.equal(found, torch.cat([values[3:], values[:3]]))


@pytest.mark.parametrize("base_dtype", ["F32", "BF16"])
@pytest.mark.parametrize("target", ["F32", "BF16", "F16"])
def test_a_merge_is_computed_in_fp32_and_rounded_once(stored, base_dtype, target, monkeypatch):
    monkeypatch.setattr(streams, "MERGE_BLOCK_ELEMENTS", 40)
    base = torch.randn(12, 8).to(FLOATS[base_dtype])
    factor_a, factor_b = torch.randn(3, 8).bfloat16(), torch.randn(12, 3).bfloat16()
    tensors = stored(w=base, a=factor_a, b=factor_b)
    update = LowRankUpdate(tensors["w"], tensors["a"], tensors["b"], 0.5)
    found = stream_tensor(OutputTensor("w", target, (12, 8), (update,)))
    exact = base.double() + 0.5 * factor_b.double() @ factor_a.double()
    assert torch.equal(found, exact.float().to(FLOATS[target])) or torch.allclose(
        found.double(), exact, rtol=torch.finfo(FLOATS[target]).eps, atol=1e-6
    )


def test_mean_rows_have_the_mean_logit(stored, monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_BYTES", 24)
    weight = torch.randn(50, 7)
    span = Span.whole(stored(w=weight)["w"])
    found = stream_tensor(OutputTensor("w", "F32", (53, 7), (span, MeanRows((span,), 7, 3))))
    assert torch.equal(found[:50], weight)
    assert torch.allclose(found[50:], weight.mean(0).expand(3, 7), atol=1e-6)
    states = torch.randn(1000, 7) * 10
    logits = states @ found.T
    assert (logits[:, 50:].amax(-1) <= logits[:, :50].amax(-1)).all()


def test_literals_pass_through():
    found = stream_tensor(OutputTensor("i", "I64", (3,), (Literal(np.arange(3).tobytes(), "I64"),)))
    assert found.tolist() == [0, 1, 2]


@pytest.mark.parametrize("scan", [True, False])
def test_shards_hold_what_was_planned(stored, tmp_path, scan):
    tensors = {f"t{i}": torch.randn(i + 1, 16).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(12)}
    outputs = [OutputTensor(n, t.dtype, t.shape, (Span.whole(t),)) for n, t in stored(**tensors).items()]
    written = []
    folder = tmp_path / "out"
    folder.mkdir()
    with TensorStream(scan) as stream:
        files = write_shards(folder, outputs, 1500, stream, written.append)
    assert sum(written) == sum(output.nbytes for output in outputs)
    assert files[-1].name == "model.safetensors.index.json"
    found = {}
    for path in files[:-1]:
        assert path.stat().st_size < 1500 + 2000
        for name, tensor in read_header(path).items():
            assert tensor.offset % tensor_width(tensor.dtype) == 0, name
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def tensor_width(dtype: str) -> int:
    return streams.item_size(dtype)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no advice on this platform")
@pytest.mark.parametrize("supported", [True, False])
def test_sources_are_read_ahead(stored, tmp_path, monkeypatch, supported):
    advised = []

    def advise(_descriptor, position, count, _advice):
        advised.append((position, count))
        if not supported:
            raise OSError(errno.EINVAL, "not supported here")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(writer, "READ_AHEAD_BYTES", 1000)
    monkeypatch.setattr(writer, "READ_AHEAD_STEP", 300)
    tensors = {f"t{i}": torch.randn(i + 1, 16) for i in range(12)}
    found = stored(**tensors)
    outputs = [OutputTensor(name, "F32", t.shape, (Span.whole(t),)) for name, t in found.items()]
    (tmp_path / "out").mkdir()
    with TensorStream() as stream:
        write_shards(tmp_path / "out", outputs, 1500, stream)
    written = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    if supported:
        ends = [position + count for position, count in advised]
        assert [position for position, _ in advised[1:]] == ends[:-1], "in order and without a gap"
        assert advised[0][0] == found["t0"].offset
        assert sum(count for _, count in advised) == sum(tensor.nbytes for tensor in tensors.values())
        assert max(count for _, count in advised) <= 300


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(stored):
    tensors = stored(small=torch.randn(2), large=torch.randn(100), last=torch.randn(2))
    outputs = [OutputTensor(n, "F32", tensors[n].shape, (Span.whole(tensors[n]),)) for n in ("small", "large", "last")]
    assert [[t.name for t in shard] for shard in plan_shards(outputs, 100)] == [["small"], ["large"], ["last"]]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("512MiB", 512 << 20), ("7", 7), ("2kb", 2000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "5XB", "-1GB", "0", "1e999GB"])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)
