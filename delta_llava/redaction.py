"""Keeps tokens and passwords out of what is printed, logged, stored or sent."""

import logging
import os
import re
import sys

# What is hidden on the screen may be a little too much; what is refused must be one.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
WHOLE_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b")
PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@'\"<>]+@")
SIGNATURE = re.compile(r"(?i)(https?://[^\s?'\"]+)\?[^\s'\"]+")
# Shorter values of HF_TOKEN are words such as "none", which stand in many texts.
SHORTEST = 8

_given: set[str] = set()


def hide(token: str) -> None:
    """Has [`scrub`] and [`holds_secret`] know a token that was given to this process and nowhere else."""
    _given.add(token)


def tokens_in_use() -> set[str]:
    """Tokens given to this process, and what huggingface_hub would send: `HF_TOKEN`, or that of `hf auth login`."""
    tokens = _given | {os.environ.get("HF_TOKEN")}
    # Where it was not imported nothing can have been sent, and importing it takes longer than a usage error.
    hub = sys.modules.get("huggingface_hub")
    if hub is not None:
        tokens.add(hub.get_token())
    return {token for token in tokens if token and len(token) >= SHORTEST}


def holds_secret(text: str) -> bool:
    """Whether a text holds a token (of the Hub's form, or one in use) or an address with a password."""
    if WHOLE_TOKEN.search(text) or PASSWORD.search(text):
        return True
    return any(token in text for token in tokens_in_use())


def scrub(text: str) -> str:
    """`text` without tokens (of the Hub's form, or in use), without passwords and queries of addresses."""
    for token in tokens_in_use():
        text = text.replace(token, "<token>")
    return SIGNATURE.sub(r"\1", PASSWORD.sub(r"\1", TOKEN.sub("<token>", text)))


class ScrubbedRecords(logging.Filter):
    """For log handlers: takes out of each record what [`scrub`] takes out."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage()), ()
        return True
