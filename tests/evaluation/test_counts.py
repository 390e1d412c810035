"""Counts: the paper's figures, and closed forms against torch's own counter."""

import pytest
import torch

from delta_llava.errors import UserError
from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.evaluation.backbones import LANGUAGE_MODELS, VISION_TOWERS, known_config
from modeling_delta_llava.evaluation.counts import (
    TextGeometry,
    closed_form,
    counted,
    has_closed_form,
    meta_model,
    paper_convention,
    parameters,
    projector_flops,
    tower_flops,
)
from modeling_delta_llava.modeling_delta_llava import CACHE_NAME
from tests.tiny import tiny_config, tiny_model

VICUNA_7B = "lmsys/vicuna-7b-v1.5"
TERA = 1e12


def assert_torch_agrees(model: DeltaLlavaForConditionalGeneration, budget: int, text_tokens: int, new_tokens: int):
    """The closed form is torch's count, up to the rotary angles that some releases compute as a matrix product."""
    config = model.config
    ours = closed_form(config, budget, text_tokens, new_tokens)
    theirs = counted(model, budget, text_tokens, new_tokens)
    angles_per_token = TextGeometry.of(config.text_config).head_dim
    angles = {"prefill": angles_per_token * (text_tokens + budget), "decode": angles_per_token * (new_tokens - 1)}
    for component in ("vision_tower", "projector", "prefill", "decode"):
        difference = getattr(theirs, component) - getattr(ours, component)
        assert difference in (0, angles.get(component, 0)), (component, budget)


@pytest.mark.parametrize(("budget", "tera"), [(1, 0.70), (16, 0.85), (144, 2.16), (576, 6.72)])
def test_prefill_of_figure_3_in_the_papers_convention(budget, tera):
    flops = paper_convention(known_config(VICUNA_7B), budget)
    assert flops.prefill / TERA == pytest.approx(tera, rel=0.005)


@pytest.mark.parametrize(("budget", "tera"), [(1, 0.697), (16, 0.849), (144, 2.158), (576, 6.700)])
def test_prefill_to_three_digits(budget, tera):
    assert round(paper_convention(known_config(VICUNA_7B), budget).prefill / TERA, 3) == tera


def test_vision_and_baseline_projector_of_figure_3():
    flops = paper_convention(known_config(VICUNA_7B), 576)
    assert flops.vision_tower / TERA == pytest.approx(0.382, abs=0.0005)
    assert flops.projector / TERA == pytest.approx(0.024, abs=0.0005)
    assert flops.decode / TERA == pytest.approx(0.31, abs=0.005)
    assert flops.total / TERA == pytest.approx(7.43, rel=0.005)


def test_the_paper_counts_two_of_three_mlp_matrices():
    config = known_config(VICUNA_7B)
    text, sequence = TextGeometry.of(config.text_config), 68 + 144
    third_matrix = 2 * sequence * text.hidden_size * text.intermediate_size * text.num_layers
    head = 2 * text.hidden_size * text.vocab_size
    assert closed_form(config, 144).prefill - paper_convention(config, 144).prefill == third_matrix + head


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "qwen3", "mistral", "seed_oss", "gemma", "gemma2", "phi3"])
def test_closed_form_is_what_torch_counts(decoder, new_tokens):
    config = tiny_config(decoder=decoder, text={"num_key_value_heads": 1})
    model = meta_model(config)
    assert has_closed_form(config.text_config)
    for budget in config.legal_num_visual_tokens:
        assert_torch_agrees(model, budget, 11, new_tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"tower": "siglip"},
        {"projector_hidden_size": 64},
        {"use_emhsa": False},
        {"use_transformer_block": False},
        {"delta_rank": 0},
        {"spatial_reduction": 2},
        {"memory_feature_layers": [1, 2]},
        {"use_transformer_block": False, "projector_hidden_size": 64},
    ],
)
def test_closed_form_of_other_geometries(fields):
    config = tiny_config(**fields)
    model = meta_model(config)
    for budget in config.legal_num_visual_tokens:
        assert_torch_agrees(model, budget, 11, 3)


@pytest.mark.parametrize("language_model", sorted(LANGUAGE_MODELS))
def test_closed_form_at_published_size(language_model):
    assert_torch_agrees(meta_model(known_config(language_model)), 144, 68, 3)


def test_the_skipped_tower_layer_outweighs_the_compressing_projector():
    config = known_config(VICUNA_7B)
    mlp = 2 * 576 * (1024 * 4096 + 4096**2)
    native = tower_flops(config, config.vision_config.num_hidden_layers) + mlp
    for budget in config.legal_num_visual_tokens[1:]:
        assert tower_flops(config) + projector_flops(config, budget) < native


@pytest.mark.parametrize(
    ("language_model", "billions"),
    [(VICUNA_7B, 6.738), ("lmsys/vicuna-13b-v1.5", 13.016), ("Qwen/Qwen2.5-7B-Instruct", 7.616)],
)
def test_parameters_of_published_language_models(language_model, billions):
    counts = parameters(meta_model(known_config(language_model)))
    assert (counts["language_model"] + counts["output_head"]) / 1e9 == pytest.approx(billions, abs=0.001)
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")


def test_parameters_of_the_released_projector():
    assert parameters(meta_model(known_config(VICUNA_7B)))["projector"] == 42_503_680


def test_tied_embeddings_count_once():
    model = tiny_model(text={"tie_word_embeddings": True})
    assert parameters(model)["output_head"] == 0


def test_key_value_bytes_are_what_the_cache_holds():
    model = tiny_model(decoder="qwen2", text={"num_key_value_heads": 1})
    with torch.no_grad():
        cache = model.model.language_model(inputs_embeds=torch.zeros(1, 7, 32), use_cache=True)[CACHE_NAME]
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert TextGeometry.of(model.config.text_config).key_value_bytes(7, bytes_per_value=4) == held


def test_unknown_backbone_is_named():
    with pytest.raises(UserError, match="nobody/nothing"):
        known_config("nobody/nothing")


def test_known_towers_give_the_published_grids():
    grids = {name: DeltaLlavaConfig(vision_config=dict(tower)).grid_size for name, tower in VISION_TOWERS.items()}
    assert grids == {
        "openai/clip-vit-large-patch14-336": 24,
        "openai/clip-vit-large-patch14": 16,
        "openai/clip-vit-base-patch32": 7,
        "google/siglip-so400m-patch14-384": 27,
    }
