"""The rule about code in folders: none but this package's."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError

from .json_files import check_file

# Keys that make transformers run code of a folder or of another repository, in whichever JSON file they stand.
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
# `from_pretrained` runs what lies in here without any key that names it.
CODE_FOLDER = "custom_generate"
# Result files of lmms-eval, which state how each task's data set was loaded.
RESULTS_FOLDER = "eval"
# DeepSpeed writes it into its checkpoints; nothing loads it.
DEEPSPEED_SCRIPT = "zero_to_fp32.py"
SHOWN = 3


def code_files() -> list[Path]:
    """The files of this package that a Hub repository ships: what `auto_map` names, and what that imports."""
    from transformers.dynamic_module_utils import get_relative_import_files

    from . import configuration_delta_llava

    package = Path(configuration_delta_llava.__file__).parent
    files = {package / f"{entry.partition('.')[0]}.py" for entry in configuration_delta_llava.AUTO_MAP.values()}
    imported = {Path(path) for file in files for path in get_relative_import_files(file)}
    return sorted(files | imported)


def check_code(folder: Path) -> None:
    """Raises `UserError` unless a Hub folder's code files are there and equal to this package's."""
    for path in code_files():
        copy = folder / path.name
        if not copy.is_file():
            raise UserError(f"{copy} is missing: let `delta-llava convert` write the folder anew")
        if copy.read_bytes() != path.read_bytes():
            raise UserError(
                f"{copy} differs from this version of the package: publish the folder with --refresh-code, or let "
                "`delta-llava convert` write it anew"
            )


def refuse_foreign_code(folder: Path) -> None:
    """Refuses a Hub folder that names or holds code which is not this package's, before anything loads it.

    In any JSON file of it: an `auto_map` entry that is not in `AUTO_MAP`, `custom_pipelines`, `custom_generate`, or a
    `trust_remote_code` that is true. A folder `custom_generate`, and any `.py` file that has not the name of one of
    ours. Whether ours are unchanged is [`check_code`]'s question.

    Raises:
        UserError: one line with the files and the keys.
    """
    found = []
    for path in _json_files(folder):
        keys = [key for _, key in _code_entries(_read(path))]
        if path.relative_to(folder).parts[0] == RESULTS_FOLDER:
            keys = [key for key in keys if key != "trust_remote_code"]
        if keys:
            found.append(f"{', '.join(dict.fromkeys(keys))} in {path.relative_to(folder)}")
    if os.path.lexists(folder / CODE_FOLDER):
        found.append(f"the folder {CODE_FOLDER}")
    ours = {path.name for path in code_files()} | {DEEPSPEED_SCRIPT}
    found += [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.py")) if path.name not in ours]
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{folder} brings code that is not this package's: {', '.join(found[:SHOWN])}{more}; take it out, or let "
            "`delta-llava convert` write the folder anew without it"
        )


def strip_foreign_code(folder: Path) -> list[str]:
    """Takes what [`refuse_foreign_code`] refuses out of the JSON files of a folder that has just been written.

    Returns:
        What was taken out, as "KEY in FILE".
    """
    stripped = []
    for path in _json_files(folder):
        value = _read(path)
        entries = list(_code_entries(value))
        for owner, key in entries:
            named = owner.pop(key)
            if key == "auto_map" and (own := _own_entries(named)):
                owner[key] = own
        if entries:
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            stripped.append(f"{', '.join(dict.fromkeys(key for _, key in entries))} in {path.relative_to(folder)}")
    return stripped


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json") if path.is_file())


def _read(path: Path) -> Any:
    """A JSON file's value; None for a file that is no JSON, which transformers cannot read either.

    Raises:
        UserError: it is larger than its name allows, or nested without end.
    """
    check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read: copy or download it again") from None
    except (OSError, ValueError):
        return None


def _code_entries(value: Any) -> Iterator[tuple[dict, str]]:
    """Every object in a JSON value that names foreign code, with the key."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from ((value, key) for key in CODE_KEYS if _is_foreign(key, value.get(key)))
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _is_foreign(key: str, named: Any) -> bool:
    if key == "trust_remote_code":
        return named is True
    # A number is the id of a vocabulary's entry that is spelled like the key.
    if not isinstance(named, dict | list | str) or not named:
        return False
    return key != "auto_map" or _own_entries(named) != named


def _own_entries(named: Any) -> dict[str, str]:
    """What is ours of an `auto_map`."""
    from .configuration_delta_llava import AUTO_MAP

    entries = named.items() if isinstance(named, dict) else ()
    return {name: target for name, target in entries if AUTO_MAP.get(name) == target}
