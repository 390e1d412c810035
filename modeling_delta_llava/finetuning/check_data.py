"""`--check_data`: reads a dataset through once and says what training on it would mean."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import nn
from tqdm import tqdm

from delta_llava.errors import UserError

from ..building import check_budgets
from ..configuration_delta_llava import DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from .arguments import ModelArguments, RunArguments
from .checkpoints import OPTIMIZER_BYTES
from .data import JsonLines, load_rows
from .parts import count_parts, set_trained, with_lora
from .pictures import BrokenImageError, open_image
from .rows import RowError, parse_line, parse_row
from .start import read_start
from .text import IGNORED_LABEL, ConversationEncoder, expand

HISTOGRAM_BARS = 10
BAR_WIDTH = 40
SHOWN_PROBLEMS = 5
ROWS_AT_ONCE = 512


@dataclass
class RowFacts:
    """What one row would give to training."""

    tokens: int = 0
    learned: int = 0
    images: int = 0
    was_cut: bool = False
    dropped_leading_answer: bool = False
    problem: str | None = None
    kind: str = "usable"


@dataclass
class DataFacts:
    """What all rows would give to training, per epoch."""

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learned: int = 0
    images: int = 0
    text_only: int = 0
    several_images: int = 0
    cut: int = 0
    dropped_answers: int = 0


def check_data(arguments: RunArguments) -> str:
    """Reads every row and decodes every picture of a run's data.

    Returns:
        The report: counts, bad rows and pictures, lengths, tokens per epoch, steps and memory.
    Raises:
        UserError: the data file, the model's config or its tokenizer cannot be read.
    """
    config, processor = read_start(arguments.model, arguments.data)
    check_budgets(config, arguments.training.visual_token_budgets)
    facts = gather(arguments, processor)
    return report(arguments, config, facts)


def gather(arguments: RunArguments, processor: DeltaLlavaProcessor) -> DataFacts:
    """The facts of every row; pictures are decoded by a pool of threads."""
    data = arguments.data
    encoder = ConversationEncoder(processor, data.format)
    budgets = arguments.training.visual_token_budgets
    budget = max(budgets) if budgets else processor.num_visual_tokens
    rows = load_rows(data.data_path, data.split, streaming=data.streaming, on_bad_row="skip")
    folder = Path(data.image_folder).expanduser() if data.image_folder is not None else None
    encoding = Lock()  # transformers' templates with assistant marks render for one thread at a time

    unit = "line" if isinstance(rows, JsonLines) else "row"

    def raw_rows() -> Iterator[tuple[int, object]]:
        if isinstance(rows, JsonLines):
            yield from ((number, parse_line(line)) for number, line in rows.lines())
        elif data.streaming:
            yield from enumerate(rows)
        else:
            for index in range(len(rows)):
                yield index, rows.raw(index)

    def facts_of(numbered: tuple[int, object]) -> RowFacts:
        index, row = numbered
        try:
            sample = parse_row(row)
            with encoding:
                encoded = encoder.encode(sample.messages)
        except RowError as error:
            where = f"{data.data_path}: {unit} {index}" if data.streaming else rows.where(index)
            return RowFacts(problem=f"{where}: {error}", kind="malformed rows")
        for image in sample.images:
            try:
                open_image(image, folder, data.max_image_pixels)
            except BrokenImageError as error:
                kind = "missing images" if str(error).endswith(": missing") else "broken images"
                return RowFacts(problem=f"{unit} {index}: {error}", kind=kind)
        text = expand(encoded, processor.image_token_id, budget, data.max_length)
        learned = sum(label != IGNORED_LABEL for label in text.labels)
        return RowFacts(
            tokens=len(text.input_ids),
            learned=learned,
            images=text.num_images,
            was_cut=text.was_cut,
            dropped_leading_answer=sample.dropped_leading_answer,
            problem=None if learned else f"{unit} {index}: nothing to learn within max_length={data.max_length}",
            kind="usable" if learned else "rows with nothing to learn",
        )

    total = DataFacts()
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=None if data.streaming else len(rows)) as bar:
        chunk: list[tuple[int, object]] = []
        for numbered in raw_rows():
            chunk.append(numbered)
            if len(chunk) == ROWS_AT_ONCE:
                add_facts(total, pool.map(facts_of, chunk), bar)
                chunk = []
        add_facts(total, pool.map(facts_of, chunk), bar)
    return total


def add_facts(total: DataFacts, rows: Iterator[RowFacts], bar: tqdm) -> None:
    """Adds the facts of some rows to those of all."""
    for row in rows:
        bar.update()
        total.rows += 1
        total.kinds[row.kind] += 1
        if row.problem is not None:
            total.problems.append(row.problem)
            continue
        total.tokens.append(row.tokens)
        total.learned += row.learned
        total.images += row.images
        total.text_only += row.images == 0
        total.several_images += row.images > 1
        total.cut += row.was_cut
        total.dropped_answers += row.dropped_leading_answer


def report(arguments: RunArguments, config: DeltaLlavaConfig, facts: DataFacts) -> str:
    """The facts in words."""
    data, training = arguments.data, arguments.training
    if not facts.tokens:
        problem = facts.problems[0] if facts.problems else "it is empty"
        raise UserError(f"{data.data_path}: no usable row; the first problem: {problem}")
    usable = len(facts.tokens)
    lines = [
        f"{data.data_path}",
        f"  rows                  {facts.rows:>12,}",
        f"  usable                {usable:>12,}",
        f"    without a picture   {facts.text_only:>12,}",
        f"    several pictures    {facts.several_images:>12,}",
        f"    cut at {data.max_length:<12,} {facts.cut:>12,}",
        f"    leading answer left out {facts.dropped_answers:>8,}",
        f"  pictures              {facts.images:>12,}",
    ]
    lines += [f"  {kind:<21} {count:>12,}" for kind, count in sorted(facts.kinds.items()) if kind != "usable"]
    lines += [f"    {problem}" for problem in facts.problems[:SHOWN_PROBLEMS]]
    if len(facts.problems) > SHOWN_PROBLEMS:
        lines.append(f"    and {len(facts.problems) - SHOWN_PROBLEMS:,} more")
    budgets = training.visual_token_budgets or [config.num_visual_tokens]
    lines += ["", f"Tokens per row at {max(budgets)} visual tokens per picture", *histogram(facts.tokens)]
    tokens = sum(facts.tokens)
    lines += [
        "",
        f"Tokens per epoch        {tokens:>14,} ({facts.learned:,} learned, {tokens / usable:.0f} per row)",
    ]
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = math.ceil(usable / batch)
    planned = training.max_steps if training.max_steps > 0 else math.ceil(steps * training.num_train_epochs)
    lines.append(f"Steps per epoch         {steps:>14,} of {batch} rows; {planned:,} planned")
    lines += memory_estimate(arguments, config, longest=max(facts.tokens))
    return "\n".join(lines)


def histogram(lengths: list[int]) -> list[str]:
    """Bars of equal width over the range of lengths."""
    low, high = min(lengths), max(lengths)
    width = max(1, math.ceil((high - low + 1) / HISTOGRAM_BARS))
    counts = Counter((length - low) // width for length in lengths)
    most = max(counts.values())
    lines = []
    for bar in range(math.ceil((high - low + 1) / width)):
        start = low + bar * width
        stars = "#" * math.ceil(counts[bar] * BAR_WIDTH / most)
        lines.append(f"  {start:>6}-{start + width - 1:<6} {counts[bar]:>10,} {stars}")
    return lines


def weight_bytes(config: DeltaLlavaConfig, model: ModelArguments, bf16: bool) -> float:
    """Bytes of weights, gradients and optimizer states on a device that holds the whole model."""
    with torch.device("meta"):
        built = DeltaLlavaForConditionalGeneration(config)
        set_trained(built, model)
        quantised = sum(
            layer.weight.numel() for layer in built.model.language_model.modules() if isinstance(layer, nn.Linear)
        )
        if model.lora_rank:
            built = with_lora(built, model, gradient_checkpointing=False)
    counts = count_parts(built)
    trained, frozen = sum(count.trained for count in counts), sum(count.frozen for count in counts)
    if model.quantization == "none":
        stored = frozen * (2 if bf16 else 4)
    else:
        # Only linear layers are quantised; peft keeps whatever is not, such as embeddings, in fp32.
        stored = quantised * (0.5 if model.quantization == "4bit" else 1) + (frozen - quantised) * 4
    return trained * (4 + 4 + OPTIMIZER_BYTES) + stored


def memory_estimate(arguments: RunArguments, config: DeltaLlavaConfig, longest: int) -> list[str]:
    """Memory of one device that holds the whole model, from the shapes alone; activations are rough."""
    compute_bytes = 2 if arguments.training.bf16 else 4
    text = config.text_config
    tokens = arguments.training.per_device_train_batch_size * longest
    # Per layer and token: the layer's input alone, or what attention and MLP keep for the backward pass.
    kept = 1 if arguments.training.gradient_checkpointing else 12 + 3 * text.intermediate_size / text.hidden_size
    activations = tokens * text.num_hidden_layers * text.hidden_size * compute_bytes * kept
    logits = tokens * text.vocab_size * 3 * 4
    weights = weight_bytes(config, arguments.model, arguments.training.bf16)
    total = weights + activations + logits
    rows = arguments.training.per_device_train_batch_size
    indent = " " * 24
    return [
        f"Memory of one device    {total / 1e9:>14.1f} GB (estimated, nothing sharded)",
        f"{indent}weights, gradients and optimizer {weights / 1e9:.1f} GB",
        f"{indent}activations of {rows} rows of {longest} tokens {activations / 1e9:.1f} GB",
        f"{indent}logits of these {logits / 1e9:.1f} GB",
    ]
