"""`delta-llava verify`: is a Hub folder complete and loadable, and does it hold what its source holds?"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import forms
from modeling_delta_llava.conversion.checkpoints import read_checkpoint, require_folder
from modeling_delta_llava.conversion.convert import progress_bar, quiet_transformers
from modeling_delta_llava.conversion.entries import Entries, Entry
from modeling_delta_llava.conversion.export import hub_entries, load_output, read_hub_config, training_tensors
from modeling_delta_llava.conversion.plan import Options, Plan, make_plan
from modeling_delta_llava.conversion.streams import OutputTensor, Span, TensorStream
from modeling_delta_llava.conversion.tensors import FLOATING, format_bytes, item_size
from modeling_delta_llava.folders import holds_model
from modeling_delta_llava.foreign_code import check_code, code_files, refuse_foreign_code
from modeling_delta_llava.json_files import read_json

REQUIRED_FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json")
# Largest relative difference of a stage between folder and source in fp32.
TOLERANCE = 1e-4
# Bytes per weight for the stage-by-stage numbers: one model in fp32 at a time, and room for activations and for the
# largest tensor as it is stored.
NUMBERS_BYTES_PER_WEIGHT = 5


@dataclass(frozen=True)
class Check:
    """One row of the result: `passed` is None for a check that was not made."""

    name: str
    passed: bool | None
    detail: str


def verify(
    folder: str | Path,
    against: str | None = None,
    options: Options | None = None,
    *,
    progress: bool = True,
    numbers: bool = True,
) -> list[Check]:
    """Checks a Hub folder; with `against`, compares it with its source too.

    Args:
        against: the source it was converted from (folder or Hub id), read with `options`.
        numbers: with `against`, also compute both sides stage by stage, when memory allows.

    Returns:
        one [`Check`] per row; the folder is good when none has `passed` False.

    Raises:
        UserError: `folder` is no folder or brings code that is not this package's, or the source cannot be read.
    """
    folder = require_folder(Path(folder), "FOLDER")
    if holds_model(folder):
        refuse_foreign_code(folder)
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, True, check()))
        except (UserError, OSError) as error:
            checks.append(Check(name, False, " ".join(str(error).split())))
        return bool(checks[-1].passed)

    with quiet_transformers(downloads=progress):
        run("files", lambda: _check_files(folder))
        known = run("config", lambda: _check_config(folder))
        if not known:
            return checks
        config, projector = read_hub_config(folder)
        if projector == forms.DELTA:
            run("code", lambda: _check_code(folder))
        run("generation config", lambda: _check_generation(folder, config))
        run("processor", lambda: _check_processor(folder, config, projector))
        entries: Entries = {}
        if run("tensor names and shapes", lambda: _check_names(folder, config, projector, entries)):
            run("finite values", lambda: _check_finite(entries, progress))
            if against is not None:
                plan = make_plan(against, options or Options())
                same = run("tensors of the source", lambda: _compare_tensors(entries, plan, progress))
                if same and numbers:
                    checks += _number_checks(folder, config, projector, plan)
    return checks


def passed(checks: list[Check]) -> bool:
    """Whether no check failed."""
    return all(check.passed is not False for check in checks)


# --- structure -------------------------------------------------------------------------------------------------------


def _check_files(folder: Path) -> str:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    if not (folder / "chat_template.jinja").is_file():
        missing.append("chat_template.jinja")
    if missing:
        raise UserError(f"{', '.join(missing)} missing")
    count = sum(1 for path in folder.rglob("*") if path.is_file())
    return f"{count} files"


def _check_config(folder: Path) -> str:
    from modeling_delta_llava.configuration_delta_llava import AUTO_MAP

    config, projector = read_hub_config(folder)
    if projector == forms.DELTA:
        written = read_json(folder / "config.json").get("auto_map") or {}
        wrong = [name for name, target in AUTO_MAP.items() if written.get(name) != target]
        if wrong:
            raise UserError(f"auto_map lacks or differs in {', '.join(wrong)}")
    return f"{config.model_type}, {config.text_config.model_type} + {config.vision_config.model_type}"


def _check_code(folder: Path) -> str:
    check_code(folder)
    return f"{len(code_files())} files, as in this package"


def _check_generation(folder: Path, config) -> str:
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(folder)
        generation.validate(strict=True)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"not valid: {error}") from error
    if config.image_token_id not in (generation.suppress_tokens or []):
        raise UserError(f"the image token {config.image_token_id} may be generated: add it to suppress_tokens")
    return f"valid, {len(generation.suppress_tokens)} tokens suppressed"


def _check_processor(folder: Path, config, projector: str) -> str:
    from PIL import Image

    from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor

    if projector == forms.DELTA:
        processor_class, expected = DeltaLlavaProcessor, config.num_visual_tokens
    else:
        from transformers import LlavaProcessor

        processor_class, expected = LlavaProcessor, config.image_seq_length
    try:
        processor = processor_class.from_pretrained(folder, trust_remote_code=False)
        side = config.vision_config.image_size
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=Image.new("RGB", (side, side)), text=prompt, return_tensors="pt")
    # Whatever a damaged tokenizer or template raises is a finding of this check.
    except Exception as error:
        raise UserError(f"cannot be used: {type(error).__name__}: {error}") from error
    count = int((inputs["input_ids"] == config.image_token_id).sum())
    if count != expected:
        raise UserError(
            f"a picture becomes {count} tokens of id {config.image_token_id}, the model expects {expected}"
        )
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= config.text_config.vocab_size:
        raise UserError(f"token id {largest} has no embedding row (vocab_size {config.text_config.vocab_size})")
    return f"{count} tokens per picture, image token id {config.image_token_id}"


def _check_names(folder: Path, config, projector: str, entries: Entries) -> str:
    """Fills `entries` with what the folder holds."""
    entries |= hub_entries(folder, config, projector)
    files = {entry.source.file for entry in entries.values()}
    size = sum(path.stat().st_size for path in files)
    return f"{len(entries)} tensors in {len(files)} file{'s' * (len(files) != 1)}, {format_bytes(size)}"


def _check_finite(entries: Entries, progress: bool) -> str:
    outputs = [OutputTensor(name, e.dtype, e.shape, e.pieces) for name, e in entries.items()]
    total = sum(output.nbytes for output in outputs)
    with TensorStream() as stream, progress_bar(total, "scanning", progress) as advance:
        for output in outputs:
            for chunk in stream.chunks(output):
                advance(len(chunk))
    if stream.nonfinite:
        name, count = next(iter(stream.nonfinite.items()))
        raise UserError(f"{len(stream.nonfinite)} tensors with NaN or infinity, first {name!r} ({count} values)")
    return f"{format_bytes(total)} scanned"


# --- against a source ------------------------------------------------------------------------------------------------


def _compare_tensors(entries: Entries, plan: Plan, progress: bool) -> str:
    expected = {plan.names[output.name]: output for output in plan.tensors}
    if expected.keys() != entries.keys():
        name = sorted(expected.keys() ^ entries.keys())[0]
        raise UserError(f"{name!r} is only in the {'source' if name in expected else 'folder'}")
    changed = []
    with TensorStream(scan=False) as stream, progress_bar(plan.nbytes, "comparing", progress) as advance:
        for name, output in expected.items():
            entry = entries[name]
            if entry.shape != output.shape:
                raise UserError(f"{name!r} has shape {entry.shape}, the source gives {output.shape}")
            # A folder converted with --dtype is compared with the source rounded in the same way.
            output = OutputTensor(name, entry.dtype, output.shape, output.pieces)
            if not _same_values(stream, output, entry.pieces[0], advance):
                changed.append(name)
    if changed:
        raise UserError(f"{len(changed)} of {len(expected)} tensors differ, first {changed[0]!r}")
    return f"{len(expected)} tensors equal, byte for byte"


def _same_values(stream: TensorStream, output: OutputTensor, span: Span, advance: Callable[[int], object]) -> bool:
    position = span.stored.offset + span.start * item_size(span.dtype)
    same = True
    for chunk in stream.chunks(output):
        written = bytearray(len(chunk))
        stream.read_into(span.stored.file, position, memoryview(written))
        same = same and written == chunk
        position += len(chunk)
        advance(len(chunk))
    return same


def available_memory() -> int:
    """Bytes of memory that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _number_checks(folder: Path, config, projector: str, plan: Plan) -> list[Check]:
    """Both sides computed in fp32 on one picture and prompt, one after the other."""
    needed = sum(output.nbytes // item_size(output.dtype) for output in plan.tensors) * NUMBERS_BYTES_PER_WEIGHT
    free = available_memory()
    if needed > free:
        detail = f"not computed: {format_bytes(needed)} of memory needed, {format_bytes(free)} free"
        return [Check("numbers", None, detail)]
    import torch

    from modeling_delta_llava.conversion.reference import reference_stages

    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    pixel_values = torch.randn(1, 3, side, side, generator=generator)
    before, after = (torch.randint(0, plan.source_rows, (1, count), generator=generator) for count in (5, 9))
    for ids in (before, after):
        ids[ids == config.image_token_id] = 0
    found = model_stages(folder, config, projector, pixel_values, before, after)
    with TensorStream(scan=False) as stream:
        tensors = _reference_tensors(plan, stream)
        wanted = reference_stages(tensors, config, projector, pixel_values, before, after)
    checks = []
    rows = wanted["logits"].shape[-1]
    new, found["logits"] = found["logits"][..., rows:], found["logits"][..., :rows]
    for name, reference in wanted.items():
        difference = float((found[name] - reference).abs().max() / reference.abs().max())
        checks.append(Check(f"numbers: {name}", difference <= TOLERANCE, f"largest difference {difference:.1e}"))
    same = found["logits"].argmax(-1) == wanted["logits"].argmax(-1)
    detail = f"{int(same.sum())} of {same.numel()} equal"
    checks.append(Check("numbers: most likely tokens", bool(same.all()), detail))
    if new.numel():
        lower = bool((new.amax(-1) <= found["logits"].amax(-1)).all())
        checks.append(
            Check("numbers: new vocabulary rows", lower, f"{new.shape[-1]} rows never have the largest logit")
        )
    return checks


def model_stages(folder: Path, config, projector: str, pixel_values, before, after) -> dict:
    """The same stages as `reference_stages`, from the loaded folder in fp32."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from modeling_delta_llava import DeltaLlavaForConditionalGeneration

    model_class = LlavaForConditionalGeneration if projector == forms.PLAIN else DeltaLlavaForConditionalGeneration
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        if projector == forms.PLAIN:
            stages = {f"tower layer {config.vision_feature_layer}": states[config.vision_feature_layer]}
        else:
            layers = config.memory_feature_layers
            stages = {f"tower layer {layer}": states[config.hidden_state_index(layer)] for layer in layers}
        visual = model.get_image_features(pixel_values, return_dict=True).pooler_output
        visual = torch.stack([tokens.reshape(-1, tokens.shape[-1]) for tokens in visual])
        placeholders = torch.full((1, visual.shape[1]), config.image_token_id)
        input_ids = torch.cat([before, placeholders, after], 1)
        logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
    return stages | {"projector": visual, "logits": logits}


def _reference_tensors(plan: Plan, stream: TensorStream) -> dict:
    """fp32 tensors by training key: read under the source's own keys where it has all of them.

    A stage-2 checkpoint with its tower inside is read as it is, without the key tables; any other source has no
    training keys for every tensor (a base model, a tower repository, LoRA factors), so its plan is taken back through
    the tables.
    """

    inside = plan.record["tower_keys"]
    if plan.form == forms.STAGE2 and inside:
        stored = read_checkpoint(plan.folders["SOURCE"]).tensors
        tensors = {key: stream.load(t).float() for key, t in stored.items() if t.dtype in FLOATING}
        if inside == "flat":
            start = "model.vision_tower.vision_tower."
            tensors = {
                key.replace(start, start + "vision_model.", 1) if key.startswith(start) else key: tensor
                for key, tensor in tensors.items()
            }
    else:
        entries = {plan.names[o.name]: Entry(o.dtype, o.shape, o.pieces) for o in plan.tensors}
        record = plan.record | {"tower_keys": "old", "dropped_tensors": {}, "tied_head_saved": False}
        outputs = training_tensors(entries, plan.projector, record, plan.source_rows)
        tensors = {output.name: load_output(output, stream).float() for output in outputs}
    return tensors
