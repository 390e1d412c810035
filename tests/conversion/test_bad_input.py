"""Bad input: one line that says what, where and what to do; exit status 2; OUTPUT absent; SOURCE untouched."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from delta_llava.cli import main
from modeling_delta_llava import folders
from modeling_delta_llava.conversion import write
from tests.conversion.conftest import LAYOUT, assert_same_tensors, change_json, read_tensors
from tests.training_layout import (
    TrainingLayout,
    write_base_model,
    write_json,
    write_lora,
    write_stage1,
    write_stage2,
    write_tower,
    write_weights,
)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def change_shard(folder: Path, name: str, change) -> None:
    """Rewrites a shard, and its entries in the index, through a function of its tensors."""
    tensors = change(load_file(folder / name))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != name} | dict.fromkeys(tensors, name)
    write_json(folder / "model.safetensors.index.json", index)


# --- damaged weights -------------------------------------------------------------------------------------------------


def test_missing_shard(stage2, refused):
    (stage2 / SHARDS[1]).unlink()
    assert f"lacks {SHARDS[1]}" in refused(stage2)


def test_missing_shard_without_an_index(stage2, refused):
    (stage2 / SHARDS[1]).unlink()
    (stage2 / "model.safetensors.index.json").unlink()
    assert "not the full set" in refused(stage2)


def test_truncated_shard(stage2, refused):
    path = stage2 / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-10])
    line = refused(stage2)
    assert str(path) in line
    assert "truncated" in line


def test_corrupt_header(stage2, refused):
    path = stage2 / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[10:20] = b"\x00" * 10
    path.write_bytes(data)
    assert "truncated or damaged" in refused(stage2)


def test_truncated_bin(tmp_path, refused):
    write_stage2(tmp_path / "source", LAYOUT, weights_format="bin")
    path = tmp_path / "source" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-5000])
    assert "truncated" in refused(tmp_path / "source")


def test_index_names_a_tensor_that_is_not_there(stage2, refused):
    index = json.loads((stage2 / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = SHARDS[0]
    write_json(stage2 / "model.safetensors.index.json", index)
    assert "'model.layers.9.mlp.up_proj.weight'" in refused(stage2)


def test_a_shard_holds_what_the_index_does_not_name(stage2, refused):
    index = json.loads((stage2 / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    write_json(stage2 / "model.safetensors.index.json", index)
    assert "'lm_head.weight'" in refused(stage2)


def test_duplicate_tensors(stage2, refused):
    one = load_file(stage2 / SHARDS[0])
    key = next(iter(one))
    other = load_file(stage2 / SHARDS[1]) | {key: one[key]}
    save_file(other, stage2 / SHARDS[1], {"format": "pt"})
    line = refused(stage2)
    assert repr(key) in line
    assert "holds too" in line


def test_unknown_tensor(stage2, refused):
    change_shard(stage2, SHARDS[0], lambda tensors: tensors | {"model.vision_resizer.weight": torch.ones(2)})
    assert "'model.vision_resizer.weight'" in refused(stage2)


def test_extra_tensor_of_a_known_part(stage2, refused):
    extra = {"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}
    change_shard(stage2, SHARDS[0], lambda tensors: tensors | extra)
    assert "'model.layers.2.mlp.up_proj.weight'" in refused(stage2)


@pytest.mark.parametrize("key", ["model.norm.weight", "model.mm_projector.k_proj_1.U", "lm_head.weight"])
def test_missing_tensor(stage2, refused, key):
    for name in SHARDS:
        change_shard(stage2, name, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    line = refused(stage2)
    assert "lacks 1 tensor" in line


def test_zero_size_tensors_name_the_consolidation_command(stage2, refused):
    change_shard(stage2, SHARDS[0], lambda tensors: {key: torch.zeros(0) for key in tensors})
    line = refused(stage2)
    assert "zero_to_fp32.py" in line
    assert "without elements" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.mm_projector.mlp.2.weight"])
def test_nonfinite_weights(stage2, refused, key, value, tmp_path, capsys):
    def poison(tensors):
        if key in tensors:
            tensors[key].view(-1)[7] = value
        return tensors

    for name in SHARDS:
        change_shard(stage2, name, poison)
    line = refused(stage2)
    assert "1 NaN or infinite value in float32" in line
    assert "--allow-nonfinite" in line
    assert main(["convert", str(stage2), str(tmp_path / "output"), "--allow-nonfinite", "--no-progress"]) == 0
    assert "warning:" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "output"), "--no-progress"]) == 1
    assert "NaN or infinity" in capsys.readouterr().out


def test_values_too_large_for_float16(stage2, refused):
    def enlarge(tensors):
        return {key: t * 1e6 if key == "model.norm.weight" else t for key, t in tensors.items()}

    for name in SHARDS:
        change_shard(stage2, name, enlarge)
    line = refused(stage2, "--dtype", "float16")
    assert "infinite values in float16" in line
    assert "--dtype" in line


def test_integer_weights(stage2, refused):
    def quantise(tensors):
        return {key: t.char() if key == "lm_head.weight" else t for key, t in tensors.items()}

    for name in SHARDS:
        change_shard(stage2, name, quantise)
    assert "quantised" in refused(stage2)


def test_a_tied_head_that_differs(tmp_path, refused):
    layout = TrainingLayout(text_model_type="qwen2", tie_word_embeddings=True)
    tensors = write_stage2(tmp_path / "source", layout)
    write_weights(tmp_path / "source", tensors | {"lm_head.weight": torch.randn(420, 64)})
    assert "tie_word_embeddings" in refused(tmp_path / "source")


# --- wrong parts -----------------------------------------------------------------------------------------------------


def test_tower_of_another_size(stage2, tmp_path, refused):
    write_tower(tmp_path / "other", TrainingLayout(tower_hidden_size=64))
    line = refused(stage2, "--vision-tower", str(tmp_path / "other"))
    assert "has shape" in line


def test_tower_config_of_another_size(tmp_path, refused):
    write_stage2(tmp_path / "source", LAYOUT)
    change_json(tmp_path / "source-tower" / "config.json", intermediate_size=48)
    line = refused(tmp_path / "source")
    assert "--vision-tower" in line
    assert "encoder.layers.0.mlp.fc1" in line


def test_language_model_of_another_width(sources, tmp_path, refused):
    write_base_model(tmp_path / "base", TrainingLayout(text_hidden_size=32))
    line = refused(sources / "stage1", "--base-model", str(tmp_path / "base"))
    assert "has shape" in line
    assert "config.json describes" in line


def test_adapter_of_another_base(sources, tmp_path, refused):
    write_base_model(tmp_path / "base", TrainingLayout(text_hidden_size=32))
    line = refused(sources / "lora", "--base-model", str(tmp_path / "base"))
    assert "trained on" in line


def test_an_adapter_beside_whole_weights(stage2, sources, tmp_path, capsys):
    """Never left out in silence: the user says which is meant, or is told."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(sources / "lora" / name, stage2 / name)
    base = ["--base-model", str(sources / "base"), "--no-progress"]
    assert main(["convert", str(stage2), str(tmp_path / "output"), *base]) == 2
    assert "whole weights and an adapter (adapter_config.json): say which with --form" in capsys.readouterr().err
    assert main(["convert", str(stage2), str(tmp_path / "output"), "--form", "stage2", "--no-progress"]) == 0
    assert "adapter_config.json is not used" in capsys.readouterr().err
    (stage2 / "non_lora_trainables.bin").write_bytes((sources / "lora" / "non_lora_trainables.bin").read_bytes())
    assert main(["convert", str(stage2), str(tmp_path / "merged"), "--form", "lora", *base]) == 0
    assert "6 weights get their LoRA update" in capsys.readouterr().err


def test_adapter_with_more_layers_than_the_base(sources, tmp_path, refused):
    write_lora(tmp_path / "lora", TrainingLayout(text_layers=3), tower=sources / "tower")
    line = refused(tmp_path / "lora", "--base-model", str(sources / "base"))
    assert "model.layers.2." in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "sets use_dora to 'True', which is no plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type to 'IA3'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights to 'pissa'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens to '[1, 2]'"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"a_setting_of_tomorrow": "on"}, "a_setting_of_tomorrow to 'on'"),
        ({"r": 5}, "rank 4"),
        ({"r": True}, "states no usable r"),
        ({"lora_alpha": None}, "states no usable r and lora_alpha"),
        ({"lora_alpha": 10**400}, "states no usable r and lora_alpha"),
        ({"lora_alpha": float("nan")}, "states no usable r and lora_alpha"),
        ({"alpha_pattern": {"([a-z._0-9]+)+!": 3}}, "unusable alpha_pattern"),
        ({"rank_pattern": {".*.*.*.*.*.*.*x": 3}}, "unusable rank_pattern"),
        ({"rank_pattern": {"a" * 1000 + "|([a-z._0-9]+)+!": 3}}, "unusable rank_pattern"),
    ],
)
def test_adapters_that_are_no_plain_lora(sources, tmp_path, refused, changes, message):
    write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower")
    change_json(tmp_path / "lora" / "adapter_config.json", **changes)
    assert message in refused(tmp_path / "lora", "--base-model", str(sources / "base"))


def test_dora_is_seen_in_the_tensors_too(sources, tmp_path, refused):
    write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    save_file(load_file(path) | {key: torch.ones(64)}, path)
    assert "DoRA" in refused(tmp_path / "lora", "--base-model", str(sources / "base"))


def test_half_a_lora_factor(sources, tmp_path, refused):
    write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, path)
    assert "lacks lora_A or lora_B" in refused(tmp_path / "lora", "--base-model", str(sources / "base"))


def test_lora_without_its_projector(sources, tmp_path, refused):
    write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower")
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    assert "non_lora_trainables.bin" in refused(tmp_path / "lora", "--base-model", str(sources / "base"))


@pytest.mark.parametrize("form", ["stage1", "lora"])
def test_base_model_is_asked_for(sources, refused, form):
    assert "--base-model" in refused(sources / form)


def test_a_language_model_alone(sources, refused):
    line = refused(sources / "base")
    assert "no projector tensors" in line
    assert "--base-model" in line


def test_config_without_a_tower(stage2, refused):
    change_json(stage2 / "config.json", mm_vision_tower=None)
    assert "mm_vision_tower" in refused(stage2)


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-224-nowhere", "/nowhere/clip", "nowhere"])
def test_unreachable_tower(stage2, refused, name):
    change_json(stage2 / "config.json", mm_vision_tower=name)
    line = refused(stage2)
    assert name in line
    assert "--vision-tower" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "spatial merge"),
        ({"mm_patch_merge_type": "spatial"}, "spatial merge"),
        ({"s2": True}, "s2"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"model_type": "llava_mpt"}, "'llava_mpt'"),
        ({"scale_factor": 3}, "scale_factor 3"),
        ({"scale_factor": None}, "scale_factor None"),
        ({"mm_vision_select_layer": -40}, "impossible model"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_features_and_values_that_are_not_supported(stage2, refused, changes, message):
    change_json(stage2 / "config.json", **changes)
    assert message in refused(stage2)


def test_image_newline_is_refused_by_name(stage2, refused):
    change_shard(stage2, SHARDS[0], lambda tensors: tensors | {"model.image_newline": torch.ones(64)})
    assert "model.image_newline" in refused(stage2)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["weight", "bias"], "linear projector"), (["0.weight", "2.weight", "4.weight"], "mlp3x_gelu")],
)
def test_other_projectors_are_refused_by_name(sources, tmp_path, refused, names, message):
    folder = tmp_path / "stage1"
    write_stage1(folder, LAYOUT, tower=sources / "tower", plain=True)
    torch.save({f"model.mm_projector.{name}": torch.ones(2, 2) for name in names}, folder / "mm_projector.bin")
    assert message in refused(folder, "--base-model", str(sources / "base"))


# --- checkpoints that are no checkpoints -----------------------------------------------------------------------------


def test_deepspeed_folder(tmp_path, refused):
    (tmp_path / "run" / "global_step10").mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "global_step10"):
        line = refused(folder)
        assert "DeepSpeed" in line
        assert "zero_to_fp32.py" in line


def test_fsdp_folder(tmp_path, refused):
    (tmp_path / "run" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "run" / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
    line = refused(tmp_path / "run")
    assert "FSDP" in line
    assert "accelerate merge-weights" in line


def test_folder_of_checkpoints(tmp_path, refused):
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    assert "checkpoint-20" in refused(tmp_path / "run")


def test_empty_folder(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "no weights" in refused(tmp_path / "empty")


def test_malicious_pickle(stage2, tmp_path, refused):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for name in SHARDS:
        (stage2 / name).unlink()
    (stage2 / "model.safetensors.index.json").unlink()
    torch.save({"lm_head.weight": Payload()}, stage2 / "pytorch_model.bin")
    line = refused(stage2)
    assert "system" in line
    assert "refused" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../x.safetensors", ""])
def test_index_that_leaves_the_folder(stage2, refused, name):
    index = json.loads((stage2 / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    write_json(stage2 / "model.safetensors.index.json", index)
    line = refused(stage2)
    assert "leaves" in line
    assert repr(name) in line


def test_link_out_of_the_folder(stage2, tmp_path, refused):
    target = tmp_path / "elsewhere.safetensors"
    shutil.move(stage2 / SHARDS[0], target)
    (stage2 / SHARDS[0]).symlink_to(target)
    line = refused(stage2)
    assert "link that leaves" in line


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "config.json"])
def test_small_files_that_are_links_out_of_the_folder(stage2, tmp_path, refused, name):
    shutil.move(stage2 / name, tmp_path / "elsewhere.json")
    (stage2 / name).symlink_to(tmp_path / "elsewhere.json")
    line = refused(stage2)
    assert str(stage2 / name) in line
    assert "link that leaves" in line


def test_links_inside_the_hub_cache_are_followed(stage2, tmp_path):
    root = tmp_path / "models--someone--model"
    snapshot = root / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for path in stage2.iterdir():
        shutil.copy(path, root / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert main(["convert", str(snapshot), str(tmp_path / "output"), "--no-progress"]) == 0


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_damaged_config(stage2, refused, text):
    (stage2 / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(stage2)


def test_no_tokenizer(stage2, refused):
    for path in stage2.glob("*token*"):
        path.unlink()
    assert "tokenizer" in refused(stage2)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": ["x"]}}', "names no file for tensor"),
        (SHARDS[0], "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("added_tokens.json", "[]", "added_tokens.json does not hold a JSON object"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {}}}',
            "added tokens in no valid way (invalid literal",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"448": {}}}', "in no valid way (KeyError: 'content')"),
        ("added_tokens.json", '{"<pad>": "last"}', "added tokens in no valid way (invalid literal"),
        ("tokenizer.model", "hello", "is not a sentencepiece model"),
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
    ],
)
def test_damaged_small_files(stage2, refused, file, text, message):
    (stage2 / file).write_text(text)
    line = refused(stage2)
    assert message in line
    assert str(stage2) in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "impossible model"),
        ({"rope_scaling": {"type": "nonsense"}}, "impossible model (KeyError: 'nonsense')"),
        ({"hidden_size": "wide"}, "'hidden_size'"),
    ],
)
def test_configs_that_make_no_model(stage2, refused, changes, message):
    change_json(stage2 / "config.json", **changes)
    line = refused(stage2)
    assert message in line
    assert str(stage2 / "config.json") in line


def test_a_damaged_tokenizer_of_the_library(tmp_path, refused):
    """The tokenizers library answers with a plain Exception."""
    write_stage2(tmp_path / "source", TrainingLayout(text_model_type="seed_oss"))
    change_json(tmp_path / "source" / "tokenizer.json", model={"type": "Nonsense"})
    assert f"no tokenizer could be loaded from {tmp_path / 'source'}" in refused(tmp_path / "source")


@pytest.mark.parametrize("plain", [True, False])
def test_a_tower_config_without_a_grid(tmp_path, refused, plain):
    write_stage2(tmp_path / "source", LAYOUT, plain=plain)
    change_json(tmp_path / "source-tower" / "config.json", patch_size=0)
    assert "patch_size 0, which make no grid" in refused(tmp_path / "source")


def test_a_plain_llava_with_an_impossible_layer(tmp_path, refused):
    write_stage2(tmp_path / "source", LAYOUT, plain=True)
    change_json(tmp_path / "source" / "config.json", mm_vision_select_layer="last")
    assert "impossible model" in refused(tmp_path / "source")


def test_a_language_model_as_the_tower(stage2, sources, refused):
    line = refused(stage2, "--vision-tower", str(sources / "base"))
    assert "no vision tower" in line
    assert "'llama'" in line


def test_preprocessor_settings_that_make_no_processor(tmp_path, refused):
    write_stage2(tmp_path / "source", LAYOUT)
    (tmp_path / "source-tower" / "preprocessor_config.json").write_text('{"size": "large"}')
    assert "preprocessor_config.json makes no image processor" in refused(tmp_path / "source")


@pytest.mark.parametrize("pattern", [{"(": 3}, {"*": 3}, ["q_proj"]])
def test_an_alpha_pattern_that_is_none(sources, tmp_path, refused, pattern):
    write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower")
    change_json(tmp_path / "lora" / "adapter_config.json", alpha_pattern=pattern)
    assert "unusable alpha_pattern" in refused(tmp_path / "lora", "--base-model", str(sources / "base"))


def test_a_stage1_checkpoint_that_training_set_aside(stage2, tmp_path, refused):
    """With an output folder called checkpoint-*, training puts the projector into a folder beside it."""
    (tmp_path / "checkpoint-9").mkdir()
    shutil.copy(stage2 / "config.json", tmp_path / "checkpoint-9")
    (tmp_path / "mm_projector").mkdir()
    (tmp_path / "mm_projector" / "checkpoint-9.bin").write_bytes(b"")
    line = refused(tmp_path / "checkpoint-9")
    assert str(tmp_path / "mm_projector" / "checkpoint-9.bin") in line
    assert str(tmp_path / "checkpoint-9" / "mm_projector.bin") in line


@pytest.mark.parametrize("name", ["config.json", SHARDS[0]])
def test_files_that_may_not_be_read(stage2, refused, monkeypatch, name):
    """Refused by a stand-in for the file system: tests may run as root, whom no permission stops."""

    def guarded(real):
        def call(path, *arguments, **options):
            if path == stage2 / name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr("builtins.open", guarded(open))
    monkeypatch.setattr(Path, "read_text", guarded(Path.read_text))
    line = refused(stage2)
    assert f"{stage2 / name} cannot be read (Permission denied)" in line


# --- places ----------------------------------------------------------------------------------------------------------


def test_source_that_does_not_exist(tmp_path, refused):
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_source_on_a_hub_that_cannot_be_reached(refused):
    line = refused("nobody/nothing")
    assert "nobody/nothing" in line
    assert "downloading it failed" in line


def test_revision_of_a_path(stage2, refused):
    assert "--revision" in refused(stage2, "--revision", "main")


def test_source_is_a_file(stage2, refused):
    assert "is a file" in refused(stage2 / "config.json")


def test_a_folder_where_a_weight_file_is_expected(sources, tmp_path, refused):
    (tmp_path / "stage1" / "mm_projector.bin").mkdir(parents=True)
    shutil.copy(sources / "stage1" / "config.json", tmp_path / "stage1")
    assert "a weight file is expected" in refused(tmp_path / "stage1", "--base-model", str(sources / "base"))


def test_output_is_the_source(stage2, refused):
    before = read_tensors(stage2)
    assert "is SOURCE itself" in refused(stage2, "--overwrite", output=stage2)
    assert_same_tensors(read_tensors(stage2), before)


def test_output_is_the_source_by_another_name(stage2, tmp_path, refused):
    (tmp_path / "link").symlink_to(stage2)
    assert "is SOURCE itself" in refused(stage2, "--overwrite", output=tmp_path / "link")


def test_output_around_or_inside_an_input(stage2, tmp_path, refused):
    assert "lies inside SOURCE" in refused(stage2, output=stage2 / "hub")
    assert "contains SOURCE" in refused(stage2, "--overwrite", output=tmp_path)


def test_output_is_the_base_model(sources, refused):
    base = sources / "base"
    line = refused(sources / "lora", "--base-model", str(base), "--overwrite", output=base)
    assert "is --base-model itself" in line
    assert (base / "model.safetensors").exists()


def test_output_exists(stage2, tmp_path, refused):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").write_text("mine")
    assert "--overwrite" in refused(stage2)
    assert "holds no model" in refused(stage2, "--overwrite")
    assert (tmp_path / "output" / "precious").read_text() == "mine"


def test_overwrite_replaces_a_model(stage2, tmp_path):
    output = tmp_path / "output"
    assert main(["convert", str(stage2), str(output), "--no-progress"]) == 0
    (output / "left-over").write_text("old")
    assert main(["convert", str(stage2), str(output), "--no-progress", "--overwrite"]) == 0
    assert not (output / "left-over").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "stage2"]


def test_a_failing_overwrite_leaves_the_old_model(stage2, tmp_path, refused):
    output = tmp_path / "output"
    assert main(["convert", str(stage2), str(output), "--no-progress"]) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def poison(tensors):
        return {key: t * float("nan") if key == "model.norm.weight" else t for key, t in tensors.items()}

    for name in SHARDS:
        change_shard(stage2, name, poison)
    refused(stage2, "--overwrite")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_output_is_a_file_or_below_one(stage2, tmp_path, refused):
    (tmp_path / "file").write_text("x")
    assert "a folder is expected" in refused(stage2, "--overwrite", output=tmp_path / "file")
    assert "is a file" in refused(stage2, output=tmp_path / "file" / "hub")


def test_no_space(stage2, refused, monkeypatch):
    monkeypatch.setattr(folders, "free_bytes", lambda path: 1000)
    line = refused(stage2)
    assert "no space" in line
    assert "1.0 kB free" in line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_fills_up_on_the_way(stage2, refused, monkeypatch, code):
    def fill(*_arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(write, "save", fill)
    assert "is full" in refused(stage2)


def test_no_permission_to_write(stage2, refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission" in refused(stage2)


def test_permission_is_lost_on_the_way(stage2, refused, monkeypatch, tmp_path):
    make = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name == "new":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "no permission to use" in refused(stage2, output=tmp_path / "fresh" / "parents" / "output")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype 'int8'"),
        (["--form", "stage3"], "--form 'stage3'"),
        (["--max-shard-size", "large"], "--max-shard-size"),
        (["--form", "stage1"], "mm_projector.bin"),
        (["--form", "lora"], "adapter_config.json"),
    ],
)
def test_bad_options(stage2, refused, arguments, message):
    assert message in refused(stage2, *arguments)


# --- export and verify -----------------------------------------------------------------------------------------------


def test_export_of_a_training_folder(stage2, refused):
    assert "model_type 'llava_llama'" in refused(stage2, command="export")


def test_export_of_nothing(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(tmp_path / "empty", command="export")


def test_export_into_its_own_folder(hub_folder, refused):
    assert "itself" in refused(hub_folder, "--overwrite", output=hub_folder, command="export")


def test_export_of_a_tower_nobody_named(hub_folder, refused):
    assert "--vision-tower" in refused(hub_folder, command="export")


def test_verify_of_no_folder(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
