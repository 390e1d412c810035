"""The projector at every budget against the released computation, in one process: forward passes in inference.

The released computation is rendered by `tests/conversion/reference.py`; `--authors` takes the authors' own class.

Both have the same weights and take turns; a ratio is the median over rounds of the ratio within a round.
"""

import copy
from pathlib import Path

import torch
from authors_projector import AuthorsProjector, ReleasedProjector
from common import machine, measure, median_ms, parser, print_table, ratio, start, write_result

from modeling_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@torch.no_grad()
def rows_of(projector, released, inputs, budgets, config, device, rounds) -> list[dict]:
    rows = []
    for budget in budgets:
        scale = config.scale_factor(budget)
        expected = released(*inputs, scale).float()
        error = (projector(*inputs, scale) - expected).norm() / expected.norm()
        functions = {"released": lambda s=scale: released(*inputs, s), "ours": lambda s=scale: projector(*inputs, s)}
        times = measure(functions, device, **rounds)
        rows.append(
            {
                "num_visual_tokens": budget,
                "batch_size": inputs[0].shape[0],
                "median_ms": {name: median_ms(seconds) for name, seconds in times.items()},
                "released_over_ours": ratio(times["released"], times["ours"]),
                "relative_error": error.item(),
            }
        )
    return rows


def main():
    arguments_parser = parser(__doc__, "projector", warmup=2)
    arguments_parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    arguments_parser.add_argument("--budgets", nargs="+", type=int, default=None, help="[every legal one]")
    arguments_parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    arguments_parser.add_argument("--text-hidden-size", type=int, default=4096, help="width of the language model")
    arguments_parser.add_argument(
        "--authors", type=Path, help="checkout of github.com/mzamini92/Delta-LLaVA; needs timm and einops"
    )
    arguments_parser.add_argument("--notes", default=None, help="what a reader of the result file should know")
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
        if arguments.authors is None:
            released = ReleasedProjector(projector).eval()
        else:
            scales = [config.scale_factor(budget) for budget in budgets]
            released = AuthorsProjector(arguments.authors, projector, scales).eval()
        for batch_size in arguments.batch_sizes:
            inputs = random_streams(config, batch_size, device, dtype)
            measured = rows_of(projector, released, inputs, budgets, config, device, rounds)
            rows += [{"dtype": dtype_name, **row} for row in measured]
    write_result(arguments, device, about, {"rows": rows})
    print_table(
        ["dtype", "batch", "V", "released ms", "ours ms", "released / ours", "relative error"],
        [
            [row["dtype"], row["batch_size"], row["num_visual_tokens"], *row["median_ms"].values(),
             row["released_over_ours"], f"{row['relative_error']:.1e}"]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
