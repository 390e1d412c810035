"""The model card that goes with every folder a training run saves."""

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import TrainerState, TrainingArguments

from modeling_delta_llava.configuration_delta_llava import TRANSFORMERS_RANGE

from .parts import PartCount


def model_card(
    facts: dict[str, Any],
    state: TrainerState,
    args: TrainingArguments,
    config: Any,
    parts: list[PartCount],
    is_lora: bool = False,
) -> str:
    """The text of `README.md`, with metadata for the Hub.

    Args:
        facts: what only the run knows: `model`, `language_model`, `vision_tower` (names), `data` (file or repo names),
            `format`, `rows`.
        state: steps, epochs and the log so far.
        args: hyper-parameters.
        config: the model's config.
        parts: trained and frozen parameters.
        is_lora: whether the folder holds a LoRA adapter and not a whole model.
    """
    bases = [name for key in ("model", "language_model", "vision_tower") if (name := hub_name(facts.get(key)))]
    dataset = hub_name(facts.get("data"))
    metadata = ModelCardData(
        library_name="peft" if is_lora else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=bases or None,
        base_model_relation=("adapter" if is_lora else "finetune") if bases else None,
        datasets=[dataset] if dataset else None,
        tags=["delta-llava", "multimodal", "visual-token-compression", "arxiv:2512.18910"],
    )
    budgets = ", ".join(map(str, config.trained_num_visual_tokens or [config.num_visual_tokens]))
    grid = config.grid_size
    sources = [
        f"{name.replace('_', ' ')} `{shown(facts[name])}`"
        for name in ("model", "language_model", "vision_tower")
        if facts.get(name)
    ]
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {Path(args.output_dir).name}",
        "",
        "A [Delta-LLaVA](https://arxiv.org/abs/2512.18910) model trained with the unofficial Hugging Face port's",
        "`delta-llava finetune`. The weights come from this run, not from the paper's authors, and no score of the",
        "paper applies to them.",
        "",
        "## Training",
        "",
        f"Started from {' and '.join(sources) or 'a model in memory'}.",
        f"Data: `{shown(facts.get('data')) or 'in memory'}`, {facts.get('rows', 'all')} rows.",
        f"Format of the text: `{facts.get('format', 'template')}`.",
        f"Visual tokens per image: {budgets} of a {grid} x {grid} patch grid.",
        "",
        "| part | trained parameters | frozen parameters |",
        "| --- | ---: | ---: |",
        *(f"| {count.part} | {count.trained:,} | {count.frozen:,} |" for count in parts),
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in hyper_parameters(args).items()),
        "",
        f"Steps {state.global_step:,} of {state.max_steps:,}, epoch {state.epoch or 0:.2f}.",
    ]
    losses = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
    if losses:
        lines += ["", "| step | training loss | evaluation loss |", "| ---: | ---: | ---: |", *loss_rows(losses)]
    lines += ["", "## Use", "", *usage(is_lora, args.hub_model_id or "THIS_REPO"), "", *versions()]
    return "\n".join(lines) + "\n"


def hub_name(name: str | None) -> str | None:
    """`owner/name` as it is; nothing for paths, which mean nothing on another machine."""
    if not name or Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        return None
    return name


def shown(name: str | None) -> str | None:
    """A name for the card: Hub names whole, paths by their last part."""
    return hub_name(name) or (Path(name).name if name else None)


def hyper_parameters(args: TrainingArguments) -> dict[str, Any]:
    """The settings that decide what a run computes."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    chosen = {
        "learning rate": args.learning_rate,
        "projector learning rate": getattr(args, "projector_learning_rate", None),
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warm-up": args.warmup_steps,
        "batch (all devices)": batch,
        "weight decay": args.weight_decay,
        "optimizer": getattr(args.optim, "value", args.optim),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "budget weights": getattr(args, "visual_token_budget_weights", None),
        "seed": args.seed,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def loss_rows(losses: list[dict[str, float]], most: int = 10) -> list[str]:
    """At most `most` rows of the loss table, evenly spread, the last one included."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in losses:
        by_step.setdefault(int(entry["step"]), {}).update(entry)
    steps = sorted(by_step)
    if len(steps) > most:
        steps = [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]
    return [
        f"| {step} | {number(by_step[step].get('loss'))} | {number(by_step[step].get('eval_loss'))} |"
        for step in steps
    ]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def usage(is_lora: bool, repo_id: str) -> list[str]:
    if is_lora:
        return [
            "This folder holds a LoRA adapter and the projector that was trained with it. `delta-llava convert`",
            "merges it into a model folder; `peft.PeftModel.from_pretrained` puts it on the model it started from.",
        ]
    return [
        "```python",
        "from transformers import pipeline",
        "",
        f'pipe = pipeline("image-text-to-text", model="{repo_id}", trust_remote_code=True)',
        'messages = [{"role": "user", "content": [',
        '    {"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "What is in the picture?"},',
        "]}]",
        'print(pipe(text=messages, max_new_tokens=64)[0]["generated_text"][-1]["content"])',
        "```",
    ]


def versions() -> list[str]:
    used = f"Made with transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}"
    return [f"{used}; the code in this repository needs `transformers{TRANSFORMERS_RANGE}`."]
