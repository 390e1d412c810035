"""Quantised copies load with plain `from_pretrained`, keep tower and projector in 16 bit and have their own card."""

import json
import struct
import sys

import pytest
from huggingface_hub import ModelCard

from delta_llava.errors import UserError
from modeling_delta_llava.hub_cards.card import write_card
from modeling_delta_llava.hub_cards.contents import list_files
from modeling_delta_llava.hub_cards.metadata import card_problems
from modeling_delta_llava.hub_cards.quantize import quantize
from tests import tiny
from tests.hub_cards.conftest import assert_one_line
from tests.hub_cards.test_publish import ANSWER

# Some CPUs' 4-bit kernels need widths in multiples of 64.
TEXT = {"hidden_size": 64, "intermediate_size": 128}
# What training leaves in its folder, and what else `publish` would refuse.
NOT_OF_A_REPOSITORY = (
    "checkpoint-5/optimizer.pt",
    "runs/x/events.out.tfevents.1",
    "_base/model.safetensors",
    "training_args.bin",
    "x.PT",
    ".env",
)


@pytest.fixture
def folder(tmp_path):
    made = tiny.write_hub_folder(tmp_path / "full", text=TEXT)
    write_card(made, repo_id="user/full", licence="apache-2.0")
    return made


def tensor_types(path) -> dict[str, str]:
    with path.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_copy(client, cli, hub, folder, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    for path in NOT_OF_A_REPOSITORY:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    output = tmp_path / f"q{bits}"
    left = tmp_path / f".q{bits}.unfinished" / "new"
    left.mkdir(parents=True)
    (left / "config.json").write_text("half of what a killed run wrote")
    repo_id = f"user/full-{bits}bit"
    process = cli("quantize", folder, output, "--bits", bits, "--repo-id", repo_id)
    assert process.returncode == 0, process.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    assert not left.parent.exists()
    assert not [path for path in NOT_OF_A_REPOSITORY if (output / path).exists()]
    assert (output / "example.png").is_file()

    types = tensor_types(output / "model.safetensors")
    packed = {name for name, kind in types.items() if kind in ("U8", "I8") and name.endswith(".weight")}
    assert packed
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    for name, kind in types.items():
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "lm_head.")):
            assert kind == "BF16", name
    assert str(tmp_path) not in (output / "config.json").read_text()

    assert card_problems(output, list_files(output)) == []
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == "user/full"
    assert card.data.base_model_relation == "quantized"
    assert card.data.license == "apache-2.0"
    assert f"{bits}-bit" in card.data.tags
    assert f'model_id = "{repo_id}"' in card.text

    loaded = client("-c", ANSWER, output, "{}", token=None)
    assert loaded.returncode == 0, loaded.stderr
    if bits == 8:
        return  # publishing is the same for both
    published = cli("publish", output, repo_id, "--tag", "v1.0")
    assert published.returncode == 0, published.stderr
    remote = client("-c", ANSWER, repo_id, '{"revision": "v1.0"}', token=None, home="fresh")
    assert remote.returncode == 0, remote.stderr
    assert json.loads(remote.stdout) == json.loads(loaded.stdout)


def test_output_must_be_new(folder):
    with pytest.raises(UserError, match="is FOLDER itself"):
        quantize(folder, folder)


def test_output_must_not_exist(folder, tmp_path):
    (tmp_path / "q").mkdir()
    with pytest.raises(UserError, match="exists"):
        quantize(folder, tmp_path / "q")


def test_bits_are_four_or_eight(cli, folder, tmp_path):
    assert_one_line(cli("quantize", folder, tmp_path / "q", "--bits", "3"), "to 4 or 8 bits")


def test_the_full_model_must_be_named(model_folder, tmp_path):
    with pytest.raises(UserError, match="give --base-model"):
        quantize(model_folder, tmp_path / "q")


def test_quantised_twice(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised already"):
        quantize(folder, tmp_path / "q")


def test_without_bitsandbytes_it_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"delta-llava\[quantization\]"):
        quantize(folder, tmp_path / "q", base_model="user/full")
    assert not (tmp_path / "q").exists()
