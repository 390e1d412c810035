"""A faster backward pass of Linears in half precision, for CPUs that emulate it.

PyTorch takes up to a hundred times as long for a Linear's gradients there as for the Linear itself. The forward pass
is left as it is.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .fusion_delta_llava import is_emulated


class LinearWithFullPrecisionBackward(torch.autograd.Function):
    """`F.linear` of `(..., in)` features in half precision. Its gradients are products in fp32, rounded once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(features, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor):
        features, weight, _ = inputs
        ctx.save_for_backward(features, weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        gradient = gradient.float()
        rows = gradient.flatten(0, -2)
        of_features = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_features = (gradient @ weight.float()).to(features.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (rows.T @ features.flatten(0, -2).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(weight.dtype)
        return of_features, of_weight, of_bias


def linear(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, as a [`LinearWithFullPrecisionBackward`] where both are plain (not quantised or sharded) halves."""
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in (features, weight))
    if not plain or {features.dtype, weight.dtype} not in ({torch.bfloat16}, {torch.float16}):
        return F.linear(features, weight, bias)
    return LinearWithFullPrecisionBackward.apply(features, weight, bias)


class FullPrecisionBackward(TorchFunctionMode):
    """Within it, every Linear calls `linear` above."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs:
            return linear(*args)
        return function(*args, **(kwargs or {}))


def faster_backward(features: torch.Tensor) -> AbstractContextManager:
    """[`FullPrecisionBackward`] where gradients may be wanted and the CPU emulates the dtype of the features."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_emulated(features):
        return nullcontext()
    return FullPrecisionBackward()
