"""What a Hub folder keeps of the training checkpoint that it was converted from, so that export can restore it."""

import base64
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.tables import TOWER_ROWS, is_dropped
from modeling_delta_llava.json_files import read_json
from modeling_delta_llava.sources import file_inside, is_hub_id

# In the Hub folder: what training wrote beside the weights, as `delta-llava export` puts it back.
TRAINING_FOLDER = "training"
RECORD_FILE = f"{TRAINING_FOLDER}/record.json"
# Rotary frequencies and position ids are smaller.
RECORDED_BYTES = 64_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def make_record(
    *,
    form: str,
    projector: str,
    training: dict,
    vision_tower: str | None,
    vocabulary_rows: int,
    tower_keys: str | None,
    tied_head_saved: bool,
    tensors: Mapping[str, Tensor],
) -> dict:
    """The record of one conversion.

    Args:
        training: the source's configuration.
        vision_tower: what the user gave in place of the tower that it names.
        vocabulary_rows: embedding rows of the source.
        tower_keys: how the source names the tower in it ("old", "flat"); None for no tower.
        tied_head_saved: whether the source holds the head beside the embedding that it is tied to.
        tensors: those of a whole checkpoint; what conversion leaves out of them is kept up to [`RECORDED_BYTES`].
    """
    training = {name: value for name, value in training.items() if name != "_name_or_path"}
    tower = vision_tower or training.get("mm_vision_tower")
    if isinstance(tower, str):
        # A path of the training machine means nothing elsewhere, and may name people.
        training["mm_vision_tower"] = tower if is_hub_id(tower) else Path(tower).name
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        "form": form,
        "projector": projector,
        "training_config": training,
        "vocabulary_rows": vocabulary_rows,
        "tower_keys": tower_keys,
        "tied_head_saved": tied_head_saved,
        "dropped_tensors": {
            key: {
                "dtype": names[tensor.dtype],
                "shape": list(tensor.shape),
                "base64": base64.b64encode(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).decode("ascii"),
            }
            for key, tensor in tensors.items()
            if is_dropped(key) and tensor.dtype in names and tensor.nbytes <= RECORDED_BYTES
        },
    }


def kept_tensors(record: dict) -> dict[str, Tensor]:
    """The tensors that conversion left out, by training key."""
    return {key: _tensor(stored) for key, stored in record["dropped_tensors"].items()}


def _tensor(stored: dict) -> Tensor:
    data = bytearray(base64.b64decode(stored["base64"], validate=True))
    return torch.frombuffer(data, dtype=DTYPES[stored["dtype"]]).reshape(stored["shape"])


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
        return f"has vocabulary_rows {repr(rows)[:40]}"
    if "tower_keys" not in record or record["tower_keys"] not in (None, *TOWER_ROWS):
        return f"has tower_keys {repr(record.get('tower_keys'))[:40]}"
    if not isinstance(record.get("tied_head_saved"), bool):
        return f"has tied_head_saved {repr(record.get('tied_head_saved'))[:40]}"
    if not isinstance(dropped, dict):
        return "has no dropped_tensors"
    for key, stored in dropped.items():
        if is_dropped(key) is None:
            return f"keeps {key[:120]!r}, a tensor that conversion never leaves out"
        try:
            dtype, shape = DTYPES.get(stored["dtype"]), stored["shape"]
            data = base64.b64decode(stored["base64"], validate=True)
            whole = dtype is not None and isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
            if not whole or math.prod(shape) * dtype.itemsize != len(data):
                kind = f"{str(stored['dtype'])[:20]!r} of shape {str(shape)[:80]}"
                return f"keeps {len(data)} bytes of {key!r}, which are no {kind}"
        except (KeyError, TypeError, ValueError) as error:
            return f"keeps {key!r} in no readable way ({type(error).__name__})"
    return None
