"""Quick Linears on CPUs: PyTorch's values and gradients but for their rounding, and PyTorch's own wherever else."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.linear_delta_llava import (
    BLOCK_CHANNELS,
    BLOCK_MAX_ROWS,
    QuickLinears,
    linear,
    quick_linear,
)
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector
from tests.tiny import tiny_config, tiny_model

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request, monkeypatch):
    """What the CPU seems to have: half precision is emulated with AVX2 and runs as it is with AVX512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Products are divided into at least as many blocks as there are threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def random_projector(config: DeltaLlavaConfig) -> DeltaLlavaProjector:
    torch.manual_seed(0)
    projector = DeltaLlavaProjector(config)
    with torch.no_grad():
        for weight in projector.parameters():
            weight.normal_(0.5 if weight.ndim == 1 else 0.0, 0.3)
    return projector.train()


def random_streams(config: DeltaLlavaConfig, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    width = config.vision_config.hidden_size
    widths = (width, len(config.memory_feature_layers) * width)
    return [torch.randn(2, config.num_patches, each, dtype=dtype) for each in widths]


def forward_and_backward(projector, streams, scale) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    projector.zero_grad()
    streams = [stream.detach().requires_grad_() for stream in streams]
    output = projector(*streams, scale)
    output.float().square().mean().backward()
    gradients = {name: weight.grad for name, weight in projector.named_parameters() if weight.grad is not None}
    return output.detach(), gradients | {f"stream {i}": stream.grad for i, stream in enumerate(streams)}


def is_ours(output: torch.Tensor) -> bool:
    """Whether a [`LinearWithGradients`] is among what `output` was computed by."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if "LinearWithGradients" in node.name():
            return True
        seen.add(node)
        pending += [parent for parent, _ in node.next_functions]
    return False


def assert_as_close(found: dict, plain: dict, exact: dict):
    """Every tensor is about as close to the exact one as what PyTorch computes by itself."""
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert tensor.dtype == plain[name].dtype
        error, plain_error = ((each[name].double() - exact[name]).norm() for each in (found, plain))
        assert error <= 1.5 * plain_error + 0.1 * torch.finfo(tensor.dtype).eps * exact[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("scale", [1, 2])
def test_projector_keeps_its_values_and_gradients(dtype, scale, emulated, monkeypatch):
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config).to(dtype)
    streams = random_streams(config, dtype)
    output, gradients = forward_and_backward(projector, streams, scale)
    monkeypatch.setattr("modeling_delta_llava.linear_delta_llava.LinearWithGradients", None)
    _, exact = forward_and_backward(copy.deepcopy(projector).double(), [each.double() for each in streams], scale)
    monkeypatch.setattr("modeling_delta_llava.linear_delta_llava.quick_linear", F.linear)
    plain_output, plain_gradients = forward_and_backward(projector, streams, scale)
    assert torch.equal(output, plain_output)
    assert_as_close(gradients, plain_gradients, exact)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0, 3)])
@pytest.mark.parametrize("sizes", [(5, 4), (2 * BLOCK_CHANNELS, 4 * BLOCK_CHANNELS)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_has_the_gradients_of_its_definition(dtype, shape, sizes, bias, emulated):
    torch.manual_seed(0)
    module = nn.Linear(*sizes, bias=bias, dtype=dtype)
    features = torch.randn(*shape, sizes[0], dtype=dtype, requires_grad=True)
    with QuickLinears():
        output = module(features)
    assert is_ours(output)
    torch.testing.assert_close(output, module(features))
    tensors = [features, *module.parameters()]
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(F.linear(*exact), exact, upstream.double())
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(
            gradient, wanted.to(dtype), atol=1e-4 if dtype == torch.float32 else 1e-2, rtol=2e-2
        )


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_it_does_without(autocast, emulated):
    """Weights in fp32 under autocast, as `bf16: true` trains; here the backward pass is under it too."""
    torch.manual_seed(0)
    module = nn.Linear(5, 4)
    features = torch.randn(2, 3, 5, requires_grad=True)
    results = []
    for mode in (nullcontext(), QuickLinears()):
        with torch.autocast("cpu", autocast):
            with mode:
                output = module(features)
            results.append((output, torch.autograd.grad(output.float().sum(), [features, *module.parameters()])))
    assert [is_ours(output) for output, _ in results] == [False, True]
    (plain, plain_gradients), (output, gradients) = results
    assert output.dtype == autocast
    assert torch.equal(output, plain)
    for gradient, wanted in zip(gradients, plain_gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, atol=0.02, rtol=0.02)


def test_frozen_weights_keep_no_activations(emulated):
    module = nn.Linear(5, 4, dtype=torch.bfloat16).requires_grad_(False)
    features = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    output = quick_linear(features, module.weight, module.bias)
    kept, _ = output.grad_fn.saved_tensors
    assert kept is None
    gradients = output.grad_fn.apply(torch.ones_like(output))
    assert [gradient is None for gradient in gradients] == [False, True, True]


def test_transforms_of_functions(emulated):
    """Gradients per sample, of gradients, and in forward mode."""
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.bfloat16)
    features = torch.randn(3, 2, 5, dtype=torch.bfloat16)

    def loss(weight: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        with QuickLinears():
            return F.linear(sample, weight).float().pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, features)
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss)(weight, features[1]))
    second = []
    for each in (weight, weight.double()):
        each.requires_grad_()
        (first,) = torch.autograd.grad(loss(each, features.to(each.dtype)), each, create_graph=True)
        second += torch.autograd.grad(first.sum(), each)
    half, exact = second
    assert (half - exact).norm() < 0.02 * exact.norm()
    direction = torch.ones_like(features)
    _, forward = torch.func.jvp(lambda sample: loss(weight.detach(), sample), (features,), (direction,))
    backward = torch.func.grad(loss, argnums=1)(weight.detach(), features).float().sum()
    torch.testing.assert_close(forward, backward, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpointed_projector_has_the_same_gradients(dtype, use_reentrant, emulated):
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config).to(dtype)
    streams = random_streams(config, dtype)
    _, expected = forward_and_backward(projector, streams, 2)

    def checkpointed(*inputs):
        return checkpoint(projector, *inputs, use_reentrant=use_reentrant)

    checkpointed.zero_grad, checkpointed.named_parameters = projector.zero_grad, projector.named_parameters
    _, gradients = forward_and_backward(checkpointed, streams, 2)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def test_adapters_on_the_projector(emulated):
    """PEFT's layers call the Linears that they wrap, and Linears of their own."""
    peft = pytest.importorskip("peft")
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config).to(torch.bfloat16)
    wrapped = peft.get_peft_model(projector, peft.LoraConfig(target_modules=["linear_1", "k_proj"], r=2))
    streams = random_streams(config, torch.bfloat16)
    output, gradients = forward_and_backward(wrapped, streams, 2)
    assert is_ours(wrapped(*streams, 2))
    assert all("lora_" in name or "stream" in name for name in gradients)
    assert any("linear_1.lora_B" in name and gradient.any() for name, gradient in gradients.items())
    assert torch.isfinite(output).all()


def test_only_where_it_is_quicker(capability):
    config = tiny_config()
    projector = random_projector(config)
    assert is_ours(projector(*random_streams(config), 2))
    for dtype in HALVES:
        assert is_ours(projector.to(dtype)(*random_streams(config, dtype), 2)) == (capability == "AVX2")


def test_other_tensors_keep_their_own_linear(emulated, monkeypatch):
    class Quantized(torch.Tensor):
        pass

    features = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.bfloat16)
    with QuickLinears():
        assert not is_ours(F.linear(features, weight.as_subclass(Quantized)))
        assert not is_ours(F.linear(features.double(), weight.double()))
        assert not is_ours(F.linear(input=features, weight=weight))
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(features.float(), weight)
        replaced = F.linear
        monkeypatch.setattr(F, "linear", lambda *tensors: replaced(*tensors))
        assert not is_ours(nn.Linear(5, 4, dtype=torch.bfloat16)(features))


@pytest.mark.parametrize("scale", [1, 2])
def test_compiled_training_has_no_break(scale, emulated):
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config).to(torch.bfloat16)
    streams = random_streams(config, torch.bfloat16)
    expected, expected_gradients = forward_and_backward(projector, streams, scale)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    output, gradients = forward_and_backward(compiled, streams, scale)
    torch.testing.assert_close(output, expected)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=0.02, rtol=0.05, msg=name)


def test_a_part_may_be_compiled(emulated):
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config)
    streams = random_streams(config)
    expected = projector(*streams, 2)
    projector.query_block = torch.compile(projector.query_block, backend="aot_eager")
    torch.testing.assert_close(projector(*streams, 2), expected)


FULL_GRID = {
    "default": {},
    "spatial reduction": {"spatial_reduction": 2},
    "no EMHSA": {"use_emhsa": False},
    "no transformer block": {"use_transformer_block": False},
    "no low-rank update": {"delta_rank": 0},
    "two heads": {"projector_num_attention_heads": 2},
    "stochastic depth": {"drop_path_rate": 0.5},
}


@pytest.mark.parametrize("changes", FULL_GRID.values(), ids=FULL_GRID)
def test_the_query_path_gets_zero_gradients_on_the_full_grid(changes):
    """Where a token reads one patch, the softmax is 1: what the whole attention would give, without computing it."""
    config = tiny_config(**{"drop_path_rate": 0.0, **changes})
    projector = random_projector(config)
    streams = random_streams(config)
    output, gradients = forward_and_backward(projector, streams, 1)

    def whole(query_features, memory_features, scale):
        queries, keys = projector.queries(query_features, config.grid_size), projector.key_projection(memory_features)
        values, attention = projector.value_projection(memory_features), projector.cross_attention
        parts = (attention.q_proj(queries), attention.k_proj(keys), attention.v_proj(values))
        attended = F.scaled_dot_product_attention(*(attention.windows(part, config.grid_size, 1) for part in parts))
        attended = attention.out_proj(attended.reshape_as(values))
        return projector.linear_2(F.gelu(projector.linear_1(attended)))

    whole.zero_grad, whole.named_parameters = projector.zero_grad, projector.named_parameters
    expected, expected_gradients = forward_and_backward(whole, streams, 1)
    torch.testing.assert_close(output, expected)
    assert gradients.keys() == expected_gradients.keys() >= {name for name, _ in projector.named_parameters()}
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        if name.startswith(("query_", "key_")) or name == "stream 0":
            assert not gradients[name].any(), name


def test_modules_are_called_in_one_order_at_every_budget():
    """ZeRO-3 gathers weights as modules are called: processes must agree, whatever the budgets of their images."""
    config = tiny_config()
    projector = random_projector(config)
    orders = []
    for scale in (1, 2, 4):
        order = []
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name, order=order: order.append(name))
            for name, module in projector.named_modules()
        ]
        projector(*random_streams(config), scale)
        for handle in handles:
            handle.remove()
        orders.append(order)
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == len(set(orders[0])) > 20


def test_large_gradients_in_fp16_stay_finite_on_the_full_grid():
    """As with a loss scale: no gradient overflows, and a sum of all of them would."""
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config).half()
    with torch.no_grad():
        for module in (projector.cross_attention.out_proj, projector.linear_1, projector.linear_2):
            module.weight.fill_(0.05)
    tokens = projector(*random_streams(config, torch.float16), 1)
    tokens.backward(torch.full_like(tokens, 50.0))
    for name, weight in projector.named_parameters():
        assert torch.isfinite(weight.grad).all(), name


def test_large_gradients_in_fp16_stay_finite_in_a_text_only_batch():
    model = tiny_model().half().train()
    embeddings = torch.randn(2, 16, model.config.text_config.hidden_size, dtype=torch.float16)
    embeddings = embeddings + model.model._touch_projector(embeddings)
    embeddings.backward(torch.full_like(embeddings, 1000.0))
    for name, weight in model.model.multi_modal_projector.named_parameters():
        assert torch.equal(weight.grad, torch.zeros_like(weight)), name


@pytest.mark.parametrize("rows", [(1,), (2, 3), (BLOCK_MAX_ROWS,), (BLOCK_MAX_ROWS + 1,)])
@pytest.mark.parametrize("channels", [4 * BLOCK_CHANNELS, BLOCK_CHANNELS + 1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_in_blocks(rows, channels, has_bias):
    """Wide maps of few rows run as a batch of products; all others as one; with the same results."""
    torch.manual_seed(0)
    features, weight = torch.randn(*rows, 24), torch.randn(channels, 24)
    bias = torch.randn(channels) if has_bias else None
    with torch.profiler.profile() as recorded:
        found = linear(features, weight, bias)
    torch.testing.assert_close(found, nn.functional.linear(features, weight, bias))
    batched = {event.key for event in recorded.key_averages()} & {"aten::bmm", "aten::baddbmm"}
    assert bool(batched) == (channels % BLOCK_CHANNELS == 0 and math.prod(rows) <= BLOCK_MAX_ROWS)
