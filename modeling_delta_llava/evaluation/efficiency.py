"""The efficiency profile: what every visual-token budget costs, counted from the config and measured on a device."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delta_llava.errors import UserError, told
from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.asking import check_device, model_folder
from modeling_delta_llava.building import check_budgets
from modeling_delta_llava.json_files import read_json

from . import figure
from .counts import (
    PAPER_NEW_TOKENS,
    PAPER_TEXT_TOKENS,
    TextGeometry,
    closed_form,
    counted,
    has_closed_form,
    meta_model,
    paper_convention,
    parameters,
)
from .measurements import measure
from .units import flop_unit, readable_number

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(source: str) -> DeltaLlavaConfig:
    """Config of a Delta-LLaVA folder or Hub repository.

    Raises:
        UserError: if there is none, or it is another model's.
    """
    fields = read_json(model_folder(source, weights=False) / "config.json")
    if fields.get("model_type") != DeltaLlavaConfig.model_type:
        raise UserError(
            f"{source}: its config.json says model_type {fields.get('model_type')!r}, not "
            f"{DeltaLlavaConfig.model_type!r}; convert a training checkpoint first (`delta-llava convert`)"
        )
    with told(f"{source}: its config.json describes no model", "repair it"):
        return DeltaLlavaConfig.from_dict(fields)


def count(
    config: DeltaLlavaConfig,
    budgets: Sequence[int],
    text_tokens: int = PAPER_TEXT_TOKENS,
    new_tokens: int = PAPER_NEW_TOKENS,
) -> dict[str, Any]:
    """Parameters, FLOPs and cache bytes at every budget, without weights.

    The result has `parameters` and `budgets`, a list with one entry per budget: FLOPs by component `counted` by
    torch, in `closed_form` (left out for decoders it does not describe) and in the
    `paper_convention`; `key_value_cache_bytes` in 16 bit for prompt and answer.
    """
    model = meta_model(config)
    rows = []
    for budget in budgets:
        row: dict[str, Any] = {"num_visual_tokens": budget}
        row["flops"] = {"counted": counted(model, budget, text_tokens, new_tokens).to_dict()}
        if has_closed_form(config.text_config):
            row["flops"]["closed_form"] = closed_form(config, budget, text_tokens, new_tokens).to_dict()
            row["flops"]["paper_convention"] = paper_convention(config, budget, text_tokens, new_tokens).to_dict()
        geometry = TextGeometry.of(config.text_config)
        row["key_value_cache_bytes"] = geometry.key_value_bytes(text_tokens + budget + new_tokens)
        rows.append(row)
    return {
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "parameters": parameters(model),
        "budgets": rows,
    }


def profile(
    config: DeltaLlavaConfig,
    name: str,
    weights: str | None = None,
    budgets: Sequence[int] | None = None,
    text_tokens: int = PAPER_TEXT_TOKENS,
    new_tokens: int = PAPER_NEW_TOKENS,
    batch_size: int = 8,
    repeats: int = 5,
    device: str | None = None,
    dtype: str | None = None,
    json_file: Path | None = None,
    png_file: Path | None = None,
) -> dict[str, Any]:
    """The profile of a model, written to the files that are given.

    Args:
        config: its geometry.
        name: what table and figure call it.
        weights: folder or Hub id to measure, `"random"` to measure random weights, `None` to count only.
        budgets: visual tokens per image; by default every legal number.
        text_tokens: of the prompt.
        new_tokens: of the answer.
        batch_size: rows of the requests/s measurement.
        repeats: calls per measurement.
        device: by default the CUDA device when there is one.
        dtype: a name of `DTYPES`; by default as stored, bfloat16 for random weights.
        json_file: where to write it.
        png_file: where to draw it.

    Raises:
        UserError: for a budget, device, dtype, file name or weights that cannot be used.
    """
    if png_file is not None:
        figure.check(png_file)
    for file, mark in ((json_file, b'"num_visual_tokens"'), (png_file, b"Matplotlib")):
        if file is not None:
            check_writable(file, mark)
    check_budgets(config, budgets)
    budgets = sorted(set(budgets or config.legal_num_visual_tokens), reverse=True)
    place = check_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    context = getattr(config.text_config, "max_position_embeddings", None)
    if weights is not None and context is not None and text_tokens + budgets[0] + new_tokens > context:
        raise UserError(
            f"{budgets[0]} visual, {text_tokens} text and {new_tokens} new tokens do not fit the language model's "
            f"context of {context}; ask for less"
        )
    with told(f"{name}: its config describes no model", "repair it"):
        document = {"model": name, **count(config, budgets, text_tokens, new_tokens)}
    if weights is not None:
        if weights == "random":
            model = random_model(config, place, DTYPES[dtype or "bfloat16"])
        else:
            model = load_model(weights, place, DTYPES[dtype] if dtype else "auto")
        document = measured(model, document, batch_size, repeats)
    if json_file is not None:
        write_json(document, json_file)
    if png_file is not None:
        figure.draw(document, png_file)
    return document


def check_writable(file: Path, mark: bytes):
    """Makes the folder of a result file, which may hold an earlier result: something with `mark` in it.

    Raises:
        UserError: the file cannot be written there, or holds something else than an earlier result.
    """
    try:
        if file.is_file() and file.stat().st_size and mark not in file.read_bytes():
            raise UserError(f"{file} exists and `profile` did not write it; give another file")
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        with file.open("a"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); give another file") from error


def load_model(source: str, device: torch.device, dtype: torch.dtype | str) -> DeltaLlavaForConditionalGeneration:
    """The model of a folder or repository, for measurements.

    Raises:
        UserError: if its weights cannot be read, or do not fit in memory.
    """
    advice = "check it with `delta-llava verify`, or count without weights by --analytic"
    with told(f"{source}: its weights cannot be loaded", advice):
        return DeltaLlavaForConditionalGeneration.from_pretrained(source, dtype=dtype).eval().to(device)


def random_model(
    config: DeltaLlavaConfig, device: torch.device, dtype: torch.dtype
) -> DeltaLlavaForConditionalGeneration:
    """A model of this geometry with random weights, for measurements without a checkpoint."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return DeltaLlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(previous)


def measured(
    model: DeltaLlavaForConditionalGeneration, document: dict[str, Any], batch_size: int = 8, repeats: int = 5
) -> dict[str, Any]:
    """`document` (from `count`) with measurements of `model` at its budgets and a description of the device."""
    device = model.device
    rows = []
    for row in document["budgets"]:
        figures = measure(
            model,
            row["num_visual_tokens"],
            document["text_tokens"],
            max(document["new_tokens"], 2),
            batch_size=batch_size,
            repeats=repeats,
        )
        rows.append({**row, "measured": figures.to_dict()})
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "repeats": repeats,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    return {**document, "measured_on": about, "budgets": rows}


def write_json(document: dict[str, Any], path: Path):
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def cost_rows(document: dict[str, Any]) -> dict[str, Any]:
    """A measured profile for a page: `name`, heads of `columns`, `rows` of cells (the budget first), `about` all."""
    unit, size = flop_unit(document)
    parts = {"vision_tower": "tower", "projector": "projector", "prefill": "prefill", "decode": "decode"}
    rows = []
    for row in document["budgets"]:
        flops, paper = row["flops"]["counted"], row["flops"].get("paper_convention")
        counts = [*(flops[part] for part in (*parts, "total")), *([paper["total"]] if paper else [])]
        speed = row["measured"]["generate_tokens_per_s"]
        rows.append([str(row["num_visual_tokens"]), f"{speed:.2f}", *(f"{count / size:.3f}" for count in counts)])
    columns = ["tokens/s", *(f"{unit}: {label}" for label in (*parts.values(), "total"))]
    if len(rows[0]) > 1 + len(columns):
        columns.append(f"{unit} as the paper counts")
    about = document["measured_on"]
    return {
        "name": document["model"],
        "columns": columns,
        "rows": rows,
        "about": f"One picture, {document['text_tokens']} text tokens, {document['new_tokens']} new tokens; tokens/s "
        f"of the whole answer, measured on {about['device']} in {about['dtype']} with {about['threads']} threads. The "
        "paper's count leaves out one MLP matrix of three and the output head.",
    }


def table(document: dict[str, Any]) -> "Table":
    """The profile as a table: one row per budget, FLOPs by component, then what was measured."""
    from rich.table import Table

    unit, size = flop_unit(document)
    result = Table(
        title=f"{document['model']}: {readable_number(document['parameters']['total'])} parameters; one image, "
        f"{document['text_tokens']} text tokens, {document['new_tokens']} new tokens",
        caption=f"{unit} as counted by torch; the paper's count leaves out one MLP matrix of three and the output "
        "head. KV cache in 16 bit.",
        title_justify="left",
        caption_justify="left",
    )
    headings = ["Visual tokens", f"Tower {unit}", "Projector", "Prefill", "Decode", "Total", "Paper's count"]
    headings += ["KV cache MB"]
    is_measured = "measured_on" in document
    if is_measured:
        about = document["measured_on"]
        headings += ["Tower ms", "Projector ms", "Prefill ms", "First token ms", "Decode tokens/s", "Requests/s"]
        headings += ["Peak MiB"]
        result.caption += (
            f" Measured on {about['device']} in {about['dtype']}; requests/s at batch "
            f"{document['budgets'][0]['measured']['batch_size']}."
        )
    for heading in headings:
        result.add_column(heading, justify="right")
    for row in document["budgets"]:
        flops, paper = row["flops"]["counted"], row["flops"].get("paper_convention")
        cells = [str(row["num_visual_tokens"])]
        cells += [f"{flops[part] / size:.3f}" for part in ("vision_tower", "projector", "prefill", "decode", "total")]
        cells += [f"{paper['total'] / size:.3f}" if paper else "–", f"{row['key_value_cache_bytes'] / 1e6:.1f}"]
        if is_measured:
            figures = row["measured"]
            peak = figures["peak_memory_mib"]
            cells += [
                f"{figures[name]:.1f}"
                for name in ("vision_tower_ms", "projector_ms", "prefill_ms", "time_to_first_token_ms")
            ]
            cells += [f"{figures[name]:.2f}" for name in ("decode_tokens_per_s", "requests_per_s")]
            cells += ["–" if peak is None else f"{peak:.0f}"]
        result.add_row(*cells)
    return result


def print_table(document: dict[str, Any]):
    """Print the table on standard output, as wide as it needs to be when that is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=250)
    console.print(table(document))
