"""`delta-llava convert`: a training checkpoint becomes a Hub folder."""

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from modeling_delta_llava.conversion import configs
from modeling_delta_llava.conversion.assemble import Assembly, Options, assemble
from modeling_delta_llava.conversion.source import DELTA, FINETUNED, FORM_NAMES, PROJECTOR_NAMES
from modeling_delta_llava.conversion.tables import NATIVE_LLAVA_ROWS, PROJECTOR, TOWER, backwards, new_name
from modeling_delta_llava.conversion.write import Weights, parse_size, plan_shards, write_shards
from modeling_delta_llava.folders import atomic_folder, check_output, check_space, format_bytes, free_bytes
from modeling_delta_llava.foreign_code import code_files, strip_foreign_code
from modeling_delta_llava.json_files import read_json, write_json
from modeling_delta_llava.sources import file_inside, is_hub_id

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Room for config, code, tokenizer and index beside the weights.
SMALL_FILES_BYTES = 64_000_000


@dataclass
class Result:
    """What a conversion wrote.

    Attributes:
        seconds: of copying the weights alone.
    """

    output: Path
    nbytes: int
    seconds: float

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.output.rglob("*") if path.is_file())


def convert(
    source: str,
    output: str | Path,
    options: Options | None = None,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    scan: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Writes the Hub folder of a training checkpoint.

    Args:
        source: folder or Hub id.
        output: folder that appears when everything is written, and not before.
        options: form, base model, vision tower, revision, dtype.
        max_shard_size: `5GB`.
        overwrite: replace an `output` that holds a model.
        allow_nonfinite: convert weights with NaN or infinity as they are, and report them.
        scan: look for NaN and infinity at all.
        progress: show a bar with rate and time left.
        say: called with lines about what was found.

    Raises:
        UserError: bad input, or a source that was changed meanwhile; `output` is then as it was before.
    """
    output = Path(output)
    max_shard_bytes = parse_size(max_shard_size)
    options = options or Options()
    check_output(output, _local_inputs(source, options), overwrite)
    with quiet_transformers(downloads=progress), atomic_folder(output, overwrite) as building:
        found = assemble(source, options)
        check_output(output, found.folders, overwrite)
        for line in describe(found):
            say(line)
        weights = file_names(found)
        check_space(output, needed_bytes(weights, max_shard_bytes))
        write_small_files(found, building)
        for entry in strip_foreign_code(building):
            say(f"note: not taken over, it names code that is not this package's: {entry}")
        started = time.perf_counter()
        with progress_bar(found.nbytes, "converting", progress) as bar:
            nonfinite = write_shards(
                building,
                weights,
                max_shard_bytes,
                scan=scan,
                allow_nonfinite=allow_nonfinite,
                advance=bar.update,
            )
        found.check_sources_unchanged()
        seconds = time.perf_counter() - started
    for name, count in nonfinite.items():
        say(f"warning: {name} holds {count} values that are NaN or infinite")
    return Result(output, found.nbytes, seconds)


def file_names(found: Assembly) -> Weights:
    """The weights under their names on disk, which differ from those in the model for native LLaVA."""
    if found.projector == DELTA:
        return found.weights
    table = backwards(NATIVE_LLAVA_ROWS)
    return {new_name(name, table): weight for name, weight in found.weights.items()}


def needed_bytes(weights: Weights, max_shard_bytes: int) -> int:
    """Disk that the result takes, and for a while what is computed for two shards."""
    computed = [weight.nbytes for weight in weights.values() if not weight.is_copy]
    scratch = min(2 * max(max_shard_bytes, max(computed, default=0)), sum(computed))
    return sum(weight.nbytes for weight in weights.values()) + scratch + SMALL_FILES_BYTES


def preview(
    source: str,
    output: str | Path,
    options: Options | None = None,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> tuple[list[str], list[tuple[str, str]]]:
    """What [`convert`] would do (`--dry-run`): lines about the source, and the rows of a table. Writes nothing."""
    output = Path(output)
    max_shard_bytes = parse_size(max_shard_size)
    options = options or Options()
    check_output(output, _local_inputs(source, options), overwrite)
    with quiet_transformers(downloads=True):
        found = assemble(source, options)
    check_output(output, found.folders, overwrite)
    return describe(found), describe_result(found, output, max_shard_bytes)


def _local_inputs(source: str, options: Options) -> dict[str, Path]:
    given = {"SOURCE": source, "--base-model": options.base_model, "--vision-tower": options.vision_tower}
    return {role: Path(name) for role, name in given.items() if name is not None and not is_hub_id(name)}


# --- small files -----------------------------------------------------------------------------------------------------


def write_small_files(found: Assembly, folder: Path) -> None:
    """Everything but the weights: config, code, processor, tokenizer, generation config, what export needs."""
    from transformers import GenerationConfig

    found.config.architectures = [configs.model_class(found.projector).__name__]
    found.config.save_pretrained(folder)
    if found.projector == DELTA:
        for path in code_files():
            shutil.copyfile(path, folder / path.name)
    written = read_json(found.generation_file) if found.generation_file is not None else found.training
    build_processor(found).save_pretrained(folder)
    GenerationConfig(**generation_fields(found, written)).save_pretrained(folder)
    _keep_training_files(found, folder)


def generation_fields(found: Assembly, written: dict) -> dict:
    """Fields of `generation_config.json`: valid, greedy, and unable to produce the image token or an added row.

    Sampling settings are left out: language models bring temperatures without `do_sample` (which transformers refuses
    to save), training switches `do_sample` on only to get around that, and published scores are greedy.

    Args:
        written: fields of the source's `generation_config.json`, or of its config.
    """
    tokenizer = found.tokenizer
    ends = written.get("eos_token_id")
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    ends = list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)))
    image_token_id = tokenizer.convert_tokens_to_ids(found.image_token)
    fields = {
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else written.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": sorted({image_token_id, *found.added_rows}),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _keep_training_files(found: Assembly, folder: Path) -> None:
    """What export needs: the record, and the tokenizer and generation config of training, or those kept before."""
    if found.record is None:
        return
    if found.form == FINETUNED:
        names = (*TOKENIZER_FILES, "generation_config.json")
        files = [(found.folders["SOURCE"], f"{configs.TRAINING_FOLDER}/{name}") for name in names]
    else:
        files = [(found.tokenizer_folder, name) for name in TOKENIZER_FILES]
        if found.generation_file is not None:
            files.append((found.generation_file.parent, found.generation_file.name))
    (folder / configs.TRAINING_FOLDER).mkdir()
    for root, name in files:
        if (root / name).is_file():
            path = file_inside(root, name, "SOURCE")
            shutil.copyfile(path, folder / configs.TRAINING_FOLDER / path.name)
    write_json(folder / configs.RECORD_FILE, found.record)


def build_processor(found: Assembly):
    """The processor of the Hub folder: taken over from a folder that has one, or built from tokenizer and tower."""
    from modeling_delta_llava.building import backbone_chat_template, build_image_processor
    from modeling_delta_llava.building import build_processor as build_delta_processor

    if found.processor is not None:
        return found.processor
    tokenizer, vision = found.tokenizer, found.config.vision_config
    aspect_ratio = found.training.get("image_aspect_ratio") or "square"
    if found.projector == DELTA:
        return build_delta_processor(found.config, tokenizer, found.image_token, found.preprocessor, aspect_ratio)
    from transformers import LlavaProcessor

    template = backbone_chat_template(tokenizer, found.image_token)
    tokenizer.chat_template = None
    return LlavaProcessor(
        image_processor=build_image_processor(vision, found.preprocessor, aspect_ratio),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=found.config.vision_feature_select_strategy,
        chat_template=template,
        image_token=found.image_token,
        num_additional_image_tokens=0 if vision.model_type.startswith("siglip") else 1,
    )


# --- telling ---------------------------------------------------------------------------------------------------------


def describe(found: Assembly) -> list[str]:
    """What was found, for the screen."""
    lines = [f"found: {FORM_NAMES[found.form]} with a {PROJECTOR_NAMES[found.projector]}"]
    lines += [f"reading {role}: {folder}" for role, folder in found.folders.items()]
    return lines + [f"note: {note}" for note in found.notes]


def describe_result(found: Assembly, output: Path, max_shard_bytes: int) -> list[tuple[str, str]]:
    """Rows of the `--dry-run` table."""
    config, weights = found.config, found.weights
    parts = {"vision tower": [], "projector": [], "language model": []}
    for name, weight in weights.items():
        part = "vision tower" if name.startswith(TOWER) else "projector" if name.startswith(PROJECTOR) else None
        parts[part or "language model"].append(weight.nbytes)
    rows = [(part, f"{len(sizes)} tensors, {format_bytes(sum(sizes))}") for part, sizes in parts.items()]
    reasons = list(found.dropped.values())
    rows += [("not written", f"{reasons.count(why)} tensors: {why}") for why in dict.fromkeys(reasons)]
    copied = sum(weight.nbytes for weight in weights.values() if weight.is_copy)
    rows.append(("copied unchanged", f"{format_bytes(copied)} of {format_bytes(found.nbytes)}"))
    shards = len(plan_shards(weights, max_shard_bytes))
    rows.append(("shards", f"{shards} of at most {format_bytes(max_shard_bytes)}"))
    if found.projector == DELTA:
        budgets = ", ".join(str(count) for count in config.legal_num_visual_tokens)
        rows.append(("visual tokens", f"{config.num_visual_tokens} per image (legal: {budgets})"))
    else:
        rows.append(("visual tokens", f"{config.image_seq_length} per image"))
    vocabulary, added = config.text_config.vocab_size, len(found.added_rows)
    rows.append(("vocabulary", f"{vocabulary} rows" + (f", {added} of them new" if added else ", none added")))
    rows.append(("image token", f"{found.image_token} = {config.image_token_id}"))
    needed = needed_bytes(weights, max_shard_bytes)
    rows.append(("disk", f"{format_bytes(needed)} needed, {format_bytes(free_bytes(output))} free"))
    return rows


def progress_bar(total: int, what: str, shown: bool) -> tqdm:
    """A bar in bytes with rate and time left, on a terminal."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if shown else True, mininterval=0.2)


@contextlib.contextmanager
def quiet_transformers(downloads: bool = False) -> Iterator[None]:
    """Only transformers' errors reach the screen inside the block; its advice and bars are about loading models.

    Args:
        downloads: whether huggingface_hub shows its bars, which transformers switches off together with its own.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads and hub_bars:
        enable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Cannot enable progress bars")
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            (enable_progress_bars if hub_bars else disable_progress_bars)()
