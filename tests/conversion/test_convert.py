"""Conversion of every form and back: the same tensors, the same numbers, a folder that loads."""

import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_delta_llava.configuration_delta_llava import AUTO_MAP
from modeling_delta_llava.conversion.assemble import Options
from modeling_delta_llava.conversion.convert import convert, preview
from modeling_delta_llava.conversion.export import export
from modeling_delta_llava.conversion.source import STAGE1
from modeling_delta_llava.conversion.verify import passed, verify
from tests.conversion.conftest import LAYOUT, assert_same_tensors, read_tensors
from tests.conversion.reference import assert_same_numbers
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

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "seed_oss", "phi3", "gemma")


def load_model(folder: Path, dtype=torch.float32):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


def assert_verified(folder: Path, source: Path, options: Options | None = None) -> None:
    checks = verify(folder, str(source), options, progress=False)
    assert passed(checks), [check for check in checks if not check.passed]
    assert checks[-1].name == "numbers"


def round_trip(source: Path, folder: Path, **options) -> None:
    """Converts, verifies against the source (numbers included) and exports again: the same tensors."""
    convert(str(source), folder / "hub", progress=False, **options)
    assert_verified(folder / "hub", source)
    export(str(folder / "hub"), folder / "back", progress=False)
    expected = read_tensors(source)
    assert_same_tensors(read_tensors(folder / "back"), expected)
    if any("vision_tower" in key for key in expected):
        assert_same_numbers(folder / "hub", source)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_there_and_back(tmp_path, family):
    layout = TrainingLayout(text_model_type=family, text_key_value_heads=2, tie_word_embeddings=family == "gemma")
    write_stage2(tmp_path / "source", layout)
    round_trip(tmp_path / "source", tmp_path)


@pytest.mark.parametrize("weights_format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tower_inside", ["old", "flat", None])
def test_files_and_towers_there_and_back(tmp_path, weights_format, shards, tower_inside):
    options = {"weights_format": weights_format, "shards": shards, "tower_inside": tower_inside}
    write_stage2(tmp_path / "source", LAYOUT, dtype=torch.bfloat16, **options)
    round_trip(tmp_path / "source", tmp_path)


@pytest.mark.parametrize("tower_inside", ["old", None])
def test_a_siglip_tower_there_and_back(tmp_path, tower_inside):
    layout = TrainingLayout(tower_model_type="siglip_vision_model")
    write_stage2(tmp_path / "source", layout, tower_inside=tower_inside)
    round_trip(tmp_path / "source", tmp_path)


def test_a_tower_of_released_depth_and_grid(tmp_path):
    layout = TrainingLayout(tower_layers=24, image_size=96)
    write_stage2(tmp_path / "source", layout)
    convert(str(tmp_path / "source"), tmp_path / "hub", progress=False)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["memory_feature_layers"] == [12, 16, 22, 23]
    assert (config["num_visual_tokens"], config["trained_num_visual_tokens"]) == (144, [144])
    assert_verified(tmp_path / "hub", tmp_path / "source")


def test_buffers_of_old_transformers_are_dropped_and_put_back(tmp_path):
    tensors = write_stage2(tmp_path / "source", LAYOUT)
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(8) for layer in range(2)}
    tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write_weights(tmp_path / "source", tensors)
    round_trip(tmp_path / "source", tmp_path)
    assert not [key for key in read_tensors(tmp_path / "hub") if "inv_freq" in key or "position_ids" in key]


@pytest.mark.parametrize("weights_format", ["safetensors", "bin"])
def test_a_tied_head_saved_twice(tmp_path, weights_format):
    layout = TrainingLayout(text_model_type="qwen2", tie_word_embeddings=True)
    tensors = write_stage2(tmp_path / "source", layout)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding if weights_format == "bin" else embedding.clone()
    (tmp_path / "source" / "model.safetensors").unlink()
    write_weights(tmp_path / "source", tensors, weights_format)
    round_trip(tmp_path / "source", tmp_path)
    assert "lm_head.weight" not in read_tensors(tmp_path / "hub")


def test_a_tied_head_saved_in_another_order_of_bytes(tmp_path):
    layout = TrainingLayout(text_model_type="qwen2", tie_word_embeddings=True, vocab_size=20_000)
    tensors = write_stage2(tmp_path / "source", layout, weights_format="bin")
    head = tensors["model.embed_tokens.weight"].t().contiguous().t()
    torch.save(tensors | {"lm_head.weight": head}, tmp_path / "source" / "pytorch_model.bin")
    convert(str(tmp_path / "source"), tmp_path / "hub", progress=False)
    assert "lm_head.weight" not in read_tensors(tmp_path / "hub")


def test_a_transposed_tensor_of_a_bin_file(tmp_path):
    tensors = write_stage2(tmp_path / "source", LAYOUT, weights_format="bin")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].t().contiguous().t()
    tensors["model.mm_projector.clip_attn.in_proj_weight"] = (
        tensors["model.mm_projector.clip_attn.in_proj_weight"].t().contiguous().t()
    )
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    round_trip(tmp_path / "source", tmp_path)


def test_stage1_there_and_back(sources, tmp_path):
    options = Options(base_model=str(sources / "base"))
    convert(str(sources / "stage1"), tmp_path / "hub", options, progress=False)
    assert_verified(tmp_path / "hub", sources / "stage1", options)
    export(str(tmp_path / "hub"), tmp_path / "back", projector_only=True, progress=False)
    expected = torch.load(sources / "stage1" / "mm_projector.bin", weights_only=True)
    assert_same_tensors(torch.load(tmp_path / "back" / "mm_projector.bin", weights_only=True), expected)
    written, back = (
        json.loads((path / "config.json").read_text()) for path in (sources / "stage1", tmp_path / "back")
    )
    assert back == written | {"mm_vision_tower": "tower"}
    processor = json.loads((tmp_path / "hub" / "processor_config.json").read_text())
    assert processor["image_processor"]["do_pad"] is False, "stage 1 does not pad pictures"


# --- LoRA ------------------------------------------------------------------------------------------------------------

LORA_VARIANTS = {
    "plain": {},
    "bin": {"adapter_format": "bin"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3, "down_proj": 32}},
}


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_lora_merges_as_peft_does(sources, tmp_path, variant):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    options = Options(base_model=str(sources / "base"))
    write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower", **LORA_VARIANTS[variant])
    convert(str(tmp_path / "lora"), tmp_path / "hub", options, progress=False)
    assert_verified(tmp_path / "hub", tmp_path / "lora", options)

    base = AutoModelForCausalLM.from_pretrained(sources / "base", dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    export(str(tmp_path / "hub"), tmp_path / "back", progress=False)
    found = read_tensors(tmp_path / "back")
    changed = 0
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=1e-6, atol=1e-6), key
        changed += not torch.equal(tensor, load_file(sources / "base" / "model.safetensors")[key])
    assert changed == 6, "q, v and down projections of two layers"
    others = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", weights_only=True)
    for key, tensor in others.items():
        assert torch.equal(found[key.removeprefix("base_model.model.")], tensor), key


def test_a_merge_in_bfloat16_is_rounded_once(sources, tmp_path):
    tensors = write_base_model(tmp_path / "base", LAYOUT, dtype=torch.bfloat16)
    factors = write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower", dtype=torch.bfloat16, alpha=6)
    convert(str(tmp_path / "lora"), tmp_path / "hub", Options(base_model=str(tmp_path / "base")), progress=False)
    found = read_tensors(tmp_path / "hub")["model.language_model.layers.0.self_attn.q_proj.weight"]
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    update = factors[f"{start}B.weight"].float() @ (factors[f"{start}A.weight"].float() * 1.5)
    expected = tensors["model.layers.0.self_attn.q_proj.weight"].float() + update
    assert torch.equal(found, expected.bfloat16())


def test_an_adapter_trained_on_a_hub_folder(sources, tmp_path):
    peft = pytest.importorskip("peft")
    convert(str(sources / "stage2"), tmp_path / "hub", progress=False)
    model = load_model(tmp_path / "hub")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r"model\.language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["model.multi_modal_projector"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.01
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    options = Options(base_model=str(tmp_path / "hub"))
    convert(str(tmp_path / "adapter"), tmp_path / "merged", options, progress=False)
    found = load_model(tmp_path / "merged").state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=1e-6, atol=1e-6), key
    assert_verified(tmp_path / "merged", tmp_path / "adapter", options)


def test_an_adapter_of_our_finetuning_keeps_the_budget_it_was_trained_at(hub_folder, tmp_path):
    pytest.importorskip("peft")
    from modeling_delta_llava.finetuning.arguments import build_arguments
    from modeling_delta_llava.finetuning.run import run
    from tests.finetuning.conftest import EXACT, write_data

    settings = EXACT | {
        "model": str(hub_folder),
        "data_path": str(write_data(tmp_path / "data", rows=4)),
        "image_folder": str(tmp_path / "data" / "images"),
        "output_dir": str(tmp_path / "adapter"),
        "train_language_model": False,
        "lora_rank": 2,
        "num_visual_tokens": 16,
        "max_steps": 1,
    }
    assert json.loads((hub_folder / "config.json").read_text())["num_visual_tokens"] == 4
    run(build_arguments(settings))
    options = Options(base_model=str(hub_folder))
    convert(str(tmp_path / "adapter"), tmp_path / "merged", options, progress=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["num_visual_tokens"], config["trained_num_visual_tokens"]) == (16, [16])
    processor = json.loads((tmp_path / "merged" / "processor_config.json").read_text())
    assert processor["num_visual_tokens"] == 16
    assert_verified(tmp_path / "merged", tmp_path / "adapter", options)


# --- this project's own checkpoints ----------------------------------------------------------------------------------


def test_a_finetuned_folder_keeps_everything(sources, tmp_path):
    convert(str(sources / "stage2"), tmp_path / "hub", progress=False)
    convert(str(tmp_path / "hub"), tmp_path / "again", max_shard_size="1MB", progress=False)
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "hub"))
    for name in ("config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes(), name
    assert_verified(tmp_path / "again", tmp_path / "hub")
    export(str(tmp_path / "again"), tmp_path / "back", progress=False)
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(sources / "stage2"))


def test_a_folder_saved_by_the_model_exports_without_a_record(sources, tmp_path):
    convert(str(sources / "stage2"), tmp_path / "hub", progress=False)
    model = load_model(tmp_path / "hub")
    model.save_pretrained(tmp_path / "saved")
    said = []
    export(str(tmp_path / "saved"), tmp_path / "back", vision_tower="x/y", progress=False, say=said.append)
    found, expected = read_tensors(tmp_path / "back"), read_tensors(sources / "stage2")
    unread = {key for key in expected if f"encoder.layers.{model.config.num_tower_layers}." in key}
    assert unread
    assert found.keys() == expected.keys() - unread  # which the model did not build
    expected = {key: tensor for key, tensor in expected.items() if key not in unread}
    rows = expected["lm_head.weight"].shape[0]
    assert found["lm_head.weight"].shape[0] == rows + 1
    found |= {key: found[key][:rows] for key in ("lm_head.weight", "model.embed_tokens.weight")}
    assert_same_tensors(found, expected)
    assert "was not written by convert" in said[0]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["mm_vision_tower"], config["scale_factor"]) == ("llava_llama", "x/y", 2)


# --- the 576-token baseline ------------------------------------------------------------------------------------------


def test_a_plain_llava_becomes_native_whatever_it_is_called(sources, tmp_path):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    write_stage2(tmp_path / "source", LAYOUT, plain=True)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    write_json(tmp_path / "source" / "config.json", config | {"mm_projector_type": "delatallava"})
    round_trip(tmp_path / "source", tmp_path)
    model = load_model(tmp_path / "hub")
    assert type(model) is LlavaForConditionalGeneration
    assert not list((tmp_path / "hub").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    processor = LlavaProcessor.from_pretrained(tmp_path / "hub")
    assert processor.patch_size == 4
    keys = read_tensors(tmp_path / "hub").keys()
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= keys


def test_a_delta_projector_called_mlp2x_gelu_is_recognised(stage2, tmp_path):
    config = json.loads((stage2 / "config.json").read_text())
    write_json(stage2 / "config.json", config | {"mm_projector_type": "mlp2x_gelu"})
    convert(str(stage2), tmp_path / "hub", progress=False)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["model_type"] == "delta_llava"


def test_plain_stage1_and_lora(sources, tmp_path):
    options = Options(base_model=str(sources / "base"))
    write_stage1(tmp_path / "stage1", LAYOUT, tower=sources / "tower", plain=True)
    write_lora(tmp_path / "lora", LAYOUT, tower=sources / "tower")
    projector = torch.load(tmp_path / "stage1" / "mm_projector.bin", weights_only=True)
    trained = {f"base_model.model.{key}": tensor for key, tensor in projector.items()}
    torch.save(trained, tmp_path / "lora" / "non_lora_trainables.bin")
    changed = "language_model.model.layers.0.self_attn.q_proj.weight"
    found = {}
    for form in ("stage1", "lora"):
        convert(str(tmp_path / form), tmp_path / f"{form}-hub", options, progress=False)
        assert_verified(tmp_path / f"{form}-hub", tmp_path / form, options)
        assert json.loads((tmp_path / f"{form}-hub" / "config.json").read_text())["model_type"] == "llava"
        found[form] = read_tensors(tmp_path / f"{form}-hub")
    assert torch.equal(
        found["stage1"]["multi_modal_projector.linear_1.weight"], projector["model.mm_projector.0.weight"]
    )
    assert not torch.equal(found["stage1"][changed], found["lora"][changed])


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(stage2, tmp_path, dtype):
    options = Options(dtype=dtype)
    convert(str(stage2), tmp_path / "hub", options, progress=False)
    source = read_tensors(stage2)
    found = read_tensors(tmp_path / "hub")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["dtype"] == dtype
    expected = source["model.mm_projector.clip_attn.in_proj_weight"].to(getattr(torch, dtype))
    parts = [found[f"model.multi_modal_projector.cross_attention.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), expected)
    checks = verify(tmp_path / "hub", str(stage2), numbers=False, progress=False)
    assert passed(checks), checks


def test_another_tower_wins_over_the_one_inside(stage2, tmp_path):
    write_tower(tmp_path / "other", LAYOUT, seed=99)
    convert(str(stage2), tmp_path / "hub", Options(vision_tower=str(tmp_path / "other")), progress=False)
    other = load_file(tmp_path / "other" / "model.safetensors")
    found = read_tensors(tmp_path / "hub")
    for key, tensor in other.items():
        assert torch.equal(found["model.vision_tower." + key.removeprefix("vision_model.")], tensor), key


def test_a_tower_from_a_full_clip_repository(tmp_path):
    tensors = write_stage2(tmp_path / "source", LAYOUT, tower_inside=None)
    tower = tmp_path / "source-tower"
    vision = json.loads((tower / "config.json").read_text())
    write_json(tower / "config.json", {"model_type": "clip", "vision_config": vision, "text_config": {}})
    weights = load_file(tower / "model.safetensors")
    extra = {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.tensor(1.0)}
    extra["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(weights | extra | {"visual_projection.weight": torch.ones(2, 2)}, tower / "pytorch_model.bin")
    (tower / "model.safetensors").unlink()
    convert(str(tmp_path / "source"), tmp_path / "hub", progress=False)
    assert_verified(tmp_path / "hub", tmp_path / "source")
    assert len(read_tensors(tmp_path / "hub")) == len(tensors) + len(weights) + 4, "two fused tensors became six"


def test_a_known_tower_needs_no_network_when_its_weights_are_inside(tmp_path, monkeypatch):
    from modeling_delta_llava.conversion import configs

    write_stage2(tmp_path / "source", LAYOUT)
    fields = json.loads((tmp_path / "source-tower" / "config.json").read_text())
    monkeypatch.setitem(configs.KNOWN_TOWERS, "clip-vit-large-patch14-336", fields)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    name = "openai/clip-vit-large-patch14-336"
    write_json(tmp_path / "source" / "config.json", config | {"mm_vision_tower": name})
    said = []
    convert(str(tmp_path / "source"), tmp_path / "hub", progress=False, say=said.append)
    assert any("its published configuration is used" in line for line in said)
    export(str(tmp_path / "hub"), tmp_path / "back", progress=False)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_vision_tower"] == name


def test_the_form_is_said_and_can_be_overridden(sources, stage2, tmp_path):
    (stage2 / "mm_projector.bin").write_bytes((sources / "stage1" / "mm_projector.bin").read_bytes())
    said = []
    convert(str(stage2), tmp_path / "one", progress=False, say=said.append)
    assert said[0] == "found: complete stage-2 checkpoint with a Delta projector"
    options = Options(form=STAGE1, base_model=str(sources / "base"))
    convert(str(stage2), tmp_path / "two", options, progress=False, say=said.append)
    assert "found: stage-1 projector (mm_projector.bin) with a Delta projector" in said
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    key = "model.language_model.embed_tokens.weight"
    assert torch.equal(one[key], two[key])


def test_preview_writes_nothing_and_tells_the_plan(sources, tmp_path):
    found, rows = preview(str(sources / "stage2"), tmp_path / "hub")
    table = dict(rows)
    assert found[0].startswith("found: complete stage-2 checkpoint")
    assert table["projector"].startswith("49 tensors")
    assert table["visual tokens"] == "4 per image (legal: 16, 4, 1)"
    assert table["vocabulary"] == "449 rows, 1 of them new"
    assert table["image token"] == "<image> = 448"
    assert "free" in table["disk"]
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bars_reach_their_end(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    convert(str(sources / "stage2"), tmp_path / "hub")
    export(str(tmp_path / "hub"), tmp_path / "back")
    assert re.search(r"converting: 100%.*<.*B/s", terminal.getvalue())
    assert re.search(r"exporting: 100%.*<.*B/s", terminal.getvalue())


# --- vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "added", "image_token_id", "rows"),
    [
        pytest.param(None, (), 448, 449, id="no row for the image token"),
        pytest.param(None, ("<pad>",), 449, 450, id="one added token"),
        pytest.param(None, ("<pad>", "<extra>"), 450, 451, id="two added tokens"),
        pytest.param(512, (), 448, 512, id="padded rows are reused"),
        pytest.param(446, ("<im_start>", "<im_end>"), 450, 451, id="two tokens without rows"),
    ],
)
def test_vocabulary_rows(tmp_path, vocab_size, added, image_token_id, rows):
    layout = replace(LAYOUT, vocab_size=vocab_size)
    source = write_stage2(tmp_path / "source", layout, added_tokens=added)
    round_trip(tmp_path / "source", tmp_path)
    model = load_model(tmp_path / "hub")
    assert model.config.image_token_id == image_token_id
    assert model.config.text_config.vocab_size == rows
    head = model.lm_head.weight
    assert head.shape[0] == rows
    kept = source["lm_head.weight"].shape[0]
    assert torch.equal(head[:kept], source["lm_head.weight"])
    assert model.generation_config.suppress_tokens == sorted({image_token_id, *range(kept, rows)})
    with torch.no_grad():
        states = torch.randn(500, head.shape[1]) * 5
        logits = states @ head.T
    assert (logits[:, kept:].amax(-1) <= logits[:, :kept].amax(-1)).all() if rows > kept else True


def test_qwen_reuses_its_own_image_token(tmp_path):
    layout = TrainingLayout(text_model_type="qwen2", vocab_size=440)
    write_stage2(tmp_path / "source", layout)
    convert(str(tmp_path / "source"), tmp_path / "hub", progress=False)
    model = load_model(tmp_path / "hub")
    assert model.config.image_token_id == 5
    assert model.lm_head.weight.shape[0] == 440
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("sampling", [True, False])
def test_the_image_token_is_never_generated(sources, tmp_path, sampling):
    convert(str(sources / "stage2"), tmp_path / "hub", progress=False)
    model = load_model(tmp_path / "hub")
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_id] = 100 * model.lm_head.weight.abs().amax(0)
    torch.manual_seed(0)
    output = model.generate(
        input_ids=torch.randint(3, 448, (4, 6)), max_new_tokens=20, do_sample=sampling, eos_token_id=None
    )
    assert not (output == model.config.image_token_id).any()


def test_the_generation_config_is_valid_although_the_source_is_not(sources, tmp_path):
    from transformers import GenerationConfig

    with pytest.raises(ValueError, match=r"temperature|do_sample"):
        GenerationConfig.from_pretrained(sources / "stage2").validate(strict=True)
    convert(str(sources / "stage2"), tmp_path / "hub", progress=False)
    generation = GenerationConfig.from_pretrained(tmp_path / "hub")
    generation.validate(strict=True)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


# --- privacy and files -----------------------------------------------------------------------------------------------


def test_no_path_of_the_training_machine_is_written(sources, tmp_path):
    convert(str(sources / "stage2"), tmp_path / "hub", progress=False)
    for path in (tmp_path / "hub").rglob("*"):
        if path.is_file():
            assert str(sources).encode() not in path.read_bytes(), path.name


def test_the_folder_is_complete(sources, tmp_path):
    result = convert(str(sources / "stage2"), tmp_path / "hub", progress=False)
    names = {path.relative_to(result.output).as_posix() for path in result.files}
    assert {
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "configuration_delta_llava.py",
        "modeling_delta_llava.py",
        "processing_delta_llava.py",
        "projector_delta_llava.py",
        "video_delta_llava.py",
        "model.safetensors",
        "training/record.json",
        "training/tokenizer.model",
    } <= names
    assert not any(Path(name).name.startswith(".") for name in names)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architectures"] == ["DeltaLlavaForConditionalGeneration"]
    assert config["auto_map"] == AUTO_MAP


def test_shard_sizes(sources, tmp_path):
    convert(str(sources / "stage2"), tmp_path / "hub", max_shard_size="500KB", progress=False)
    files = sorted((tmp_path / "hub").glob("model-*.safetensors"))
    assert len(files) > 5
    largest = max(tensor.nbytes for tensor in read_tensors(tmp_path / "hub").values())
    assert all(path.stat().st_size < max(500_000, largest) + 20_000 for path in files)
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "hub")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(math.prod(tensor.shape) for tensor in tensors.values())
    unread = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if ".encoder.layers.7." in name)
    assert load_model(tmp_path / "hub").num_parameters() == index["metadata"]["total_parameters"] - unread


def test_shards_without_an_index_are_read_when_complete(stage2, tmp_path):
    (stage2 / "model.safetensors.index.json").unlink()
    said = []
    convert(str(stage2), tmp_path / "hub", progress=False, say=said.append)
    assert any("index" in line for line in said)
    assert_verified(tmp_path / "hub", stage2)


def test_safetensors_win_over_bin(stage2, tmp_path):
    torch.save({"nonsense": torch.zeros(1)}, stage2 / "pytorch_model.bin")
    said = []
    convert(str(stage2), tmp_path / "hub", progress=False, say=said.append)
    assert any("the safetensors are read" in line for line in said)


def test_mixed_dtypes_are_kept(tmp_path):
    tensors = write_stage2(tmp_path / "source", LAYOUT, dtype=torch.bfloat16)
    mixed = {key: t.float() if "vision_tower" in key else t for key, t in tensors.items()}
    save_file(mixed, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    round_trip(tmp_path / "source", tmp_path)
    found = read_tensors(tmp_path / "hub")
    assert found["model.vision_tower.pre_layrnorm.weight"].dtype == torch.float32
    assert found["lm_head.weight"].dtype == torch.bfloat16
