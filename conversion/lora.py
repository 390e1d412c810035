"""LoRA adapters: which are plain low-rank updates, and what they add to which weight."""

import math
import re
from dataclasses import replace

from torch import Tensor

from delta_llava.errors import UserError, told
from modeling_delta_llava.conversion.source import FLOATING, Checkpoint
from modeling_delta_llava.conversion.tables import describe_keys
from modeling_delta_llava.conversion.write import LowRankUpdate, Weight

# Settings of PEFT's LoraConfig that may say anything: they do not change `W + (alpha / r) B A` on the base as it is.
_ADAPTER_SETTINGS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_MERGE_HINT = "merge it with peft (merge_and_unload) and convert the merged model"
# A module name or a plain pattern of one: matching it takes no time that grows with more than the name's length.
LONGEST_PATTERN = 500
_MODULE_PATTERN = re.compile(r"[\w.\\^$|-]*(?:[*+][\w.\\^$|-]*){0,3}")


def check_adapter_config(settings: dict, where: str) -> None:
    """Refuses adapters that are not `W + (alpha / r) B A` on the base as it is; what is not known is refused.

    Raises:
        UserError: names the setting.
    """
    problem = next((name for name, value in settings.items() if value and name not in _ADAPTER_SETTINGS), None)
    if settings.get("peft_type", "LORA") != "LORA":
        problem = "peft_type"
    elif problem is None and settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        problem = "init_lora_weights"
    if problem is not None:
        raise UserError(
            f"{where} sets {problem[:120]} to {str(settings[problem])[:120]!r}, which is no plain LoRA: {_MERGE_HINT}"
        )


def lora_scale(settings: dict, module: str, rank: int, where: str) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` with rslora; PEFT's own way to look up alpha and rank patterns.

    Args:
        module: name of the adapted module, without PEFT's prefix.
        rank: rows of `lora_A`.

    Raises:
        UserError: `adapter_config.json` has no usable alpha, or says another rank.
    """

    def lookup(name: str, default: object) -> object:
        with told(f"the adapter_config.json of {where} has an unusable {name}", "copy the one of training"):
            for pattern, value in (settings.get(name) or {}).items():
                if len(pattern) > LONGEST_PATTERN or not _MODULE_PATTERN.fullmatch(pattern):
                    raise ValueError(f"{pattern[:120]!r} is no pattern of a module name")
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
        return default

    alpha = lookup("alpha_pattern", settings.get("lora_alpha"))
    stated = lookup("rank_pattern", settings.get("r"))
    try:
        usable = type(stated) is int and math.isfinite(float(alpha)) and not isinstance(alpha, bool | str)
    except (TypeError, ValueError, OverflowError):
        usable = False
    if not usable:
        raise UserError(
            f"{where} states no usable r and lora_alpha for {module}: copy the adapter_config.json of training"
        )
    if stated != rank:
        raise UserError(
            f"{where} has a lora_A of rank {rank} for {module}, but adapter_config.json says {str(stated)[:20]}"
        )
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def without_peft(key: str) -> str | None:
    """The training key behind PEFT's wrappers; None for a weight that a trained copy replaces.

    Raises:
        UserError: a key of PEFT's that has no place in a plain LoRA.
    """
    if not key.startswith("base_model."):
        return key
    name = key.removeprefix("base_model.model.")
    if ".original_module." in name:
        return None
    name = re.sub(r"\.modules_to_save\.(?:default\.)?", ".", name)
    name = re.sub(r"\.base_layer\.(?=(?:weight|bias)$)", ".", name)
    if name.startswith("base_model.") or ".base_layer." in name:
        raise UserError(f"the adapter holds {key!r}, which no plain LoRA has: {_MERGE_HINT}")
    return name


def low_rank_factors(checkpoint: Checkpoint, where: str, expected: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
    """{training key of a weight: (A, B)} of an adapter file.

    Args:
        expected: whether the file may hold factors.

    Raises:
        UserError: a factor without its partner, DoRA magnitudes, LoRA on embeddings, or an unknown kind of factor.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        if ".lora_" not in key:
            continue
        if "lora_magnitude_vector" in key:
            raise UserError(f"{where} is a DoRA adapter ({key}): {_MERGE_HINT}")
        if "lora_embedding_" in key:
            raise UserError(f"{where} adapts an embedding ({key}): {_MERGE_HINT}")
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.(?:default\.)?weight", key)
        if match is None or not expected:
            raise UserError(f"{where} holds {key!r}, which no plain LoRA has there: {_MERGE_HINT}")
        pair = pairs.setdefault(f"{match[1]}.weight", {})
        if match[2] in pair:
            raise UserError(f"{where} holds lora_{match[2]} of {match[1]} twice: save the adapter again")
        pair[match[2]] = tensor
    alone = [weight for weight, pair in pairs.items() if len(pair) != 2]
    if alone:
        raise UserError(f"{where} lacks lora_A or lora_B for {describe_keys(alone)}: save the adapter again")
    return {weight: (pair["A"], pair["B"]) for weight, pair in pairs.items()}


def merged(weight: Weight, key: str, factor_a: Tensor, factor_b: Tensor, settings: dict, where: str) -> Weight:
    fitting = factor_a.ndim == factor_b.ndim == 2 and factor_a.shape[0] == factor_b.shape[1]
    shape = (factor_b.shape[0], factor_a.shape[1]) if fitting else None
    if shape != weight.shape:
        raise UserError(
            f"{where} adapts {key} with factors for shape {shape}, but the base model's is {weight.shape}: "
            "is --base-model the model that the adapter was trained on?"
        )
    if factor_a.dtype not in FLOATING or factor_b.dtype not in FLOATING:
        raise UserError(f"{where} adapts {key} with factors of {factor_a.dtype}: save the adapter in 16 or 32 bit")
    scale = lora_scale(settings, key.removesuffix(".weight"), factor_a.shape[0], where)
    return replace(weight, update=LowRankUpdate(factor_a, factor_b, scale))
