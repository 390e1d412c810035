"""The three parts of the model, which of them train, and LoRA on one of them."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from delta_llava.errors import UserError

from .arguments import ModelArguments

VISION_TOWER = "vision tower"
PROJECTOR = "projector"
LANGUAGE_MODEL = "language model"
LORA = "LoRA"
PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL, LORA)
PROJECTOR_MODULE = "multi_modal_projector"
# bitsandbytes matches these against the start of a full name, or as its suffix.
NOT_QUANTIZED = ["model.vision_tower", f"model.{PROJECTOR_MODULE}", "lm_head"]


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model."""

    part: str
    trained: int
    frozen: int


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its full name (wrappers may put prefixes in front)."""
    if ".lora_" in name:
        return LORA
    if f"{PROJECTOR_MODULE}." in name:
        return PROJECTOR
    if "vision_tower." in name:
        return VISION_TOWER
    return LANGUAGE_MODEL


def number_of_elements(parameter: nn.Parameter) -> int:
    """Weights in a parameter, also where it is packed in 4 bits or partitioned over ranks (ZeRO-3)."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    if parameter.__class__.__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()


def count_parts(model: nn.Module) -> list[PartCount]:
    """Trained and frozen parameters of each part that the model has."""
    trained = dict.fromkeys(PARTS, 0)
    frozen = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if f"{PROJECTOR_MODULE}.original_module." in name:
            continue  # PEFT keeps the projector it started from beside the one it trains
        counts = trained if parameter.requires_grad else frozen
        counts[part_of(name)] += number_of_elements(parameter)
    return [PartCount(part, trained[part], frozen[part]) for part in PARTS if trained[part] + frozen[part]]


def describe_parts(counts: list[PartCount]) -> str:
    """The counts as one line per part, for the log."""
    return "\n".join(
        f"  {count.part:<15} {'trained' if count.trained else 'frozen':<8} {count.trained:>15,} trained "
        f"{count.frozen:>15,} frozen"
        for count in counts
    )


def set_trained(model: nn.Module, arguments: ModelArguments) -> None:
    """Freezes everything, then lets the asked-for parts train. What nothing reads of the tower stays frozen."""
    trained = {
        VISION_TOWER: arguments.train_vision_tower,
        PROJECTOR: arguments.train_projector,
        LANGUAGE_MODEL: arguments.train_language_model,
    }
    for name, parameter in model.named_parameters():
        unread = re.search(r"vision_tower\.(?:.*\.)?(?:post_layernorm|head)\.", name) is not None
        if parameter.is_floating_point():
            parameter.requires_grad_(trained[part_of(name)] and not unread)


def lora_config(arguments: ModelArguments) -> Any:
    """PEFT's settings of LoRA on the language model's linear layers; the projector is trained in full beside it.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("lora_rank needs the `peft` package; pip install peft") from None
    targets = "|".join(re.escape(name) for name in sorted(set(arguments.lora_target_modules)))
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=rf"model\.language_model\.(?:.*\.)?(?:{targets})",
        modules_to_save=[PROJECTOR_MODULE] if arguments.train_projector else None,
        task_type="CAUSAL_LM",
    )


def with_lora(model: nn.Module, arguments: ModelArguments, gradient_checkpointing: bool) -> Any:
    """The model with the new adapter of [`lora_config`].

    Raises:
        UserError: peft is not installed, or no layer has one of the target names.
    """
    config = lora_config(arguments)
    from peft import get_peft_model, prepare_model_for_kbit_training

    found = {name.rpartition(".")[2] for name, _ in model.named_modules() if re.fullmatch(config.target_modules, name)}
    missing = sorted(set(arguments.lora_target_modules) - found)
    if missing:
        raise UserError(
            f"lora_target_modules: the language model has no layer named {', '.join(missing)}; give the names of its "
            "linear layers"
        )
    if arguments.quantization != "none":
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return get_peft_model(model, config)
