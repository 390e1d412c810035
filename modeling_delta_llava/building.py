"""Builds a [`DeltaLlavaProcessor`] from the parts that a training run or a pair of base models leaves behind."""

from importlib import resources
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from delta_llava.errors import UserError

from .configuration_delta_llava import DeltaLlavaConfig
from .json_files import read_json
from .processing_delta_llava import DeltaLlavaProcessor
from .tokenization import sentencepiece_tokenizer

IMAGE_TOKEN = "<image>"
# Placeholders that language models bring along; reusing one keeps their vocabulary as it is.
NATIVE_IMAGE_TOKENS = ("<|image_pad|>",)
# Language models whose sentencepiece tokenizer is rebuilt with training's dummy spaces.
SENTENCEPIECE_MODEL_TYPES = ("llama", "mistral")
# Language models that the released scripts train on the Vicuna v1 format, whatever template their tokenizer brings.

# Jinja condition: a conversation that a template without tools would show in part.
WITH_TOOLS = (
    "tools or messages | selectattr('role', 'equalto', 'tool') | list "
    "or messages | selectattr('tool_calls', 'defined') | selectattr('tool_calls') | list"
)


def _template_file(name: str, image_token: str) -> str:
    text = (resources.files(__package__) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return text.replace(IMAGE_TOKEN, image_token)


def read_chat_template(name: str, image_token: str = IMAGE_TOKEN) -> str:
    """A chat template of this package (`vicuna_v1`, `plain`, `chatml`) for an image token; it refuses tools."""
    return _template_file("no_tools", image_token) + _template_file(name, image_token)


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict]) -> str | None:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
        )
    except (TemplateError, TypeError, ValueError):
        return None


def backbone_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """The language model's own chat template, extended by images.

    A tokenizer without a template gets Vicuna v1. A template that renders as ChatML is replaced by an equal one that
    marks what the assistant says, which training needs, except in conversations with tools, if it knows tools; any
    other one is kept, behind a step that flattens images. Templates that know no tools refuse them.
    """
    own = tokenizer.chat_template
    if not own:
        return read_chat_template("vicuna_v1", image_token)
    if isinstance(own, dict):
        own = own["default"]
    question, answer = {"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}
    rendered = _render(tokenizer, own, [question])
    start, end = "<|im_start|>system\n", "<|im_end|>\n"
    default_system = rendered[len(start) :].partition(end)[0] if rendered and rendered.startswith(start) else ""
    escaped = default_system.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    marked = read_chat_template("chatml", image_token).replace("@DEFAULT_SYSTEM_MESSAGE@", escaped)
    probes = (
        [question],
        [question, answer],
        [question, answer, question],
        [{"role": "system", "content": "Be brief."}, question, answer, question],
    )
    is_chatml = all(_render(tokenizer, own, probe) == _render(tokenizer, marked, probe) for probe in probes)
    kept = _template_file("flatten_images", image_token) + own
    if "tools" not in own:
        return marked if is_chatml else _template_file("no_tools", image_token) + kept
    if not is_chatml:
        return kept
    return f"{{%- if {WITH_TOOLS} -%}}{kept}{{%- else -%}}{marked}{{%- endif -%}}"


def load_tokenizer(
    folder: str | Path, model_type: str, model_max_length: int | None = None
) -> tuple[PreTrainedTokenizerBase, str]:
    """
    The tokenizer of a language model, with an image token, and that token.

    Args:
        folder: tokenizer files of the checkpoint.
        model_type: the language model's type (`llama`, `qwen2`, ...).
        model_max_length: context length; by default what the tokenizer files say.

    Raises:
        UserError: if the folder holds no tokenizer, or a damaged one.
    """
    folder = Path(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if model_type in SENTENCEPIECE_MODEL_TYPES and (folder / "tokenizer.model").is_file():
        tokenizer = _sentencepiece_with_added_tokens(folder, settings, model_max_length)
        return tokenizer, IMAGE_TOKEN
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left", trust_remote_code=False)
    # The tokenizers library answers a damaged file with a plain Exception.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"no tokenizer could be loaded from {folder} ({reason}): add the tokenizer files") from error
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    vocabulary = tokenizer.get_vocab()
    image_token = next((token for token in NATIVE_IMAGE_TOKENS if token in vocabulary), IMAGE_TOKEN)
    if image_token not in vocabulary:
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer, image_token


def _sentencepiece_with_added_tokens(folder: Path, settings: dict, model_max_length: int | None):
    """The rebuilt tokenizer of `folder`, with the tokens that training appended (a `<pad>`, say) at their ids."""
    entries = folder / "added_tokens.json"
    appended_ids = read_json(entries) if entries.is_file() else {}
    pad_token = settings.get("pad_token")
    try:
        added = {
            int(index): str(entry["content"]) for index, entry in settings.get("added_tokens_decoder", {}).items()
        }
        added |= {int(index): token for token, index in appended_ids.items()}
        pad_token = pad_token["content"] if isinstance(pad_token, dict) else pad_token
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"tokenizer_config.json or added_tokens.json in {folder} lists its added tokens in no valid way "
            f"({type(error).__name__}: {error}): give the tokenizer files that training saved"
        ) from error
    appended = tuple(token for _, token in sorted(added.items()) if token not in ("<unk>", "<s>", "</s>"))
    tokenizer = sentencepiece_tokenizer(
        folder / "tokenizer.model",
        legacy=settings.get("legacy", True),
        image_token=IMAGE_TOKEN,
        pad_token=pad_token or "<unk>",
        model_max_length=model_max_length or settings.get("model_max_length"),
        added_tokens=appended,
    )
    moved = {token: index for index, token in added.items() if tokenizer.convert_tokens_to_ids(token) != index}
    if moved:
        raise UserError(
            f"tokens that {folder} adds to its vocabulary do not follow it without a gap, {moved}: their embeddings "
            "would be mixed up; give the tokenizer files that training saved"
        )
    tokenizer.chat_template = settings.get("chat_template")
    return tokenizer


def build_image_processor(
    vision_config: PretrainedConfig, preprocessor: dict | None = None, image_aspect_ratio: str | None = "pad"
):
    """
    transformers' LLaVA image processor for a vision tower.

    Args:
        vision_config: the tower's configuration.
        preprocessor: contents of the tower's `preprocessor_config.json`; by default CLIP's or SigLIP's values.
        image_aspect_ratio: `pad` pads to a square with the mean colour, as stage 2 of training does.
    """
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import LlavaImageProcessor
    else:
        from transformers import LlavaImageProcessorPil as LlavaImageProcessor

    side = vision_config.image_size
    square = {"height": side, "width": side}
    if vision_config.model_type.startswith("siglip"):
        values = {"size": square, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        values = {
            "size": {"shortest_edge": side},
            "crop_size": square,
            "do_center_crop": True,
            "image_mean": OPENAI_CLIP_MEAN,
            "image_std": OPENAI_CLIP_STD,
        }
    taken = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample", "do_resize", "do_rescale")
    values.update({name: preprocessor[name] for name in taken if preprocessor and preprocessor.get(name) is not None})
    if isinstance(values["size"], int):
        values["size"] = {"shortest_edge": values["size"]}
    if isinstance(values.get("crop_size"), int):
        values["crop_size"] = {"height": values["crop_size"], "width": values["crop_size"]}
    return LlavaImageProcessor(**values, do_pad=image_aspect_ratio == "pad", do_convert_rgb=True)


def build_processor(
    config: DeltaLlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str = IMAGE_TOKEN,
    preprocessor: dict | None = None,
    image_aspect_ratio: str | None = "pad",
    chat_template: str | None = None,
) -> DeltaLlavaProcessor:
    """
    The processor of a Delta-LLaVA repository.

    Args:
        config: the model's configuration; its budget and patch grid are taken over.
        tokenizer, image_token: as [`load_tokenizer`] gives them.
        preprocessor: contents of the tower's `preprocessor_config.json`.
        image_aspect_ratio: `pad`, or anything else for resizing and cropping.
        chat_template: Jinja text; by default [`backbone_chat_template`].
    """
    template = chat_template or backbone_chat_template(tokenizer, image_token)
    tokenizer.chat_template = None  # the processor's template is the repository's only one
    return DeltaLlavaProcessor(
        image_processor=build_image_processor(config.vision_config, preprocessor, image_aspect_ratio),
        tokenizer=tokenizer,
        num_visual_tokens=config.num_visual_tokens,
        grid_size=config.grid_size,
        chat_template=template,
        image_token=image_token,
    )
