"""LICENSE and NOTICE files of a Hub repository."""

import re
from pathlib import Path

TEXTS = Path(__file__).parent / "licenses"
LLAMA_2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
NO_LICENCE = "No licence is stated for these weights"
"""Starts the licence paragraph of a card without one; `; NOTICE` ends what it says about the licence."""


def licence_sentence(licence: dict[str, str], has_file: bool) -> str:
    """A stated licence for the card's text: `license`, with "other" also `license_name` and `license_link`."""
    text = f"`{licence['license']}`"
    if licence.get("license_name"):
        return f"{text} ([{licence['license_name']}]({licence['license_link']}))"
    return f"{text}, see [LICENSE](LICENSE)" if has_file else text


def state_licence(text: str, licence: str, has_file: bool) -> str:
    """The text of a card that says it has no licence, saying that it has this one."""
    sentence = licence_sentence({"license": licence}, has_file)
    return re.sub(rf"^{NO_LICENCE}.*?(?=; NOTICE)", lambda _: sentence, text, flags=re.MULTILINE)


def licence_text(licence: str) -> str | None:
    """The full text of a licence that this package carries, None for others."""
    file = TEXTS / f"{licence}.txt"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def write_licence_file(folder: Path, licence: str) -> bool:
    """Writes LICENSE when the text is known and the folder has none; whether the folder has one now."""
    target = folder / "LICENSE"
    if target.exists():
        return True
    text = licence_text(licence)
    if text is None:
        return False
    target.write_text(text, encoding="utf-8")
    return True


def add_llama_2_notice(folder: Path) -> None:
    """Adds the sentence that the Llama 2 licence demands to NOTICE, unless it is there."""
    target = folder / "NOTICE"
    text = target.read_text(encoding="utf-8") if target.is_file() else ""
    if LLAMA_2_NOTICE not in text:
        target.write_text(f"{text}\n{LLAMA_2_NOTICE}\n".lstrip("\n"), encoding="utf-8")


def notice(components: list[tuple[str, str]], llama_2: bool) -> str:
    """Text of NOTICE.

    Args:
        components: what the repository contains or derives from, each with its licence in words.
        llama_2: whether the weights derive from Llama 2, whose licence demands a sentence here.
    """
    lines = ["This repository contains or derives from:", ""]
    lines += [f"- {name}: {licence}" for name, licence in components]
    if llama_2:
        lines += ["", LLAMA_2_NOTICE]
    return "\n".join(lines) + "\n"
