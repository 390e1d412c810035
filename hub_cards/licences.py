"""LICENSE and NOTICE files of a Hub repository."""

from pathlib import Path

TEXTS = Path(__file__).parent / "licenses"
LLAMA_2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)


def licence_text(licence: str) -> str | None:
    """The full text of a licence that this package carries, None for others."""
    file = TEXTS / f"{licence}.txt"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def with_llama_2_notice(text: str) -> str:
    """NOTICE with the sentence that the Llama 2 licence demands in it, added unless it is there."""
    return text if LLAMA_2_NOTICE in text else f"{text}\n{LLAMA_2_NOTICE}\n".lstrip("\n")


def notice(components: list[tuple[str, str]], llama_2: bool) -> str:
    """Text of NOTICE.

    Args:
        components: what the repository contains or derives from, each with its licence in words.
        llama_2: whether the weights derive from Llama 2, whose licence demands a sentence here.
    """
    lines = ["This repository contains or derives from:", ""]
    lines += [f"- {name}: {licence}" for name, licence in components]
    text = "\n".join(lines) + "\n"
    return with_llama_2_notice(text) if llama_2 else text
