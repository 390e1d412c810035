"""What a Hub folder keeps of the training checkpoint that it was converted from, so that export can restore it."""

import base64
import math
import re
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.checkpoints import file_inside
from modeling_delta_llava.conversion.keys import PLAIN_TRAINING_RULES, TRAINING_RULES
from modeling_delta_llava.conversion.tensors import DTYPES, item_size
from modeling_delta_llava.json_files import read_json

# In the Hub folder: what training wrote beside the weights, as `delta-llava export` puts it back.
TRAINING_FOLDER = "training"
RECORD_FILE = f"{TRAINING_FOLDER}/record.json"
_DROPPING_PATTERNS = {
    rule.pattern
    for rules in (*TRAINING_RULES.values(), *PLAIN_TRAINING_RULES.values())
    for rule in rules
    if rule.replacement is None
}


def dropped_tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> dict:
    """A tensor that conversion leaves out, as JSON."""
    return {"dtype": dtype, "shape": list(shape), "base64": base64.b64encode(data).decode("ascii")}


def tensor_bytes(stored: dict) -> bytes:
    """The bytes of a [`dropped_tensor`]."""
    return base64.b64decode(stored["base64"], validate=True)


def read_record(folder: Path) -> dict | None:
    """The record of a Hub folder; None for a folder that was not converted.

    Raises:
        UserError: it is a link that leaves the folder, or not what conversion writes.
    """
    path = file_inside(folder, RECORD_FILE, str(folder))
    if not path.is_file():
        return None
    record = read_json(path)
    problem = _problem(record)
    if problem:
        raise UserError(
            f"{path} {problem}: convert the checkpoint again, or remove {path.parent} to export without it"
        )
    return record


def _problem(record: dict) -> str | None:
    rows, dropped = record.get("vocabulary_rows"), record.get("dropped_tensors")
    if not isinstance(record.get("training_config"), dict):
        return "has no training_config"
    if type(rows) is not int or rows < 1:
        return f"has vocabulary_rows {rows!r}"
    if "tower_keys" not in record or record["tower_keys"] not in (None, *TRAINING_RULES):
        return f"has tower_keys {record.get('tower_keys')!r}"
    if not isinstance(record.get("tied_head_saved"), bool):
        return f"has tied_head_saved {record.get('tied_head_saved')!r}"
    if not isinstance(dropped, dict):
        return "has no dropped_tensors"
    for key, stored in dropped.items():
        if not any(re.fullmatch(pattern, key) for pattern in _DROPPING_PATTERNS):
            return f"keeps {key!r}, a tensor that conversion never leaves out"
        try:
            dtype, shape, data = stored["dtype"], stored["shape"], tensor_bytes(stored)
            whole = dtype in DTYPES and isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
            if not whole or len(data) != math.prod(shape) * item_size(dtype):
                return f"keeps {len(data)} bytes of {key!r}, which are no {dtype!r} of shape {shape!r}"
        except (KeyError, TypeError, ValueError) as error:
            return f"keeps {key!r} in no readable way ({type(error).__name__})"
    return None
