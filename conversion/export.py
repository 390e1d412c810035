"""`delta-llava export`: a Hub folder becomes a training checkpoint again."""

import io
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from delta_llava.errors import UserError, told
from modeling_delta_llava.conversion import configs, convert, tables
from modeling_delta_llava.conversion.source import DELTA, PLAIN, PROJECTOR_FILE, Checkpoint, read_checkpoint
from modeling_delta_llava.conversion.tables import EMBEDDING, HEAD, TOWER
from modeling_delta_llava.conversion.write import (
    Weight,
    Weights,
    check_weights,
    parse_size,
    stored_weight,
    with_parts_joined,
    write_shards,
)
from modeling_delta_llava.folders import atomic_folder, check_output, check_space
from modeling_delta_llava.foreign_code import refuse_foreign_code
from modeling_delta_llava.json_files import check_sizes, read_json, write_json
from modeling_delta_llava.sources import file_inside, local_folder, require_folder


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
) -> convert.Result:
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
    with convert.quiet_transformers(downloads=progress):
        source = local_folder(folder, "HUB_FOLDER")
        check_output(output, {"HUB_FOLDER": source}, overwrite)
        config, projector = read_hub_config(source)
        refuse_foreign_code(source)
        record = configs.read_record(source)
        if record is None:
            say("note: this folder was not written by convert: config and tower name are built from its config.json")
        weights, checkpoint = read_hub_weights(source, config, projector)
        rows = weights[EMBEDDING].shape[0]
        if record is not None:
            rows = min(rows, record["vocabulary_rows"])
        training = configs.training_config_of(config, record, rows, vision_tower)
        trained = training_weights(weights, projector, record, rows, source)
        if projector_only:
            trained = {key: weight for key, weight in trained.items() if key.startswith(tables.TRAINED_PROJECTOR)}
        total = sum(weight.nbytes for weight in trained.values())
        check_space(output, total + convert.SMALL_FILES_BYTES)
        with atomic_folder(output, overwrite) as building:
            started = time.perf_counter()
            write_json(building / "config.json", training)
            if projector_only:
                _save_projector(building / PROJECTOR_FILE, trained)
            else:
                _copy_tokenizer(source, building, say)
                with convert.progress_bar(total, "exporting", progress) as bar:
                    write_shards(building, trained, max_shard_bytes, scan=False, advance=bar.update)
            checkpoint.check_unchanged()
            seconds = time.perf_counter() - started
    return convert.Result(output, total, seconds)


def read_hub_config(folder: Path):
    """The configuration object of a Hub folder and which projector it has.

    Raises:
        UserError: `config.json` is missing, damaged or of another model.
    """
    from transformers import LlavaConfig

    from modeling_delta_llava.configuration_delta_llava import DeltaLlavaConfig

    require_folder(folder, "folder")
    fields = read_json(folder / "config.json")
    classes = {"delta_llava": (DeltaLlavaConfig, DELTA), "llava": (LlavaConfig, PLAIN)}
    if fields.get("model_type") not in classes:
        raise UserError(
            f"{folder / 'config.json'} has model_type {str(fields.get('model_type'))[:80]!r}, not delta_llava: "
            "give a folder that `delta-llava convert` or finetuning wrote"
        )
    config_class, projector = classes[fields["model_type"]]
    check_sizes(fields, folder / "config.json")
    with told(f"{folder / 'config.json'} cannot be read", "copy or download the folder again"):
        return config_class.from_dict(fields), projector


def read_hub_weights(folder: Path, config, projector: str) -> tuple[Weights, Checkpoint]:
    """The tensors of a Hub folder under model names, checked against the model of its config."""
    checkpoint = read_checkpoint(folder)
    table = tables.HUB_ROWS if projector == DELTA else tables.NATIVE_LLAVA_ROWS
    names, _ = tables.rename(checkpoint.tensors, table, str(folder), dropped={})
    weights = {name: stored_weight(checkpoint, key) for key, name in names.items()}
    check_weights(weights, *configs.expected_shapes(config, projector, folder / "config.json"), str(folder))
    return weights, checkpoint


def training_weights(weights: Weights, projector: str, record: dict | None, rows: int, source: Path) -> Weights:
    """The tensors of a Hub folder under training keys: what [`with_parts_split`] and a table did, backwards.

    Args:
        rows: embedding rows to keep.
    """
    tower_keys = record["tower_keys"] if record else "old"
    kept = {name: weight.stored for name, weight in weights.items() if tower_keys or not name.startswith(TOWER)}
    for name in (EMBEDDING, HEAD):
        if name in kept:
            kept[name] = kept[name][:rows]
    table = tables.backwards(tables.training_table(projector == PLAIN, tower_keys or "old"))
    trained = {}
    for name, tensor in with_parts_joined(kept).items():
        key = tables.new_name(name, table)
        if key is None:
            raise UserError(f"tensor {name!r} has no place in a training checkpoint: it cannot be exported")
        trained[key] = Weight(tensor, name, weights[name].file if name in weights else source, tensor.dtype)
    if record and record["tied_head_saved"] and HEAD not in kept:
        trained["lm_head.weight"] = trained["model.embed_tokens.weight"]
    for key, tensor in (configs.kept_tensors(record) if record else {}).items():
        trained[key] = Weight(tensor, key, source / configs.RECORD_FILE, tensor.dtype)
    return trained


def _save_projector(path: Path, weights: Mapping[str, Weight]) -> None:
    # Copies, since torch.save writes the whole file that a mapped tensor is part of; and in memory first, since it
    # answers a full disk with a RuntimeError of many faces, a file with a plain OSError.
    content = io.BytesIO()
    torch.save({key: weight.stored.clone() for key, weight in weights.items()}, content)
    path.write_bytes(content.getbuffer())


def _copy_tokenizer(source: Path, building: Path, say: Callable[[str], None]) -> None:
    """Tokenizer files as training wrote them, or else the Hub folder's own."""
    kept = any((source / configs.TRAINING_FOLDER / name).is_file() for name in convert.TOKENIZER_FILES)
    if not kept:
        say(
            "note: the tokenizer is the Hub folder's; LLaVA training of a Llama model needs its tokenizer.model beside"
        )
    for name in (*convert.TOKENIZER_FILES, "generation_config.json"):
        path = f"{configs.TRAINING_FOLDER}/{name}" if kept else name
        if (source / path).is_file():
            shutil.copyfile(file_inside(source, path, "HUB_FOLDER"), building / name)
