"""The fused projector: the plain one's results, its weights untouched, and refused where it cannot be built."""

import copy

import pytest
import torch
from torch import nn

from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector
from tests.tiny import tiny_config, tiny_model

GEOMETRIES = {
    "default": {},
    "odd windows": {"tower": "siglip"},
    "two heads": {"projector_num_attention_heads": 2},
    "wider than the tower": {"projector_hidden_size": 64},
    "no EMHSA": {"use_emhsa": False},
    "no transformer block": {"use_transformer_block": False},
    "no transformer block, wider": {"use_transformer_block": False, "projector_hidden_size": 64},
    "no low-rank update": {"delta_rank": 0},
    "spatial reduction": {"spatial_reduction": 2},
    "scaled tokens": {"visual_token_scale": 0.25},
}


def random_projector(config: DeltaLlavaConfig, seed: int = 0) -> DeltaLlavaProjector:
    """Every weight random, LayerNorms and biases included, so that nothing left out can go unnoticed."""
    torch.manual_seed(seed)
    projector = DeltaLlavaProjector(config).eval()
    with torch.no_grad():
        for name, weight in projector.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.normal_(1.0, 0.3)
            else:
                weight.normal_(std=0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5)
    return projector


def random_streams(config: DeltaLlavaConfig, batch_size: int = 2) -> list[torch.Tensor]:
    """Query and memory stream; the query stream is a slice without its class token, as the model hands it over."""
    width, layers = config.vision_config.hidden_size, len(config.memory_feature_layers)
    query = torch.randn(batch_size, 1 + config.num_patches, width)[:, 1:]
    return [query, torch.randn(batch_size, config.num_patches, layers * width)]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@torch.no_grad()
def both(projector: DeltaLlavaProjector, streams: list[torch.Tensor], scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of the plain and of the fused projector; fails if the fused one was not used."""
    projector.unfuse()
    plain = projector(*streams, scale)
    projector.fuse()
    calls = []
    hook = projector.fused.register_forward_hook(lambda *_: calls.append(1))
    fused = projector(*streams, scale)
    hook.remove()
    assert calls == [1]
    return plain, fused


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_same_results_at_every_budget(geometry, batch_size):
    config = tiny_config(**GEOMETRIES[geometry])
    projector = random_projector(config)
    streams = random_streams(config, batch_size)
    for budget in config.legal_num_visual_tokens:
        plain, fused = both(projector, streams, config.scale_factor(budget))
        assert fused.shape == plain.shape == (batch_size, budget, config.text_config.hidden_size)
        assert relative_error(fused, plain) < 1e-5, budget


@pytest.mark.parametrize("budget", [576, 144, 64, 1])
def test_same_results_at_the_released_size(budget):
    config = DeltaLlavaConfig()
    projector = random_projector(config)
    plain, fused = both(projector, random_streams(config, batch_size=1), config.scale_factor(budget))
    assert relative_error(fused, plain) < 1e-5


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_fp32_as_the_plain_projector(dtype, capability, monkeypatch):
    """Folded in half precision, or in fp32 on a CPU that emulates products in half precision."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = tiny_config()
    projector = random_projector(config)
    streams = random_streams(config)
    for budget in config.legal_num_visual_tokens:
        scale = config.scale_factor(budget)
        projector.float()
        expected, _ = both(projector, streams, scale)
        plain, fused = both(projector.to(dtype), [stream.to(dtype) for stream in streams], scale)
        assert fused.dtype == dtype
        projector.fuse()
        assert projector.fused.memory_weight.dtype == (torch.float32 if capability == "AVX2" else dtype)
        assert relative_error(fused.float(), expected) < 1.5 * relative_error(plain.float(), expected) + 1e-3


def test_another_dtype_drops_the_folded_weights():
    """Weights and folded copies would be rounded each on their own."""
    config = tiny_config()
    projector = random_projector(config)
    streams = random_streams(config)
    projector.fuse()
    projector.to(torch.bfloat16).to(torch.float32)
    plain, fused = both(projector, streams, 2)
    assert relative_error(fused, plain) < 1e-5
    projector.to(torch.bfloat16)
    with torch.no_grad():
        assert projector(*[stream.bfloat16() for stream in streams], 2).dtype == torch.bfloat16
    assert projector.fused is None


def test_mixed_budgets_through_the_whole_model():
    model = tiny_model()
    config = model.config
    pixels = torch.randn(3, 3, config.vision_config.image_size, config.vision_config.image_size)
    budgets = [16, 1, 4]
    with torch.no_grad():
        plain = model.get_image_features(pixels, num_visual_tokens=budgets).pooler_output
        model.fuse_projector()
        fused = model.get_image_features(pixels, num_visual_tokens=budgets).pooler_output
    assert [len(tokens) for tokens in fused] == budgets
    for ours, expected in zip(fused, plain, strict=True):
        assert relative_error(ours, expected) < 1e-5


def test_state_dict_and_saved_files_are_the_plain_ones(tmp_path):
    model = tiny_model()
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.fuse_projector()
    assert list(model.state_dict()) == list(plain)
    model.save_pretrained(tmp_path)
    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.model.multi_modal_projector.fused is None
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, plain[name]), name


def test_saved_code_is_complete(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "fusion_delta_llava.py").is_file()
    assert (tmp_path / "linear_delta_llava.py").is_file()


def test_a_fused_model_trains_its_plain_weights():
    config = tiny_config(drop_path_rate=0.0)
    streams = random_streams(config)
    gradients = []
    for fuse in (False, True):
        projector = random_projector(config)
        if fuse:
            projector.fuse()
        projector.train()
        projector(*streams, 2).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in projector.named_parameters()})
    plain, fused = gradients
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert torch.equal(fused[name], gradient), name


def change_in_place(projector: nn.Module):
    projector.key_projection.base.weight.mul_(-1.0)


def load_weights(projector: nn.Module):
    projector.load_state_dict(random_projector(tiny_config(), seed=1).state_dict())


def assign_weights(projector: nn.Module):
    projector.load_state_dict(random_projector(tiny_config(), seed=1).state_dict(), assign=True)


def train_through_data(projector: nn.Module):
    projector.train()
    projector.key_projection.base.weight.data.mul_(-1.0)
    projector.eval()


CHANGES = [
    *((change, False) for change in (change_in_place, load_weights, assign_weights, train_through_data)),
    *((change, True) for change in (load_weights, assign_weights, train_through_data)),
]


@pytest.mark.parametrize(("change", "compiled"), CHANGES)
def test_changed_weights_are_never_answered_with_old_ones(change, compiled):
    config = tiny_config()
    projector = random_projector(config)
    streams = random_streams(config)
    projector.fuse()
    forward = torch.compile(projector, backend="eager") if compiled else projector
    with torch.no_grad():
        before = forward(*streams, 2)
        change(projector)
        after = forward(*streams, 2)
        projector.unfuse()
        expected = projector(*streams, 2)
    assert relative_error(after, before) > 1e-2
    assert torch.equal(after, expected)


def test_weights_made_in_inference_mode_can_be_fused():
    config = tiny_config()
    with torch.inference_mode():
        projector = random_projector(config)
        streams = random_streams(config)
        plain, fused = both(projector, streams, 2)
    assert relative_error(fused, plain) < 1e-5


def test_a_copy_works_on_its_own():
    """With weights of its own it computes plainly until it is fused itself."""
    config = tiny_config()
    projector = random_projector(config)
    streams = random_streams(config)
    projector.fuse()
    duplicate = copy.deepcopy(projector)
    with torch.no_grad():
        before = projector(*streams, 2)
        projector.linear_1.weight.zero_()
        assert relative_error(duplicate(*streams, 2), before) < 1e-5
        assert duplicate.fused is None
        plain, fused = both(duplicate, streams, 2)
    assert relative_error(fused, plain) < 1e-5


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_compiles_without_a_graph_break(scale):
    config = tiny_config()
    projector = random_projector(config)
    streams = random_streams(config)
    projector.fuse()
    compiled = torch.compile(projector, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*streams, scale), projector(*streams, scale))


class QuantisedLinear(nn.Linear):
    """Holds its weight as integers, as bitsandbytes does."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.int8), requires_grad=False)


def quantise(model: DeltaLlavaForConditionalGeneration):
    projector = model.model.multi_modal_projector
    projector.linear_1 = QuantisedLinear(projector.linear_1)


def offload(model: DeltaLlavaForConditionalGeneration):
    model.model.multi_modal_projector.linear_2.to("meta")


def adapt(model: DeltaLlavaForConditionalGeneration):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["linear_1"]), model)


def adapt_whole_module(model: DeltaLlavaForConditionalGeneration):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    peft.get_peft_model(model, settings)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [(quantise, "quantised"), (offload, "offloaded"), (adapt, "PEFT"), (adapt_whole_module, "PEFT")],
)
def test_refused_with_the_reason(prepare, reason):
    model = tiny_model()
    prepare(model)
    with pytest.raises(ValueError, match=reason) as error:
        model.fuse_projector()
    assert "\n" not in str(error.value)


def test_an_adapter_on_the_language_model_does_not_matter():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r".*language_model.*\.q_proj"), model)
    model.fuse_projector()
    assert model.model.multi_modal_projector.fused is not None


def test_unfusing_frees_the_copy():
    model = tiny_model()
    buffers = sum(1 for _ in model.buffers())
    model.fuse_projector()
    assert sum(1 for _ in model.buffers()) > buffers
    model.unfuse_projector()
    assert sum(1 for _ in model.buffers()) == buffers
