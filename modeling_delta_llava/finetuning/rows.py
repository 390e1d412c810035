"""Rows of a dataset file, checked and normalised: one `Sample` is one conversation with its pictures.

Two layouts are read: LLaVA JSON / JSONL (`conversations` of `from` / `value`, `<image>` in the text, `image` as one
name or a list of names) and Hugging Face chat rows (`messages` of `role` / `content`, `images` as a list).
Everything that can be known without opening a picture is checked here, with the line of the offending row.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError, reason

IMAGE_MARK = "<image>"
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RowError(ValueError):
    """A row that cannot be trained on; the message says why, the caller adds where."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    `messages` are chat-template messages whose contents are lists of `{"type": "image"}` and
    `{"type": "text", "text": ...}` parts; `images` are the pictures in the order of their parts: a file name, encoded
    bytes, a `{"bytes", "path"}` pair or a `PIL.Image.Image`.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    dropped_leading_answer: bool = False


@dataclass(frozen=True)
class BrokenLine:
    """Stands for the row on a line of a JSONL file that is no JSON."""

    problem: str


def parse_line(line: str) -> Any:
    """The row on a line of a JSONL file, or a `BrokenLine`, which [`parse_row`] refuses as a bad row."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BrokenLine(f"no JSON ({error.msg})")


def parse_row(row: Any) -> Sample:
    """Checks one row of either layout and normalises it.

    Raises:
        RowError: the row has no turns, wrong roles or types, or a number of pictures that its text does not ask for.
    """
    if isinstance(row, BrokenLine):
        raise RowError(row.problem)
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, found {type(row).__name__}")
    if "conversations" in row:
        return _parse_llava(row)
    if "messages" in row:
        return _parse_chat(row)
    raise RowError("neither `conversations` (LLaVA) nor `messages` (Hugging Face chat) is present")


def _parse_llava(row: dict[str, Any]) -> Sample:
    images = _listed_images(row.get("image", row.get("images")))
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("`conversations` is empty or no list")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RowError(f"turn {number} has no `from` and `value`")
        if not isinstance(turn["from"], str) or turn["from"].lower() not in LLAVA_ROLES:
            raise RowError(f"turn {number} is from {turn['from']!r}; known are human, gpt and system")
        if not isinstance(turn["value"], str):
            raise RowError(f"turn {number} has a `value` of type {type(turn['value']).__name__}, not text")
        messages.append(
            {"role": LLAVA_ROLES[turn["from"].lower()], "content": _text_content(turn["value"], bool(images))}
        )
    return _checked(messages, images)


def _parse_chat(row: dict[str, Any]) -> Sample:
    images = _listed_images(row.get("images", row.get("image")))
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowError("`messages` is empty or no list")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise RowError(f"message {number} has no `role` and `content`")
        if turn["role"] not in ("system", "user", "assistant"):
            raise RowError(f"message {number} has the role {turn['role']!r}; known are system, user and assistant")
        content = turn["content"]
        if isinstance(content, str):
            parts = _text_content(content, bool(images))
        elif isinstance(content, list):
            parts = [_chat_part(part, number) for part in content]
        else:
            raise RowError(f"message {number} has a `content` of type {type(content).__name__}")
        messages.append({"role": turn["role"], "content": parts})
    return _checked(messages, images)


def _chat_part(part: Any, number: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_MARK in part["text"]:
            raise RowError(f'message {number} has {IMAGE_MARK} inside a text part; use a part {{"type": "image"}}')
        return {"type": "text", "text": part["text"]}
    raise RowError(f"message {number} has a part that is neither an image nor a text")


def _text_content(text: str, has_image: bool) -> list[dict[str, Any]]:
    """A text with `<image>` marks as parts: pictures first, then the text around them, as LLaVA is trained."""
    count = text.count(IMAGE_MARK) if has_image else 0
    if count == 0:
        return [{"type": "text", "text": text}]
    text = text.replace(IMAGE_MARK, "").strip()
    return [{"type": "image"}] * count + ([{"type": "text", "text": text}] if text else [])


def _listed_images(value: Any) -> list[Any]:
    if value is None:
        return []
    images = value if isinstance(value, list) else [value]
    for image in images:
        if image is None or (isinstance(image, str) and not image):
            raise RowError("an image name is empty")
        if isinstance(image, (int, float, bool, list)):
            raise RowError(f"an image is of type {type(image).__name__}, not a file name")
    return images


def _checked(messages: list[dict[str, Any]], images: list[Any]) -> Sample:
    asked = sum(part["type"] == "image" for message in messages for part in message["content"])
    if asked != len(images):
        raise RowError(f"the text has {asked} {IMAGE_MARK} but the row lists {len(images)} images")
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text" and IMAGE_MARK in part["text"]:
                raise RowError(f"a row without images has {IMAGE_MARK} in its text")
            if part["type"] == "image" and message["role"] != "user":
                raise RowError(f"the {message['role']} turn has an image; only user turns can show one")
        if message["role"] == "assistant" and not "".join(part["text"] for part in message["content"]).strip():
            raise RowError("an assistant turn is empty")
        if message["role"] == "user" and not any(
            part["type"] == "image" or part["text"].strip() for part in message["content"]
        ):
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


def read_json_rows(path: Path, on_bad_row: str = "stop") -> list[Any]:
    """All rows of a `.json` array or a `.jsonl` file.

    Args:
        path: the file.
        on_bad_row: "stop" raises at a line of a `.jsonl` that is no JSON, "skip" gives a `BrokenLine` for it.
    Raises:
        UserError: the file is missing, is no JSON (with the line), or is no list of rows.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file; pass an existing LLaVA JSON or JSONL as --data_path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({reason(error)}); check --data_path") from None
    if path.suffix == ".jsonl":
        rows = []
        for line_number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            rows.append(parse_line(line))
            if on_bad_row == "stop" and isinstance(rows[-1], BrokenLine):
                raise UserError(
                    f"{path}: line {line_number} is {rows[-1].problem}; repair that line, or pass --on_bad_row skip"
                )
        return rows
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno} column {error.colno} is no JSON ({error.msg}); repair the file"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, found {type(rows).__name__}; use one object per sample")
    return rows


def line_of_row(path: Path, index: int) -> int:
    """The line on which row `index` of a JSON or JSONL file begins (used only to word an error)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = [number for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return lines[index]
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    for current in range(index + 1):
        while text[position] in " \t\r\n,":
            position += 1
        if current == index:
            break
        _, position = decoder.raw_decode(text, position)
    return text.count("\n", 0, position) + 1
