"""Conversations as token ids and labels, through the chat template's own marks of what the assistant says."""

import re
from dataclasses import dataclass
from typing import Any

from delta_llava.errors import UserError, reason

from ..building import read_chat_template
from .rows import RowError

IGNORED_LABEL = -100
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Setting `format` -> chat template of the package; "template" is the processor's own.
TEMPLATES = {"v1": "vicuna_v1", "plain": "plain"}


@dataclass(frozen=True)
class EncodedText:
    """Token ids with one image token per picture, and as many labels (`IGNORED_LABEL` where nothing is learned)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def has_labels(self) -> bool:
        return any(label != IGNORED_LABEL for label in self.labels)


@dataclass(frozen=True)
class ExpandedText(EncodedText):
    """Token ids with V image tokens per picture, their labels, and how many of the pictures are left after cutting."""

    num_images: int
    was_cut: bool


def chat_template_of(processor: Any, format: str) -> str | None:  # noqa: A002 - the setting's name
    """The Jinja template of a format, for the processor's image token."""
    if format == "template":
        return processor.chat_template
    return read_chat_template(TEMPLATES[format], processor.image_token)


class ConversationEncoder:
    """Encodes conversations for training with a processor's tokenizer.

    Args:
        processor: a `DeltaLlavaProcessor`.
        format: "template" for the processor's own chat template, "v1" for Vicuna's, "plain" for LLaVA-1.5's stage 1.
    Raises:
        UserError: the tokenizer has no pad token, or the template has no marks around what the assistant says.
    """

    def __init__(self, processor: Any, format: str = "template"):  # noqa: A002 - the setting's name
        self.tokenizer = processor.tokenizer
        self.image_token_id = processor.image_token_id
        self.template = chat_template_of(processor, format)
        if self.tokenizer.pad_token_id is None:
            raise UserError(
                "the tokenizer has no pad token; set one (Llama: '<unk>') with `tokenizer.pad_token` and save it again"
            )
        if not self.template:
            raise UserError(
                "the processor has no chat template; add chat_template.jinja to its folder, or pass --format v1"
            )
        if not _GENERATION_MARK.search(self.template):
            raise UserError(
                "the chat template has no {% generation %} marks, so answers cannot be told from questions; pass "
                "--format v1 to train on Vicuna's, or put {% generation %} ... {% endgeneration %} around the "
                "assistant's text in the chat template of a local copy of the model"
            )
        self._accepted: set[tuple] = set()

    def check(self, messages: list[dict[str, Any]]) -> None:
        """Renders a conversation, without tokenising it, unless one of the same roles and parts was rendered before.

        Raises:
            RowError: the template refuses it, as some refuse system turns.
        """
        shape = tuple((message["role"], *(part["type"] for part in message["content"])) for message in messages)
        if shape not in self._accepted:
            self._apply_template(messages, tokenize=False)
            self._accepted.add(shape)

    def encode(self, messages: list[dict[str, Any]]) -> EncodedText:
        """Ids and labels of one conversation; labels are kept where the template marks the assistant's text.

        Raises:
            RowError: the template refuses it.
        """
        encoded = self._apply_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        input_ids = list(encoded["input_ids"])
        labels = [
            token if spoken and token != self.image_token_id else IGNORED_LABEL
            for token, spoken in zip(input_ids, encoded["assistant_masks"], strict=True)
        ]
        return EncodedText(input_ids=input_ids, labels=labels)

    def _apply_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)
        except Exception as error:  # a template is a program: it raises what it likes
            raise RowError(f"the chat template cannot show this conversation ({reason(error)})") from None


def expand(text: EncodedText, image_token_id: int, num_visual_tokens: int, max_length: int) -> ExpandedText:
    """Repeats each image token once per visual token and cuts what is longer than `max_length` tokens.

    The cut never leaves part of a picture: where it would, the sequence ends before that picture.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    num_images = 0
    for token, label in zip(text.input_ids, text.labels, strict=True):
        width = num_visual_tokens if token == image_token_id else 1
        if len(input_ids) + width > max_length:
            return ExpandedText(input_ids, labels, num_images, was_cut=True)
        input_ids += [token] * width
        labels += [label] * width
        num_images += token == image_token_id
    return ExpandedText(input_ids, labels, num_images, was_cut=False)
