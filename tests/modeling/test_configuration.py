"""Configuration: defaults that follow the tower, legal budgets, and errors that say what is legal."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given
from hypothesis import strategies as st

from modeling_delta_llava.configuration_delta_llava import (
    AUTO_MAP,
    DeltaLlavaConfig,
    image_budgets,
    legal_visual_tokens,
)
from tests.tiny import DECODERS, tiny_config

TOWER = {"model_type": "clip_vision_model", "num_attention_heads": 8, "intermediate_size": 64}


def test_defaults_are_the_released_architecture():
    config = DeltaLlavaConfig()
    assert config.vision_config.model_type == "clip_vision_model"
    assert config.text_config.model_type == "llama"
    assert (config.grid_size, config.num_patches, config.num_visual_tokens) == (24, 576, 144)
    assert config.memory_feature_layers == [12, 16, 22, 23]
    assert config.query_feature_layer == -2
    assert (config.projector_hidden_size, config.projector_num_attention_heads) == (1024, 8)
    assert (config.block_head_dim, config.block_attention_size, config.delta_rank) == (32, 768, 16)
    assert config.legal_num_visual_tokens == [576, 144, 64, 36, 16, 9, 4, 1]
    assert config.vision_feature_select_strategy == "default"


@pytest.mark.parametrize(
    ("tower", "grid", "budget", "heads", "attention", "memory", "strategy"),
    [
        ({"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 224, "patch_size": 14}, 16, 64, 8, 768,
         [12, 16, 22, 23], "default"),
        ({"hidden_size": 768, "num_hidden_layers": 12, "image_size": 224, "patch_size": 32}, 7, 49, 6, 576,
         [6, 8, 10, 11], "default"),
        ({"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "image_size": 384,
          "patch_size": 14}, 27, 81, 9, 864, [13, 18, 25, 26], "full"),
        ({"hidden_size": 32, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}, 4, 16, 1, 24,
         [0, 1], "default"),
    ],
    ids=["clip-l-224", "clip-b-32", "siglip-so400m-384", "tiny"],
)  # fmt: skip
def test_other_towers_set_the_geometry(tower, grid, budget, heads, attention, memory, strategy):
    config = DeltaLlavaConfig(vision_config={**TOWER, **tower})
    assert (config.grid_size, config.num_visual_tokens) == (grid, budget)
    assert (config.projector_num_attention_heads, config.block_attention_size) == (heads, attention)
    assert config.memory_feature_layers == memory
    assert config.vision_feature_select_strategy == strategy


@pytest.mark.parametrize("decoder", DECODERS)
def test_any_decoder_round_trips(decoder, tmp_path):
    config = tiny_config(decoder=decoder, trained_num_visual_tokens=[16, 4])
    config.save_pretrained(tmp_path)
    loaded = DeltaLlavaConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "auto_map"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    assert loaded.image_token_index == loaded.image_token_id == 448


def test_saved_config_names_every_auto_class(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert saved["auto_map"]["AutoModel"].endswith("DeltaLlavaModel")
    assert (tmp_path / "configuration_delta_llava.py").is_file()


def test_tied_embeddings_follow_the_language_model():
    assert tiny_config(text={"tie_word_embeddings": True}).tie_word_embeddings is True
    assert tiny_config(text={"tie_word_embeddings": False}).tie_word_embeddings is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_visual_tokens": 100}, r"num_visual_tokens=100 .*\[16, 4, 1\]"),
        ({"num_visual_tokens": 0}, r"choose one of \[16, 4, 1\]"),
        ({"num_visual_tokens": -4}, r"choose one of"),
        ({"num_visual_tokens": 9}, r"4 x 4 patch grid"),
        ({"trained_num_visual_tokens": [16, 5]}, r"num_visual_tokens=5 "),
        ({"query_feature_layer": 6}, r"query_feature_layer=6 .* 5 layers.* 0 \(embeddings\) to 5"),
        ({"query_feature_layer": -7}, r"-6 to -1"),
        ({"memory_feature_layers": [1, 9]}, r"memory_feature_layers=\[1, 9\]"),
        ({"memory_feature_layers": []}, r"memory_feature_layers=\[\]"),
        ({"projector_hidden_size": 30}, "multiple of 4"),
        ({"projector_num_attention_heads": 3}, "3 heads"),
        ({"projector_num_attention_heads": 0}, "0 heads"),
        ({"block_head_dim": 5}, "whole heads"),
        ({"block_head_dim": 0}, "whole heads"),
        ({"mix_ratio": 1.0}, "whole heads"),
        ({"delta_rank": -1}, "delta_rank=-1"),
        ({"spatial_reduction": 0}, "spatial_reduction=0"),
        ({"block_mlp_ratio": 0}, "block_mlp_ratio=0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
    ],
)
def test_impossible_settings_say_what_is_possible(fields, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        tiny_config(**fields)


@pytest.mark.parametrize("budget", ["4", [4], 4.0, True, b"4"], ids=repr)
def test_wrong_types_are_refused(budget):
    with pytest.raises(Exception, match="num_visual_tokens"):
        tiny_config(num_visual_tokens=budget)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"image_size": 8, "patch_size": 16}, "empty"),
        ({"image_size": [32, 32]}, "image_size"),
    ],
)
def test_impossible_towers(vision, message):
    with pytest.raises(Exception, match=message):
        DeltaLlavaConfig(vision_config={**TOWER, "hidden_size": 32, "num_hidden_layers": 2, **vision})


def test_language_models_with_a_biased_head_are_refused():
    with pytest.raises(ValueError, match="'phi' has a biased output head"):
        DeltaLlavaConfig(text_config={"model_type": "phi"})


def test_encoder_decoder_language_models_are_refused():
    with pytest.raises(ValueError, match=r"t5.*decoder-only"):
        DeltaLlavaConfig(text_config={"model_type": "t5"})


@given(grid=st.integers(1, 200), scale=st.integers(1, 200))
def test_legal_budgets_are_exactly_the_divisors_squares(grid, scale):
    legal = legal_visual_tokens(grid)
    assert legal == sorted(set(legal), reverse=True)
    assert legal[0] == grid**2
    assert legal[-1] == 1
    if grid % scale == 0:
        config = DeltaLlavaConfig(vision_config={**TOWER, "image_size": grid, "patch_size": 1})
        assert config.scale_factor((grid // scale) ** 2) == scale


@given(grid=st.integers(1, 60), budget=st.integers(-5, 4000))
def test_legal_budgets_only_are_accepted(grid, budget):
    if budget in legal_visual_tokens(grid):
        assert image_budgets(budget, 1, grid) == budget
    else:
        with pytest.raises(ValueError, match="choose one of"):
            image_budgets(budget, 1, grid)
