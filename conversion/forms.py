"""What a source is, read from its tensors and files, never from its name."""

import re
from collections.abc import Iterable
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.checkpoints import file_inside, has_weights, read_checkpoint
from modeling_delta_llava.json_files import read_json

STAGE2, STAGE1, LORA, FINETUNED = "stage2", "stage1", "lora", "finetuned"
FORMS = (STAGE2, STAGE1, LORA, FINETUNED)
FORM_NAMES = {
    STAGE2: "complete stage-2 checkpoint",
    STAGE1: "stage-1 projector (mm_projector.bin)",
    LORA: "LoRA adapter",
    FINETUNED: "checkpoint in this project's own layout",
}
DELTA, PLAIN = "delta", "mlp2x_gelu"
PROJECTOR_NAMES = {DELTA: "Delta projector", PLAIN: "LLaVA-1.5 MLP projector (mlp2x_gelu)"}

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def detect_form(folder: Path) -> str:
    """The form of a source folder.

    Raises:
        UserError: it holds a language model only, or nothing that training writes.
    """
    if any((folder / name).exists() for name in ("adapter_config.json", *ADAPTER_FILES)):
        if not has_weights(folder):
            return LORA
    elif not has_weights(folder) and (folder / PROJECTOR_FILE).exists():
        return STAGE1
    keys = read_checkpoint(folder).tensors
    if any(re.match(r"(?:module\.)?model\.multi_modal_projector\.", key) for key in keys):
        return FINETUNED
    if any(key.startswith("model.mm_projector.") for key in keys):
        return STAGE2
    if (folder / PROJECTOR_FILE).exists():
        raise UserError(
            f"{folder} holds a language model and {PROJECTOR_FILE}: move {PROJECTOR_FILE} and its config.json to a "
            "folder of their own and pass the language model as --base-model"
        )
    raise UserError(
        f"{folder} has no projector tensors (model.mm_projector.*): if it is a language model, pass it as "
        "--base-model and give the folder with the projector or adapter as SOURCE"
    )


def detect_projector(keys: Iterable[str], where: str) -> str:
    """Which projector the training keys (`model.mm_projector.*`) belong to.

    Raises:
        UserError: one that the release never used, by name.
    """
    names = {key.partition("mm_projector.")[2] for key in keys if "mm_projector." in key}
    if any(name.startswith(("q_proj_1.", "k_proj_1.", "clip_attn.", "combined_block.")) for name in names):
        return DELTA
    if names and names <= {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return PLAIN
    if names and names <= {"weight", "bias"}:
        raise UserError(f"{where} has a linear projector: only the Delta projector and mlp2x_gelu are supported")
    if any(re.match(r"\d+\.", name) for name in names):
        depth = 1 + max(int(match[1]) for name in names if (match := re.match(r"(\d+)\.", name))) // 2
        raise UserError(f"{where} has an mlp{depth}x_gelu projector: only mlp2x_gelu and Delta are supported")
    raise UserError(f"{where} has no tensors of a projector (mm_projector.*)")


def refuse_unused_features(config: dict, keys: Iterable[str], where: Path) -> None:
    """Refuses, by name, features of the LLaVA code base that the Delta-LLaVA release never used."""
    merge = config.get("mm_patch_merge_type") or "flat"
    aspect_ratio = str(config.get("image_aspect_ratio") or "square")
    used = None
    if aspect_ratio.startswith("anyres"):
        used = f"image_aspect_ratio {aspect_ratio!r} (anyres tiling)"
    elif merge != "flat":
        used = f"mm_patch_merge_type {merge!r} (spatial merge)"
    elif config.get("s2"):
        used = "s2 (multi-scale features)"
    elif config.get("mm_use_im_start_end"):
        used = "mm_use_im_start_end (<im_start> and <im_end> around images)"
    elif config.get("quantization_config"):
        used = "quantization_config (quantised weights)"
    elif config.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        used = f"mm_vision_select_feature {config['mm_vision_select_feature']!r}"
    for key in keys:
        if key.endswith("image_newline"):
            used = f"{key} (spatial or unpad merge)"
        elif "vision_resampler" in key:
            used = f"{key} (vision resampler)"
    if used:
        raise UserError(f"{where} uses {used}, which Delta-LLaVA was never released with: not supported")


def read_training_config(folder: Path) -> dict:
    """`config.json` of a training folder, with `mm_vision_tower` in it.

    Raises:
        UserError: missing, not JSON, or without `mm_vision_tower` and not this project's own.
    """
    config = read_json(file_inside(folder, "config.json", "SOURCE"))
    if config.get("model_type") not in ("delta_llava", "llava") and not config.get("mm_vision_tower"):
        raise UserError(
            f"{folder / 'config.json'} has no mm_vision_tower: it is not the config that LLaVA training writes; "
            "copy the right one, or add the tower's Hub id or path under that name"
        )
    return config
