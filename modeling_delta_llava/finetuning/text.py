"""Conversations as token ids and labels, through the chat template's own marks of what the assistant says."""

import re
from dataclasses import dataclass
from typing import Any

from delta_llava.errors import UserError, reason

from ..building import read_chat_template
from ..tokenization import with_image_token
from .rows import PICTURE_MARK, RowError

IGNORED_LABEL = -100
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Setting `format` -> chat template of the package; "template" is the processor's own.
TEMPLATES = {"v1": "vicuna_v1", "plain": "plain"}


@dataclass(frozen=True)
class EncodedText:
    """Token ids with one image token per picture, and as many labels (`IGNORED_LABEL` where nothing is learned)."""

    input_ids: list[int]
    labels: list[int]


class ConversationEncoder:
    """Encodes conversations for training with a processor's tokenizer.

    Args:
        processor: a `DeltaLlavaProcessor`.
        format: "template" for the processor's own chat template, "v1" for Vicuna's, "plain" for LLaVA-1.5's stage 1.
    Raises:
        UserError: the tokenizer has no pad token, or the template has no marks around what the assistant says.
    """

    def __init__(self, processor: Any, format: str = "template"):  # noqa: A002 - the setting's name
        self.image_token_id = processor.image_token_id
        if processor.tokenizer.pad_token_id is None:
            raise UserError(
                "the tokenizer has no pad token; set one (Llama: '<unk>') with `tokenizer.pad_token` and save it again"
            )
        if format != "template":
            self.template = read_chat_template(TEMPLATES[format], PICTURE_MARK)
        elif processor.chat_template:
            self.template = processor.chat_template.replace(processor.image_token, PICTURE_MARK)
        else:
            raise UserError(
                "the processor has no chat template; add chat_template.jinja to its folder, or pass --format v1"
            )
        if not _GENERATION_MARK.search(self.template):
            raise UserError(
                "the chat template has no {% generation %} marks, so answers cannot be told from questions; pass "
                "--format v1 to train on Vicuna's, or put {% generation %} ... {% endgeneration %} around the "
                "assistant's text in the chat template of a local copy of the model"
            )
        self.tokenizer = with_image_token(processor.tokenizer, processor.image_token, PICTURE_MARK)
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
            RowError: the template refuses it, or shows another number of pictures than it has.
        """
        encoded = self._apply_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        input_ids = list(encoded["input_ids"])
        shown = input_ids.count(self.image_token_id)
        pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
        if shown != pictures:
            raise RowError(f"the chat template shows {shown} of its {pictures} pictures")
        labels = [
            token if spoken else IGNORED_LABEL
            for token, spoken in zip(input_ids, encoded["assistant_masks"], strict=True)
        ]
        return EncodedText(input_ids=input_ids, labels=labels)

    def _apply_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)
        except Exception as error:  # a template is a program: it raises what it likes
            raise RowError(f"the chat template cannot show this conversation ({reason(error)})") from None
