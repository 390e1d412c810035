"""What a model has answered so far, on disk: an evaluation that was killed goes on behind its last answer."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError

FOLDER = "answers"
# What decides what a model answers, beside its weights: its config, tokenizer, templates and preprocessing.
_SETTINGS = ("*.json", "*.jinja", "*.model")


def revision_of(folder: Path) -> str:
    """What tells a model from its other versions: a commit in the Hub's cache, else a digest of a folder's files.

    Weights enter with their size and the time they were written, and not with their gigabytes.

    Raises:
        UserError: the folder has no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder} has no weights (*.safetensors): give the folder that `delta-llava convert` wrote")
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for file in weights:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for file in sorted(file for pattern in _SETTINGS for file in folder.glob(pattern)):
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Answers:
    """Answers by all that decides them, kept as lines of JSON in a folder.

    Every process of an evaluation adds to a file of its own and reads those of all. A line that a kill has cut short
    is passed over.

    Args:
        folder: made with the first answer; `None` keeps them in memory alone.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0):
        self._file = None if folder is None else folder / f"rank_{rank}.jsonl"
        self._known: dict[str, str] = {}
        for file in sorted(folder.glob("*.jsonl")) if folder is not None else ():
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = record["answer"]
                except (ValueError, TypeError, KeyError):
                    continue

    @staticmethod
    def key(asked: Mapping[str, Any]) -> str:
        """The digest of a question: everything that its answer depends on, in plain data."""
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def add(self, key: str, answer: str, **about: Any) -> None:
        """Keeps an answer; `about` says to readers of the file what was asked."""
        self._known[key] = answer
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            # In front too, behind what a kill may have left of a line.
            stream.write("\n" + json.dumps({"key": key, **about, "answer": answer}, ensure_ascii=False) + "\n")
