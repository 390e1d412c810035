"""`--check_data`: reads a dataset through once and says what training on it would mean."""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from delta_llava.errors import UserError

from ..building import check_budgets
from ..configuration_delta_llava import DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from .arguments import ModelArguments, RunArguments
from .checkpoints import OPTIMIZER_BYTES
from .collator import DeltaLlavaCollator, collator_of, expand
from .data import load_rows
from .parts import count_parts, set_trained, with_lora
from .pictures import BrokenImageError, MissingImageError
from .rows import RowError
from .start import read_start
from .text import IGNORED_LABEL

HISTOGRAM_BARS = 10
BAR_WIDTH = 40
SHOWN_PROBLEMS = 5
ROWS_AT_ONCE = 64
MOST_WORKERS = 16
PROBLEMS = ("broken images", "malformed rows", "missing images", "rows with nothing to learn")


@dataclass
class DataFacts:
    """What rows would give to training: counts by name, tokens of each usable row, and why others are not usable."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, other: "DataFacts") -> None:
        """Adds the facts of other rows."""
        self.counts.update(other.counts)
        self.tokens += other.tokens
        self.problems += other.problems


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


@dataclass
class RowReader:
    """Reads rows of a data set as training would, in the workers of a `DataLoader`."""

    collator: DeltaLlavaCollator
    num_visual_tokens: int
    max_length: int

    def __call__(self, records: list[dict[str, Any]]) -> DataFacts:
        total = DataFacts(Counter(rows=len(records)))
        for record in records:
            place = self.collator.place_of(record)
            try:
                total.add(self.facts_of(record))
            except RowError as error:
                total.add(DataFacts(Counter(["malformed rows"]), problems=[f"{place}: {error}"]))
            except BrokenImageError as error:
                kind = "missing images" if isinstance(error, MissingImageError) else "broken images"
                total.add(DataFacts(Counter([kind]), problems=[f"{place}: image {error}"]))
        return total

    def facts_of(self, record: dict[str, Any]) -> DataFacts:
        """The facts of one row.

        Raises:
            RowError, BrokenImageError: it cannot be used.
        """
        sample, text, images = self.collator.read(record)
        tokens, labels, kept = expand(
            *map(torch.tensor, (text.input_ids, text.labels)),
            image_token_id=self.collator.processor.image_token_id,
            num_visual_tokens=self.num_visual_tokens,
            max_length=self.max_length,
        )
        learned = int((labels != IGNORED_LABEL).sum())
        if not learned:
            problem = f"{self.collator.place_of(record)}: nothing to learn within max_length={self.max_length}"
            return DataFacts(Counter(["rows with nothing to learn"]), problems=[problem])
        shown = int(kept.sum())
        counts = Counter(
            {
                "learned": learned,
                "pictures": shown,
                "without a picture": shown == 0,
                "several pictures": shown > 1,
                "cut": len(tokens) < len(text.input_ids) + (self.num_visual_tokens - 1) * len(images),
                "leading answer left out": sample.dropped_leading_answer,
            }
        )
        return DataFacts(counts, tokens=[len(tokens)])


def gather(arguments: RunArguments, processor: DeltaLlavaProcessor) -> DataFacts:
    """The facts of every row, its pictures decoded."""
    data = arguments.data
    budgets = arguments.training.visual_token_budgets
    reader = RowReader(
        collator_of(data, processor, data.data_path, data.image_folder),
        max(budgets) if budgets else processor.num_visual_tokens,
        data.max_length,
    )
    rows = load_rows(data.data_path, data.split, data.streaming, passes=1)
    loader = DataLoader(
        rows,
        batch_size=ROWS_AT_ONCE,
        collate_fn=reader,
        num_workers=min(os.cpu_count() or 1, rows.num_shards if data.streaming else MOST_WORKERS),
    )
    total = DataFacts()
    with tqdm(total=None if data.streaming else len(rows)) as bar:
        for facts in loader:
            total.add(facts)
            bar.update(facts.counts["rows"])
    return total


def report(arguments: RunArguments, config: DeltaLlavaConfig, facts: DataFacts) -> str:
    """The facts in words."""
    data, training = arguments.data, arguments.training
    if not facts.tokens:
        problem = facts.problems[0] if facts.problems else "it is empty"
        raise UserError(f"{data.data_path}: no usable row; the first problem: {problem}")
    usable, counts = len(facts.tokens), facts.counts
    lines = [
        f"{data.data_path}",
        f"  rows                  {counts['rows']:>12,}",
        f"  usable                {usable:>12,}",
        f"    without a picture   {counts['without a picture']:>12,}",
        f"    several pictures    {counts['several pictures']:>12,}",
        f"    cut at {data.max_length:<12,} {counts['cut']:>12,}",
        f"    leading answer left out {counts['leading answer left out']:>8,}",
        f"  pictures              {counts['pictures']:>12,}",
    ]
    lines += [f"  {kind:<21} {counts[kind]:>12,}" for kind in PROBLEMS if counts[kind]]
    lines += [f"    {problem}" for problem in facts.problems[:SHOWN_PROBLEMS]]
    if len(facts.problems) > SHOWN_PROBLEMS:
        lines.append(f"    and {len(facts.problems) - SHOWN_PROBLEMS:,} more")
    budgets = training.visual_token_budgets or [config.num_visual_tokens]
    lines += ["", f"Tokens per row at {max(budgets)} visual tokens per picture", *histogram(facts.tokens)]
    tokens = sum(facts.tokens)
    lines += [
        "",
        f"Tokens per epoch        {tokens:>14,} ({facts.counts['learned']:,} learned, {tokens / usable:.0f} per row)",
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
