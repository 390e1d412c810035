"""Rows of a data set, checked and brought into one form: one `Sample` is one conversation with its pictures.

Two layouts are read: LLaVA's (`conversations` of `from` / `value`, `<image>` in the questions, `image` as one name or
a list of names) and Hugging Face chat rows (`messages` of `role` / `content`, `images` as a list, or pictures inside
the message parts). Everything that can be known without opening a picture is checked here. A key without content
(null, an empty text or list) counts as absent; a key with content is known, or named in an error.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from delta_llava.errors import printable

IMAGE_MARK = "<image>"
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CHAT_ROLES = ("system", "user", "assistant")
# What stands for a picture while a conversation is rendered: noncharacters, which no text holds. Then rows may talk
# about the image token as about any other word.
PICTURE_MARK = "\ufdd0image\ufdd1"
# Where a message part may hold its picture.
PICTURE_KEYS = ("image", "url", "image_url", "path", "base64")


class RowError(ValueError):
    """A row that cannot be trained on; the message says why, the caller adds where."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    `messages` are chat-template messages whose contents are lists of `{"type": "image"}` and
    `{"type": "text", "text": ...}` parts; `images` are the pictures in the order of their parts, each as
    [`open_image`][modeling_delta_llava.finetuning.pictures.open_image] takes them.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    dropped_leading_answer: bool = False

    @property
    def num_words(self) -> int:
        """Words of all turns, which stand for their tokens where rows are grouped by length."""
        return sum(len(part["text"].split()) for turn in self.messages for part in turn["content"] if "text" in part)


def parse_row(row: Any, ignored_keys: Collection[str] = ()) -> Sample:
    """Checks one row of either layout and brings it into one form.

    Args:
        row: the row.
        ignored_keys: keys of a row, a turn or a part that are left unused, whatever they hold.
    Raises:
        RowError: the row has no turns, wrong roles or types, content under a key that nobody uses, or another number
            of pictures than its text shows.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object, found {type(row).__name__}")
    keys = _keys_with_content(row, "the row", ("conversations", "messages", "image", "images"), ignored_keys)
    if {"conversations", "messages"} <= keys:
        raise RowError("it has both `conversations` and `messages`; leave one of them")
    if {"image", "images"} <= keys:
        raise RowError("it has both `image` and `images`; leave one of them")
    if not keys & {"conversations", "messages"}:
        empty = [key for key in ("conversations", "messages") if key in row]
        raise RowError(
            f"`{empty[0]}` is empty"
            if empty
            else "neither `conversations` (LLaVA) nor `messages` (Hugging Face chat) is present"
        )
    listed = _pictures(next((row[key] for key in ("image", "images") if key in keys), None))
    is_llava = "conversations" in keys
    turns = row["conversations" if is_llava else "messages"]
    if not isinstance(turns, list):
        raise RowError(f"`{'conversations' if is_llava else 'messages'}` is of type {type(turns).__name__}, no list")
    parse_turn = _llava_turn if is_llava else _chat_turn
    shown: list[Any] = []
    messages = []
    for number, turn in enumerate(turns, start=1):
        role, content, pictures = parse_turn(turn, f"turn {number}", bool(listed), ignored_keys)
        messages.append({"role": role, "content": content})
        shown += pictures
    return _checked(messages, _shown_pictures(shown, listed))


@dataclass(frozen=True)
class _Listed:
    """Stands for a picture that the row lists: number `index` of them, or the next one."""

    index: Any = None


def _shown_pictures(shown: list[Any], listed: list[Any]) -> list[Any]:
    """What the turns of a row show, with the row's own pictures in their places."""
    asked = [picture.index for picture in shown if isinstance(picture, _Listed)]
    if len({index is None for index in asked}) > 1:
        raise RowError("some image parts have an `index` and some have none; give all of them one, or none")
    for index in asked:
        if index is not None and (type(index) is not int or not 0 <= index < len(listed)):
            index = printable(repr(index), 40)
            raise RowError(f"an image part has the index {index}, but the row lists {len(listed)} images")
    if asked and asked[0] is None:
        asked = list(range(len(asked)))
    if set(asked) != set(range(len(listed))):
        raise RowError(f"the text has {len(asked)} {IMAGE_MARK} but the row lists {len(listed)} images")
    places = iter(asked)
    return [listed[next(places)] if isinstance(picture, _Listed) else picture for picture in shown]


Turn = tuple[str, list[dict[str, Any]], list[Any]]
"""Role, parts, and the pictures of the image parts."""


def _llava_turn(turn: Any, where: str, has_listed: bool, ignored_keys: Collection[str]) -> Turn:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise RowError(f"{where} has no `from` and `value`")
    _keys_with_content(turn, where, ("from", "value"), ignored_keys)
    role = LLAVA_ROLES.get(turn["from"].lower()) if isinstance(turn["from"], str) else None
    if role is None:
        raise RowError(f"{where} is from {printable(repr(turn['from']), 40)}; known are human, gpt and system")
    return role, *_marked_text(turn["value"], role, where, has_listed)


def _chat_turn(turn: Any, where: str, has_listed: bool, ignored_keys: Collection[str]) -> Turn:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise RowError(f"{where} has no `role` and `content`")
    _keys_with_content(turn, where, ("role", "content"), ignored_keys)
    role = turn["role"] if isinstance(turn["role"], str) and turn["role"] in CHAT_ROLES else None
    if role is None:
        raise RowError(f"{where} has the role {printable(repr(turn['role']), 40)}; known are {', '.join(CHAT_ROLES)}")
    if not isinstance(turn["content"], list):
        return role, *_marked_text(turn["content"], role, where, has_listed)
    parts, pictures = [], []
    for part in turn["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            _keys_with_content(part, f"a text part of {where}", ("type", "text"), ignored_keys)
            parts.append({"type": "text", "text": _text(part.get("text"), where)})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            pictures.append(_picture_of_part(part, f"an image part of {where}", ignored_keys))
        else:
            raise RowError(f"{where} has a part that is neither an image nor a text")
    return role, parts, pictures


def _picture_of_part(part: Mapping[str, Any], where: str, ignored_keys: Collection[str]) -> Any:
    keys = _keys_with_content(part, where, ("type", "index", *PICTURE_KEYS), ignored_keys) - {"type"}
    if len(keys) > 1:
        raise RowError(f"{where} has {', '.join(sorted(keys))}; leave one of them")
    if keys - {"index"}:
        return _picture({key: part[key] for key in keys})
    return _Listed(part["index"] if keys else None)


def _marked_text(text: Any, role: str, where: str, has_listed: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """A text as parts, and the pictures it shows. In a question of a row with pictures, `<image>` shows the next one,
    and pictures come first, as LLaVA is trained; anywhere else `<image>` is text like any other."""
    text = _text(text, where)
    count = text.count(IMAGE_MARK) if has_listed and role == "user" else 0
    if count == 0:
        return [{"type": "text", "text": text}], []
    text = text.replace(IMAGE_MARK, "").strip()
    parts = [{"type": "image"}] * count + ([{"type": "text", "text": text}] if text else [])
    return parts, [_Listed()] * count


def _text(text: Any, where: str) -> str:
    """A text that can be tokenised; null is an empty one."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise RowError(f"{where} has content of type {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(f"{where} has half of a character (a lone surrogate, such as a cut emoji)") from None
        if PICTURE_MARK[0] in text:
            raise RowError(f"{where} has U+{ord(PICTURE_MARK[0]):04X}, which is no character")
    return text


def _pictures(value: Any) -> list[Any]:
    if value in (None, ""):
        return []
    return [_picture(picture) for picture in (value if isinstance(value, list) else [value])]


def _picture(value: Any) -> Any:
    """A picture as [`open_image`] takes it."""
    if isinstance(value, Mapping):
        holds = {key: entry for key, entry in value.items() if entry is not None}
        if isinstance(holds.get("bytes"), bytes) and holds.keys() <= {"bytes", "path"}:
            return dict(holds)
        if holds.keys() == {"image_url"} and isinstance(holds["image_url"], Mapping):
            holds = {key: entry for key, entry in holds["image_url"].items() if entry is not None and key != "detail"}
        if holds.keys() == {"base64"} and isinstance(holds["base64"], str):
            return f"data:;base64,{holds['base64']}"
        if len(holds) != 1 or not holds.keys() <= {*PICTURE_KEYS, "bytes"}:
            names = printable(", ".join(map(str, holds)), 80)
            raise RowError(f"an image has the keys {names or 'of none'}; give its path or bytes")
        return _picture(next(iter(holds.values())))
    if isinstance(value, str) and value:
        return _text(value, "an image name")
    if value in (None, "", b""):
        raise RowError("an image name is empty")
    if isinstance(value, bytes | Path | Image.Image):
        return value
    raise RowError(f"an image is of type {type(value).__name__}, not a file name")


def _keys_with_content(
    mapping: Mapping[str, Any], where: str, known: Collection[str], ignored_keys: Collection[str]
) -> set[str]:
    keys = {key for key, value in mapping.items() if value is not None and value != "" and value != [] and value != {}}
    unknown = sorted(map(str, keys - set(known) - set(ignored_keys)))
    if unknown:
        raise RowError(
            f"{where} has {printable(', '.join(unknown), 80)}, which training does not use; add it to ignored_keys"
        )
    return keys - set(ignored_keys)


def _checked(messages: list[dict[str, Any]], images: list[Any]) -> Sample:
    for message in messages:
        kinds = {part["type"] for part in message["content"]}
        if "image" in kinds and message["role"] != "user":
            raise RowError(f"the {message['role']} turn has an image; only user turns can show one")
        has_text = any(part["type"] == "text" and part["text"].strip() for part in message["content"])
        if message["role"] == "assistant" and not has_text:
            raise RowError("an assistant turn is empty")
        if message["role"] == "user" and not has_text and "image" not in kinds:
            raise RowError("a user turn is empty")

    start = 1 if messages[0]["role"] == "system" else 0
    dropped = False
    if len(messages) > start and messages[start]["role"] == "assistant":
        # An answer without a question cannot be learned; the released preprocessing leaves it out too.
        messages = messages[:start] + messages[start + 1 :]
        dropped = True
    turns = messages[start:]
    if not turns:
        raise RowError("the conversation has no question with an answer")
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise RowError(f"roles out of order: turn {number + 1} is {message['role']}, expected {expected}")
    if turns[-1]["role"] != "assistant":
        raise RowError("the conversation ends with a question that has no answer")
    return Sample(messages=messages, images=images, dropped_leading_answer=dropped)
