"""Latency, throughput and memory of a loaded model on its device."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LogitsProcessor

from modeling_delta_llava import DeltaLlavaForConditionalGeneration

FIRST_ORDINARY_TOKEN = 5
"""Random prompts draw from here on: the lowest ids are special tokens in every tokenizer we know."""


@dataclass(frozen=True)
class Measurement:
    """Medians over repeats at one budget. Milliseconds, tokens or requests per second, MiB.

    The first token is timed to its logits, and decoding is the rest of the same answer.
    """

    vision_tower_ms: float
    projector_ms: float
    prefill_ms: float
    time_to_first_token_ms: float
    decode_tokens_per_s: float
    generate_tokens_per_s: float
    requests_per_s: float
    batch_size: int
    peak_memory_mib: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def synchronize(device: torch.device):
    """Wait for everything that was launched on the device."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int, warmup: int = 1) -> float:
    """Median seconds of a call."""
    times = []
    for repeat in range(-warmup, repeats):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        if repeat >= 0:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


class FirstTokenClock(LogitsProcessor):
    """Seconds from its making to the first logits, in an answer that it is handed to."""

    def __init__(self, device: torch.device):
        self.device = device
        synchronize(device)
        self.begin = time.perf_counter()
        self.first = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            synchronize(self.device)
            self.first = time.perf_counter() - self.begin
        return scores


def reset_peak_memory(device: torch.device):
    """Start a new peak: of the CUDA device, or of this process's resident memory (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak since `reset_peak_memory`; `None` where the platform does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def random_prompt(
    model: DeltaLlavaForConditionalGeneration, num_visual_tokens: int, text_tokens: int, batch_size: int = 1
) -> dict[str, torch.Tensor]:
    """Inputs of one image and `text_tokens` random tokens per row: speed does not depend on what they say."""
    config = model.config
    vision = config.vision_config
    device = model.device
    text = torch.randint(FIRST_ORDINARY_TOKEN, config.text_config.vocab_size, (batch_size, text_tokens), device=device)
    text[text == config.image_token_id] = FIRST_ORDINARY_TOKEN
    image = torch.full((batch_size, num_visual_tokens), config.image_token_id, device=device)
    input_ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    size = (batch_size, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(size, device=device).to(model.dtype),
        "num_visual_tokens": torch.full((batch_size,), num_visual_tokens, device=device),
    }


@torch.no_grad()
def measure(
    model: DeltaLlavaForConditionalGeneration,
    num_visual_tokens: int,
    text_tokens: int,
    new_tokens: int,
    batch_size: int = 8,
    repeats: int = 5,
) -> Measurement:
    """Measure answering one question about one image at one budget.

    Args:
        model: in evaluation mode, on its device.
        num_visual_tokens: V.
        text_tokens: T.
        new_tokens: G >= 2; exactly so many are generated.
        batch_size: rows of the requests/s measurement.
        repeats: medians are over this many calls.
    """
    device, inner = model.device, model.model
    inputs = random_prompt(model, num_visual_tokens, text_tokens)
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": 0}
    settings |= {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}

    def tower():
        return inner.get_patch_features(inputs["pixel_values"])

    streams = tower()[:2]
    scale = model.config.scale_factor(num_visual_tokens)
    encoded = {"image": inner.get_image_features(inputs["pixel_values"], num_visual_tokens, return_dict=True)}
    text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    reset_peak_memory(device)
    tower_s = seconds_of(tower, device, repeats)
    projector_s = seconds_of(lambda: inner.multi_modal_projector(*streams, scale), device, repeats)
    prefill_s = seconds_of(
        lambda: model(**text_inputs, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=True), device, repeats
    )
    model.generate(**inputs, **settings)
    clocks, answers = [], []
    for _ in range(repeats):
        clocks.append(FirstTokenClock(device))
        model.generate(**inputs, **settings, logits_processor=[clocks[-1]])
        synchronize(device)
        answers.append(time.perf_counter() - clocks[-1].begin)
    decode_s = statistics.median(whole - clock.first for whole, clock in zip(answers, clocks, strict=True))
    peak = peak_memory_mib(device)
    batch = random_prompt(model, num_visual_tokens, text_tokens, batch_size)
    batch_s = seconds_of(lambda: model.generate(**batch, **settings), device, max(1, repeats // 2))
    return Measurement(
        vision_tower_ms=tower_s * 1e3,
        projector_ms=projector_s * 1e3,
        prefill_ms=prefill_s * 1e3,
        time_to_first_token_ms=statistics.median(clock.first for clock in clocks) * 1e3,
        decode_tokens_per_s=(new_tokens - 1) / decode_s,
        generate_tokens_per_s=new_tokens / statistics.median(answers),
        requests_per_s=batch_size / batch_s,
        batch_size=batch_size,
        peak_memory_mib=peak,
    )
