"""Gradients on CPUs that emulate half precision: PyTorch's own but for their rounding, and the same forward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F

from modeling_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.backward_delta_llava import FullPrecisionBackward, LinearWithFullPrecisionBackward
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector
from tests.tiny import tiny_config

HALVES = [torch.bfloat16, torch.float16]


def random_projector(config: DeltaLlavaConfig) -> DeltaLlavaProjector:
    torch.manual_seed(0)
    projector = DeltaLlavaProjector(config)
    with torch.no_grad():
        for weight in projector.parameters():
            weight.normal_(0.5 if weight.ndim == 1 else 0.0, 0.3)
    return projector.train()


def random_streams(config: DeltaLlavaConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    width = config.vision_config.hidden_size
    widths = (width, len(config.memory_feature_layers) * width)
    return [torch.randn(2, config.num_patches, each, dtype=dtype, requires_grad=True) for each in widths]


def forward_and_backward(projector, streams, scale) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    projector.zero_grad()
    streams = [stream.detach().requires_grad_() for stream in streams]
    output = projector(*streams, scale)
    output.float().square().mean().backward()
    gradients = {name: weight.grad for name, weight in projector.named_parameters() if weight.grad is not None}
    return output.detach(), {**gradients, **{f"stream {i}": stream.grad for i, stream in enumerate(streams)}}


def uses_it(output: torch.Tensor) -> bool:
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if "FullPrecision" in node.name():
            return True
        seen.add(node)
        pending += [parent for parent, _ in node.next_functions]
    return False


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1, 2])
def test_projector_keeps_its_values_and_gradients(dtype, scale, monkeypatch):
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config).to(dtype)
    streams = random_streams(config, dtype)
    exact = copy.deepcopy(projector).double()
    _, expected = forward_and_backward(exact, [stream.double() for stream in streams], scale)
    results = {}
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        results[capability] = forward_and_backward(projector, streams, scale)
    (plain, plain_gradients), (output, gradients) = results["AVX512"], results["AVX2"]
    assert torch.equal(output, plain)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        scale_of = expected[name].norm() + 1e-6
        error, plain_error = (
            (found.double() - expected[name]).norm() / scale_of for found in (gradient, plain_gradients[name])
        )
        assert error <= 1.5 * plain_error + 1e-3, name


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(7,), (2, 3), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_has_the_gradients_of_its_definition(dtype, shape, bias):
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 4, bias=bias, dtype=dtype)
    features = torch.randn(*shape, 5, dtype=dtype, requires_grad=True)
    with FullPrecisionBackward():
        output = module(features)
    assert uses_it(output)
    assert torch.equal(output, module(features))
    tensors = [features, *module.parameters()]
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(F.linear(*exact), exact, upstream.double())
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted.to(dtype))


def test_frozen_weights_cost_no_gradient():
    module = torch.nn.Linear(5, 4, dtype=torch.bfloat16).requires_grad_(False)
    features = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    output = LinearWithFullPrecisionBackward.apply(features, module.weight, module.bias)
    gradients = output.grad_fn.apply(torch.ones_like(output))
    assert [gradient is None for gradient in gradients] == [False, True, True]


def test_gradients_per_sample_and_of_gradients():
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.bfloat16)
    features = torch.randn(3, 2, 5, dtype=torch.bfloat16)

    def loss(weight: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        with FullPrecisionBackward():
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


@pytest.mark.parametrize(
    ("capability", "dtype", "grad", "expected"),
    [
        ("AVX2", torch.bfloat16, True, True),
        ("AVX2", torch.float16, True, True),
        ("AVX2", torch.float32, True, False),
        ("AVX2", torch.bfloat16, False, False),
        ("AVX512", torch.bfloat16, True, False),
    ],
)
def test_only_where_half_precision_is_emulated(capability, dtype, grad, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = tiny_config()
    projector = random_projector(config).to(dtype)
    streams = random_streams(config, dtype)
    with torch.set_grad_enabled(grad):
        assert uses_it(projector(*streams, 2)) == expected


def test_other_tensors_keep_their_own_linear():
    class Quantized(torch.Tensor):
        pass

    features = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.bfloat16)
    with FullPrecisionBackward():
        assert not uses_it(F.linear(features, weight.as_subclass(Quantized)))
        assert not uses_it(F.linear(features.float(), weight.float()))
        assert not uses_it(F.linear(input=features, weight=weight))
        with torch.autocast("cpu", torch.bfloat16):
            assert not uses_it(F.linear(features.float(), weight))


def test_compiled_forward_has_no_break(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    config = tiny_config(drop_path_rate=0.0)
    projector = random_projector(config).to(torch.bfloat16)
    streams = random_streams(config, torch.bfloat16)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*streams, 2), projector(*streams, 2))
