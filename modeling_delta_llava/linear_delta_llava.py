"""Quicker Linears on CPUs, in both directions: products that the projector computes through `F.linear`.

* In fp32, products of few rows run as a batch of blocks of columns. BLAS hands whole products of a batch to its
  threads, each with its own columns of the weight; a single product with few rows it divides so badly that up to half
  of the speed is lost.
* In half precision on a CPU that emulates it, gradients are products in fp32, rounded once. PyTorch takes up to a
  hundred times as long for them as for the Linear itself, whose forward pass stays as it is.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

BLOCK_CHANNELS, BLOCK_MAX_ROWS = 256, 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the CPU emulates products in this dtype: half precision without instructions for it."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def runs_in_blocks(rows: torch.Tensor, channels: int) -> bool:
    """Whether a product of `(R, in)` rows with an `(in, channels)` matrix is quicker in blocks of columns."""
    blocks, rest = divmod(channels, BLOCK_CHANNELS)
    return not (
        torch.compiler.is_compiling()
        or rows.device.type != "cpu"
        or rows.dtype != torch.float32
        or rest != 0
        or blocks < torch.get_num_threads()
        or rows.shape[0] > BLOCK_MAX_ROWS
    )


def product_in_blocks(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ matrix + bias`, `(R, out)`, of `(R, in)` rows and an `(in, out)` matrix."""
    matrices = matrix.unflatten(1, (-1, BLOCK_CHANNELS)).transpose(0, 1)  # [blocks, in, 256]
    rows = rows.expand(len(matrices), -1, -1)  # [blocks, R, in]
    if bias is None:
        products = torch.bmm(rows, matrices)
    else:
        products = torch.baddbmm(bias.view(len(matrices), 1, -1), rows, matrices)
    return products.transpose(0, 1).flatten(1)


def linear(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`: `(..., in)` features, `(out, in)` weight and `(out,)` bias to `(..., out)`."""
    rows = features.reshape(-1, features.shape[-1])
    if not runs_in_blocks(rows, weight.shape[0]):
        return F.linear(features, weight, bias)
    return product_in_blocks(rows, weight.T, bias).view(*features.shape[:-1], weight.shape[0])


class LinearWithGradients(torch.autograd.Function):
    """`linear` of features, weight and bias of one dtype; its gradients are products in fp32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(features, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor):
        features, weight, _ = inputs
        of_features, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(features if of_weight else None, weight if of_features else None)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        dtype = gradient.dtype
        of_features = of_weight = of_bias = None
        with torch.autocast("cpu", enabled=False):
            rows = gradient.reshape(-1, gradient.shape[-1]).float()
            if weight is not None:
                weight = weight.float()
                of_rows = product_in_blocks(rows, weight) if runs_in_blocks(rows, weight.shape[1]) else rows @ weight
                of_features = of_rows.to(dtype).view(*gradient.shape[:-1], weight.shape[1])
            if features is not None:
                of_weight = (rows.T @ features.reshape(-1, features.shape[-1]).float()).to(dtype)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0).to(dtype)
        return of_features, of_weight, of_bias


def quick_linear(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` as a [`LinearWithGradients`] where that is quicker; quantised and sharded tensors keep their own."""
    tensors = [tensor for tensor in (features, weight, bias) if tensor is not None]
    plain = weight.ndim == 2 and all(map(is_plain, tensors))
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
    one_dtype = autocast or all(tensor.dtype == dtype for tensor in tensors)
    quicker = dtype == torch.float32 or is_emulated(dtype, weight.device)
    forward_mode = forward_ad._current_level >= 0
    if not plain or not one_dtype or not quicker or forward_mode:
        return F.linear(features, weight, bias)
    if autocast:
        features, weight, bias = (None if each is None else each.to(dtype) for each in (features, weight, bias))
    return LinearWithGradients.apply(features, weight, bias)


def is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.dtype in DTYPES


class QuickLinears(TorchFunctionMode):
    """Within it, `F.linear` is `quick_linear`.

    The modules stay the `nn.Linear`s that quantisers and adapters look for. What checkpoints activations must hold the
    whole mode: a recomputation of a part would run without it.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and not torch.compiler.is_compiling():
            return quick_linear(*args)
        return function(*args, **(kwargs or {}))


def quick_linears_on_cpu(features: torch.Tensor) -> AbstractContextManager:
    """[`QuickLinears`] for features on a CPU, unless the code is being compiled or traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or features.device.type != "cpu":
        return nullcontext()
    return QuickLinears()
