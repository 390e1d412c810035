"""Folders that commands read: a path as it is, a Hub id by downloading only the files that are needed."""

import glob
import re
from pathlib import Path

from delta_llava.errors import UserError, reason

from .folders import format_bytes, free_bytes
from .json_files import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
# Beside weights in repositories, and never read here.
_IGNORED = ["*.msgpack", "*.h5", "*.onnx", "onnx/*", "*.gguf", "*.md", "global_step*", "optimizer*", "scheduler*"]
_SMALL_WEIGHTS = ["mm_projector.bin", "non_lora_trainables.bin", "adapter_model.safetensors", "adapter_model.bin"]


def require_folder(path: Path, role: str) -> Path:
    """`path` if it is a folder.

    Raises:
        UserError: it does not exist or is a file; `role` names it in the message (`SOURCE`).
    """
    try:
        if path.is_dir():
            return path
        if not path.exists():
            raise UserError(f"{role} {path} does not exist: give a folder or a Hub id such as organisation/name")
    except OSError as error:
        raise UserError(f"{role} {path} cannot be read ({reason(error)}): give another folder") from error
    raise UserError(f"{role} {path} is a file: give the folder that holds it")


def file_inside(folder: Path, name: str, why: str) -> Path:
    """`folder/name`, if that stays inside the folder.

    A link may point out of the folder only in the Hub's own cache, where every file of a snapshot is a link to
    `blobs` beside it.

    Raises:
        UserError: the name or a link leaves the folder. `why` says who asked for the file.
    """
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    if not parts or ".." in parts or Path(name).is_absolute():
        raise UserError(f"{why} names {str(name)[:120]!r}, which leaves {folder}: refused")
    path = folder / name
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve(strict=path.is_symlink())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is a link that leads nowhere ({reason(error)}): copy the file there") from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(f"{path} is a link that leaves {folder} (to {target}): refused; copy the file into the folder")
    return path


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


def is_hub_id(name: str) -> bool:
    """Whether a name that is no existing path looks like `organisation/name` on the Hub."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def local_folder(name: str, role: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded into the Hub's cache when `name` is a Hub id.

    Args:
        role: how messages call it (`SOURCE`).
        revision: branch, tag or commit on the Hub.
        weights: whether the weights are needed, or only config, tokenizer and preprocessor.

    Raises:
        UserError: no such folder, a link leaves it, or the Hub cannot be reached or does not give it.
    """
    if not is_hub_id(name):
        if revision is not None:
            raise UserError(f"--revision {revision} needs {role} to be a Hub id, and {name} is a path")
        return _checked_links(require_folder(Path(name).expanduser(), role), role)
    folder = _download(name, role, revision, _SMALL_FILES + (_SMALL_WEIGHTS if weights else []))
    if weights:
        # Beside a projector or an adapter, too: what the folder is, the reader decides from all that is in it.
        for patterns in (_safetensors_patterns(folder), ["pytorch_model*.bin"]):
            folder = _download(name, role, revision, patterns)
            if any(any(folder.glob(pattern)) for pattern in patterns):
                break
    return _checked_links(folder, role)


def _checked_links(folder: Path, role: str) -> Path:
    """`folder`, if none of the small files in it that are read by name is a link out of it.

    Weights, and what lies in folders inside, are checked singly.
    """
    for path in folder.iterdir():
        if path.is_symlink() and any(path.match(pattern) for pattern in _SMALL_FILES):
            file_inside(folder, path.name, role)
    return folder


def _safetensors_patterns(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors", "model-*-of-*.safetensors"]
    return sorted(glob.escape(name) for name in set(read_weight_map(index).values()))


def _download(name: str, role: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from .hub import hub_api, one_line

    api = hub_api()  # which bounds the time of every request
    try:
        if not HF_HUB_OFFLINE:
            _check_cache_space(api, name, role, revision, patterns)
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except UserError:
        raise
    except Exception as error:  # what a hostile or broken answer raises in the client has many classes
        at = f" at revision {revision!r}" if revision else ""
        doing = f"it is no folder here, and downloading it{at}"
        raise UserError(one_line(error, doing, f"{role} {name}")) from error


def _check_cache_space(api, name: str, role: str, revision: str | None, patterns: list[str]) -> None:
    """Refuses a download that the cache's disk cannot hold, before its first byte."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.utils import filter_repo_objects

    info = api.model_info(name, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = filter_repo_objects(sizes, allow_patterns=patterns, ignore_patterns=_IGNORED)
    needed = sum(
        sizes[file] for file in wanted if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)
    )
    free = free_bytes(Path(HF_HUB_CACHE))
    if needed > free:
        raise UserError(
            f"no space to download {role} {name} into {HF_HUB_CACHE}: {format_bytes(needed)} needed, "
            f"{format_bytes(free)} free; free some or set HF_HOME to another disk"
        )
