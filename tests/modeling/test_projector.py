"""The projector against the released code's own values, and its parts against their definitions."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_delta_llava.configuration_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaModel
from modeling_delta_llava.projector_delta_llava import (
    DeltaLlavaDropPath,
    DeltaLlavaProjection,
    DeltaLlavaProjector,
    DeltaLlavaSelfAttention,
    position_table,
)
from tests.golden import PROJECTOR_ENTRIES, PROJECTOR_VALUES, check_projector, golden_projector, golden_streams
from tests.tiny import tiny_config, tiny_model


def test_all_twelve_golden_entries_are_there():
    assert len(PROJECTOR_ENTRIES) == 12


def test_parameters_of_the_released_projector():
    assert sum(parameter.numel() for parameter in golden_projector(4096).parameters()) == 42_503_680


@pytest.mark.parametrize("entry", PROJECTOR_ENTRIES)
def test_released_values(entry):
    check_projector(entry)


@pytest.mark.parametrize("scale", [1, 2])
def test_training_computes_the_released_values_too(scale):
    """In training the query path runs at every budget; without stochastic depth it must not change the result."""
    projector = copy.deepcopy(golden_projector(4096)).train()
    for module in projector.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0
    with torch.no_grad():
        output = projector(*golden_streams(), scale).numpy()
    expected = PROJECTOR_VALUES[f"h4096_s{scale}_sample"]
    rows, columns = (PROJECTOR_VALUES[f"h4096_s{scale}_{axis}"] for axis in ("rows", "columns"))
    assert np.abs(output[:, rows][:, :, columns] - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("grid_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_position_table_is_the_bicubic_resize_of_the_full_table(grid_size):
    channels = 32
    frequencies = 1.0 / 10000 ** (np.arange(channels // 4) / (channels // 4))
    rows, columns = np.meshgrid(np.arange(24), np.arange(24), indexing="ij")
    full = np.concatenate(
        [function(index.reshape(-1, 1) * frequencies) for index in (columns, rows) for function in (np.sin, np.cos)],
        axis=1,
    ).astype(np.float32)
    image = torch.from_numpy(full).T.reshape(1, channels, 24, 24)
    expected = F.interpolate(image, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    table = position_table(grid_size, 24, channels, torch.device("cpu"))
    torch.testing.assert_close(table, expected[0].flatten(1).T, rtol=0, atol=2e-6)


def test_delta_projection_is_base_plus_low_rank_update():
    torch.manual_seed(0)
    projection = DeltaLlavaProjection(12, 8, rank=3)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.normal_()
    tokens = torch.randn(5, 12)
    weight = projection.base.weight + (projection.delta_u @ projection.delta_v).T
    expected = projection.norm(F.gelu(F.linear(tokens, weight)))
    torch.testing.assert_close(projection(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "pooled"), [(16, 4), (4, 1), (3, 3), (1, 1)])
def test_spatial_reduction_pools_runs_of_tokens_unless_there_are_too_few(tokens, pooled):
    attention = DeltaLlavaSelfAttention(16, head_dim=8, spatial_reduction=2)
    seen = []
    attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    hidden_states = torch.randn(2, tokens, 16)
    assert attention(hidden_states).shape == (2, tokens, 16)
    assert seen[0].shape == (2, pooled, 16)
    normalised = attention.norm(hidden_states)
    expected = normalised if pooled == tokens else normalised.unflatten(1, (pooled, 4)).mean(2)
    torch.testing.assert_close(seen[0], expected)


def test_every_query_reads_exactly_its_own_window():
    """Changing one patch changes the one visual token whose window holds it, and no other (keys and values)."""
    projector = tiny_model().model.multi_modal_projector
    query, memory = torch.randn(1, 16, 32), torch.randn(1, 16, 96)
    with torch.no_grad():
        before = projector(query, memory, 2)
        changed = memory.clone()
        changed[0, 4 * 2 + 3] += 1.0  # patch (2, 3) lies in window (1, 1)
        difference = (projector(query, changed, 2) - before).abs().amax(-1)[0]
    assert difference[3] > 1e-4
    assert difference[:3].max() == 0


def test_full_grid_skips_the_query_path_in_inference_only():
    projector = tiny_model().model.multi_modal_projector
    calls = []
    projector.query_projection.register_forward_hook(lambda *_: calls.append(1))
    streams = torch.randn(1, 16, 32), torch.randn(1, 16, 96)
    with torch.no_grad():
        inference = projector.eval()(*streams, 1)
        assert not calls
        projector.train()
        for module in projector.modules():
            if hasattr(module, "rate"):
                module.rate = 0.0
        torch.testing.assert_close(projector(*streams, 1), inference)
    assert calls


@pytest.mark.parametrize(
    ("switch", "missing"),
    [
        ({"use_emhsa": False}, "query_block.attention"),
        ({"delta_rank": 0}, "delta_"),
        ({"use_transformer_block": False}, "query_block"),
    ],
)
def test_ablations_remove_their_part_and_nothing_else(switch, missing):
    full = dict(tiny_model().model.multi_modal_projector.named_parameters())
    model = tiny_model(**switch)
    ablated = dict(model.model.multi_modal_projector.named_parameters())
    assert set(ablated) == {name for name in full if missing not in name}
    with torch.no_grad():
        output = model.model.multi_modal_projector(torch.randn(2, 16, 32), torch.randn(2, 16, 96), 2)
    assert output.shape == (2, 4, 32)
    assert torch.isfinite(output).all()


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = torch.ones(20000, 1, 1)
    dropped = DeltaLlavaDropPath(0.25).train()(branch)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(DeltaLlavaDropPath(0.25).eval()(branch), branch)


def test_initialisation_follows_the_released_code():
    config = DeltaLlavaConfig(text_config={"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2})
    config.vision_config.num_hidden_layers = 1
    config.query_feature_layer, config.memory_feature_layers = 0, [0, 1, 1, 1]
    config.text_config.update({"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 16})
    torch.manual_seed(0)
    projector = DeltaLlavaModel(config).multi_modal_projector
    state = projector.state_dict()
    for name, tensor in state.items():
        if re.search(r"norm\.weight", name):
            assert (tensor == 1).all(), name
        elif re.search(r"norm\.bias|(attention|cross_attention)\.\w+_proj\.bias|linear_\d\.bias", name):
            assert (tensor == 0).all(), name
        elif re.search(r"\.base\.weight|attention\.out_proj\.weight|query_block\.attention\.\w_proj\.weight", name):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.02), name
        elif re.search(r"cross_attention\.[qkv]_proj\.weight", name):
            assert tensor.abs().max().item() == pytest.approx((6 / 4096) ** 0.5, rel=0.01), name
        elif re.search(r"delta_[uv]", name):
            assert tensor.abs().max().item() == pytest.approx((6 / sum(tensor.shape)) ** 0.5, rel=0.02), name
        elif re.search(r"input_proj|local_proj|local_mixer|fc[12]", name):
            fan_in = {"fc1": 1024, "fc2": 2048, "input_proj": 1024, "local_proj": 768, "conv": 288, "out_proj": 256}
            bound = next(value for part, value in fan_in.items() if part in name) ** -0.5
            assert tensor.abs().max().item() == pytest.approx(bound, rel=0.03), name
        else:
            assert re.search(r"linear_\d\.weight", name), f"no expectation for {name}"


@settings(max_examples=30, deadline=None)
@given(grid=st.integers(1, 8), heads=st.integers(1, 3), rank=st.integers(0, 3), data=st.data())
def test_any_legal_budget_of_any_grid_runs(grid, heads, rank, data):
    config = tiny_config(
        delta_rank=rank,
        projector_num_attention_heads=heads,
        projector_hidden_size=24,
        block_head_dim=6,
        num_visual_tokens=1,
    )
    config.vision_config.image_size = grid * config.vision_config.patch_size
    budget = data.draw(st.sampled_from(config.legal_num_visual_tokens))
    projector = DeltaLlavaProjector(config).eval()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(std=0.2)
        query = torch.randn(1, grid**2, 32)
        output = projector(query, torch.randn(1, grid**2, 96), config.scale_factor(budget))
    assert output.shape == (1, budget, 32)
    assert torch.isfinite(output).all()
