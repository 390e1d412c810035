"""`delta-llava export`: a Hub folder becomes a training checkpoint again."""

import io
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import configs, forms
from modeling_delta_llava.conversion.checkpoints import file_inside, read_checkpoint, require_folder
from modeling_delta_llava.conversion.convert import (
    SMALL_FILES_BYTES,
    TOKENIZER_FILES,
    Result,
    progress_bar,
    quiet_transformers,
)
from modeling_delta_llava.conversion.entries import (
    EMBEDDING,
    HEAD,
    TOWER,
    Entries,
    Entry,
    check_entries,
    json_bytes,
    named_entries,
)
from modeling_delta_llava.conversion.keys import (
    HUB_RULES,
    NATIVE_LLAVA_RULES,
    PLAIN_TRAINING_RULES,
    TRAINING_RULES,
    invert_rules,
    rename_key,
    step_of_target,
)
from modeling_delta_llava.conversion.record import TRAINING_FOLDER, read_record, tensor_bytes
from modeling_delta_llava.conversion.sources import local_folder
from modeling_delta_llava.conversion.streams import Literal, OutputTensor, Span, TensorStream, torch_bytes
from modeling_delta_llava.conversion.tensors import DTYPES, item_size
from modeling_delta_llava.conversion.workspace import check_output, check_space, interruptible, transaction
from modeling_delta_llava.conversion.writer import parse_size, write_shards
from modeling_delta_llava.foreign_code import refuse_foreign_code
from modeling_delta_llava.json_files import read_json


def export(
    folder: str,
    output: str | Path,
    *,
    projector_only: bool = False,
    vision_tower: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Writes the training layout of a Hub folder.

    Tensors are those of the checkpoint that was converted, bit for bit: rows that conversion added are taken off,
    tensors that it dropped are put back. A merged LoRA is exported as the merged model.

    Args:
        folder: Hub folder or id.
        output: folder that appears when everything is written, and not before.
        projector_only: write what stage 1 leaves: `mm_projector.bin` and `config.json`.
        vision_tower: Hub id or path to state as `mm_vision_tower`; by default the one that was converted.

    Raises:
        UserError: bad input; `output` is then as it was before.
    """
    output = Path(output)
    max_shard_bytes = parse_size(max_shard_size)
    with interruptible(output), quiet_transformers(downloads=progress):
        source = local_folder(folder, "HUB_FOLDER")
        check_output(output, {"HUB_FOLDER": source}, overwrite)
        config, projector = read_hub_config(source)
        refuse_foreign_code(source)
        record = read_record(source)
        if record is None:
            say("note: this folder was not written by convert: config and tower name are built from its config.json")
        entries = hub_entries(source, config, projector)
        rows = entries[EMBEDDING].shape[0]
        if record is not None:
            rows = min(rows, record["vocabulary_rows"])
        training = configs.training_config_of(config, record, rows, vision_tower)
        tensors = training_tensors(entries, projector, record, rows)
        if projector_only:
            tensors = [tensor for tensor in tensors if tensor.name.startswith("model.mm_projector.")]
        total = sum(tensor.nbytes for tensor in tensors)
        check_space(output, total + SMALL_FILES_BYTES)
        with transaction(output, overwrite) as building:
            started = time.perf_counter()
            (building / "config.json").write_bytes(json_bytes(training))
            with TensorStream(scan=False) as stream, progress_bar(total, "exporting", progress) as advance:
                if projector_only:
                    _save_projector(building / forms.PROJECTOR_FILE, tensors, stream, advance)
                else:
                    _copy_tokenizer(source, building, say)
                    write_shards(building, tensors, max_shard_bytes, stream, advance)
            seconds = time.perf_counter() - started
    files = sorted(path for path in output.iterdir() if path.is_file())
    return Result(output, files, total, seconds, {})


def read_hub_config(folder: Path):
    """The configuration object of a Hub folder and which projector it has.

    Raises:
        UserError: `config.json` is missing, damaged or of another model.
    """
    from transformers import LlavaConfig

    from modeling_delta_llava.configuration_delta_llava import DeltaLlavaConfig

    require_folder(folder, "folder")
    fields = read_json(folder / "config.json")
    classes = {"delta_llava": (DeltaLlavaConfig, forms.DELTA), "llava": (LlavaConfig, forms.PLAIN)}
    if fields.get("model_type") not in classes:
        raise UserError(
            f"{folder / 'config.json'} has model_type {fields.get('model_type')!r}, not delta_llava: "
            "give a folder that `delta-llava convert` or finetuning wrote"
        )
    config_class, projector = classes[fields["model_type"]]
    try:
        return config_class.from_dict(fields), projector
    # Strict configs wrap their checks in huggingface_hub's own error classes.
    except Exception as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())[:300]}") from error


def hub_entries(folder: Path, config, projector: str) -> Entries:
    """The tensors of a Hub folder under model names, checked against the model of its config."""
    tables = [HUB_RULES] if projector == forms.DELTA else [invert_rules(NATIVE_LLAVA_RULES)]
    entries, _ = named_entries(read_checkpoint(folder).tensors, tables, str(folder), steps=False)
    check_entries(entries, *configs.expected_shapes(config, projector, folder / "config.json"), str(folder))
    return entries


def training_tensors(entries: Entries, projector: str, record: dict | None, rows: int) -> list[OutputTensor]:
    """Entries under training keys, in the order of their bytes.

    Args:
        rows: embedding rows to keep.
    """
    tower_keys = record["tower_keys"] if record else "old"
    rules = (PLAIN_TRAINING_RULES if projector == forms.PLAIN else TRAINING_RULES)[tower_keys or "old"]
    table = invert_rules(rules)
    kept = {name: entry for name, entry in entries.items() if tower_keys or not name.startswith(TOWER)}
    for name in (EMBEDDING, HEAD):
        if name in kept:
            kept[name] = _first_rows(kept[name], rows)
    tensors = []
    for name, entry in _fused(kept).items():
        tensors.append(OutputTensor(rename_key(name, table), entry.dtype, entry.shape, entry.pieces))
    if record and record["tied_head_saved"] and HEAD not in kept:
        embedding = kept[EMBEDDING]
        tensors.append(OutputTensor("lm_head.weight", embedding.dtype, embedding.shape, embedding.pieces))
    for key, stored in (record["dropped_tensors"] if record else {}).items():
        literal = Literal(tensor_bytes(stored), stored["dtype"])
        tensors.append(OutputTensor(key, literal.dtype, tuple(stored["shape"]), (literal,)))
    return tensors


def _first_rows(entry: Entry, rows: int) -> Entry:
    """Only the first rows of a matrix."""
    if entry.shape[0] <= rows:
        return entry
    shape = (rows, *entry.shape[1:])
    pieces, left = [], math.prod(shape)
    for piece in entry.pieces:
        take = min(left, piece.count)
        if take == piece.count:
            pieces.append(piece)
        elif take and isinstance(piece, Span):
            pieces.append(replace(piece, count=take))
        left -= take
    return Entry(entry.dtype, shape, tuple(pieces))


def _fused(entries: Entries) -> Entries:
    """Undoes every step: parts are put together in order, 1x1 convolutions get their axes back."""
    fused: Entries = {}
    parts: dict[str, dict[int, Entry]] = {}
    for name, entry in entries.items():
        found = step_of_target(name)
        if found is None:
            fused[name] = entry
            continue
        step, part = found
        whole = step.fused_name(part, name)
        parts.setdefault(whole, {})[part] = entry
        if len(parts[whole]) == len(step.targets):
            ordered = [parts[whole][index] for index in range(len(step.targets))]
            shape = (sum(piece.shape[0] for piece in ordered), *entry.shape[1:], *((1, 1) if step.squeeze else ()))
            fused[whole] = Entry(entry.dtype, shape, tuple(piece for one in ordered for piece in one.pieces))
    return fused


def _save_projector(
    path: Path, tensors: list[OutputTensor], stream: TensorStream, advance: Callable[[int], object]
) -> None:
    import torch

    # In memory first: torch.save answers a full disk with a RuntimeError of many faces, a file with a plain OSError.
    content = io.BytesIO()
    torch.save({tensor.name: load_output(tensor, stream, advance) for tensor in tensors}, content)
    path.write_bytes(content.getbuffer())


def load_output(tensor: OutputTensor, stream: TensorStream, advance: Callable[[int], object] = lambda count: None):
    """An output tensor as a `torch.Tensor` in memory; `advance` is called with the bytes of each part of it."""
    import torch

    values = torch.empty(math.prod(tensor.shape) * item_size(tensor.dtype), dtype=torch.uint8)
    target, position = torch_bytes(values), 0
    for chunk in stream.chunks(tensor):
        target[position : position + len(chunk)] = chunk
        position += len(chunk)
        advance(len(chunk))
    return values.view(getattr(torch, DTYPES[tensor.dtype][1])).reshape(tensor.shape)


def _copy_tokenizer(source: Path, building: Path, say: Callable[[str], None]) -> None:
    """Tokenizer files as training wrote them, or else the Hub folder's own."""
    origin = TRAINING_FOLDER if any((source / TRAINING_FOLDER / name).is_file() for name in TOKENIZER_FILES) else "."
    if origin == ".":
        say(
            "note: the tokenizer is the Hub folder's; LLaVA training of a Llama model needs its tokenizer.model beside"
        )
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / origin / name).is_file():
            shutil.copyfile(file_inside(source, f"{origin}/{name}", "HUB_FOLDER"), building / name)
