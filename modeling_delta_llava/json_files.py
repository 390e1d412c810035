"""Texts that a checkpoint brings: bounded before anything interprets them, with one line of error."""

import json
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError, printable, reason

MIB = 2**20
# Largest sizes of what transformers reads from a folder; a `tokenizer.json` has a megabyte per 10,000 tokens or so.
MAX_BYTES = {
    "tokenizer.json": 128 * MIB,
    "vocab.json": 32 * MIB,
    "merges.txt": 32 * MIB,
    "tokenizer.model": 16 * MIB,
    "model.safetensors.index.json": 128 * MIB,
    "pytorch_model.bin.index.json": 128 * MIB,
    "trainer_state.json": 128 * MIB,
    "chat_template.jinja": MIB,
}
MAX_OTHER_BYTES = 8 * MIB
ADAPTER_CONFIG = "adapter_config.json"
# Beside an adapter, what `config.json` is beside whole weights. By that name transformers would look for such weights
# in the folder; without it, it loads the base model and puts the adapter on it.
ADAPTED_CONFIG = "model_config.json"
# What else it reads.
SMALL_FILES = (
    *("config.json", "generation_config.json", ADAPTER_CONFIG, ADAPTED_CONFIG, "preprocessor_config.json"),
    *("processor_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "video_preprocessor_config.json"),
)
# Largest values of the fields that decide how much a model or processor builds, far beyond any published one. The
# first pattern that matches the whole name counts.
MAX_VALUES = tuple(
    (re.compile(pattern), limit)
    for pattern, limit in (
        (r".*(layers?|depths?|blocks|beams)", 1_000),
        (r".*experts?", 4_096),
        (r".*(image|patch|crop|tile)_size|size|height|width|.*_edge|max_aspect_ratio", 8_192),
        (r".*vocab_size|num_embeddings", 10_000_000),
        (r".*(heads?|groups?|channels|labels|sequences)", 100_000),
        (r"(num|n)_.*(tokens|positions)|image_seq_length|.*(size|dims?|width|rank|ratio|reduction|factor)", 1_000_000),
    )
)


def merging(adapter: Path) -> str:
    """What to do about an adapter where a whole model is needed, as part of a line."""
    return f"merge it with `delta-llava convert {adapter} OUTPUT --base-model BASE` and give OUTPUT"


def check_file(path: Path) -> None:
    """Raises `UserError` unless `path` is a regular file (or a link to one) of the size that its name allows."""
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.name == "config.json" and (path.parent / ADAPTER_CONFIG).exists():
            raise UserError(f"{path.parent} is a LoRA adapter, no whole model: {merging(path.parent)}") from None
        raise UserError(f"{path} is missing: copy or download the folder again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is a folder: a file is expected")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no regular file but a pipe, device or socket: copy or download the folder again")
    limit = MAX_BYTES.get(path.name, MAX_OTHER_BYTES)
    if found.st_size > limit:
        raise UserError(
            f"{path} has {found.st_size / MIB:,.0f} MiB, and no such file needs more than {limit / MIB:,.0f}: copy or "
            "download it again"
        )


def check_files(folder: Path) -> None:
    """[`check_file`] for everything in a folder that transformers reads beside its weights.

    Raises:
        UserError: one line with the first file that is no regular one, or too large.
    """
    for name in (*SMALL_FILES, *MAX_BYTES):
        if (folder / name).is_symlink() or (folder / name).exists():
            check_file(folder / name)


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing, cannot be read, is too large, or is no JSON object that names every key once.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({reason(error)}): copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: copy or download it again")
    return value


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file with sorted keys, as every one of ours is written."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `object_pairs_hook` of `json.loads`; a `ValueError` where it names a key twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it names {counts.most_common(1)[0][0]!r} twice")
    return value


def check_sizes(fields: dict, where: Path | str) -> None:
    """Refuses a configuration that would build a model without end, before anything is built from it.

    Args:
        fields: a `config.json` or a processor's settings, with their nested ones.
        where: names the file in the message.

    Raises:
        UserError: one line with the file, the field and its value.
    """
    left = [("", fields)]
    while left:
        place, value = left.pop()
        for name, entry in value.items():
            field = f"{place}{name}"
            if isinstance(entry, dict):
                left.append((f"{field}.", entry))
                continue
            limit = next((limit for pattern, limit in MAX_VALUES if pattern.fullmatch(name)), None)
            if limit is None:
                continue
            numbers = [*entry, len(entry)] if isinstance(entry, list) else [entry]
            for number in numbers:
                if isinstance(number, int | float) and not -limit <= number <= limit:
                    raise UserError(
                        f"{where}: {printable(field)} is {str(number)[:20]}, and no model needs more than {limit:,}: "
                        "copy or download the file again"
                    )
