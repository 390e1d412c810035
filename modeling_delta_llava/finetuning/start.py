"""What a run starts from: a Delta-LLaVA folder, or a language model and a vision tower joined by a new projector."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from delta_llava.errors import UserError, printable, told

from ..building import (
    backbone_chat_template,
    build_processor,
    check_budgets,
    check_chat_template,
    load_tokenizer,
    read_chat_template,
)
from ..configuration_delta_llava import DeltaLlavaConfig
from ..folders import atomic_folder
from ..foreign_code import refuse_foreign_code, strip_foreign_code
from ..json_files import ADAPTED_CONFIG, ADAPTER_CONFIG, check_files, check_sizes, merging, read_json
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from ..projector_delta_llava import DeltaLlavaProjector
from ..sources import file_inside, is_hub_id, local_folder
from .arguments import DataArguments, DeltaLlavaTrainingArguments, ModelArguments
from .checkpoints import SETTINGS_FILE, read_stored_settings, write_settings
from .parts import NOT_QUANTIZED, PROJECTOR_MODULE, lora_config

logger = logging.getLogger(__name__)

# A name with a leading underscore: `Trainer.push_to_hub` leaves such files out.
BASE_FOLDER = "_base"
# What a run may have otherwise than the adapter that it starts from: none of it changes what the weights mean.
FREE_ADAPTER_FIELDS = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout"),
    *("peft_version", "revision", "task_type"),
)
# PEFT's names of what this package's settings decide.
ADAPTER_SETTINGS = {"r": "lora_rank", "target_modules": "lora_target_modules", "modules_to_save": "train_projector"}


def read_config(folder: Path, what: str) -> Any:
    """The config in a folder.

    Raises:
        UserError: there is none, it cannot be read, or it describes a model without end.
    """
    check_files(folder)
    check_sizes(read_json(folder / "config.json"), folder / "config.json")
    advice = f"give a model that transformers knows without code of its own as --{what}"
    with told(f"{what}: {folder} has no readable config.json", advice):
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


@dataclass(frozen=True)
class BaseParts:
    """What is known of a language model and a tower without their weights, and the processor of both together."""

    text_folder: Path
    vision_folder: Path
    config: DeltaLlavaConfig
    processor: DeltaLlavaProcessor


def read_base_parts(model: ModelArguments, data: DataArguments, weights: bool = True) -> BaseParts:
    """Reads the configs and tokenizer of `language_model` and `vision_tower`.

    Args:
        model: names the two and the projector's config fields.
        data: its format decides the chat template, its aspect ratio the padding.
        weights: whether a download from the Hub includes the weights.
    Raises:
        UserError: one of them cannot be read, or they do not go together.
    """
    text_folder = local_folder(model.language_model, "--language_model", weights=weights)
    vision_folder = local_folder(model.vision_tower, "--vision_tower", weights=weights)
    text_config = read_config(text_folder, "language_model")
    vision_config = read_config(vision_folder, "vision_tower")
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if text_config.model_type == DeltaLlavaConfig.model_type:
        raise UserError(f"language_model: {model.language_model} is a whole Delta-LLaVA; pass it as --model")
    rows = getattr(text_config, "vocab_size", None)
    if not isinstance(rows, int):
        raise UserError(
            f"language_model: {model.language_model} is of type {text_config.model_type}, no language model; give one "
            "as --language_model"
        )
    tokenizer, image_token = load_tokenizer(text_folder, text_config.model_type, rows=rows)
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    text_config.vocab_size = max(rows, image_token_id + 1)
    advice = "correct `projector` or `num_visual_tokens`, or give another --vision_tower"
    with told("the projector cannot be built", advice):
        config = DeltaLlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_id=image_token_id,
            num_visual_tokens=model.num_visual_tokens,
            **model.projector,
        )
    preprocessor_file = vision_folder / "preprocessor_config.json"
    preprocessor = read_json(preprocessor_file) if preprocessor_file.is_file() else None
    if data.format == "v1":
        template = read_chat_template("vicuna_v1", image_token)
    else:
        template = backbone_chat_template(tokenizer, image_token)
    processor = build_processor(
        config, tokenizer, image_token, preprocessor, data.image_aspect_ratio, chat_template=template
    )
    return BaseParts(text_folder, vision_folder, config, processor)


def compose(folder: Path, model: ModelArguments, data: DataArguments, seed: int = 0) -> Path:
    """Writes a Delta-LLaVA Hub folder with the weights of a language model and a tower, and a new projector.

    Args:
        folder: what is written; kept when it was already composed of the same parts.
        model, data: see [`read_base_parts`].
        seed: seed of the new projector.
    Raises:
        UserError: one of the two cannot be read, or they do not go together.
    """
    made_from = {
        "language_model": model.language_model,
        "vision_tower": model.vision_tower,
        "projector": model.projector,
        "num_visual_tokens": model.num_visual_tokens,
        "format": data.format,
        "image_aspect_ratio": data.image_aspect_ratio,
        "seed": seed,
    }
    if (folder / SETTINGS_FILE).is_file() and read_stored_settings(folder) == made_from:
        return folder
    parts = read_base_parts(model, data)
    advice = "both must hold whole weights: download them again, or give others"
    with told(f"{model.language_model} with {model.vision_tower} cannot be loaded", advice):
        with torch.device("meta"):
            tower_class = type(AutoModel.from_config(parts.config.vision_config, trust_remote_code=False))
        language_model = AutoModelForCausalLM.from_pretrained(
            str(parts.text_folder), dtype="auto", trust_remote_code=False
        )
        tower = tower_class.from_pretrained(str(parts.vision_folder), dtype="auto")
    if language_model.get_input_embeddings().num_embeddings < parts.config.text_config.vocab_size:
        append_rows(language_model, parts.config.text_config.vocab_size)

    composed = join(parts.config, language_model, tower, seed)
    tokenizer = parts.processor.tokenizer
    composed.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[parts.config.image_token_id],
    )
    with atomic_folder(folder, overwrite=True) as building:
        composed.save_pretrained(building)
        parts.processor.save_pretrained(building)
        for entry in strip_foreign_code(building):
            logger.warning("not taken over, it names code that is not this package's: %s", entry)
        write_settings(building, made_from)
    return folder


@contextmanager
def built_whole(training: DeltaLlavaTrainingArguments) -> Iterator[None]:
    """While active, models are built on this rank alone, also in a run whose weights ZeRO-3 spreads over ranks."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training.deepspeed:
            set_hf_deepspeed_config(training.hf_deepspeed_config)
        elif training.deepspeed_plugin is not None:  # of `accelerate launch`
            training.deepspeed_plugin.set_deepspeed_weakref()


def append_rows(language_model: Any, rows: int) -> None:
    """Grows the vocabulary to `rows`; new rows are the mean of the old ones, which never wins a prediction."""
    old = language_model.get_input_embeddings().num_embeddings
    language_model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for embedding in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            embedding.weight[old:] = embedding.weight[:old].float().mean(0).to(embedding.weight.dtype)


def join(
    config: DeltaLlavaConfig, language_model: Any, tower: torch.nn.Module, seed: int
) -> DeltaLlavaForConditionalGeneration:
    """A model that holds the given parts (not copies of them) and a newly initialised projector."""
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = DeltaLlavaProjector(config)
        for module in projector.modules():
            model._init_weights(module)
    model.model.multi_modal_projector = projector
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    return model


@contextmanager
def kept_in_fp32(modules: set[str]) -> Iterator[None]:
    """While active, `from_pretrained` keeps these modules in fp32 whatever dtype is asked for.

    A model class names such modules in this attribute, and no argument of `from_pretrained` does: given a dtype for
    each part, it takes that of the whole.
    """
    previous = DeltaLlavaForConditionalGeneration._keep_in_fp32_modules_strict
    DeltaLlavaForConditionalGeneration._keep_in_fp32_modules_strict = modules
    try:
        yield
    finally:
        DeltaLlavaForConditionalGeneration._keep_in_fp32_modules_strict = previous


def fp32_modules(model: ModelArguments, training: DeltaLlavaTrainingArguments) -> tuple[torch.dtype, set[str]]:
    """The dtype to load in, and the modules that stay in fp32.

    Trained weights are kept in fp32, because an update of 1e-3 of a weight is lost in bf16; frozen ones follow the
    compute dtype. DeepSpeed keeps fp32 copies itself, and FSDP shards only what has one dtype.
    """
    if not training.bf16 or training.uses_fsdp:
        return torch.float32, set()
    if training.deepspeed_plugin is not None:
        return torch.bfloat16, set()
    trained = {
        PROJECTOR_MODULE: model.train_projector,
        "language_model": model.train_language_model,
        "lm_head": model.train_language_model,
        "vision_tower": model.train_vision_tower,
    }
    return torch.bfloat16, {name for name, is_trained in trained.items() if is_trained}


def quantization_config(model: ModelArguments, training: DeltaLlavaTrainingArguments) -> BitsAndBytesConfig | None:
    """How bitsandbytes loads the language model; tower, projector and head are never quantised."""
    if model.quantization == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"quantization: {model.quantization} needs the `bitsandbytes` package; pip install bitsandbytes"
        ) from None
    if model.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter, such as a run with `lora_rank` leaves."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_folder(folder: Path, weights: bool = True) -> Path:
    """The folder of the whole model: `folder`, or the base model of the adapter that it holds.

    Raises:
        UserError: the adapter names no base model, or one that is not there.
    """
    if not is_adapter(folder):
        return folder
    file = folder / ADAPTER_CONFIG
    stored = read_json(file)
    name, revision = stored.get("base_model_name_or_path"), stored.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise UserError(f"model: {file} names no base model; put its folder or Hub id under base_model_name_or_path")
    return local_folder(name, f"the base_model_name_or_path of {file},", revision, weights)


def check_adapter(folder: Path, model: ModelArguments) -> None:
    """Raises `UserError` unless a run's settings make an adapter like the one in a folder."""
    if not model.lora_rank:
        raise UserError(f"model: {folder} is a LoRA adapter; set lora_rank to train it further, or {merging(folder)}")
    stored, wanted = read_json(folder / ADAPTER_CONFIG), lora_config(model).to_dict()
    for name in (*wanted, *(stored.keys() - wanted.keys())):
        was, now = stored.get(name), wanted.get(name)
        if was != now and (was or now) and name not in FREE_ADAPTER_FIELDS:
            values = f"{printable(str(was))} there, {printable(str(now))} in this run"
            raise UserError(
                f"model: {folder} is a LoRA adapter of another {ADAPTER_SETTINGS.get(name, name)} ({values}); give "
                f"the settings it was trained with, or {merging(folder)}"
            )


def place_adapter(adapted: Any, folder: Path, model: ModelArguments) -> None:
    """Names the base model in a new adapter, and gives it the weights of the adapter that the run starts from, if any.

    Args:
        adapted: the `PeftModel`.
        folder: what the run starts from.
    Raises:
        UserError: the weights of the adapter in `folder` cannot be read, or do not fit.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = adapted.peft_config["default"]
    if not is_adapter(folder):
        name = model.model or str(folder)
        # A relative path would lead elsewhere from another folder.
        config.base_model_name_or_path = name if is_hub_id(name) else str(Path(name).expanduser().absolute())
        config.revision = model.model_revision
        return
    stored = read_json(folder / ADAPTER_CONFIG)
    config.base_model_name_or_path, config.revision = stored["base_model_name_or_path"], stored.get("revision")
    with told(f"model: the adapter in {folder} cannot be loaded", "copy or download the folder again"):
        weights = load_file(file_inside(folder, "adapter_model.safetensors", "--model"))
        different = weights.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if different:
            raise ValueError(f"{len(different)} weights are missing or do not belong to it, such as {min(different)}")
        set_peft_model_state_dict(adapted, weights)


def default_budget(folder: Path, model: ModelArguments) -> int | None:
    """The budget that a run sets as the model's default, if any: the one asked for, or that of the adapter it starts
    from."""
    if model.num_visual_tokens is None and is_adapter(folder) and (folder / ADAPTED_CONFIG).is_file():
        return read_json(folder / ADAPTED_CONFIG).get("num_visual_tokens")
    return model.num_visual_tokens


def load_processor(folder: Path, model: ModelArguments, data: DataArguments) -> DeltaLlavaProcessor:
    """The processor in a Delta-LLaVA folder, with the run's budget and picture padding.

    Raises:
        UserError: the folder has no processor, or one whose chat template cannot be used.
    """
    check_files(folder)
    with told(f"model: {folder} has no usable processor", "convert the checkpoint again"):
        processor = DeltaLlavaProcessor.from_pretrained(str(folder), trust_remote_code=False)
    processor.image_processor.do_pad = data.image_aspect_ratio == "pad"
    if model.num_visual_tokens is not None:
        processor.num_visual_tokens = model.num_visual_tokens
    if data.format == "v1":
        processor.chat_template = read_chat_template("vicuna_v1", processor.image_token)
    elif processor.chat_template:
        check_chat_template(processor, folder)
    return processor


def read_model_config(folder: Path) -> DeltaLlavaConfig:
    """The config of a Delta-LLaVA folder.

    Raises:
        UserError: the folder holds another kind of model, or code that is not this package's.
    """
    config = read_config(folder, "model")
    if config.model_type != DeltaLlavaConfig.model_type:
        raise UserError(
            f"model: {folder} is a {config.model_type} model, no Delta-LLaVA; pass it as --language_model with a "
            "--vision_tower, or convert a training checkpoint with `delta-llava convert`"
        )
    refuse_foreign_code(folder)
    return config


def read_start(model: ModelArguments, data: DataArguments) -> tuple[DeltaLlavaConfig, DeltaLlavaProcessor]:
    """Config and processor of what a run starts from; from the Hub only their small files are downloaded.

    Raises:
        UserError: one of them cannot be read, or the budget asked for is not possible.
    """
    if model.model is None:
        parts = read_base_parts(model, data, weights=False)
        return parts.config, parts.processor
    folder = local_folder(model.model, "--model", model.model_revision, weights=False)
    if is_adapter(folder):
        check_adapter(folder, model)
        refuse_foreign_code(folder)
    config = read_model_config(base_folder(folder, weights=False))
    budget = default_budget(folder, model)
    if budget is not None:
        check_budgets(config, [budget])
        config.num_visual_tokens = budget
    return config, load_processor(folder, model, data)


def check_default_budget(config: DeltaLlavaConfig, budgets: list[int] | None) -> None:
    """Raises `UserError` when the budget that the saved model would use by default is never trained."""
    if budgets and config.num_visual_tokens not in budgets:
        raise UserError(
            f"the model's default of {config.num_visual_tokens} visual tokens is not among visual_token_budgets "
            f"{budgets} and would never be trained; add it, or pass --num_visual_tokens {max(budgets)}"
        )


def load_model(
    folder: Path, model: ModelArguments, training: DeltaLlavaTrainingArguments
) -> DeltaLlavaForConditionalGeneration:
    """The model in a Delta-LLaVA folder, or the base model of an adapter, in the dtypes that training needs.

    Raises:
        UserError: weights are missing, or cannot be read.
    """
    dtype, modules = fp32_modules(model, training)
    quantization = quantization_config(model, training)
    settings: dict[str, Any] = {}
    if quantization is not None:
        settings["quantization_config"] = quantization
        settings["device_map"] = {"": training.device}
    if model.attn_implementation is not None:
        settings["attn_implementation"] = model.attn_implementation
    advice = "check its weight files, --attn_implementation and --quantization"
    with told(f"model: {folder} cannot be loaded", advice), kept_in_fp32(modules):
        loaded, report = DeltaLlavaForConditionalGeneration.from_pretrained(
            str(base_folder(folder)), dtype=dtype, output_loading_info=True, **settings
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"model: {folder} lacks {len(missing)} weights, such as {missing[0]}; convert it again")
    budget = default_budget(folder, model)
    if budget is not None:
        loaded.config.num_visual_tokens = budget
    return loaded
