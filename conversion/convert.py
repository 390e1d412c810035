"""`delta-llava convert`: a training checkpoint becomes a Hub folder."""

import contextlib
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import forms
from modeling_delta_llava.conversion.checkpoints import file_inside
from modeling_delta_llava.conversion.entries import json_bytes
from modeling_delta_llava.conversion.generation import generation_fields
from modeling_delta_llava.conversion.plan import Options, Plan, make_plan
from modeling_delta_llava.conversion.record import RECORD_FILE, TRAINING_FOLDER, read_record
from modeling_delta_llava.conversion.sources import is_hub_id
from modeling_delta_llava.conversion.streams import (
    BUFFER_BYTES,
    MERGE_BLOCK_ELEMENTS,
    LowRankUpdate,
    Span,
    TensorStream,
)
from modeling_delta_llava.conversion.tensors import format_bytes, item_size
from modeling_delta_llava.conversion.workspace import (
    check_output,
    check_space,
    free_bytes,
    interruptible,
    transaction,
)
from modeling_delta_llava.conversion.writer import parse_size, plan_shards, write_shards
from modeling_delta_llava.foreign_code import code_files, strip_foreign_code
from modeling_delta_llava.json_files import read_json

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
        nonfinite: values that are NaN or infinite, by tensor, when they were allowed.
    """

    output: Path
    files: list[Path]
    nbytes: int
    seconds: float
    nonfinite: dict[str, int]


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
        UserError: bad input; `output` is then as it was before.
    """
    output = Path(output)
    max_shard_bytes = parse_size(max_shard_size)
    options = options or Options()
    with interruptible(output), quiet_transformers(downloads=progress):
        check_output(output, _local_inputs(source, options), overwrite)
        plan = make_plan(source, options)
        check_output(output, plan.folders, overwrite)
        for line in describe(plan):
            say(line)
        check_space(output, plan.nbytes + SMALL_FILES_BYTES)
        with transaction(output, overwrite) as building:
            write_small_files(plan, building)
            for entry in strip_foreign_code(building):
                say(f"note: not taken over, it names code that is not this package's: {entry}")
            started = time.perf_counter()
            with TensorStream(scan) as stream, progress_bar(plan.nbytes, "converting", progress) as advance:
                write_shards(building, plan.tensors, max_shard_bytes, stream, advance, allow_nonfinite)
            seconds = time.perf_counter() - started
    for name, count in stream.nonfinite.items():
        say(f"warning: {name} holds {count} values that are NaN or infinite")
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return Result(output, files, plan.nbytes, seconds, stream.nonfinite)


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
        plan = make_plan(source, options)
    check_output(output, plan.folders, overwrite)
    return describe(plan), describe_plan(plan, output, max_shard_bytes)


def _local_inputs(source: str, options: Options) -> dict[str, Path]:
    given = {"SOURCE": source, "--base-model": options.base_model, "--vision-tower": options.vision_tower}
    return {role: Path(name) for role, name in given.items() if name is not None and not is_hub_id(name)}


# --- small files -----------------------------------------------------------------------------------------------------


def write_small_files(plan: Plan, folder: Path) -> None:
    """Everything but the weights: config, code, processor, tokenizer, generation config, what export needs."""
    from transformers import GenerationConfig

    config = plan.config
    config.architectures = [
        "LlavaForConditionalGeneration" if plan.projector == forms.PLAIN else "DeltaLlavaForConditionalGeneration"
    ]
    config.save_pretrained(folder)
    if plan.projector == forms.DELTA:
        for path in code_files():
            shutil.copyfile(path, folder / path.name)
    written = read_json(plan.generation_file) if plan.generation_file is not None else plan.training
    fields = generation_fields(plan.tokenizer, written, plan.image_token, plan.suppressed_rows)
    try:
        processor = build_processor(plan)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if plan.preprocessor is None:
            raise
        path = plan.folders["--vision-tower"] / "preprocessor_config.json"
        raise UserError(f"{path} makes no image processor ({error}): copy the tower's own there") from error
    processor.save_pretrained(folder)
    GenerationConfig(**fields).save_pretrained(folder)
    _keep_training_files(plan, folder)


def _keep_training_files(plan: Plan, folder: Path) -> None:
    """What export needs: a training checkpoint's tokenizer, generation config and record, or those kept before."""
    source = plan.folders["SOURCE"]
    record = read_record(source) if plan.form == forms.FINETUNED else None
    if record is not None:
        files = [(source, f"{TRAINING_FOLDER}/{name}") for name in (*TOKENIZER_FILES, "generation_config.json")]
    elif plan.form != forms.FINETUNED and plan.training.get("model_type") != "delta_llava":
        record = plan.record
        files = [(plan.tokenizer_folder, name) for name in TOKENIZER_FILES]
        if plan.generation_file is not None:
            files.append((plan.generation_file.parent, plan.generation_file.name))
    else:
        return
    (folder / TRAINING_FOLDER).mkdir()
    for root, name in files:
        if (root / name).is_file():
            path = file_inside(root, name, "SOURCE")
            shutil.copyfile(path, folder / TRAINING_FOLDER / path.name)
    (folder / RECORD_FILE).write_bytes(json_bytes(record))


def build_processor(plan: Plan):
    """The processor of the Hub folder: taken over from a folder that has one, or built from tokenizer and tower."""
    from modeling_delta_llava.building import backbone_chat_template, build_image_processor
    from modeling_delta_llava.building import build_processor as build_delta_processor

    if plan.processor is not None:
        return plan.processor
    aspect_ratio = plan.training.get("image_aspect_ratio") or "square"
    if plan.projector == forms.DELTA:
        return build_delta_processor(plan.config, plan.tokenizer, plan.image_token, plan.preprocessor, aspect_ratio)
    from transformers import LlavaProcessor

    template = backbone_chat_template(plan.tokenizer, plan.image_token)
    plan.tokenizer.chat_template = None
    return LlavaProcessor(
        image_processor=build_image_processor(plan.config.vision_config, plan.preprocessor, aspect_ratio),
        tokenizer=plan.tokenizer,
        patch_size=plan.config.vision_config.patch_size,
        vision_feature_select_strategy=plan.config.vision_feature_select_strategy,
        chat_template=template,
        image_token=plan.image_token,
        num_additional_image_tokens=0 if plan.config.vision_config.model_type.startswith("siglip") else 1,
    )


# --- telling ---------------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> list[str]:
    """What was found, for the screen."""
    lines = [f"found: {forms.FORM_NAMES[plan.form]} with a {forms.PROJECTOR_NAMES[plan.projector]}"]
    lines += [f"reading {role}: {folder}" for role, folder in plan.folders.items()]
    return lines + [f"note: {note}" for note in plan.notes]


def describe_plan(plan: Plan, output: Path, max_shard_bytes: int) -> list[tuple[str, str]]:
    """Rows of the `--dry-run` table."""
    config = plan.config
    rows = [(part, f"{count} tensors, {format_bytes(size)}") for part, count, size in plan.counts]
    reasons: dict[str, int] = {}
    for reason in plan.dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    rows += [("not written", f"{count} tensors: {reason}") for reason, count in reasons.items()]
    copied = sum(tensor.copied_bytes for tensor in plan.tensors)
    rows.append(("copied unchanged", f"{format_bytes(copied)} of {format_bytes(plan.nbytes)}"))
    shards = len(plan_shards(plan.tensors, max_shard_bytes))
    rows.append(("shards", f"{shards} of at most {format_bytes(max_shard_bytes)}"))
    if plan.projector == forms.DELTA:
        budgets = ", ".join(str(count) for count in config.legal_num_visual_tokens)
        rows.append(("visual tokens", f"{config.num_visual_tokens} per image (legal: {budgets})"))
    else:
        rows.append(("visual tokens", f"{config.image_seq_length} per image"))
    vocabulary = config.text_config.vocab_size
    added = vocabulary - plan.source_rows
    rows.append(("vocabulary", f"{vocabulary} rows" + (f", {added} of them new" if added else ", none added")))
    rows.append(("image token", f"{plan.image_token} = {config.image_token_id}"))
    rows.append(("peak memory", f"about {format_bytes(peak_memory(plan))}"))
    needed = plan.nbytes + SMALL_FILES_BYTES
    rows.append(("disk", f"{format_bytes(needed)} needed, {format_bytes(free_bytes(output))} free"))
    return rows


def peak_memory(plan: Plan) -> int:
    """Bytes the whole process will hold: what it holds now, the copy buffer, and the largest computed block."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    blocks = [0]
    for tensor in plan.tensors:
        for piece in tensor.pieces:
            if isinstance(piece, LowRankUpdate):
                blocks.append(3 * 4 * min(piece.count, MERGE_BLOCK_ELEMENTS))
            elif isinstance(piece, Span) and not piece.stored.is_contiguous:
                # Its storage, its rows in order, and once more when the mean of its rows is needed.
                blocks.append(piece.stored.span * item_size(piece.dtype) + 2 * piece.stored.nbytes)
    return now + 6 * BUFFER_BYTES + max(blocks)


class progress_bar:  # noqa: N801 - used like a function
    """A bar in bytes with rate and time left, on a terminal; a context that gives the function to advance it."""

    def __init__(self, total: int, what: str, shown: bool = True):
        from tqdm import tqdm

        self.bar = tqdm(
            total=total,
            desc=what,
            unit="B",
            unit_scale=True,
            disable=None if shown else True,
            mininterval=0.2,
            file=sys.stderr,
        )

    def __enter__(self) -> Callable[[int], object]:
        return self.bar.update

    def __exit__(self, *_error) -> None:
        self.bar.close()


@contextlib.contextmanager
def quiet_transformers(downloads: bool = False) -> Iterator[None]:
    """Only transformers' errors reach the screen inside the block; its advice and bars are about loading models.

    Args:
        downloads: whether huggingface_hub shows its bars, which transformers switches off together with its own.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
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
