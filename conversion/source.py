"""The weight files of a source folder, as tensors mapped from the files, and what kind of source it is.

Nothing is read here but headers: tensors are views of mapped files, whose pages come into memory when they are written
out, and go again when memory is short.
"""

import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from delta_llava.errors import UserError, reason, told
from modeling_delta_llava.conversion.tables import describe_keys
from modeling_delta_llava.json_files import ADAPTED_CONFIG, read_json
from modeling_delta_llava.sources import file_inside, read_weight_map

STAGE2, STAGE1, LORA, FINETUNED = "stage2", "stage1", "lora", "finetuned"
FORM_NAMES = {
    STAGE2: "complete stage-2 checkpoint",
    STAGE1: "stage-1 projector (mm_projector.bin)",
    LORA: "LoRA adapter",
    FINETUNED: "checkpoint in this project's own layout",
}
DELTA, PLAIN = "delta", "mlp2x_gelu"
PROJECTOR_NAMES = {DELTA: "Delta projector", PLAIN: "LLaVA-1.5 MLP projector (mlp2x_gelu)"}
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Far above any language model with its tower; what has more is damaged or made to keep us busy.
MOST_TENSORS = 50_000
MOST_PICKLE_BYTES = 16_000_000
MOST_RECORD_BYTES = 64_000

# How torch names what its unpickler refuses.
_FOREIGN_NAME = re.compile(r"GLOBAL (\S+)")
ZERO3_HINT = (
    "ZeRO-3 saved its partitions without gathering them: run "
    "`python zero_to_fp32.py CHECKPOINT OUTPUT` in the training output (DeepSpeed wrote the script there) "
    "and convert OUTPUT with the checkpoint's config and tokenizer"
)
LFS_POINTER = b"version https://git-lfs"
FSDP_HINT = "FSDP saved shards: run `accelerate merge-weights CHECKPOINT OUTPUT` and convert OUTPUT"


@dataclass
class Checkpoint:
    """The tensors of a source by key, the file of each, and what the files looked like when they were opened."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    identities: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, path: Path) -> dict[str, Tensor]:
        """Opens one more file and returns its tensors.

        Raises:
            UserError: as [`read_weight_file`]; or a tensor is in another file too, or has no elements.
        """
        identity = _identity(path)
        found = read_weight_file(path)
        twice = sorted(self.tensors.keys() & found.keys())
        if twice:
            first = self.files[twice[0]].name
            raise UserError(f"{path} holds {describe_keys(twice)} that {first} holds too: save it again")
        empty = [key for key, tensor in found.items() if tensor.numel() == 0]
        if empty:
            raise UserError(f"{path} holds {describe_keys(empty)} without elements; {ZERO3_HINT}")
        self.tensors |= found
        if len(self.tensors) > MOST_TENSORS:
            raise UserError(
                f"{path.parent} holds more than {MOST_TENSORS:,} tensors: this is no checkpoint of a model"
            )
        self.files |= dict.fromkeys(found, path)
        self.identities[path] = identity
        return found

    def check_unchanged(self) -> None:
        """To be called when the tensors have been used.

        Raises:
            UserError: a file was changed or replaced since it was opened, so that they may not be what they were.
        """
        for path, identity in self.identities.items():
            if _identity(path) != identity:
                raise UserError(changed_message(path))


def changed_message(path: Path) -> str:
    """What is said of a file that was written to while it was read."""
    return f"{path} changed while it was read: nothing was kept; leave it alone and run again"


def _identity(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


# --- one file --------------------------------------------------------------------------------------------------------


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.safetensors` or `torch.save` file, mapped from it.

    Raises:
        UserError: there is no such file, it cannot be read, is damaged, or holds anything but dense CPU tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}: a weight file is expected")
    with told(f"{path} is truncated or damaged", "download or save it again"):
        try:
            with open(path, "rb") as file:
                start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in {path.parent}")
            if path.suffix == ".safetensors":
                return _read_safetensors(path)
            return _read_torch(path, zipped=start.startswith(b"PK\x03\x04"))
        except OSError as error:
            why = error.strerror or reason(error)
            raise UserError(f"{path} cannot be read ({why}): check its permissions and its disk") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        keys = file.keys()
        if len(keys) > MOST_TENSORS:
            raise UserError(f"{path} holds {len(keys):,} tensors: this is no checkpoint of a model")
        return {key: file.get_tensor(key) for key in keys}


def _read_torch(path: Path, zipped: bool) -> dict[str, Tensor]:
    """A state dict, or one under `state_dict` or `model`. Nothing in the pickle is run but torch's allow list."""
    records: Counter[int] = Counter()
    if zipped:
        records = _check_archive(path)
    elif path.stat().st_size > psutil.virtual_memory().available:
        raise UserError(f"{path} is in the layout before torch 1.6, which is read whole, and larger than the memory")
    try:
        # Only the layout since torch 1.6, a zip archive, can be mapped.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old protocols and types of storage
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        # Its text tells the reader how to run the pickle all the same.
        named = _FOREIGN_NAME.search(str(error))
        if named is None:
            raise UserError(f"{path} holds a damaged pickle, or more than tensors: save a plain state dict") from error
        raise UserError(
            f"{path} is refused: its pickle asks for {named[1][:120]}, which weights never need; "
            "get the file from a source you trust, as safetensors"
        ) from error
    # The methods of dict itself: a pickle may give an OrderedDict attributes that hide them.
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(dict.get(content, wrapper), dict):
            content = dict.get(content, wrapper)
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a table of tensors")
    tensors = {}
    for key, value in dict.items(content):
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} holds {str(key)[:120]!r}, which is not a tensor: save a plain state dict")
        dense = value.layout == torch.strided and not (value.is_nested or value.is_quantized)
        if not dense or value.is_neg() or value.is_conj() or value.device.type != "cpu":
            raise UserError(f"{path} holds {key[:120]!r}, which is no dense tensor: save the model in 16 or 32 bit")
        tensors[key] = value.detach()
    if zipped:
        _check_storages(path, tensors.values(), records)
    return tensors


def _check_archive(path: Path) -> Counter[int]:
    """Refuses what makes torch read more than the tensors, or other bytes than theirs when the file is mapped.

    Returns:
        How many records of tensors have each size in bytes.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if len(records) > 2 * MOST_TENSORS:
        raise UserError(f"{path} holds {len(records):,} records: this is no checkpoint of a model")
    if len({record.filename for record in records}) < len(records):
        raise UserError(f"{path} holds two records of one name: save it again")
    sizes: Counter[int] = Counter()
    for record in records:
        name = record.filename.partition("/")[2]
        limit = MOST_PICKLE_BYTES if name == "data.pkl" else MOST_RECORD_BYTES
        if record.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} is a compressed archive: unpack it and save it again with torch.save")
        if name.startswith("data/"):
            sizes[record.file_size] += 1
        elif record.file_size > limit:
            raise UserError(f"{path} holds {record.file_size:,} bytes in {name[:120]!r}, at most {limit:,} are read")
    return sizes


def _check_storages(path: Path, tensors: Iterable[Tensor], records: Counter[int]) -> None:
    """Refuses a storage that no record has the size of: where a file is mapped, torch would read on behind its end."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if Counter(storages.values()) - records - Counter({0: len(storages)}):
        raise UserError(f"{path} is truncated or damaged (a tensor is larger than its record): download it again")


# --- a folder --------------------------------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """Whether the folder holds the weights of a whole model under one of the usual names."""
    return any(
        (folder / f"{stem}.{suffix}").exists()
        or (folder / f"{stem}.{suffix}.index.json").exists()
        or any(folder.glob(f"{stem}-*-of-*.{suffix}"))
        for stem, suffix in WEIGHT_STEMS
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """All tensors of the model in `folder`: one file, or shards with or without their index.

    safetensors win over `.bin` where both are there.

    Raises:
        UserError: no weights, a shard missing or damaged, an index that does not agree with the shards, a tensor
            twice, a name or link that leaves the folder, unconsolidated DeepSpeed or FSDP shards.
    """
    for stem, suffix in WEIGHT_STEMS:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        checkpoint = Checkpoint()
        if index.exists():
            _read_indexed(checkpoint, folder, index)
        elif single.exists():
            checkpoint.add(file_inside(folder, single.name, str(folder)))
        elif shards:
            counts = {int(match[1]) for path in shards if (match := re.search(r"-of-(\d{1,9})\.", path.name))}
            if len(counts) != 1 or len(shards) != counts.pop():
                raise UserError(
                    f"{folder} holds {len(shards)} shards, not the full set, and no index: download it again"
                )
            for path in shards:
                checkpoint.add(file_inside(folder, path.name, str(folder)))
            checkpoint.notes.append("the shards have no index: it was rebuilt from their headers")
        else:
            continue
        if suffix == "safetensors" and any(folder.glob("pytorch_model*.bin")):
            checkpoint.notes.append("both safetensors and .bin weights are there: the safetensors are read")
        return checkpoint
    raise UserError(_why_no_weights(folder))


def _read_indexed(checkpoint: Checkpoint, folder: Path, index: Path) -> None:
    named: dict[str, set[str]] = {}
    for key, name in read_weight_map(index).items():
        named.setdefault(name, set()).add(key)
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:3])}, which {index.name} names: download or copy it again"
        )
    for name, keys in named.items():
        found = checkpoint.add(folder / name)
        absent, surplus = sorted(keys - found.keys()), sorted(found.keys() - keys)
        if absent:
            raise UserError(f"{index} says that {name} holds {describe_keys(absent)}, but it does not: save it again")
        if surplus:
            raise UserError(
                f"{folder / name} holds {describe_keys(surplus)} that {index.name} does not name: save it again"
            )


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


# --- what it is ------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A source folder, opened once.

    Attributes:
        weights: the whole model's tensors, or those of the projector or adapter file.
        config: `config.json`; empty for an adapter without one.
    """

    folder: Path
    form: str
    config: dict
    weights: Checkpoint


def open_source(folder: Path, form: str | None = None) -> Source:
    """Recognises a source by its files and tensors, never by its name.

    Args:
        form: what it is said to be, instead of what is found.

    Raises:
        UserError: it holds a language model only, nothing that training writes, an adapter beside whole weights, or
            features that the release never used.
    """
    if form not in (None, *FORM_NAMES):
        raise UserError(f"--form {form!r} is unknown: choose one of {', '.join(FORM_NAMES)}")
    whole = has_weights(folder)
    adapter = next((name for name in ("adapter_config.json", *ADAPTER_FILES) if (folder / name).exists()), None)
    if adapter is not None and whole and form is None:
        raise UserError(
            f"{folder} holds whole weights and an adapter ({adapter}): say which with --form ({STAGE2} or {FINETUNED} "
            f"for the weights without the adapter, {LORA} for the adapter on a --base-model)"
        )
    if form is None and not whole:
        form = LORA if adapter else STAGE1 if (folder / PROJECTOR_FILE).exists() else None
    if form == LORA and not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} lacks adapter_config.json: copy the one that training wrote there")
    if form == LORA:
        weights = single_file(folder, ADAPTER_FILES)
    elif form == STAGE1:
        weights = single_file(folder, (PROJECTOR_FILE,))
    else:
        weights = read_checkpoint(folder)
        form = form or _form_of(weights.tensors, folder)
        if adapter is not None:
            weights.notes.append(f"{adapter} is not used: the weights are converted without the adapter")
    if form == LORA and not (folder / "config.json").exists():
        ours = (folder / ADAPTED_CONFIG).exists()
        config = read_json(file_inside(folder, ADAPTED_CONFIG, "SOURCE")) if ours else {}
    else:
        config = read_json(file_inside(folder, "config.json", "SOURCE"))
        if config.get("model_type") not in ("delta_llava", "llava") and not config.get("mm_vision_tower"):
            raise UserError(
                f"{folder / 'config.json'} has no mm_vision_tower: it is not the config that LLaVA training writes; "
                "copy the right one, or add the tower's Hub id or path under that name"
            )
    refuse_unused_features(config, weights.tensors, folder)
    return Source(folder, form, config, weights)


def single_file(folder: Path, names: tuple[str, ...]) -> Checkpoint:
    name = next((name for name in names if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{folder} lacks {' or '.join(names)}: copy it there")
    checkpoint = Checkpoint()
    checkpoint.add(file_inside(folder, name, "SOURCE"))
    return checkpoint


def _form_of(keys: Iterable[str], folder: Path) -> str:
    keys = list(keys)
    if any(re.match(r"(?:module\.)?model\.multi_modal_projector\.", key) for key in keys):
        return FINETUNED
    if any(key.startswith("model.mm_projector.") for key in keys):
        return STAGE2
    if (folder / PROJECTOR_FILE).exists():
        raise UserError(
            f"{folder} holds a language model and {PROJECTOR_FILE}: move {PROJECTOR_FILE} and its config.json to a "
            "folder of their own and pass the language model as --base-model"
        )
    raise UserError(
        f"{folder} has no projector tensors (model.mm_projector.*): if it is a language model, pass it as "
        "--base-model and give the folder with the projector or adapter as SOURCE"
    )


def detect_projector(keys: Iterable[str], where: str) -> str:
    """Which projector the training keys (`model.mm_projector.*`) belong to.

    Raises:
        UserError: one that the release never used, by name.
    """
    names = {key.partition("mm_projector.")[2] for key in keys if "mm_projector." in key}
    if any(name.startswith(("q_proj_1.", "k_proj_1.", "clip_attn.", "combined_block.")) for name in names):
        return DELTA
    if names and names <= {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return PLAIN
    if names and names <= {"weight", "bias"}:
        raise UserError(f"{where} has a linear projector: only the Delta projector and mlp2x_gelu are supported")
    numbers = [int(match[1]) for name in names if (match := re.match(r"(\d{1,4})\.", name))]
    if numbers:
        depth = 1 + max(numbers) // 2
        raise UserError(f"{where} has an mlp{depth}x_gelu projector: only mlp2x_gelu and Delta are supported")
    raise UserError(f"{where} has no tensors of a projector (mm_projector.*)")


def refuse_unused_features(config: Mapping, keys: Collection[str], where: Path) -> None:
    """Refuses, by name, features of the LLaVA code base that the Delta-LLaVA release never used."""
    merge, feature = config.get("mm_patch_merge_type") or "flat", config.get("mm_vision_select_feature", "patch")
    aspect_ratio = str(config.get("image_aspect_ratio") or "square")
    features = {
        f"image_aspect_ratio {aspect_ratio[:120]!r} (anyres tiling)": aspect_ratio.startswith("anyres"),
        f"mm_patch_merge_type {str(merge)[:120]!r} (spatial merge)": merge != "flat",
        "s2 (multi-scale features)": config.get("s2"),
        "mm_use_im_start_end (<im_start> and <im_end> around images)": config.get("mm_use_im_start_end"),
        "quantization_config (quantised weights)": config.get("quantization_config"),
        f"mm_vision_select_feature {str(feature)[:120]!r}": feature not in ("patch", "cls_patch"),
    }
    used = [name for name, is_used in features.items() if is_used]
    used += [f"{key[:120]} (spatial or unpad merge)" for key in keys if key.endswith("image_newline")]
    used += [f"{key[:120]} (vision resampler)" for key in keys if "vision_resampler" in key]
    if used:
        raise UserError(f"{where} uses {used[0]}, which Delta-LLaVA was never released with: not supported")
