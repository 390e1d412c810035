"""JSON files that users give: one line of error where one is missing or damaged."""

import json
from pathlib import Path

from delta_llava.errors import UserError


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing, cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy or download the folder again") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: a file is expected") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: copy or download it again")
    return value


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file with sorted keys, as every one of ours is written."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
