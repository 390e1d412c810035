"""`delta-llava verify`: is a Hub folder complete and loadable, and does it hold what its source holds?"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from delta_llava.errors import UserError, reason, told
from modeling_delta_llava.conversion import configs
from modeling_delta_llava.conversion.assemble import Assembly, Options, assemble
from modeling_delta_llava.conversion.convert import progress_bar, quiet_transformers
from modeling_delta_llava.conversion.export import read_hub_config, read_hub_weights
from modeling_delta_llava.conversion.source import DELTA, Checkpoint
from modeling_delta_llava.conversion.write import Weights, count_nonfinite, same_values
from modeling_delta_llava.folders import format_bytes, holds_model
from modeling_delta_llava.foreign_code import check_code, code_files, refuse_foreign_code
from modeling_delta_llava.json_files import check_files, read_json
from modeling_delta_llava.sources import require_folder

REQUIRED_FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json")
# Bytes that loading and one forward pass take, for each byte of the weights.
MEMORY_FACTOR = 1.3


@dataclass(frozen=True)
class Check:
    """One row of the result: `passed` is None for a check that was not made."""

    name: str
    passed: bool | None
    detail: str


@dataclass
class _Opened:
    """A Hub folder, and what the checks have read of it so far."""

    folder: Path
    config: object = None
    projector: str = ""
    weights: Weights = field(default_factory=dict)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


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
        numbers: also load the model and look at one answer's logits, when memory allows.

    Returns:
        one [`Check`] per row; the folder is good when none has `passed` False.

    Raises:
        UserError: `folder` is no folder or brings code that is not this package's, the source cannot be read, or one
            of them changed meanwhile.
    """
    folder = require_folder(Path(folder), "FOLDER")
    if holds_model(folder):
        refuse_foreign_code(folder)
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, True, check()))
        except (UserError, OSError) as error:
            checks.append(Check(name, False, reason(error)))
        return bool(checks[-1].passed)

    with quiet_transformers(downloads=progress):
        run("files", lambda: _check_files(folder))
        opened = _Opened(folder)
        if not run("config", lambda: _check_config(opened)):
            return checks
        config, projector = opened.config, opened.projector
        if projector == DELTA:
            run("code", lambda: _check_code(folder))
        run("generation config", lambda: _check_generation(folder, config))
        run("processor", lambda: _check_processor(folder, config, projector))
        if run("tensor names and shapes", lambda: _check_names(opened)):
            weights = opened.weights
            run("finite values", lambda: _check_finite(weights, progress))
            if against is not None:
                source = assemble(against, options or Options())
                run("tensors of the source", lambda: _compare_tensors(weights, source, progress))
                source.check_sources_unchanged()
            opened.checkpoint.check_unchanged()
        if numbers and passed(checks):
            needed = MEMORY_FACTOR * sum(weight.nbytes for weight in opened.weights.values())
            free = psutil.virtual_memory().available
            if needed > free:
                detail = f"not computed: {format_bytes(needed)} of memory needed, {format_bytes(free)} free"
                checks.append(Check("numbers", None, detail))
            else:
                run("numbers", lambda: _check_numbers(folder, config, projector))
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


def _check_config(opened: _Opened) -> str:
    from modeling_delta_llava.configuration_delta_llava import AUTO_MAP

    opened.config, opened.projector = config, projector = read_hub_config(opened.folder)
    if projector == DELTA:
        written = read_json(opened.folder / "config.json").get("auto_map") or {}
        wrong = [name for name, target in AUTO_MAP.items() if written.get(name) != target]
        if wrong:
            raise UserError(f"auto_map lacks or differs in {', '.join(wrong)}")
    return f"{config.model_type}, {config.text_config.model_type} + {config.vision_config.model_type}"


def _check_code(folder: Path) -> str:
    check_code(folder)
    return f"{len(code_files())} files, as in this package"


def _check_generation(folder: Path, config) -> str:
    from transformers import GenerationConfig

    with told("not valid", "let `delta-llava convert` write it anew"):
        generation = GenerationConfig.from_pretrained(folder)
        generation.validate(strict=True)
    if config.image_token_id not in (generation.suppress_tokens or []):
        raise UserError(f"the image token {config.image_token_id} may be generated: add it to suppress_tokens")
    return f"valid, {len(generation.suppress_tokens)} tokens suppressed"


def _check_processor(folder: Path, config, projector: str) -> str:
    from PIL import Image

    from modeling_delta_llava.building import check_chat_template
    from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor

    if projector == DELTA:
        processor_class, expected = DeltaLlavaProcessor, config.num_visual_tokens
    else:
        from transformers import LlavaProcessor

        processor_class, expected = LlavaProcessor, config.image_seq_length
    check_files(folder)
    with told("it cannot be used", "copy its files and its tokenizer again"):
        processor = processor_class.from_pretrained(folder, trust_remote_code=False)
        check_chat_template(processor, str(folder))
        side = config.vision_config.image_size
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=Image.new("RGB", (side, side)), text=prompt, return_tensors="pt")
    count = int((inputs["input_ids"] == config.image_token_id).sum())
    if count != expected:
        raise UserError(
            f"a picture becomes {count} tokens of id {config.image_token_id}, the model expects {expected}"
        )
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= config.text_config.vocab_size:
        raise UserError(f"token id {largest} has no embedding row (vocab_size {config.text_config.vocab_size})")
    return f"{count} tokens per picture, image token id {config.image_token_id}"


def _check_names(opened: _Opened) -> str:
    opened.weights, opened.checkpoint = read_hub_weights(opened.folder, opened.config, opened.projector)
    files = {weight.file for weight in opened.weights.values()}
    size = sum(path.stat().st_size for path in files)
    return f"{len(opened.weights)} tensors in {len(files)} file{'s' * (len(files) != 1)}, {format_bytes(size)}"


def _check_finite(weights: Weights, progress: bool) -> str:
    found = {}
    total = sum(weight.nbytes for weight in weights.values())
    with progress_bar(total, "scanning", progress) as bar:
        for name, weight in weights.items():
            if count := count_nonfinite(weight.stored):
                found[name] = count
            bar.update(weight.nbytes)
    if found:
        name, count = next(iter(found.items()))
        raise UserError(f"{len(found)} tensors with NaN or infinity, first {name!r} ({count} values)")
    return f"{format_bytes(total)} scanned"


def _compare_tensors(weights: Weights, source: Assembly, progress: bool) -> str:
    expected = source.weights
    if expected.keys() != weights.keys():
        name = sorted(expected.keys() ^ weights.keys())[0]
        raise UserError(f"{name!r} is only in the {'source' if name in expected else 'folder'}")
    changed = []
    with progress_bar(source.nbytes, "comparing", progress) as bar:
        for name, weight in expected.items():
            written = weights[name].stored
            if tuple(written.shape) != weight.shape:
                raise UserError(f"{name!r} has shape {tuple(written.shape)}, the source gives {weight.shape}")
            # A folder converted with --dtype is compared with the source rounded in the same way.
            if not same_values(replace(weight, dtype=written.dtype).value(), written):
                changed.append(name)
            bar.update(weight.nbytes)
    if changed:
        raise UserError(f"{len(changed)} of {len(expected)} tensors differ, first {changed[0]!r}")
    return f"{len(expected)} tensors equal, byte for byte"


def _check_numbers(folder: Path, config, projector: str) -> str:
    """Loads the model as a user would and looks at its logits on a picture and a prompt."""
    record = configs.read_record(folder)
    rows = record["vocabulary_rows"] if record else config.text_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    text = torch.randint(0, rows, (1, 14), generator=generator)
    text[text == config.image_token_id] = 0
    with told("the model cannot be used", "convert it again"):
        model, loading = configs.model_class(projector).from_pretrained(folder, dtype="auto", output_loading_info=True)
        pixel_values = torch.randn(1, 3, side, side, generator=generator, dtype=torch.float32).to(model.dtype)
        with torch.no_grad():
            pictures = model.eval().get_image_features(pixel_values, return_dict=True).pooler_output
            visual = torch.cat([tokens.flatten(0, -2) for tokens in pictures])
            placeholders = torch.full((1, visual.shape[0]), config.image_token_id)
            input_ids = torch.cat([text[:, :5], placeholders, text[:, 5:]], 1)
            logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(f"loading leaves {len(missing)} weights at random, the first is {missing[0]!r}")
    for name, values in (("visual tokens", visual), ("logits", logits)):
        if not values.isfinite().all():
            raise UserError(f"the {name} are not finite")
    known, new = logits[..., :rows], logits[..., rows:]
    if new.numel() and not bool((new.amax(-1) <= known.amax(-1)).all()):
        raise UserError("one of the new vocabulary rows has the largest logit")
    return f"loaded; {visual.shape[0]} visual tokens and {logits.shape[1]} x {logits.shape[2]} logits are finite"
