"""The projector at every budget: fused and plain, against the released computation and a LLaVA-1.5 MLP.

Forward in inference (batch sizes 1 and 4) and forward + backward in training (batch size 1), fp32 and bf16; the MLP
always at the full grid. Each also as a share of its limit, which takes turns with it:

* `share_of_peak`: FLOP/s of the fused projector, or of the plain one's training step, over those of a large square
  matrix product; in fp32 on a CPU that emulates half precision, which is faster there;
* `share_of_its_products`, in inference: time of the matrix products, convolutions and attentions which the fused
  projector still runs, with nothing between them, over the time of the whole projector.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from common import (
    machine,
    measure,
    median_ms,
    parser,
    print_table,
    ratio,
    start,
    write_result,
)
from released_projector import ReleasedProjector
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from modeling_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.evaluation.counts import projector_flops
from modeling_delta_llava.fusion_delta_llava import fold_dtype
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")


class ProductRecorder(TorchDispatchMode):
    """Records every matrix product, convolution and attention with its arguments."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__.split(".")[0]
        if name in PRODUCTS or name.startswith("_scaled_dot_product"):
            self.products.append((function, args, kwargs))
        return function(*args, **kwargs)


class LlavaMLP(nn.Sequential):
    """LLaVA-1.5's projector: two Linears with a GELU between them."""

    def __init__(self, channels: int, text_channels: int):
        super().__init__(nn.Linear(channels, text_channels), nn.GELU(), nn.Linear(text_channels, text_channels))


def random_projector(config: DeltaLlavaConfig, device: torch.device) -> DeltaLlavaProjector:
    """A projector with weights of the scale that training gives them, LayerNorms and biases included."""
    projector = DeltaLlavaProjector(config).eval()
    with torch.no_grad():
        for name, weight in projector.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.normal_(1.0, 0.1)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.05)
            else:
                weight.normal_(0.0, weight[0].numel() ** -0.5)
    return projector.to(device)


def random_streams(
    config: DeltaLlavaConfig, batch_size: int, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Query stream `(B, N, C)` and memory stream `(B, N, M * C)`."""
    width = config.vision_config.hidden_size
    widths = (width, len(config.memory_feature_layers) * width)
    return [torch.randn(batch_size, config.num_patches, each, device=device).to(dtype) for each in widths]


def products_of(function) -> Callable[[], None]:
    """What runs the products inside `function` again, one after the other and with nothing between them."""
    with ProductRecorder() as recorder:
        function()

    def products():
        for product, args, kwargs in recorder.products:
            product(*args, **kwargs)

    return products


def square_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], int]:
    """A large square matrix product, laid out as a Linear's: what the machine computes at best. With its FLOPs."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right.T, 2 * size**3


def forward_row(projector, released, mlp, inputs, budget, scale, flops, device, rounds) -> dict:
    batch_size = inputs[0].shape[0]
    fused = copy.deepcopy(projector)
    fused.fuse()
    functions = {
        "released": lambda: released(*inputs, scale),
        "plain": lambda: projector(*inputs, scale),
        "fused": lambda: fused(*inputs, scale),
        "mlp_576": lambda: mlp(inputs[0]),
    }
    functions["square"], square_flops = square_product(device, fold_dtype(projector.linear_1.weight))
    with torch.no_grad():
        error = (fused(*inputs, scale) - released(*inputs, scale)).float().norm()
        error = (error / released(*inputs, scale).float().norm()).item()
        functions["products"] = products_of(functions["fused"])
        times = measure(functions, device, **rounds)
    square_ratio = ratio(times["square"], times["fused"])
    return {
        "pass": "forward",
        "num_visual_tokens": budget,
        "batch_size": batch_size,
        "median_ms": {name: median_ms(seconds) for name, seconds in times.items()},
        "released_over_fused": ratio(times["released"], times["fused"]),
        "released_over_plain": ratio(times["released"], times["plain"]),
        "mlp_576_over_fused": ratio(times["mlp_576"], times["fused"]),
        "fused_gflop": round(flops / 1e9, 3),
        "square_gflop_per_s": round(square_flops / statistics.median(times["square"]) / 1e9, 1),
        "share_of_its_products": ratio(times["products"], times["fused"]),
        "share_of_peak": round(square_ratio * flops / square_flops, 3),
        "relative_error": error,
    }


def step(module: nn.Module, gradient: torch.Tensor, *inputs):
    """Forward and backward, with gradients of every weight and none of the inputs."""
    module.zero_grad(set_to_none=True)
    module(*inputs).backward(gradient)


def training_rows(projector, released, mlp, inputs, budgets, config, device, rounds) -> list[dict]:
    """A row for every budget. All take turns: the MLP's step, which has no budget, is measured once in a round."""
    ours, theirs, mlp = (copy.deepcopy(module).train() for module in (projector, released, mlp))
    width, dtype = projector.linear_2.out_features, inputs[0].dtype
    upstream = torch.randn(inputs[0].shape[0], config.num_patches, width, device=device).to(dtype)
    functions, flops = {}, {}
    for budget in budgets:
        arguments = (upstream[:, :budget], *inputs, config.scale_factor(budget))
        functions[f"released_{budget}"] = partial(step, theirs, *arguments)
        functions[f"plain_{budget}"] = partial(step, ours, *arguments)
        # Attention as plain products: torch does not count its fused form on CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step(ours, *arguments)
        flops[budget] = counter.get_total_flops()
    functions["mlp_576"] = partial(step, mlp, upstream, inputs[0])
    functions["square"], square_flops = square_product(device, fold_dtype(projector.linear_1.weight))
    times = measure(functions, device, **rounds)
    rows = []
    for budget in budgets:
        seconds = {name: times[f"{name}_{budget}"] for name in ("released", "plain")}
        seconds |= {name: times[name] for name in ("mlp_576", "square")}
        rows.append(
            {
                "pass": "forward_backward",
                "num_visual_tokens": budget,
                "batch_size": inputs[0].shape[0],
                "median_ms": {name: median_ms(each) for name, each in seconds.items()},
                "released_over_plain": ratio(seconds["released"], seconds["plain"]),
                "mlp_576_over_plain": ratio(seconds["mlp_576"], seconds["plain"]),
                "plain_gflop": round(flops[budget] / 1e9, 6),
                "square_gflop_per_s": round(square_flops / statistics.median(seconds["square"]) / 1e9, 1),
                "share_of_peak": round(ratio(seconds["square"], seconds["plain"]) * flops[budget] / square_flops, 3),
            }
        )
    return rows


def main():
    arguments_parser = parser(__doc__, "projector", warmup=2)
    arguments_parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    arguments_parser.add_argument("--budgets", nargs="+", type=int, default=None, help="[every legal one]")
    arguments_parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4], help="of inference")
    arguments_parser.add_argument("--text-hidden-size", type=int, default=4096, help="width of the language model")
    skipped = arguments_parser.add_mutually_exclusive_group()
    skipped.add_argument("--skip-training", action="store_true", help="measure inference only")
    skipped.add_argument("--skip-inference", action="store_true", help="measure training only")
    arguments = arguments_parser.parse_args()
    device = start(arguments)
    about = machine(device)
    config = DeltaLlavaConfig(text_config={"model_type": "llama", "hidden_size": arguments.text_hidden_size})
    full_precision = random_projector(config, device)
    budgets = arguments.budgets or config.legal_num_visual_tokens
    rounds = {"repeats": arguments.repeats, "warmup": arguments.warmup}
    rows = []
    for dtype_name in arguments.dtypes:
        dtype = DTYPES[dtype_name]
        projector = copy.deepcopy(full_precision).to(dtype)
        released = ReleasedProjector(projector).eval()
        mlp = LlavaMLP(config.projector_hidden_size, arguments.text_hidden_size).to(device, dtype)
        for batch_size in () if arguments.skip_inference else arguments.batch_sizes:
            inputs = random_streams(config, batch_size, device, dtype)
            for budget in budgets:
                scale = config.scale_factor(budget)
                flops = batch_size * projector_flops(config, budget, fused=True)
                row = forward_row(projector, released, mlp, inputs, budget, scale, flops, device, rounds)
                rows.append({"dtype": dtype_name, **row})
        inputs = random_streams(config, 1, device, dtype)
        if not arguments.skip_training:
            for row in training_rows(projector, released, mlp, inputs, budgets, config, device, rounds):
                rows.append({"dtype": dtype_name, **row})
    write_result(arguments, device, about, {"rows": rows})
    columns = {
        "dtype": "dtype",
        "pass": "pass",
        "batch": "batch_size",
        "V": "num_visual_tokens",
        "x fused": "released_over_fused",
        "x plain": "released_over_plain",
        "products": "share_of_its_products",
        "peak": "share_of_peak",
    }
    timed = ("released", "plain", "fused", "mlp_576")
    print_table(
        [*columns, *(f"{name} ms" for name in timed)],
        [
            [*(row.get(name, "") for name in columns.values()), *(row["median_ms"].get(name, "") for name in timed)]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
