"""Settings of a training run: three dataclasses, read by one parser from a flat YAML file and `--key value` words."""
# ruff: noqa: RUF009 - `setting` makes a field

import copy
import difflib
import json
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import torch
import transformers
import yaml
from accelerate.utils import TorchDynamoPlugin
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.training_args import ParallelMode
from transformers.utils import is_torch_tf32_available

from delta_llava.errors import UserError, printable, told
from delta_llava.redaction import hide, holds_secret, scrub

from .checkpoints import run_identity

CONFIG_FOLDER = Path(__file__).parent / "configs"


def setting(default: Any, words: str) -> Any:
    """A field of the dataclasses below, with its line of `--help`; a list is copied for each run."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": words})
    return field(default=default, metadata={"help": words})


@dataclass
class ModelArguments:
    """What is trained, and what it starts from: either `model`, or `language_model` with `vision_tower`."""

    _argument_group_name = "Model"

    model: str | None = setting(None, "Delta-LLaVA folder or Hub repo to start from, such as a stage-1 result.")
    language_model: str | None = setting(None, "Language model to start from, with a new projector (folder or repo).")
    vision_tower: str | None = setting(None, "Vision tower that goes with `language_model` (folder or Hub repo).")
    model_revision: str | None = setting(None, "Revision of `model` on the Hub.")
    train_projector: bool = setting(True, "Train the Delta projector.")
    train_language_model: bool = setting(False, "Train the language model and its head.")
    train_vision_tower: bool = setting(False, "Train the vision tower.")
    projector: dict[str, Any] | str | None = setting(None, 'Fields of a new projector, such as {"delta_rank": 16}.')
    num_visual_tokens: int | None = setting(None, "Visual tokens per image when no list of budgets is given.")
    attn_implementation: str | None = setting(None, "Attention kernel: sdpa, flash_attention_2, eager, ...")
    lora_rank: int = setting(0, "Rank of LoRA on the language model; 0 trains no LoRA.")
    lora_alpha: int = setting(256, "Scale of LoRA: the update is alpha / rank x B A.")
    lora_dropout: float = setting(0.05, "Dropout in front of LoRA.")
    lora_target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Linear layers of the language model that get LoRA.",
    )
    quantization: Literal["none", "4bit", "8bit"] = setting("none", "How the frozen language model of LoRA is held.")

    def __post_init__(self):
        if isinstance(self.projector, str):
            text = self.projector
            self.projector = yaml.safe_load(text)
            with suppress(ValueError):  # read as YAML, 1e-05 would be a word
                self.projector = json.loads(text)
        self.projector = {} if self.projector is None else self.projector
        if not isinstance(self.projector, dict):
            raise ValueError("projector must be a mapping such as {delta_rank: 16}")


@dataclass
class DataArguments:
    """Where the conversations and pictures come from, and what happens to those that cannot be used."""

    _argument_group_name = "Data"

    data_path: str | None = setting(
        None, "LLaVA JSON or JSONL, parquet, a folder of `save_to_disk`, or a Hub dataset."
    )
    image_folder: str | None = setting(None, "Folder that image names are relative to.")
    split: str = setting("train", "Split of a dataset that has several.")
    eval_data_path: str | None = setting(None, "Data of the evaluation loss, read likewise.")
    eval_image_folder: str | None = setting(None, "Defaults to `image_folder`.")
    eval_split: str = setting("test", "Split of an evaluation dataset that has several.")
    streaming: bool = setting(False, "Read rows in order, by no index (needs max_steps).")
    format: Literal["template", "v1", "plain"] = setting(
        "template", "template: the model's own; v1: Vicuna's; plain: picture, caption, newline (as LLaVA-1.5)."
    )
    max_length: int = setting(2048, "Tokens after which a sequence is cut, never inside a picture.")
    image_aspect_ratio: Literal["pad", "square"] = setting("pad", "Pad to a square first, or resize and crop to one.")
    on_bad_row: Literal["stop", "skip"] = setting("stop", "What happens at a malformed row.")
    on_broken_image: Literal["stop", "skip"] = setting("stop", "What happens at a picture that cannot be read.")
    max_image_pixels: int = setting(100_000_000, "Larger pictures count as broken.")
    ignored_keys: list[str] = setting(
        ["id", "model", "source"],
        "Keys of a row, a turn or a part that are left unused; content under others is refused.",
    )
    look_for_images: bool = setting(True, "Look for every picture file before the first step (reads no picture).")


@dataclass
class DeltaLlavaTrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` and what Delta-LLaVA's recipe adds to them; `--help` says what each does.

    Pictures reach the collator under names that the model's signature does not have, so columns are never removed by
    it, and a batch of pictures is never cut into pieces for other processes: each reads a stream for itself.
    """

    _argument_group_name = "Training"

    projector_learning_rate: float | None = setting(None, "Learning rate of the projector; by default learning_rate.")
    visual_token_budgets: list[int] | None = setting(None, "Visual-token budgets; each optimizer step draws one.")
    visual_token_budget_weights: list[float] | None = setting(None, "How often each is drawn, relative to the others.")
    trial_save: bool = setting(True, "Write one checkpoint and open it before the first step.")
    predict_with_generate: bool = setting(False, "Answer the evaluation rows by generation and score the answers.")
    generation_max_new_tokens: int = setting(64, "Longest answer of predict_with_generate, in tokens.")
    metric: str = setting(
        "exact_match",
        "Score of predict_with_generate: exact_match, or FILE.py:function or module:function, called with predictions "
        "and references (lists of texts); it returns a number or a mapping of names to numbers.",
    )
    early_stopping_patience: int | None = setting(
        None, "Evaluations without a better metric_for_best_model to stop at."
    )
    early_stopping_threshold: float = setting(0.0, "Gain that counts as better for early_stopping_patience.")
    # Those of transformers whose type or default is another here.
    remove_unused_columns: bool = setting(False, "Always false: the collator needs the columns with pictures.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = setting(
        "random", "Order of the rows; group_by_length fills a step with rows of similar length."
    )
    report_to: list[str] = setting(["none"], "Loggers: none, all, or their names.")
    debug: str = setting("", "underflow_overflow: look for NaN and infinity in activations.")

    def __post_init__(self):
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # as transformers has it for load_best_model_at_end
        # Names in place of which transformers or this package also take a flag.
        if self.resume_from_checkpoint in ("True", "False"):
            self.resume_from_checkpoint = self.resume_from_checkpoint.lower()
        if self.trackio_static_space_id in ("false", "False"):
            self.trackio_static_space_id = False
        super().__post_init__()
        if isinstance(self.gradient_checkpointing_kwargs, dict):
            self.gradient_checkpointing_kwargs.setdefault("use_reentrant", False)  # as transformers has it without any
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False

    @property
    def device(self) -> torch.device:
        """The device of this process, without a number on CPUs: `torch.load` knows no `cpu:0`."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP shards the model, as these settings or those of `accelerate launch` say."""
        return bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


@dataclass
class RunArguments:
    """One training run, as resolved from its YAML file and overrides."""

    model: ModelArguments
    data: DataArguments
    training: DeltaLlavaTrainingArguments
    settings: dict[str, Any]  # those that are not at their defaults, and the values of `run_identity`
    check_data: bool = False


# Settings of transformers that would change nothing here, or the wrong thing, and former names.
REFUSED = {
    "use_liger_kernel": "transformers has no such kernels for delta_llava and would train on without a word",
    "liger_kernel_config": "transformers has no such kernels for delta_llava",
    "remove_unused_columns": "the collator needs the columns with pictures",
    "label_names": "the labels of this model are called labels",
    "include_for_metrics": "metrics see predictions and references; see metric",
    "batch_eval_metrics": "metrics see all predictions at once; see metric",
    "eval_do_concat_batches": "metrics see all predictions at once; see metric",
    "eval_use_gather_object": "what evaluation gathers are tensors",
    "dataloader_drop_last": "rows would be left out of training and evaluation",
    "fp16_full_eval": "transformers ignores it while training; evaluation runs as training does",
    "bf16_full_eval": "transformers ignores it while training; evaluation runs as training does",
    "include_num_input_tokens_seen": "it would count one token for each picture",
    "auto_find_batch_size": "other batches are another run, which no checkpoint resumes; lower the batch size",
    "enable_jit_checkpoint": "it puts a checkpoint under its name before it is whole; lower save_steps",
    "parallelism_config": "this model has no tensor or context parallelism; shard it with fsdp2 or zero3",
    "length_column_name": "rows are measured as the model sees them",
    "do_train": "this command always trains; leave it out",
    "do_eval": "eval_strategy says when to evaluate",
    "do_predict": "predict_with_generate answers the evaluation rows",
    "group_by_modality_length": "set train_sampling_strategy: group_by_length",
    "group_by_length": "set train_sampling_strategy: group_by_length",
    "warmup_ratio": "set warmup_steps to the same share",
}
# The name of both that the installed transformers has, the newer where it has both.
IS_RENAMED = hasattr(transformers.TrainingArguments, "activation_checkpointing")
CHECKPOINTING = "activation_checkpointing" if IS_RENAMED else "gradient_checkpointing"
# What is of no use without another setting.
NEEDS = {
    "model_revision": "model",
    "quantization": "lora_rank",
    "streaming": "max_steps",
    "visual_token_budget_weights": "visual_token_budgets",
    "eval_image_folder": "eval_data_path",
    "eval_split": "eval_data_path",
    "eval_strategy": "eval_data_path",
    "eval_on_start": "eval_data_path",
    "eval_data_path": "eval_strategy",
    "predict_with_generate": "eval_strategy",
    "generation_max_new_tokens": "predict_with_generate",
    "metric": "predict_with_generate",
    "load_best_model_at_end": "eval_strategy",
    "early_stopping_patience": "load_best_model_at_end",
    "early_stopping_threshold": "early_stopping_patience",
    "dataloader_persistent_workers": "dataloader_num_workers",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
    f"{CHECKPOINTING}_kwargs": CHECKPOINTING,
    "fsdp_config": "fsdp",
}
EXCLUSIVE = (
    ("model", "language_model", "a `model` brings its own"),
    ("model", "vision_tower", "a `model` brings its own"),
    ("model", "projector", "a `model` brings its own"),
    ("lora_rank", "train_language_model", "LoRA keeps it frozen"),
    ("lora_rank", "train_vision_tower", "LoRA keeps it frozen"),
    ("predict_with_generate", "prediction_loss_only", "it leaves no answers to score"),
    ("fsdp", "deepspeed", "each shards the model"),
)
# The numbers that a run can use; all must be finite, and whole ones fit into 64 bits.
AT_LEAST_1 = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_visual_tokens
    visual_token_budgets max_length max_image_pixels lora_alpha generation_max_new_tokens eval_accumulation_steps
    early_stopping_patience save_total_limit torch_empty_cache_steps dataloader_prefetch_factor ddp_timeout
    ddp_bucket_cap_mb
"""
AT_LEAST_0 = """
    learning_rate projector_learning_rate visual_token_budget_weights weight_decay warmup_steps max_grad_norm
    neftune_noise_alpha lora_rank eval_delay early_stopping_threshold dataloader_num_workers
"""
SHARES = "label_smoothing_factor lora_dropout adam_beta1 adam_beta2"
LIMITS = {
    "at least 1": (lambda number: number >= 1, AT_LEAST_1),
    "at least 0": (lambda number: number >= 0, AT_LEAST_0),
    "more than 0": (lambda number: number > 0, "num_train_epochs adam_epsilon logging_steps save_steps eval_steps"),
    "at least 0 and less than 1": (lambda number: 0 <= number < 1, SHARES),
    "between 0 and 4294967295": (lambda number: 0 <= number < 2**32, "seed data_seed"),
    "at least 1, or -1 where num_train_epochs decides": (lambda number: number == -1 or number >= 1, "max_steps"),
    "at least -1": (lambda number: number >= -1, "local_rank"),
}
# Lists that may also be written as in YAML, [a, b].
LISTS = ("visual_token_budgets", "visual_token_budget_weights", "lora_target_modules", "report_to")


class SettingsParser(HfArgumentParser):
    """Reads the words of a run's settings; whatever is wrong is a `UserError` that begins with `where`."""

    def __init__(self, where: str = "the settings"):
        super().__init__(
            [ModelArguments, DataArguments, DeltaLlavaTrainingArguments],
            allow_abbrev=False,
            prog="delta-llava finetune",
            usage="%(prog)s CONFIG.yaml [--key value ...] [--check-data]",
            description=f"Train as a YAML file and overrides say. Packaged recipes: {', '.join(packaged_recipes())}; "
            f"they lie in {CONFIG_FOLDER}, beside configs of `accelerate launch`.",
            epilog="Lists are given as --key a b c, mappings as JSON. On several devices: accelerate launch -m "
            "modeling_delta_llava.finetuning CONFIG.yaml [--key value ...]",
        )
        self.where = where
        self.add_argument("--list-settings", action="help", help="the same as --help")
        words = "Read the data through, report what it holds and costs, and train nothing."
        self.add_argument(
            "--check_data", "--check-data", type=string_to_bool, nargs="?", const=True, default=False, help=words
        )

    def error(self, message: str) -> NoReturn:
        named = re.match(r"argument --(\w+)\S*: ", message)
        if named is not None:
            message = f"{named[1]}: {REFUSED.get(named[1], message[named.end() :])}"
        raise UserError(f"{self.where}: {scrub(printable(message, 1000))}")


def best_metric(name: str | None) -> str:
    """The measurement that a `metric_for_best_model` means, which may have `Trainer`'s prefix."""
    return "loss" if name is None else name.removeprefix("eval_")


def config_path(name: str) -> Path:
    """The YAML file that `name` stands for: a path, or a packaged recipe such as `vicuna-7b/stage1`.

    Raises:
        UserError: no such file; the message lists the packaged recipes.
    """
    for path in (Path(name).expanduser(), CONFIG_FOLDER / name, CONFIG_FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    raise UserError(f"{name}: no such config file; packaged recipes are {', '.join(packaged_recipes())}")


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = (path for path in CONFIG_FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")
    return sorted(str(path.relative_to(CONFIG_FOLDER).with_suffix("")) for path in files)


def read_settings(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The flat mapping in a YAML file: its scalars as they are written, lists of them, and mappings.

    `base: OTHER.yaml` reads another file first, which this one then overrides; null takes back what a base says.

    Args:
        path: the file.
        seen: the files whose `base` led here.
    Raises:
        UserError: the file is no YAML mapping (with its line), or its base cannot be read or is circular.
    """
    with told(f"{path}: cannot be read as YAML", "repair the file"), path.open("rb") as file:
        if path.resolve() in seen:
            raise UserError(f"{path}: its `base` leads back to itself; remove one of them")
        loader = yaml.SafeLoader(file)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: expected `key: value` lines; see the packaged recipes for an example")
        loader.flatten_mapping(root)
        settings = {str(key.value): _as_written(loader, node) for key, node in root.value}
    base = settings.pop("base", None)
    if base is None:
        return settings
    return {**read_settings(path.parent / str(base), (*seen, path.resolve())), **settings}


def _as_written(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_as_written(loader, item) for item in node.value]
    return loader.construct_object(node, deep=True)


def parse_overrides(words: list[str]) -> dict[str, list[str]]:
    """The texts that follow each `--key`; `--key=text` is the same as `--key text`, and a bare `--flag` has none.

    Raises:
        UserError: a word belongs to no `--key`.
    """
    settings: dict[str, list[str]] = {}
    texts = None
    for word in words:
        if word.startswith("--") and word != "--":
            key, has_equals, text = word[2:].partition("=")
            texts = settings[key.replace("-", "_")] = [text] if has_equals else []
        elif texts is not None:
            texts.append(word)
        else:
            raise UserError(f"{scrub(printable(word))}: unexpected argument; overrides are written --key value")
    return settings


def load_arguments(config: str, overrides: list[str]) -> RunArguments:
    """Arguments of `finetune CONFIG.yaml [--key value ...]`; later values win."""
    path = config_path(config)
    return build_arguments({**read_settings(path), **parse_overrides(overrides)}, where=str(path))


def build_arguments(settings: Mapping[str, Any], where: str = "the settings") -> RunArguments:
    """Validates settings and builds the dataclasses.

    Args:
        settings: values by name: texts, as a command line has them, or Python's own; None stands for the default.
        where: what messages name.
    Raises:
        UserError: an unknown key (with the nearest known ones), a value of the wrong type or out of its range, a
            setting that would do nothing or the wrong thing, or settings that do not go together.
    """
    parser = SettingsParser(where)
    chosen, unread = parser.parse_known_args(_words(parser, settings))
    if unread and unread[0].startswith("--"):
        key = unread[0].removeprefix("--").partition("=")[0]
        near = difflib.get_close_matches(key, vars(chosen), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `delta-llava finetune --help`"
        parser.error(f"unknown setting {key!r}; {REFUSED.get(key, hint)}")
    if unread:
        parser.error(f"{unread[0]}: a value too many; only lists take several")
    defaults = vars(parser.parse_known_args([])[0])
    changed = {name: value for name, value in vars(chosen).items() if value != defaults[name]}
    _check(parser, chosen, changed)
    if chosen.tf32 and not is_torch_tf32_available():
        chosen.tf32 = None  # only a matter of speed: without such a device the recipes run all the same
    with told(f"{where}: these settings cannot be used", "correct what the reason names"):
        try:
            model, data, training = parser.parse_dict(vars(chosen), allow_extra_keys=True)
        except Exception:
            # transformers makes a DeepSpeed configuration known to the whole process before it reads it.
            unset_hf_deepspeed_config()
            raise
        if not chosen.check_data:  # which any machine can do
            _check_built(parser, training)
    stored = {name: value for name, value in changed.items() if name not in ("hub_token", "check_data")}
    stored |= run_identity(model, data, training)
    return RunArguments(model, data, training, settings=stored, check_data=chosen.check_data)


def _words(parser: SettingsParser, settings: Mapping[str, Any]) -> list[str]:
    """The command line that stands for settings."""
    given = {name: _texts(value) for name, value in settings.items() if value is not None}
    for token in given.get("hub_token", []):
        hide(token)
    hints = {name: hint for group in parser.dataclass_types for name, hint in get_type_hints(group).items()}
    words = []
    for name, texts in given.items():
        if name != "hub_token" and holds_secret(f"{name} {' '.join(texts)}"):
            parser.error(
                f"{name} holds a token or a password, which every save would repeat; take it out and set HF_TOKEN, or "
                "run `hf auth login`"
            )
        if name in LISTS and len(texts) == 1:
            texts = texts[0].strip("[]").replace(",", " ").split()
        if hints.get(name) in (bool, bool | None):  # bare, or one of YAML's words that the parser does not know
            texts = [{"on": "true", "off": "false"}.get(text.lower(), text) for text in texts] or ["true"]
        if "--" in texts or any(text.startswith("--") for text in texts[1:]):
            parser.error(f"{name}: a value that begins with -- cannot be told from a setting; give another")
        name = re.sub("^(gradient|activation)_checkpointing", CHECKPOINTING, name)
        words += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
    return words


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [json.dumps(value, default=str)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _check(parser: SettingsParser, chosen: Namespace, changed: dict[str, Any]) -> None:
    """Refuses settings that cannot be used, one by one and together; `changed` are those not at their defaults."""
    for name, why in REFUSED.items():
        if name in changed:
            parser.error(f"{name} is not supported: {why}")
    for words, (is_usable, names) in LIMITS.items():
        for name in names.split():
            value = getattr(chosen, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not (is_usable(number) and number < 2**63):
                    parser.error(f"{name} must be {words}, found {number}")
    for name, other in NEEDS.items():
        if name in changed and other not in changed:
            parser.error(f"{name} needs {other}; set that too, or leave {name} out")
    for name, other, why in EXCLUSIVE:
        if name in changed and other in changed:
            parser.error(f"{name} and {other} do not go together, {why}; remove one of them")
    if "model" not in changed and not {"language_model", "vision_tower"} <= changed.keys():
        parser.error("give `model`, or `language_model` and `vision_tower`, to start from")
    if not chosen.data_path:
        parser.error("no data_path; pass --data_path FILE.json")
    if not (chosen.output_dir or chosen.check_data):
        parser.error("no output_dir; pass --output_dir FOLDER")
    if not (chosen.train_projector or chosen.train_language_model or chosen.train_vision_tower or chosen.lora_rank):
        parser.error("nothing is trained; set train_projector, train_language_model or lora_rank")
    if chosen.streaming and chosen.train_sampling_strategy == "group_by_length":
        parser.error("a stream cannot be grouped by length; set train_sampling_strategy: random")
    budgets, weights = chosen.visual_token_budgets, chosen.visual_token_budget_weights
    if budgets is not None and len(set(budgets)) != len(budgets):
        parser.error(f"visual_token_budgets must be different numbers, found {budgets}")
    if weights is not None and (len(weights) != len(budgets) or not any(weights)):
        parser.error(f"visual_token_budget_weights needs a number for each budget, not all 0; found {weights}")
    if chosen.metric != "exact_match" and not re.fullmatch(r".+:\w+", chosen.metric):
        parser.error("metric must be exact_match, FILE.py:function or module:function")
    measured = ("loss", "exact_match")[: 1 + chosen.predict_with_generate]
    best = best_metric(chosen.metric_for_best_model)
    if chosen.metric == "exact_match" and best not in measured:
        parser.error(f"metric_for_best_model must be one of {', '.join(measured)}, which evaluation measures")
    if chosen.optim_target_modules and not chosen.optim.startswith(("galore", "apollo")):
        parser.error(
            "optim_target_modules is read by the galore and apollo optimizers alone; set optim, or leave it out"
        )
    if chosen.save_strategy == "best" and chosen.eval_strategy == "no":
        parser.error("save_strategy: best needs an eval_strategy")


def _check_built(parser: SettingsParser, training: DeltaLlavaTrainingArguments) -> None:
    """Makes what a run would only find impossible later: loggers, compiler, recomputation, optimizer and schedule."""

    def trying(names: str) -> AbstractContextManager:
        return told(f"{parser.where}: {names} cannot be used", "correct what the reason names")

    for name, value in vars(training).items():
        if name.endswith("_kwargs") and isinstance(value, str):
            parser.error(f"{name} must be a mapping, found {value!r}")
    config = training.accelerator_config
    if config.dispatch_batches or config.split_batches or not config.even_batches:
        parser.error("accelerator_config: every rank reads whole batches, equally many; take its *_batches out")
    if config.gradient_accumulation_kwargs:
        parser.error("accelerator_config: set gradient_accumulation_steps in place of gradient_accumulation_kwargs")
    is_on_cpu = training.device.type == "cpu"
    if training.fp16 and is_on_cpu:
        parser.error("fp16 needs a GPU; set bf16: true, or leave it out")
    if training.fsdp and (is_on_cpu or training.parallel_mode != ParallelMode.DISTRIBUTED):
        parser.error("fsdp needs several processes with a GPU each; start with `accelerate launch`, or leave fsdp out")
    if training.fsdp and training.fsdp_config.get("activation_checkpointing") and training.gradient_checkpointing:
        parser.error(f"{CHECKPOINTING} and that of fsdp_config do not go together; leave one of them out")
    is_sharded = training.uses_fsdp or training.deepspeed_plugin is not None
    if is_sharded and training.save_only_model and training.load_best_model_at_end:
        parser.error("save_only_model leaves shards that load_best_model_at_end cannot load; remove one of them")
    for callback in get_reporting_integration_callbacks(training.report_to):
        callback()
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    if training.torch_compile:
        with trying("torch_compile_backend or torch_compile_mode"):
            torch.compile(model, backend=training.torch_compile_backend, mode=training.torch_compile_mode)
            trial = torch.compile(copy.deepcopy(model).to(training.device), backend=training.torch_compile_backend)
            trial(torch.ones(1, 1, device=training.device))  # backends come in packages
            TorchDynamoPlugin(backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    recomputed = dict(training.gradient_checkpointing_kwargs or {"use_reentrant": False})
    every = recomputed.pop("every_n_layers", 1)
    if type(every) is not int or every < 1:
        parser.error(f"{CHECKPOINTING}_kwargs: every_n_layers must be at least 1, found {every!r}")
    if IS_RENAMED and recomputed.pop("offload", False) and is_on_cpu:
        parser.error(f"{CHECKPOINTING}_kwargs: offload needs a GPU to take activations from; leave it out")
    if not isinstance(recomputed["use_reentrant"], bool):
        parser.error(
            f"{CHECKPOINTING}_kwargs: use_reentrant must be true or false, found {recomputed['use_reentrant']!r}"
        )
    with trying(f"{CHECKPOINTING}_kwargs"):
        checkpoint(model, torch.ones(1, 1, requires_grad=True), **recomputed)
    with trying("optim or optim_args"):
        _check_optimizer(parser, training, model)
    if training.lr_scheduler_kwargs and training.lr_scheduler_type.startswith("constant"):
        parser.error(f"lr_scheduler_kwargs: {training.lr_scheduler_type.value} has no use for any; leave it out")
    with trying("lr_scheduler_kwargs"):
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate)
        transformers.get_scheduler(training.lr_scheduler_type, optimizer, 0, 2, training.lr_scheduler_kwargs)


def _check_optimizer(parser: SettingsParser, training: DeltaLlavaTrainingArguments, model: torch.nn.Module) -> None:
    """Makes a run's optimizer for another model; each of `optim_args` must be read, for what is unknown is ignored."""
    training = copy.copy(training)
    if training.optim_target_modules is not None:
        training.optim_target_modules = "all-linear"
    optimizer, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(training, model)
    if not settings.keys() & {"model", "params"}:  # others take the model itself, or parts of it
        optimizer(model.parameters(), **settings)
    pairs = training.optim_args.split(",") if training.optim_args else []
    for pair in pairs:
        changed = copy.copy(training)
        changed.optim_args = ",".join(f"{pair.partition('=')[0]}=0.123" if each == pair else each for each in pairs)
        try:
            is_read = transformers.Trainer.get_optimizer_cls_and_kwargs(changed, model)[1] != settings
        except Exception:  # the other value cannot be used: whoever says so has read it
            is_read = True
        if not is_read:
            parser.error(f"optim_args: {pair.strip()} changes nothing of {training.optim.value}; leave it out")
