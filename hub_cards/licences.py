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
