"""Hub folders that are damaged, incomplete or hostile, as SOURCE of convert and export: one line, exit status 2."""

import base64
import errno
import json
import resource
import shutil
from pathlib import Path

import pytest

from delta_llava.errors import UserError
from modeling_delta_llava import sources as sources_module
from modeling_delta_llava.conversion.configs import RECORD_FILE, TRAINING_FOLDER
from modeling_delta_llava.conversion.export import export
from tests.conversion.conftest import assert_same_tensors, change_json, read_tensors
from tests.training_layout import write_json

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def hub(converted, tmp_path) -> Path:
    """A converted folder of the test's own."""
    return shutil.copytree(converted, tmp_path / "hub")


def kept_tensor(data: bytes = bytes(8), dtype: str = "F32", shape=(2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "base64": base64.b64encode(data).decode()}


# --- a folder in this project's own layout ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "has no text_config with a model_type"),
        ({"text_config": {}}, "has no text_config with a model_type"),
        ({"vision_config": None}, "has no vision_config with a model_type"),
        ({"vision_config": "clip"}, "has no vision_config with a model_type"),
        ({"vision_config": {"model_type": "clip_vision_model", "patch_size": 0}}, "impossible model"),
        ({"num_visual_tokens": 5}, "num_visual_tokens=5 is not possible"),
        ({"delta_rank": "many"}, "'delta_rank' expected int"),
    ],
)
def test_own_configs_that_are_shortened_or_impossible(hub, refused, changes, message):
    change_json(hub / "config.json", **changes)
    line = refused(hub)
    assert message in line
    assert str(hub) in line


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("processor_config.json", "{"),
        ("processor_config.json", '{"grid_size": 5, "num_visual_tokens": 4}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "Nonsense"}}'),
    ],
)
def test_a_damaged_processor(hub, refused, file, text):
    (hub / file).write_text(text)
    line = refused(hub)
    assert f"the processor in {hub} cannot be used" in line


# --- what conversion kept of the training checkpoint -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_config": None}, "has no training_config"),
        ({"vocabulary_rows": None}, "has vocabulary_rows None"),
        ({"vocabulary_rows": -3}, "has vocabulary_rows -3"),
        ({"tower_keys": None}, "has tower_keys None"),
        ({"tower_keys": "new"}, "has tower_keys 'new'"),
        ({"tower_keys": ["old"]}, "has tower_keys ['old']"),
        ({"tied_head_saved": 1}, "has tied_head_saved 1"),
        ({"dropped_tensors": []}, "has no dropped_tensors"),
        ({"dropped_tensors": {INV_FREQ: {}}}, "in no readable way (KeyError)"),
        ({"dropped_tensors": {INV_FREQ: kept_tensor() | {"base64": "%%%"}}}, "in no readable way"),
        ({"dropped_tensors": {INV_FREQ: kept_tensor() | {"base64": 5}}}, "in no readable way (TypeError)"),
        ({"dropped_tensors": {INV_FREQ: kept_tensor(bytes(7))}}, "keeps 7 bytes"),
        ({"dropped_tensors": {INV_FREQ: kept_tensor(shape=(-1, -2))}}, "no 'F32' of shape [-1, -2]"),
        ({"dropped_tensors": {INV_FREQ: kept_tensor(dtype="F31")}}, "no 'F31'"),
        ({"dropped_tensors": {"lm_head.weight": kept_tensor()}}, "keeps 'lm_head.weight'"),
        ({"dropped_tensors": {"__metadata__": kept_tensor()}}, "keeps '__metadata__'"),
    ],
)
@pytest.mark.parametrize("command", ["export", "convert"])
def test_records_that_conversion_never_writes(hub, refused, command, changes, message):
    change_json(hub / RECORD_FILE, **changes)
    line = refused(hub, command=command)
    assert message in line
    assert str(hub / RECORD_FILE) in line
    assert "convert the checkpoint again" in line


@pytest.mark.parametrize("command", ["export", "convert"])
def test_an_empty_record(hub, refused, command):
    write_json(hub / RECORD_FILE, {})
    assert "has no training_config" in refused(hub, command=command)


def test_a_record_of_a_tied_head_beside_a_head_of_its_own(converted, hub, tmp_path):
    """The head was untied since: it is exported as it is, and once."""
    change_json(hub / RECORD_FILE, tied_head_saved=True)
    export(str(hub), tmp_path / "back", progress=False)
    export(str(converted), tmp_path / "expected", progress=False)
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "expected"))


@pytest.mark.parametrize("command", ["export", "convert"])
def test_a_training_folder_that_is_a_link_out_of_the_folder(hub, tmp_path, refused, command):
    shutil.move(hub / TRAINING_FOLDER, tmp_path / "elsewhere")
    (hub / TRAINING_FOLDER).symlink_to(tmp_path / "elsewhere")
    line = refused(hub, command=command)
    assert "is a link that leaves" in line
    assert str(hub / RECORD_FILE) in line


@pytest.mark.parametrize("command", ["export", "convert"])
def test_training_files_that_are_links_out_of_the_folder(hub, tmp_path, refused, command):
    name = f"{TRAINING_FOLDER}/tokenizer.model"
    shutil.move(hub / name, tmp_path / "elsewhere.model")
    (hub / name).symlink_to(tmp_path / "elsewhere.model")
    line = refused(hub, command=command)
    assert "is a link that leaves" in line
    assert str(hub / name) in line


def test_the_training_folder_of_a_hub_snapshot_is_followed(hub, tmp_path):
    """In the Hub's cache every file is a link to `blobs`, those in folders too."""
    root = tmp_path / "models--someone--model"
    snapshot = root / "snapshots" / "0123"
    (snapshot / TRAINING_FOLDER).mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(path for path in hub.rglob("*") if path.is_file()):
        shutil.copy(path, root / "blobs" / str(number))
        (snapshot / path.relative_to(hub)).symlink_to(root / "blobs" / str(number))
    export(str(snapshot), tmp_path / "back", progress=False)
    kept = (hub / TRAINING_FOLDER / "tokenizer.model").read_bytes()
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == kept


# --- files and disks -------------------------------------------------------------------------------------------------


def test_a_source_file_that_may_not_be_read_while_writing(stage2, refused, monkeypatch):
    copy = shutil.copyfile

    def refuse(source, target):
        if source == stage2 / "special_tokens_map.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", refuse)
    line = refused(stage2)
    assert f"{stage2 / 'special_tokens_map.json'} cannot be read (Permission denied)" in line
    assert "OUTPUT" not in line


@pytest.fixture
def small_files():
    """Files of more than 200 kB cannot be written: the kernel's own limit, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_projector(hub, refused, small_files):
    assert "takes no files of this size" in refused(hub, "--projector-only", command="export")


# --- names in an index -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/passwd", "", ".", "../x.safetensors", "a\0b", "\ud800", 5])
def test_a_hub_index_that_names_no_file_of_the_repository(tmp_path, name):
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json names .*"):
        sources_module._safetensors_patterns(tmp_path)


def test_names_in_a_hub_index_are_no_patterns(tmp_path):
    index = {"weight_map": {"a": "**x.safetensors", "b": "[m].safetensors", "c": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "[m].safetensors").touch()
    (tmp_path / "m.safetensors").touch()
    patterns = sources_module._safetensors_patterns(tmp_path)
    assert [path.name for pattern in patterns for path in tmp_path.glob(pattern)] == ["[m].safetensors"]
