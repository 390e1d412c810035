"""Configurations: from what training wrote to what transformers loads, and back."""

import copy
import re
from pathlib import Path

from delta_llava.errors import UserError, told
from modeling_delta_llava.configuration_delta_llava import DEFAULT_VISION_CONFIG, DeltaLlavaConfig
from modeling_delta_llava.conversion.source import PLAIN
from modeling_delta_llava.json_files import check_sizes, read_json

# Fields of a training config that describe the multimodal part or the run; the rest is the language model's.
_TRAINING_FIELDS = re.compile(
    r"mm_.*|freeze_mm_.*|tune_mm_.*|unfreeze_mm_.*|use_mm_proj|image_aspect_ratio|image_grid_pinpoints|image_crop_.*"
    r"|scale_factor|tokenizer_.*|s2|s2_.*|architectures|model_type|_name_or_path|transformers_version|auto_map"
    r"|torch_dtype|dtype|use_cache|_attn_implementation.*|attn_implementation"
)
_FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "phi3": "phi3",
    "phi": "phi3",
    "gemma": "gemma",
    "qwen": "qwen2",
    "qwen2": "qwen2",
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
    "seed_oss": "seed_oss",
}
# Configurations of towers that are known by name, for checkpoints that carry the tower's weights and are converted
# where the Hub cannot be reached.
RELEASED_TOWER = DEFAULT_VISION_CONFIG | {"hidden_act": "quick_gelu"}
KNOWN_TOWERS = {"clip-vit-large-patch14-336": RELEASED_TOWER}


def text_model_type(config: dict, where: Path) -> str:
    """transformers' type of the language model in a training config (`llava_llama` -> `llama`).

    Raises:
        UserError: a family that is not supported.
    """
    written = str(config.get("model_type", ""))
    family = re.sub(r"^llava_?", "", written).lower().replace("-", "_") or "llama"
    if family not in _FAMILIES:
        supported = ", ".join(sorted(set(_FAMILIES.values())))
        raise UserError(f"{where} has model_type {written!r}, a language model that is not supported ({supported})")
    return _FAMILIES[family]


def text_config_fields(config: dict, where: Path) -> dict:
    """The language model's own fields of a training config, with `model_type`."""
    fields = {name: value for name, value in config.items() if not _TRAINING_FIELDS.fullmatch(name)}
    return {"model_type": text_model_type(config, where), **fields}


def build_sub_config(fields: dict, where: Path):
    """A transformers config from plain fields.

    Raises:
        UserError: transformers does not know the type or refuses the values.
    """
    from transformers import AutoConfig

    check_sizes(fields, where)
    fields = dict(fields)
    with told(f"{where} cannot be used by transformers", "check its values"):
        return AutoConfig.for_model(fields.pop("model_type"), **fields)


def tower_config_fields(folder: Path) -> dict:
    """Fields of the vision encoder in a CLIP or SigLIP repository, full model or vision part alone."""
    from transformers import AutoConfig

    path = folder / "config.json"
    fields = read_json(path)
    if "vision_config" in fields:
        # The full model's class fills in what the file leaves to its defaults.
        vision = build_sub_config({"model_type": "clip", **fields}, path).vision_config
        return vision.to_diff_dict() | {"model_type": vision.model_type}
    try:
        known = AutoConfig.for_model(fields["model_type"]).to_dict()
    except (KeyError, ValueError):
        known = {}
    if not {"image_size", "patch_size"} <= known.keys():
        found = fields.get("model_type")
        raise UserError(
            f"{path} is no vision tower that transformers knows (model_type {found!r}): "
            "give a CLIP or SigLIP one with --vision-tower"
        )
    return fields


def ties_embeddings(text: dict, where: Path) -> bool:
    """Whether a language model's fields tie its head to the embedding, the family's default included."""
    return bool(getattr(build_sub_config(_without_meta(text), where), "tie_word_embeddings", False))


def own_part(config: dict, name: str, where: Path) -> dict:
    """`text_config` or `vision_config` of a Hub folder's configuration.

    Raises:
        UserError: it is not there or has no `model_type`.
    """
    fields = config.get(name)
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise UserError(f"{where} has no {name} with a model_type: copy the whole file again")
    return dict(fields)


def build_config(
    projector: str, training: dict, text: dict, vision: dict, *, image_token_id: int, vocab_size: int, where: Path
):
    """The Hub folder's configuration.

    Args:
        projector: `DELTA` gives a `DeltaLlavaConfig`, `PLAIN` a native `LlavaConfig`.
        training: fields of the training config, or of this project's own.
        text, vision: fields of the two sub-configs.
        vocab_size: embedding rows that will be written.

    Raises:
        UserError: the fields do not make a possible model.
    """
    vision_config = build_sub_config(_without_meta(vision), where)
    text_config = build_sub_config({**_without_meta(text), "vocab_size": vocab_size}, where)
    text_config.use_cache = True
    query_layer = training.get("mm_vision_select_layer", -2)
    tied = bool(getattr(text_config, "tie_word_embeddings", False))
    if projector == PLAIN:
        from transformers import LlavaConfig

        if text_config.model_type == "gemma":
            raise UserError(f"{where}: an MLP projector on Gemma has no native LLaVA form (its embeddings are scaled)")
        strategy = "full" if training.get("mm_vision_select_feature") == "cls_patch" else "default"
        fields = {
            "vision_config": vision_config,
            "text_config": text_config,
            "image_token_index": image_token_id,
            "projector_hidden_act": "gelu",
            "vision_feature_select_strategy": strategy,
            "vision_feature_layer": query_layer,
            "image_seq_length": _grid_side(vision_config, where) ** 2 + (strategy == "full"),
            "multimodal_projector_bias": True,
            "tie_word_embeddings": tied,
        }
        return _checked_config(LlavaConfig, fields, where)
    if training.get("model_type") == "delta_llava":
        fields = _without_meta(training) | {"vision_config": vision_config, "text_config": text_config}
        for name in ("model_type", "auto_map", "image_token_index"):
            fields.pop(name, None)
        return _checked_config(DeltaLlavaConfig, {**fields, "image_token_id": image_token_id}, where)
    if training.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(f"{where} keeps the class token (mm_vision_select_feature), which the Delta projector cannot")
    tokens = _visual_tokens(training, vision_config, where)
    # Training's transformers scaled Gemma's input embeddings after the pictures were spliced in, pictures included.
    scale = text_config.hidden_size**0.5 if text_config.model_type == "gemma" else 1.0
    fields = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_id": image_token_id,
        "num_visual_tokens": tokens,
        "trained_num_visual_tokens": [tokens],
        "query_feature_layer": query_layer,
        "tie_word_embeddings": tied,
        "visual_token_scale": scale,
    }
    return _checked_config(DeltaLlavaConfig, fields, where)


def _checked_config(config_class: type, fields: dict, where: Path):
    check_sizes(fields, where)
    with told(f"{where} describes an impossible model", "check its values"):
        return config_class(**fields)


def _grid_side(vision_config, where: Path) -> int:
    """Patches along one side of the tower's image."""
    image, patch = getattr(vision_config, "image_size", None), getattr(vision_config, "patch_size", None)
    if type(image) is not int or type(patch) is not int or not 0 < patch <= image:
        raise UserError(
            f"{where}: the vision tower has image_size {image!r} and patch_size {patch!r}, which make no grid of "
            "patches; give another --vision-tower"
        )
    return image // patch


def _visual_tokens(training: dict, vision_config, where: Path) -> int:
    factor, grid = training.get("scale_factor"), _grid_side(vision_config, where)
    if type(factor) is not int or factor < 1 or grid % factor:
        raise UserError(f"{where} has scale_factor {factor!r}: a divisor of the {grid} x {grid} patch grid is needed")
    return (grid // factor) ** 2


def _without_meta(fields: dict) -> dict:
    dropped = ("architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype")
    return {name: value for name, value in fields.items() if name not in dropped}


def build_meta_model(config, projector: str):
    """The model of a config on the meta device: names and shapes without memory."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from modeling_delta_llava import DeltaLlavaForConditionalGeneration

    with torch.device("meta"):
        return (LlavaForConditionalGeneration if projector == PLAIN else DeltaLlavaForConditionalGeneration)(config)


def expected_shapes(
    config, projector: str, where: Path
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Name -> shape of every tensor that the model of a config needs, and of those that it may come with.

    A tied head is left out. What a checkpoint may have or not are the layers of the vision tower above those in use,
    and its pooling head.

    Raises:
        UserError: no model can be built from the config, which `where` holds.
    """
    import torch
    from transformers import AutoModel

    with told(f"{where} describes an impossible model", "check its values"):
        model = build_meta_model(config, projector)
        vision_config = copy.deepcopy(config.vision_config)
        if hasattr(vision_config, "vision_use_head"):
            vision_config.vision_use_head = True
        with torch.device("meta"):
            whole_tower = AutoModel.from_config(vision_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    tower = {f"model.vision_tower.{name}": tuple(each.shape) for name, each in whole_tower.state_dict().items()}
    return shapes, {name: shape for name, shape in tower.items() if name not in shapes}


def training_config_of(config, record: dict | None, vocab_size: int, vision_tower: str | None = None) -> dict:
    """The training `config.json` of a Hub folder: what training had written, or the same built from the config.

    Args:
        record: what conversion kept of the source, None for a folder that was not converted.
        vocab_size: embedding rows of the exported checkpoint.
        vision_tower: Hub id or path to state as `mm_vision_tower`.
    """
    if record is not None:
        fields = dict(record["training_config"])
    else:
        fields = _built_training_config(config)
    fields["vocab_size"] = vocab_size
    if vision_tower is not None:
        fields["mm_vision_tower"] = vision_tower
    if config.model_type == "delta_llava":
        fields["scale_factor"] = config.scale_factor()
    if not fields.get("mm_vision_tower"):
        raise UserError("the folder does not say which vision tower it was made with: pass --vision-tower")
    return fields


def _built_training_config(config) -> dict:
    family = config.text_config.model_type
    if family not in _FAMILIES.values():
        raise UserError(f"the training code has no class for a {family!r} language model: it cannot be exported")
    text = {
        name: value for name, value in config.text_config.to_dict().items() if not _TRAINING_FIELDS.fullmatch(name)
    }
    delta = config.model_type == "delta_llava"
    tower = {name: getattr(config.vision_config, name, None) for name in RELEASED_TOWER if name != "model_type"}
    known = tower == {name: value for name, value in RELEASED_TOWER.items() if name != "model_type"}
    return text | {
        "architectures": [f"Llava{family.title().replace('_', '')}ForCausalLM"],
        "model_type": "llava_Phi3" if family == "phi3" else f"llava_{family}",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "delatallava" if delta else "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.query_feature_layer if delta else config.vision_feature_layer,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336" if known else None,
        "use_mm_proj": True,
    }
