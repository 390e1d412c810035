"""Settings of a training run: three dataclasses, read from one flat YAML file and `--key value` overrides."""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_torch_tf32_available

from delta_llava.errors import UserError, reason
from delta_llava.redaction import hide, holds_secret

from .checkpoints import run_identity

CONFIG_FOLDER = Path(__file__).parent / "configs"
# `gradient_checkpointing` is called `activation_checkpointing` from transformers 5.19 on; both spellings are read.
CHECKPOINTING_NAMES = ("gradient_checkpointing", "activation_checkpointing")


@dataclass
class ModelArguments:
    """What is trained, and what it starts from: either `model`, or `language_model` with `vision_tower`."""

    model: str | None = field(
        default=None,
        metadata={"help": "Delta-LLaVA folder or Hub repo to start from, such as a stage-1 result."},
    )
    language_model: str | None = field(
        default=None, metadata={"help": "Language model to start from, with a new projector (folder or Hub repo)."}
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "Vision tower that goes with `language_model` (folder or Hub repo)."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of `model` on the Hub."})
    train_projector: bool = field(default=True, metadata={"help": "Train the Delta projector."})
    train_language_model: bool = field(default=False, metadata={"help": "Train the language model and its head."})
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower."})
    projector: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Config fields of a new projector, such as {delta_rank: 16, drop_path_rate: 0.1}."},
    )
    num_visual_tokens: int | None = field(
        default=None, metadata={"help": "Visual tokens per image when no list of budgets is given."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel: sdpa, flash_attention_2, eager, ..."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA on the language model; 0 trains no LoRA."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of LoRA: the update is alpha / rank x B A."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Linear layers of the language model that get LoRA."},
    )
    quantization: str = field(
        default="none", metadata={"help": "Load the frozen language model in 4bit (QLoRA), 8bit or none."}
    )


@dataclass
class DataArguments:
    """Where the conversations and pictures come from, and what happens to those that cannot be used."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "LLaVA JSON or JSONL, a parquet file, a folder of `save_to_disk`, or a Hub dataset."},
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder that image names are relative to."})
    split: str = field(default="train", metadata={"help": "Split of a dataset that has several."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Data of the evaluation loss, read likewise."})
    eval_image_folder: str | None = field(default=None, metadata={"help": "Defaults to `image_folder`."})
    eval_split: str = field(default="test", metadata={"help": "Split of an evaluation dataset that has several."})
    streaming: bool = field(default=False, metadata={"help": "Read rows in order, by no index (needs max_steps)."})
    format: str = field(
        default="template",
        metadata={"help": "template: the model's own; v1: Vicuna's; plain: picture, caption, newline (as LLaVA-1.5)."},
    )
    max_length: int = field(
        default=2048, metadata={"help": "Tokens after which a sequence is cut, never inside a picture."}
    )
    image_aspect_ratio: str = field(
        default="pad", metadata={"help": "pad: pad to a square first; square: resize the short side and crop."}
    )
    on_bad_row: str = field(default="stop", metadata={"help": "stop or skip at a malformed row."})
    on_broken_image: str = field(default="stop", metadata={"help": "stop or skip at a picture that cannot be read."})
    max_image_pixels: int = field(default=100_000_000, metadata={"help": "Larger pictures count as broken."})
    ignored_keys: list[str] = field(
        default_factory=lambda: ["id", "model", "source"],
        metadata={"help": "Keys of a row, a turn or a part that are left unused."},
    )
    look_for_images: bool = field(
        default=True, metadata={"help": "Look for every picture file before the first step (reads no picture)."}
    )


@dataclass
class DeltaLlavaTrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` and what Delta-LLaVA's recipe adds to them.

    Args:
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector; `learning_rate` when not given.
        group_by_modality_length (`bool`, defaults to `False`):
            Fill each batch with rows of one modality and of similar length.
        visual_token_budgets (`list[int]`, *optional*):
            Visual-token budgets to draw from, one for each optimizer step, the same on all ranks.
        visual_token_budget_weights (`list[float]`, *optional*):
            How often each budget is drawn, relative to the others; equally often when not given.
        trial_save (`bool`, defaults to `True`):
            Write one checkpoint and open it before the first step.
    """

    projector_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    visual_token_budgets: list[int] | None = field(
        default=None, metadata={"help": "Visual-token budgets to draw from, one for each optimizer step."}
    )
    visual_token_budget_weights: list[float] | None = field(
        default=None, metadata={"help": "How often each budget is drawn, relative to the others."}
    )
    predict_with_generate: bool = field(default=False, metadata={"help": "Generate answers in evaluation."})
    generation_max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a generated answer, at most."})
    metric: str = field(default="exact_match", metadata={"help": "metric"})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "p"})
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "t"})
    trial_save: bool = field(default=True, metadata={"help": "Write one checkpoint before the first step."})

    def __post_init__(self):
        # The collator makes what the model takes; dropping columns by signature would lose the pictures.
        self.remove_unused_columns = False
        if self.accelerator_config is None:
            # A stream is read on every rank: batches of pictures cannot be cut into pieces and sent around.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """The device of this process, without a number on CPUs: `torch.load` knows no `cpu:0`."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


@dataclass
class RunArguments:
    """One training run, as resolved from its YAML file and overrides."""

    model: ModelArguments
    data: DataArguments
    training: DeltaLlavaTrainingArguments
    settings: dict[str, Any]  # as given, and the resolved values of `run_identity`
    check_data: bool = False


CHOICES = {
    "format": ("template", "v1", "plain"),
    "image_aspect_ratio": ("pad", "square"),
    "on_bad_row": ("stop", "skip"),
    "on_broken_image": ("stop", "skip"),
    "quantization": ("none", "4bit", "8bit"),
}


def config_path(name: str) -> Path:
    """The YAML file that `name` stands for: a path, or a packaged recipe such as `vicuna-7b/stage1`.

    Raises:
        UserError: no such file; the message lists the packaged recipes.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = CONFIG_FOLDER / (name if name.endswith(".yaml") else f"{name}.yaml")
    if packaged.is_file():
        return packaged
    raise UserError(f"{name}: no such config file; packaged recipes are {', '.join(packaged_recipes())}")


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = (path for path in CONFIG_FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")
    return sorted(str(path.relative_to(CONFIG_FOLDER).with_suffix("")) for path in files)


def read_settings(path: Path) -> dict[str, Any]:
    """The flat mapping in a YAML file. `base: OTHER.yaml` reads another file first, which this one then overrides.

    Raises:
        UserError: the file is no YAML mapping (with its line), or its base is missing or circular.
    """
    return _read_settings(path, ())


def _read_settings(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: its `base` leads back to itself; remove one of them")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}:{line} is no YAML ({getattr(error, 'problem', error)}); repair the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{path}: expected `key: value` lines; see the packaged recipes for an example")
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    base_path = path.parent / str(base)
    if not base_path.is_file():
        raise UserError(f"{path}: its base {base} does not exist beside it; correct the `base` line")
    return {**_read_settings(base_path, (*seen, path.resolve())), **loaded}


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and bare `--flag` arguments as a mapping; values are read as YAML.

    Raises:
        UserError: an argument is no `--key`.
    """
    settings: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("--") or len(argument) == 2:
            raise UserError(f"{argument}: unexpected argument; overrides are written --key value")
        key, has_equals, value = argument[2:].partition("=")
        if not has_equals:
            if position + 1 < len(arguments) and not arguments[position + 1].startswith("--"):
                position += 1
                value = arguments[position]
            else:
                value = "true"
        try:
            settings[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key.replace("-", "_")] = value
        position += 1
    return settings


def build_arguments(settings: dict[str, Any], where: str = "the settings") -> RunArguments:
    """Validates settings and builds the dataclasses.

    Raises:
        UserError: an unknown key (with the nearest known ones), a value of the wrong type, or settings that do not
            go together.
    """
    settings = dict(settings)
    training_fields = {entry.name: entry for entry in dataclasses.fields(DeltaLlavaTrainingArguments) if entry.init}
    wanted_name = next(name for name in reversed(CHECKPOINTING_NAMES) if name in training_fields)
    for name in CHECKPOINTING_NAMES:
        for suffix in ("", "_kwargs"):
            if name + suffix in settings and name != wanted_name:
                settings[wanted_name + suffix] = settings.pop(name + suffix)

    groups: dict[type, dict[str, Any]] = {ModelArguments: {}, DataArguments: {}, DeltaLlavaTrainingArguments: {}}
    types_of = {group: typing.get_type_hints(group) for group in groups}
    known = {entry.name: group for group in groups for entry in dataclasses.fields(group) if entry.init}
    check_data = settings.pop("check_data", False)
    if not isinstance(check_data, bool):
        raise UserError(f"{where}: check_data must be true or false, found {check_data!r}")
    token = settings.pop("hub_token", None)
    if token is not None:
        if not isinstance(token, str):
            raise UserError(f"{where}: hub_token must be text; leave it out and set HF_TOKEN")
        hide(token)
        groups[DeltaLlavaTrainingArguments]["hub_token"] = token
    for key, value in settings.items():
        if holds_secret(f"{key} {value}"):
            raise UserError(
                f"{where}: {key} holds a token or a password, which every save would repeat; take it out and set "
                "HF_TOKEN, or run `hf auth login`"
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `delta-llava finetune --list-settings`"
            raise UserError(f"{where}: unknown setting {key!r}; {hint}")
        group = known[key]
        try:
            groups[group][key] = _coerced(value, types_of[group][key])
        except (TypeError, ValueError):
            raise UserError(f"{where}: {key} must be {_worded(types_of[group][key])}, found {value!r}") from None
        if key in CHOICES and groups[group][key] not in CHOICES[key]:
            raise UserError(f"{where}: {key} must be one of {', '.join(CHOICES[key])}, found {value!r}")

    model = ModelArguments(**groups[ModelArguments])
    data = DataArguments(**groups[DataArguments])
    chosen = groups[DeltaLlavaTrainingArguments]
    _check_together(model, data, chosen, where, check_data)
    if chosen.get("tf32") and not is_torch_tf32_available():
        del chosen["tf32"]  # only a matter of speed: without such a device the recipes run all the same
    try:
        training = DeltaLlavaTrainingArguments(**chosen)
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"{where}: {reason(error)}") from None
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{where}: report_to: {reason(error)}") from None
    settings |= run_identity(model, data, training)
    return RunArguments(model=model, data=data, training=training, settings=settings, check_data=check_data)


def load_arguments(config: str, overrides: list[str]) -> RunArguments:
    """Arguments of `finetune CONFIG.yaml [--key value ...]`; later values win."""
    path = config_path(config)
    return build_arguments({**read_settings(path), **parse_overrides(overrides)}, where=str(path))


def _check_together(
    model: ModelArguments, data: DataArguments, training: dict[str, Any], where: str, check_data: bool
) -> None:
    if model.model is None and (model.language_model is None or model.vision_tower is None):
        raise UserError(f"{where}: give `model`, or `language_model` and `vision_tower`, to start from")
    if model.model is not None and (model.language_model is not None or model.vision_tower is not None):
        raise UserError(f"{where}: `model` already has a language model and a tower; remove the other two, or `model`")
    if model.model is not None and model.projector:
        raise UserError(f"{where}: `projector` describes a new projector, but `model` brings its own; remove one")
    if not data.data_path:
        raise UserError(f"{where}: no data_path; pass --data_path FILE.json")
    if not training.get("output_dir") and not check_data:
        raise UserError(f"{where}: no output_dir; pass --output_dir FOLDER")
    if data.max_length < 1:
        raise UserError(f"{where}: max_length must be at least 1, found {data.max_length}")
    if not (model.train_projector or model.train_language_model or model.train_vision_tower or model.lora_rank):
        raise UserError(f"{where}: nothing is trained; set train_projector, train_language_model or lora_rank")
    if model.lora_rank < 0:
        raise UserError(f"{where}: lora_rank must be at least 0, found {model.lora_rank}")
    if model.lora_rank and model.train_language_model:
        raise UserError(f"{where}: LoRA keeps the language model frozen; set train_language_model: false")
    if model.lora_rank and model.train_vision_tower:
        raise UserError(f"{where}: LoRA runs keep the tower frozen; set train_vision_tower: false")
    if model.quantization != "none" and not model.lora_rank:
        raise UserError(f"{where}: a {model.quantization} language model cannot be trained itself; set lora_rank")
    if data.streaming and training.get("max_steps", -1) <= 0:
        raise UserError(f"{where}: a stream has no length; set max_steps")
    strategy = training.get("train_sampling_strategy")
    if strategy not in (None, "random", "sequential", "group_by_length"):
        raise UserError(
            f"{where}: train_sampling_strategy {strategy} is not supported; set group_by_modality_length: true"
        )
    if data.eval_data_path is None and str(training.get("eval_strategy", "no")) not in ("no", "False"):
        raise UserError(f"{where}: eval_strategy needs eval_data_path; set it, or eval_strategy: no")
    budgets, weights = training.get("visual_token_budgets"), training.get("visual_token_budget_weights")
    check_budget_list(budgets, weights, where)


def check_budget_list(budgets: list[int] | None, weights: list[float] | None, where: str) -> None:
    """Checks a list of visual-token budgets and its weights as far as no model is needed for it.

    Raises:
        UserError: it is empty, repeats a budget, or the weights do not fit.
    """
    if budgets is None:
        if weights is not None:
            raise UserError(f"{where}: visual_token_budget_weights without visual_token_budgets; give both")
        return
    if not budgets or len(set(budgets)) != len(budgets) or min(budgets) < 1:
        raise UserError(f"{where}: visual_token_budgets must be different positive numbers, found {budgets}")
    if weights is not None and (len(weights) != len(budgets) or min(weights) < 0 or sum(weights) <= 0):
        raise UserError(
            f"{where}: visual_token_budget_weights needs one number >= 0 for each of the {len(budgets)} budgets, "
            f"not all 0; found {weights}"
        )


def _coerced(value: Any, wanted: Any) -> Any:
    """`value` as the annotated type. Numbers may come as text (YAML reads 1e-3 as text), flags may not."""
    if isinstance(wanted, (types.UnionType, typing._UnionGenericAlias)):
        members = typing.get_args(wanted)
        if value is None:
            if type(None) in members:
                return None
            raise TypeError
        for member in sorted(members, key=lambda member: member is str):
            if member is type(None):
                continue
            try:
                return _coerced(value, member)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if typing.get_origin(wanted) is typing.Literal:
        if value not in typing.get_args(wanted):
            raise ValueError
        return value
    if wanted is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if wanted is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise TypeError
        return int(value)
    if wanted is float:
        if isinstance(value, bool) or value is None:
            raise TypeError
        return float(value)
    if wanted is str:
        if isinstance(value, bool):  # YAML reads the words no, off and yes as flags
            return {False: "no", True: "yes"}[value]
        if not isinstance(value, (str, int, float)):
            raise TypeError
        return str(value)
    if typing.get_origin(wanted) is list or wanted is list:
        inner = typing.get_args(wanted)[0] if typing.get_args(wanted) else Any
        values = value if isinstance(value, list) else [value]
        return [_coerced(item, inner) for item in values]
    if typing.get_origin(wanted) is dict or wanted is dict:
        if isinstance(value, str):
            value = json.loads(value)
        if not isinstance(value, dict):
            raise TypeError
        return value
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return wanted(value)
    return value


def _worded(wanted: Any) -> str:
    if isinstance(wanted, (types.UnionType, typing._UnionGenericAlias)):
        return " or ".join(_worded(member) for member in typing.get_args(wanted) if member is not type(None))
    if typing.get_origin(wanted) is list:
        return {int: "a list of whole numbers", float: "a list of numbers"}.get(typing.get_args(wanted)[0], "a list")
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    return names.get(wanted, names.get(typing.get_origin(wanted), getattr(wanted, "__name__", str(wanted))))
