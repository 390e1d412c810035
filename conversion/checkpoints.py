"""Finds the weight files of a folder and lists their tensors, refusing whatever is inconsistent or unsafe."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.keys import describe_keys
from modeling_delta_llava.conversion.safetensors_files import read_header
from modeling_delta_llava.conversion.tensors import StoredTensor
from modeling_delta_llava.conversion.torch_files import read_torch_file
from modeling_delta_llava.json_files import read_json

WEIGHT_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))
ZERO3_HINT = (
    "ZeRO-3 saved its partitions without gathering them: run "
    "`python zero_to_fp32.py CHECKPOINT OUTPUT` in the training output (DeepSpeed wrote the script there) "
    "and convert OUTPUT with the checkpoint's config and tokenizer"
)
LFS_POINTER = b"version https://git-lfs"
FSDP_HINT = "FSDP saved shards: run `accelerate merge-weights CHECKPOINT OUTPUT` and convert OUTPUT"


@dataclass
class Checkpoint:
    """The tensors of one source, by key, and which files they came from."""

    tensors: dict[str, StoredTensor]
    files: list[Path]
    notes: list[str] = field(default_factory=list)


def require_folder(path: Path, role: str) -> Path:
    """`path` if it is a folder.

    Raises:
        UserError: it does not exist or is a file; `role` names it in the message (`SOURCE`).
    """
    if not path.exists():
        raise UserError(f"{role} {path} does not exist: give a folder or a Hub id such as organisation/name")
    if not path.is_dir():
        raise UserError(f"{role} {path} is a file: give the folder that holds it")
    return path


def file_inside(folder: Path, name: str, why: str) -> Path:
    """`folder/name`, if that stays inside the folder.

    A link may point out of the folder only in the Hub's own cache, where every file of a snapshot is a link to
    `blobs` beside it.

    Raises:
        UserError: the name or a link leaves the folder. `why` says who asked for the file.
    """
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    if not parts or ".." in parts or Path(name).is_absolute():
        raise UserError(f"{why} names {name!r}, which leaves {folder}: refused")
    path = folder / name
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(f"{path} is a link that leaves {folder} (to {target}): refused; copy the file into the folder")
    return path


def read_weight_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one `.safetensors` or `torch.save` file.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}: a weight file is expected")
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in {path.parent}")
        return read_header(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from error


def has_weights(folder: Path) -> bool:
    """Whether the folder holds the weights of a whole model under one of the usual names."""
    return any(
        (folder / f"{stem}.{suffix}").exists()
        or (folder / f"{stem}.{suffix}.index.json").exists()
        or any(folder.glob(f"{stem}-*-of-*.{suffix}"))
        for stem, suffix in WEIGHT_STEMS
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Lists all tensors of the model in `folder`: one file, or shards with or without their index.

    safetensors win over `.bin` where both are there.

    Raises:
        UserError: no weights, a shard missing or damaged, an index that does not agree with the shards, a tensor
            twice, a name or link that leaves the folder, unconsolidated DeepSpeed or FSDP shards.
    """
    for stem, suffix in WEIGHT_STEMS:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        if index.exists():
            checkpoint = _read_indexed(folder, index)
        elif single.exists():
            file = file_inside(folder, single.name, str(folder))
            checkpoint = Checkpoint(read_weight_file(file), [file])
        elif shards:
            checkpoint = _read_shards(folder, shards)
        else:
            continue
        if suffix == "safetensors" and any(folder.glob("pytorch_model*.bin")):
            checkpoint.notes.append("both safetensors and .bin weights are there: the safetensors are read")
        _refuse_partitions(folder, checkpoint.tensors)
        return checkpoint
    raise UserError(_why_no_weights(folder))


def read_weight_map(index: Path) -> dict[str, str]:
    """Which file holds each tensor, from `*.index.json`; the files need not be there.

    Raises:
        UserError: it is damaged, or a name in it leaves its folder.
    """
    weight_map = read_json(file_inside(index.parent, index.name, str(index.parent))).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: save the checkpoint again")
    odd = next((key for key, name in weight_map.items() if not isinstance(name, str)), None)
    if odd is not None:
        raise UserError(f"{index} names no file for tensor {odd!r}: save the checkpoint again")
    for name in dict.fromkeys(weight_map.values()):
        file_inside(index.parent, name, str(index))
    return weight_map


def _read_indexed(folder: Path, index: Path) -> Checkpoint:
    weight_map = read_weight_map(index)
    names = list(dict.fromkeys(weight_map.values()))
    files = [folder / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names: download or copy it again")
    tensors: dict[str, StoredTensor] = {}
    for path, name in zip(files, names, strict=True):
        found = read_weight_file(path)
        _refuse_duplicates(tensors, found)
        absent = [key for key, file in weight_map.items() if file == name and key not in found]
        if absent:
            raise UserError(f"{index} says that {name} holds {describe_keys(absent)}, but it does not: save it again")
        surplus = [key for key in found if weight_map.get(key) != name]
        if surplus:
            raise UserError(f"{path} holds {describe_keys(surplus)} that {index.name} does not name: save it again")
        tensors |= found
    return Checkpoint(tensors, files)


def _read_shards(folder: Path, shards: list[Path]) -> Checkpoint:
    """Numbered shards without an index: taken when the set is complete."""
    counts = {int(match[1]) for path in shards if (match := re.search(r"-of-(\d+)\.", path.name))}
    if len(counts) != 1 or len(shards) != counts.pop():
        raise UserError(f"{folder} holds {len(shards)} shards, not the full set, and no index: download it again")
    tensors: dict[str, StoredTensor] = {}
    for path in shards:
        found = read_weight_file(file_inside(folder, path.name, str(folder)))
        _refuse_duplicates(tensors, found)
        tensors |= found
    return Checkpoint(tensors, shards, ["the shards have no index: it was rebuilt from their headers"])


def _refuse_duplicates(tensors: dict[str, StoredTensor], found: dict[str, StoredTensor]) -> None:
    twice = sorted(tensors.keys() & found.keys())
    if twice:
        first, second = tensors[twice[0]].file, found[twice[0]].file
        raise UserError(f"{second} holds {describe_keys(twice)} that {first.name} holds too: save it again")


def _refuse_partitions(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    empty = [key for key, tensor in tensors.items() if tensor.size == 0]
    if empty:
        raise UserError(f"{folder} holds {describe_keys(empty)} without elements; {ZERO3_HINT}")


def refuse_empty(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """The same check for a file beside the model (`mm_projector.bin`, adapters)."""
    _refuse_partitions(path, tensors)


def _why_no_weights(folder: Path) -> str:
    deepspeed = ("global_step*", "*_optim_states.pt", "*_model_states.pt")
    if folder.name.startswith("global_step") or any(any(folder.glob(pattern)) for pattern in deepspeed):
        return f"{folder} holds DeepSpeed's own checkpoint, not model weights; {ZERO3_HINT}"
    if any(folder.glob("*.distcp")) or any(folder.glob("pytorch_model_fsdp_*")) or any(folder.glob("*/*.distcp")):
        return f"{folder} holds an FSDP checkpoint, not model weights; {FSDP_HINT}"
    set_aside = folder.parent / "mm_projector" / f"{folder.name}.bin"
    if set_aside.is_file():
        return f"{folder} holds no weights: training wrote them to {set_aside}, copy that to {folder}/mm_projector.bin"
    nested = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    if nested:
        return f"{folder} holds no weights, but checkpoints: convert one of them, for example {folder / nested[-1]}"
    return (
        f"{folder} holds no weights (model.safetensors, pytorch_model.bin or their shards, mm_projector.bin, "
        "adapter_model.safetensors): is it the folder that training wrote?"
    )
