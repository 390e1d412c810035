"""Image encoding and answering, against transformers' LLaVA around the same tower and language model.

Both models live in one process and share the language model. What differs is the projector, the Delta projector at
every budget here and LLaVA-1.5's MLP at the full grid there, and the vision tower, which LLaVA runs one layer further
than it reads. Weights are random: speed does not depend on them. Reported are

* encoding: tower + projector, milliseconds per image;
* time to first token (its logits), and how its ratio to LLaVA's compares with the ratio of their FLOPs;
* decoding: tokens per second after the first, also as a share of the bandwidth limit (bytes of weights that a step
  reads over the measured copy bandwidth), and generated tokens per second of a whole answer (the curve of the paper's
  Section 6.5);
* peak memory of an answer; on a CPU that of the process, which holds both models;
* on a CUDA device, unless --no-compile: decoding with a static cache and torch.compile against eager decoding.

Within a round LLaVA and every budget take turns; ratios are medians over rounds of the ratio within a round.
"""

import argparse
import statistics
from functools import partial

import torch
from common import (
    copy_bandwidth,
    machine,
    measure,
    median_ms,
    parser,
    peak_memory,
    print_table,
    ratio,
    reset_peak_memory,
    start,
    write_result,
)
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.evaluation.backbones import LANGUAGE_MODELS, VISION_TOWERS
from modeling_delta_llava.evaluation.counts import TextGeometry, closed_form, tower_flops
from modeling_delta_llava.evaluation.measurements import FirstTokenClock

GEOMETRIES = {
    # Tower and projector as released; a language model small enough for any machine.
    "small": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16},
    "7b": LANGUAGE_MODELS["lmsys/vicuna-7b-v1.5"],
    "13b": LANGUAGE_MODELS["lmsys/vicuna-13b-v1.5"],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def geometry(name: str, layers: int | None = None) -> DeltaLlavaConfig:
    """Released tower and projector with a language model, of which `layers` decoder layers are kept."""
    text = {"num_key_value_heads": 16, **GEOMETRIES[name], "model_type": "llama", "vocab_size": 32001}
    if layers is not None:
        text["num_hidden_layers"] = layers
    tower = VISION_TOWERS["openai/clip-vit-large-patch14-336"]
    return DeltaLlavaConfig(vision_config=dict(tower), text_config=text, image_token_id=32000)


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype):
    """Replace meta tensors by small random values, a repeated block per matrix: memory speed, and no denormals."""
    block = torch.randn(2**16 + 1, device=device).mul_(0.02).to(dtype)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                values = torch.empty(weight.shape, device=device, dtype=dtype)
                flat = values.view(-1)
                for begin in range(0, flat.numel(), block.numel()):
                    flat[begin : begin + block.numel()] = block[: flat.numel() - begin]
                if weight.ndim == 1 and name == "weight":
                    values.fill_(1.0)
                setattr(module, name, nn.Parameter(values, requires_grad=False))


def build(
    config: DeltaLlavaConfig, device: torch.device, dtype: torch.dtype
) -> tuple[DeltaLlavaForConditionalGeneration, LlavaForConditionalGeneration]:
    """A Delta-LLaVA and a native LLaVA that share tower, language model and head."""
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config).eval()
        native = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=config.vision_config,
                text_config=config.text_config,
                image_token_index=config.image_token_id,
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
            )
        ).eval()
    fill(model, device, dtype)
    # Tables that the modules compute for themselves when they are built.
    model.model.language_model.rotary_emb = type(model.model.language_model.rotary_emb)(config.text_config).to(device)
    for one in (model, native):
        embeddings = one.model.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings, device=device)[None]
    native.model.language_model = model.model.language_model
    native.lm_head = model.lm_head
    fill(native, device, dtype)
    for one in (model, native):
        one.generation_config.pad_token_id = 0
        one.generation_config.eos_token_id = None
    return model, native


def prompt(config: DeltaLlavaConfig, tokens: int, text_tokens: int, pixels: torch.Tensor) -> dict:
    ids = torch.randint(5, config.image_token_id, (1, text_tokens), device=pixels.device)
    image = torch.full((1, tokens), config.image_token_id, device=pixels.device)
    input_ids = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


class Answers:
    """Answers of one prompt as a function to time; keeps the time to first token and the peak memory of each call."""

    def __init__(self, model: nn.Module, inputs: dict, new_tokens: int, device: torch.device, **kwargs):
        self.generate = partial(
            model.generate,
            **inputs,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **kwargs,
        )
        self.new_tokens = new_tokens
        self.device = device
        self.first = []
        self.peak_memory_mib = None

    def __call__(self) -> torch.Tensor:
        reset_peak_memory(self.device)
        clock = FirstTokenClock(self.device)
        tokens = self.generate(logits_processor=[clock])
        self.first.append(clock.first)
        self.peak_memory_mib = peak_memory(self.device)
        return tokens

    def decode_rate(self, seconds: list[float]) -> float:
        """Tokens per second after the first, from the seconds of whole calls: the median over them."""
        decoding = statistics.median(whole - first for whole, first in zip(seconds, self.first, strict=True))
        return round((self.new_tokens - 1) / decoding, 2)


def measure_answers(
    answers: dict[str, Answers], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of every answer, by name; what was kept of the rounds before is dropped."""
    seconds = measure(answers, device, repeats, warmup)
    for each in answers.values():
        del each.first[:warmup]
    return seconds


def report(encoding: list[float], seconds: list[float], answers: Answers) -> dict[str, object]:
    """What LLaVA and every budget are described by."""
    return {
        "encoding_ms": median_ms(encoding),
        "time_to_first_token_ms": median_ms(answers.first),
        "decode_tokens_per_s": answers.decode_rate(seconds),
        "answer_tokens_per_s": round(answers.new_tokens / statistics.median(seconds), 2),
        "peak_memory_mib": answers.peak_memory_mib,
    }


@torch.no_grad()
def run(arguments, device: torch.device) -> dict:
    dtype = DTYPES[arguments.dtype]
    config = geometry(arguments.geometry, arguments.layers)
    model, native = build(config, device, dtype)
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, device=device).to(dtype)
    text_tokens, new_tokens = arguments.text_tokens, arguments.new_tokens
    text = TextGeometry.of(config.text_config)
    full = config.num_patches
    mlp_flops = 2 * full * (config.vision_config.hidden_size * text.hidden_size + text.hidden_size**2)
    native_flops = (
        tower_flops(config, config.vision_config.num_hidden_layers)
        + mlp_flops
        + text.prefill_flops(text_tokens + full)
    )
    head_and_layers = [model.model.language_model.layers, model.model.language_model.norm, model.lm_head]
    weight_bytes = sum(weight.nbytes for module in head_and_layers for weight in module.parameters())
    bandwidth = copy_bandwidth(device)

    budgets = arguments.budgets or config.legal_num_visual_tokens
    models, prompts = {"llava": native}, {"llava": prompt(config, full, text_tokens, pixels)}
    encoders = {
        "llava": lambda: native.get_image_features(
            pixels, vision_feature_layer=-2, vision_feature_select_strategy="default"
        )
    }
    for budget in budgets:
        counts = torch.tensor([budget])
        models[str(budget)] = model
        prompts[str(budget)] = {**prompt(config, budget, text_tokens, pixels), "num_visual_tokens": counts.to(device)}
        encoders[str(budget)] = lambda counts=counts: model.get_image_features(pixels, num_visual_tokens=counts)
    # A first call is slow, and cheap enough here to be always left out.
    repeats = arguments.repeats if arguments.encoding_repeats is None else arguments.encoding_repeats
    encoding = measure(encoders, device, repeats, max(1, arguments.warmup))
    answers = {name: Answers(models[name], inputs, new_tokens, device) for name, inputs in prompts.items()}
    seconds = measure_answers(answers, device, arguments.repeats, arguments.warmup)

    llava = report(encoding["llava"], seconds["llava"], answers["llava"])
    rows = []
    for budget in budgets:
        name = str(budget)
        row = {"num_visual_tokens": budget, **report(encoding[name], seconds[name], answers[name])}
        first_ratio = ratio(answers["llava"].first, answers[name].first)
        flops_ratio = native_flops / closed_form(config, budget, text_tokens, 1).total
        row |= {
            "encoding_llava_over_ours": ratio(encoding["llava"], encoding[name]),
            "time_to_first_token_llava_over_ours": first_ratio,
            "flops_llava_over_ours": round(flops_ratio, 3),
            "time_ratio_over_flops_ratio": round(first_ratio / flops_ratio, 3),
            "answer_llava_over_ours": ratio(seconds["llava"], seconds[name]),
            "decode_share_of_bandwidth_limit": round(row["decode_tokens_per_s"] * weight_bytes / bandwidth, 3),
        }
        if arguments.compile and device.type == "cuda":  # `generate` compiles on no CPU
            # A static cache lets `generate` compile the decoding step. The first two calls compile, whatever --warmup.
            compiled = Answers(model, prompts[name], new_tokens, device, cache_implementation="static")
            times = measure_answers({name: compiled}, device, arguments.repeats, warmup=2)
            row["compiled_decode_tokens_per_s"] = compiled.decode_rate(times[name])
        rows.append(row)
    return {
        "copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "weight_gb_read_per_step": round(weight_bytes / 1e9, 3),
        "llava_576": llava,
        "rows": rows,
    }


def main():
    arguments_parser = parser(__doc__, "end_to_end", warmup=1)
    arguments_parser.add_argument("--geometry", choices=GEOMETRIES, default="small", help="language model")
    arguments_parser.add_argument("--layers", type=int, default=None, help="decoder layers to keep [all]")
    arguments_parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments_parser.add_argument("--budgets", nargs="+", type=int, default=None, help="[every legal one]")
    arguments_parser.add_argument("--encoding-repeats", type=int, default=None, help="rounds of encoding [--repeats]")
    arguments_parser.add_argument("--text-tokens", type=int, default=68)
    arguments_parser.add_argument("--new-tokens", type=int, default=30)
    arguments_parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CUDA device, also decode with a static cache and torch.compile",
    )
    arguments = arguments_parser.parse_args()
    arguments.name = f"{arguments.name}-{arguments.geometry}"
    if arguments.new_tokens < 2:
        arguments_parser.error("--new-tokens: at least 2, or there is no decoding to measure")
    device = start(arguments)
    about = machine(device)
    results = run(arguments, device)
    write_result(arguments, device, about, results)
    rows = [{"num_visual_tokens": "LLaVA 576", **results["llava_576"]}, *results["rows"]]
    columns = {
        "V": "num_visual_tokens",
        "encode ms": "encoding_ms",
        "x": "encoding_llava_over_ours",
        "first token ms": "time_to_first_token_ms",
        "x first": "time_to_first_token_llava_over_ours",
        "x FLOPs": "flops_llava_over_ours",
        "decode tok/s": "decode_tokens_per_s",
        "answer tok/s": "answer_tokens_per_s",
        "MiB": "peak_memory_mib",
    }
    print_table(list(columns), [[row.get(name, "") for name in columns.values()] for row in rows])


if __name__ == "__main__":
    main()
