"""Builds a [`DeltaLlavaProcessor`] from the parts that a training run or a pair of base models leaves behind."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from delta_llava.errors import UserError, printable, reason, told
from delta_llava.templates import render

from .configuration_delta_llava import DeltaLlavaConfig
from .json_files import check_files, check_sizes, read_json
from .processing_delta_llava import DeltaLlavaProcessor
from .tokenization import sentencepiece_tokenizer

IMAGE_TOKEN = "<image>"
# Placeholders that language models bring along; reusing one keeps their vocabulary as it is.
NATIVE_IMAGE_TOKENS = ("<|image_pad|>",)
# Language models whose sentencepiece tokenizer is rebuilt with training's dummy spaces.
SENTENCEPIECE_MODEL_TYPES = ("llama", "mistral")
# Ids further behind the embedding's rows than this are no appended tokens: the embedding would grow to hold them.
MAX_APPENDED_ROWS = 65_536
# What a chat template is tried on.
QUESTION, ANSWER = {"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}
PROBES = (
    [QUESTION],
    [QUESTION, ANSWER],
    [QUESTION, ANSWER, QUESTION],
    [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION],
)
ABOUT_A_PICTURE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A question?"}]}

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


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, probes: Sequence[list[dict]], where: str):
    """What a template makes of conversations, the first of which it must be able to show; None for those it cannot."""
    results = render(template, probes, tokenizer.special_tokens_map, where)
    if results[0].text is None:
        raise UserError(f"{where} cannot show a question ({results[0].problem}): repair or remove it")
    return [result.text for result in results]


def check_chat_template(processor: DeltaLlavaProcessor, where: str | Path, conversation: list[dict] | None = None):
    """Tries the chat template that a folder brings, in a process with little time and memory.

    Args:
        processor: of any image-text model.
        where: names the folder in the message.
        conversation: what is about to be shown; pictures in it are not looked at. By default a question.

    Raises:
        UserError: there is no template, it cannot show the conversation, or takes too long or too much memory.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    _rendered(processor.tokenizer, template, [conversation or [ABOUT_A_PICTURE]], f"the chat template of {where}")


def backbone_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """The language model's own chat template, extended by images.

    A tokenizer without a template gets Vicuna v1. A template that renders as ChatML is replaced by an equal one that
    marks what the assistant says, which training needs, except in conversations with tools, if it knows tools; any
    other one is kept, behind a step that flattens images. Templates that know no tools refuse them.

    Raises:
        UserError: the template cannot show a question, or takes too long or too much memory.
    """
    own = tokenizer.chat_template
    if not own:
        return read_chat_template("vicuna_v1", image_token)
    if isinstance(own, dict):
        own = own.get("default")
    where = "the chat template of the language model (tokenizer_config.json or chat_template.jinja)"
    rendered = _rendered(tokenizer, own, PROBES, where)
    start, end = "<|im_start|>system\n", "<|im_end|>\n"
    default_system = rendered[0][len(start) :].partition(end)[0] if rendered[0].startswith(start) else ""
    escaped = default_system.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    marked = read_chat_template("chatml", image_token).replace("@DEFAULT_SYSTEM_MESSAGE@", escaped)
    is_chatml = rendered == _rendered(tokenizer, marked, PROBES, where)
    kept = _template_file("flatten_images", image_token) + own
    if "tools" not in own:
        return marked if is_chatml else _template_file("no_tools", image_token) + kept
    if not is_chatml:
        return kept
    return f"{{%- if {WITH_TOOLS} -%}}{kept}{{%- else -%}}{marked}{{%- endif -%}}"


def load_tokenizer(
    folder: str | Path, model_type: str, model_max_length: int | None = None, rows: int | None = None
) -> tuple[PreTrainedTokenizerBase, str]:
    """
    The tokenizer of a language model, with an image token, and that token.

    Args:
        folder: tokenizer files of the checkpoint.
        model_type: the language model's type (`llama`, `qwen2`, ...).
        model_max_length: context length; by default what the tokenizer files say.
        rows: embedding rows of the language model, near which every id must be; by default the number of tokens.

    Raises:
        UserError: if the folder holds no tokenizer, a damaged one, or one of unreasonable size.
    """
    folder = Path(folder)
    check_files(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    with told(f"no tokenizer could be loaded from {folder}", "add the tokenizer files"):
        if model_type in SENTENCEPIECE_MODEL_TYPES and (folder / "tokenizer.model").is_file():
            return _sentencepiece_with_added_tokens(folder, settings, model_max_length), IMAGE_TOKEN
        tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left", trust_remote_code=False)
        if model_max_length is not None:
            tokenizer.model_max_length = model_max_length
        vocabulary = tokenizer.get_vocab()
        token, last = max(vocabulary.items(), key=lambda entry: entry[1])
        if last > (rows or len(vocabulary)) + MAX_APPENDED_ROWS:
            raise UserError(
                f"the tokenizer of {folder} gives {printable(token, 40)!r} the id {last}, far behind the "
                f"{rows or len(vocabulary):,} rows of the embedding: give the tokenizer files that belong to the model"
            )
        image_token = next((token for token in NATIVE_IMAGE_TOKENS if token in vocabulary), IMAGE_TOKEN)
        if image_token not in vocabulary:
            added = {"additional_special_tokens": [image_token]}
            tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
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
        template = settings.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"tokenizer_config.json or added_tokens.json in {folder} lists its added tokens in no valid way "
            f"({reason(error)}): give the tokenizer files that training saved"
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
        shown = printable(str(dict(list(moved.items())[:3])))
        raise UserError(
            f"tokens that {folder} adds to its vocabulary do not follow it without a gap, {shown}: their embeddings "
            "would be mixed up; give the tokenizer files that training saved"
        )
    tokenizer.chat_template = template
    return tokenizer


def check_budgets(config: DeltaLlavaConfig, budgets: Sequence[int] | None) -> None:
    """Raises `UserError` when a visual-token budget is not possible on the model's patch grid."""
    try:
        for budget in budgets or ():
            config.scale_factor(budget)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_image_processor(
    vision_config: PretrainedConfig, preprocessor: dict | None = None, image_aspect_ratio: str | None = "pad"
):
    """
    transformers' LLaVA image processor for a vision tower.

    Args:
        vision_config: the tower's configuration.
        preprocessor: contents of the tower's `preprocessor_config.json`; by default CLIP's or SigLIP's values.
        image_aspect_ratio: `pad` pads to a square with the mean colour, as stage 2 of training does.

    Raises:
        UserError: `preprocessor` holds values that make no image processor.
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
    check_sizes(values, "preprocessor_config.json")
    if isinstance(values["size"], int):
        values["size"] = {"shortest_edge": values["size"]}
    if isinstance(values.get("crop_size"), int):
        values["crop_size"] = {"height": values["crop_size"], "width": values["crop_size"]}
    with told("preprocessor_config.json makes no image processor", "give the vision tower's own file"):
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
