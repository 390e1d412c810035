"""Configurations, from what training wrote to what transformers loads; and the record that leads back."""

import base64
import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from delta_llava.errors import UserError, told
from modeling_delta_llava.configuration_delta_llava import DEFAULT_VISION_CONFIG, DeltaLlavaConfig
from modeling_delta_llava.conversion.source import PLAIN
from modeling_delta_llava.conversion.tables import HEAD, TOWER, TOWER_ROWS, is_dropped
from modeling_delta_llava.json_files import check_sizes, read_json
from modeling_delta_llava.sources import file_inside, is_hub_id

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
Shapes = dict[str, tuple[int, ...]]


def text_config_fields(config: dict, where: Path) -> dict:
    """The language model's own fields of a training config, with `model_type` as transformers has it (`llama`).

    Raises:
        UserError: a family that is not supported.
    """
    written = str(config.get("model_type", ""))
    family = re.sub(r"^llava_?", "", written).lower().replace("-", "_") or "llama"
    if family not in _FAMILIES:
        supported = ", ".join(sorted(set(_FAMILIES.values())))
        raise UserError(f"{where} has model_type {written!r}, a language model that is not supported ({supported})")
    fields = {name: value for name, value in config.items() if not _TRAINING_FIELDS.fullmatch(name)}
    return {"model_type": _FAMILIES[family], **fields}


def build_sub_config(fields: dict, where: Path):
    """A transformers config from plain fields.

    Raises:
        UserError: transformers does not know the type or refuses the values.
    """
    from transformers import AutoConfig

    check_sizes(fields, where)
    fields = _without_meta(fields)
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
    return bool(getattr(build_sub_config(text, where), "tie_word_embeddings", False))


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
    vision_config = build_sub_config(vision, where)
    text_config = build_sub_config({**text, "vocab_size": vocab_size}, where)
    text_config.use_cache = True
    fields = {"vision_config": vision_config, "text_config": text_config}
    query_layer = training.get("mm_vision_select_layer", -2)
    tied = bool(getattr(text_config, "tie_word_embeddings", False))
    if projector == PLAIN:
        from transformers import LlavaConfig

        if text_config.model_type == "gemma":
            raise UserError(f"{where}: an MLP projector on Gemma has no native LLaVA form (its embeddings are scaled)")
        strategy = "full" if training.get("mm_vision_select_feature") == "cls_patch" else "default"
        fields |= {
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
        fields = _without_meta(training) | fields
        for name in ("model_type", "auto_map", "image_token_index"):
            fields.pop(name, None)
        return _checked_config(DeltaLlavaConfig, {**fields, "image_token_id": image_token_id}, where)
    if training.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(f"{where} keeps the class token (mm_vision_select_feature), which the Delta projector cannot")
    tokens = _visual_tokens(training, vision_config, where)
    # Training's transformers scaled Gemma's input embeddings after the pictures were spliced in, pictures included.
    scale = text_config.hidden_size**0.5 if text_config.model_type == "gemma" else 1.0
    fields |= {
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


def model_class(projector: str) -> type:
    """The class that loads a Hub folder with this projector."""
    from transformers import LlavaForConditionalGeneration

    from modeling_delta_llava import DeltaLlavaForConditionalGeneration

    return LlavaForConditionalGeneration if projector == PLAIN else DeltaLlavaForConditionalGeneration


def expected_shapes(config, projector: str, where: Path) -> tuple[Shapes, Shapes]:
    """Name -> shape of every tensor that the model of a config needs, and of those that it may come with.

    A tied head is left out. What a checkpoint may have or not are the layers of the vision tower above those in use,
    and its pooling head.

    Raises:
        UserError: no model can be built from the config, which `where` holds.
    """
    from transformers import AutoModel

    vision_config = copy.deepcopy(config.vision_config)
    if hasattr(vision_config, "vision_use_head"):
        vision_config.vision_use_head = True
    with told(f"{where} describes an impossible model", "check its values"), torch.device("meta"):
        model, whole_tower = model_class(projector)(config), AutoModel.from_config(vision_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    tower = {f"{TOWER}{name}": tuple(tensor.shape) for name, tensor in whole_tower.state_dict().items()}
    return shapes, {name: shape for name, shape in tower.items() if name not in shapes}


def training_config_of(config, record: dict | None, vocab_size: int, vision_tower: str | None = None) -> dict:
    """The training `config.json` of a Hub folder: what training had written, or the same built from the config.

    Args:
        record: what conversion kept of the source, None for a folder that was not converted.
        vocab_size: embedding rows of the exported checkpoint.
        vision_tower: Hub id or path to state as `mm_vision_tower`.
    """
    fields = dict(record["training_config"]) if record is not None else _built_training_config(config)
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
    tower = {name: getattr(config.vision_config, name, None) for name in RELEASED_TOWER}
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
        "mm_vision_tower": "openai/clip-vit-large-patch14-336" if tower == RELEASED_TOWER else None,
        "use_mm_proj": True,
    }


# --- what export needs -----------------------------------------------------------------------------------------------

# In the Hub folder: what training wrote beside the weights, as `delta-llava export` puts it back.
TRAINING_FOLDER = "training"
RECORD_FILE = f"{TRAINING_FOLDER}/record.json"
# Rotary frequencies and position ids are smaller.
RECORDED_BYTES = 64_000
RECORDED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def make_record(
    *,
    form: str,
    projector: str,
    training: dict,
    vision_tower: str | None,
    vocabulary_rows: int,
    tower_keys: str | None,
    tied_head_saved: bool,
    tensors: Mapping[str, Tensor],
) -> dict:
    """The record of one conversion.

    Args:
        training: the source's configuration.
        vision_tower: what the user gave in place of the tower that it names.
        vocabulary_rows: embedding rows of the source.
        tower_keys: how the source names the tower in it ("old", "flat"); None for no tower.
        tied_head_saved: whether the source holds the head beside the embedding that it is tied to.
        tensors: those of a whole checkpoint; what conversion leaves out of them is kept up to [`RECORDED_BYTES`].
    """
    training = {name: value for name, value in training.items() if name != "_name_or_path"}
    tower = vision_tower or training.get("mm_vision_tower")
    if isinstance(tower, str):
        # A path of the training machine means nothing elsewhere, and may name people.
        training["mm_vision_tower"] = tower if is_hub_id(tower) else Path(tower).name
    names = {dtype: name for name, dtype in RECORDED_DTYPES.items()}
    return {
        "form": form,
        "projector": projector,
        "training_config": training,
        "vocabulary_rows": vocabulary_rows,
        "tower_keys": tower_keys,
        "tied_head_saved": tied_head_saved,
        "dropped_tensors": {
            key: {
                "dtype": names[tensor.dtype],
                "shape": list(tensor.shape),
                "base64": base64.b64encode(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).decode("ascii"),
            }
            for key, tensor in tensors.items()
            if is_dropped(key) and tensor.dtype in names and tensor.nbytes <= RECORDED_BYTES
        },
    }


def kept_tensors(record: dict) -> dict[str, Tensor]:
    """The tensors that conversion left out, by training key. Raises `ValueError` for what it would not have kept."""
    return {key: _kept_tensor(key, stored) for key, stored in record["dropped_tensors"].items()}


def _kept_tensor(key: str, stored: dict) -> Tensor:
    if is_dropped(key) is None:
        raise ValueError(f"keeps {key[:120]!r}, a tensor that conversion never leaves out")
    try:
        dtype, shape = RECORDED_DTYPES.get(stored["dtype"]), stored["shape"]
        data = bytearray(base64.b64decode(stored["base64"], validate=True))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"keeps {key!r} in no readable way ({type(error).__name__})") from error
    whole = dtype is not None and isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not whole or math.prod(shape) * dtype.itemsize != len(data):
        kind = f"{str(stored['dtype'])[:20]!r} of shape {str(shape)[:80]}"
        raise ValueError(f"keeps {len(data)} bytes of {key!r}, which are no {kind}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def read_record(folder: Path) -> dict | None:
    """The record of a Hub folder; None for a folder that was not converted.

    Raises:
        UserError: it is a link that leaves the folder, or not what conversion writes.
    """
    path = file_inside(folder, RECORD_FILE, str(folder))
    if not path.is_file():
        return None
    record = read_json(path)
    rows = record.get("vocabulary_rows")
    usable = {
        "vocabulary_rows": type(rows) is int and rows >= 1,
        "tower_keys": "tower_keys" in record and record["tower_keys"] in (None, *TOWER_ROWS),
        "tied_head_saved": isinstance(record.get("tied_head_saved"), bool),
    }
    try:
        for name in ("training_config", "dropped_tensors"):
            if not isinstance(record.get(name), dict):
                raise ValueError(f"has no {name}")
        for name in usable:
            if not usable[name]:
                raise ValueError(f"has {name} {repr(record.get(name))[:40]}")
        kept_tensors(record)
    except ValueError as error:
        raise UserError(
            f"{path} {error}: convert the checkpoint again, or remove {path.parent} to export without it"
        ) from error
    return record
