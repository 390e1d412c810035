"""Files of a model card: README.md with metadata, `.eval_results`, a figure, LICENSE and NOTICE.

A listed variant's card quotes the paper's tables through `variants`. Any other folder's card says what its config and
its training say, and nothing else.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from safetensors import safe_open
from transformers import TrainerState

from delta_llava.errors import UserError, told
from modeling_delta_llava.card import (
    EXAMPLE,
    LICENCE_FIELDS,
    PAPER,
    PIPELINE_TAG,
    PLACEHOLDER,
    Facts,
    metadata_of,
    progress,
    render,
    state_of,
)
from modeling_delta_llava.folders import check_output_folder
from modeling_delta_llava.foreign_code import refuse_foreign_code
from modeling_delta_llava.hub_cards.figure import chart_for, draw_chart, draw_scores
from modeling_delta_llava.hub_cards.licences import licence_text, notice
from modeling_delta_llava.hub_cards.measured import Measurement, read_measurements, shown_scores
from modeling_delta_llava.hub_cards.metadata import as_list, check_reference, check_repository, licence_problem
from modeling_delta_llava.hub_cards.variants import (
    MISSING,
    UNCOMPRESSED_TOKENS,
    Row,
    Variant,
    benchmarks,
    get_variant,
    markdown,
    paper_tables,
)
from modeling_delta_llava.json_files import read_json
from modeling_delta_llava.sources import is_hub_id

FIGURE, MEASURED_FIGURE = "scores.png", "measured.png"
DEFAULT_REVISION = "v1.0"
TRAINER_STATE_FILE = "trainer_state.json"
MEANINGS = {
    "architecture": {
        "released": "as the authors' code computes it",
        "ours": "the authors' code does not support this tower; its geometry is our extension",
    },
    "recipe": {
        "released": "as the authors' scripts run it",
        "reconstructed": "from the paper and the authors' scripts for other variants",
        "ours": "chosen for this model",
    },
    "prompt_format": {
        "released": "as the authors' code formats it",
        "ours": "the language model's own chat template; the authors' run cannot be repeated from their code",
    },
    "weights": {
        "released": "converted from the authors' weights",
        "reconstructed": "trained anew by the publisher of this repository; the authors have not released theirs",
        "ours": "trained by the publisher of this repository; the paper has no such model",
    },
}
RATES = {
    "tokens_per_second": "{} tokens per second",
    "total_tflops": "{} TFLOPs in all",
    "prefill_tflops": "{} TFLOPs of prefill",
    "decode_tflops": "{} TFLOPs of decoding",
    "vision_tflops": "{} TFLOPs in the tower",
}

# --- scores ----------------------------------------------------------------------------------------------------------


def _label(row: Row, ours: bool) -> str:
    """A row's method for readers: who is compared with whom."""
    if row.table == "6" and row.tokens == UNCOMPRESSED_TOKENS:
        return f"LLaVA-1.5 {row.method.split()[-1]}"
    if row.table == "5":
        return f"Delta-LLaVA, {row.method}"
    return "Delta-LLaVA" + (" 13B" if "13B" in row.method else "") if ours else row.method


def score_table(rows: Sequence[Row], baselines: Sequence[Row]) -> str:
    """A Markdown table of rows of one table of the paper: comparisons first, this variant last and in bold."""
    names = [name for name in benchmarks() if any(name in row.scores for row in (*rows, *baselines))]
    cells = [[_label(row, False), *row.values(["tokens", *names])] for row in baselines]
    for row in rows:
        ours = [_label(row, True), *row.values(["tokens", *names])]
        cells.append([cell if cell == MISSING else f"**{cell}**" for cell in ours])
    return markdown(["method", "visual tokens", *names], cells)


def _score_tables(variant: Variant) -> list[tuple[str, str]]:
    """(source, table) for each table of the paper that has this variant; baselines from elsewhere are left out."""
    result = []
    for source in dict.fromkeys(row.source for row in variant.rows):
        rows = [row for row in variant.rows if row.source == source]
        others = [row for row in variant.baselines if row.source == source]
        if source == "Table 5":
            others = [row for row in paper_tables()["5"].rows if row not in rows]
        result.append((source, score_table(rows, others)))
    return result


def _reference_tables(variant: Variant) -> list[tuple[str, str]]:
    """(source, table) of LLaVA-1.5's own figures in the tables that do not have this variant."""
    covered = {row.source for row in variant.rows}
    full = [row for row in variant.baselines if row.tokens == UNCOMPRESSED_TOKENS and row.source not in covered]
    return [(row.source, score_table([], [row])) for row in full]


def _attribution(variant: Variant) -> str:
    text = "Bold figures are what the paper reports for its authors' own run of this variant"
    if variant.provenance["weights"] != "released":
        text += "; **they were not measured from the weights in this repository**"
    return f"{text}. Figures at 576 tokens are LLaVA-1.5's own. The tables name no metric except CIDEr, and no split."


def paper_results(variant: Variant) -> Iterator[tuple[EvalResult, EvalResultEntry]]:
    """The paper's scores as model-index entries and as `.eval_results` entries, each with its table."""
    for score in variant.scores:
        benchmark = benchmarks()[score.benchmark]
        source = {"source_name": f"Delta-LLaVA paper, {score.source}", "source_url": PAPER["url"]}
        old = EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=benchmark["dataset"],
            dataset_name=benchmark["name"],
            metric_type=benchmark["metric"],
            metric_name=f"{score.benchmark} (reported by the paper, {score.source})",
            metric_value=score.value,
            **source,
        )
        new = EvalResultEntry(
            dataset_id=benchmark["dataset"],
            task_id=benchmark["task_id"],
            value=score.value,
            notes=f"Reported by the paper for its authors' run at {variant.num_visual_tokens} visual tokens"
            + ("" if variant.provenance["weights"] == "released" else "; not measured from these weights"),
            **source,
        )
        yield old, new


def _measured_results(
    measured: Sequence[Measurement], repo_id: str | None, revision: str
) -> Iterator[tuple[EvalResult, EvalResultEntry | None]]:
    """Measured scores in both forms; the second names a data set, and is None where the task's is not known."""
    for entry in measured:
        url = f"https://huggingface.co/{repo_id or PLACEHOLDER}/blob/{revision}/{entry.file}"
        source = {"source_name": entry.file, "source_url": url}
        old = EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=entry.dataset or entry.task,
            dataset_name=entry.task,
            metric_type=entry.metric,
            metric_name=f"{entry.metric} (measured from this repository){entry.part}",
            metric_value=entry.value,
            **source,
        )
        # The Hub compares these with others': a part of the rows is no score of the data set.
        new = (
            entry.dataset
            and not entry.rows
            and EvalResultEntry(
                dataset_id=entry.dataset,
                task_id=entry.task,
                value=entry.value,
                date=entry.date,
                notes=f"{entry.metric}, measured from this repository at {entry.tokens} visual tokens",
                **source,
            )
        )
        yield old, new or None


# --- facts -----------------------------------------------------------------------------------------------------------


def variant_sections(variant: Variant, quantized: bool = False) -> dict[str, Any]:
    """What the template says of a listed variant alone."""
    chart = chart_for(variant)
    models = (("language model", variant.backbone.id), ("vision tower", variant.tower.id))
    origins = {} if quantized else variant.provenance
    rates = variant.rates.scores if variant.rates else {}
    return {
        "lead": f"{variant.backbone.label} that sees a picture as **{variant.num_visual_tokens} visual tokens**: "
        f"Delta-LLaVA ([{PAPER['title']}]({PAPER['url']})) with {variant.tower.label}.",
        "details": [(label, f"[{name}](https://huggingface.co/{name})") for label, name in models],
        "provenance": [(part.replace("_", " "), origin, MEANINGS[part][origin]) for part, origin in origins.items()],
        "notes": () if quantized else variant.notes,
        "score_tables": _score_tables(variant),
        "reference_tables": _reference_tables(variant),
        "attribution": _attribution(variant),
        "figure": FIGURE if chart else None,
        "figure_text": chart.alternative_text if chart else "",
        "recipe": variant.recipe,
        "training_time": variant.training_time.cells if variant.training_time else None,
        "baseline_time": paper_tables()["4"].row("LLaVA 576").cells,
        "rates": ", ".join(RATES[name].format(text) for name, text in rates.items() if name in RATES),
        "weights_source": variant.weights_source,
    }


def count_parameters(folder: Path) -> int | None:
    """Elements of all tensors, from the headers of the safetensors files; None without any."""
    total = 0
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with told(f"{path} is damaged", "convert or save it again"), safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total if files else None


def _components(facts: Facts, variant: Variant | None) -> list[tuple[str, str]]:
    """What NOTICE lists, each with its licence in words."""
    lines = [("the modelling code (*.py)", "Apache-2.0, the contributors of delta-llava")]
    if variant:
        lines.append((f"the language model {variant.backbone.id}", variant.backbone.licence["license"]))
        lines.append((f"the vision tower {variant.tower.id}", "see its model page"))
        if variant.weights_source:
            lines.append((f"weights of {variant.weights_source}", "no licence stated by their authors"))
    else:
        lines += [(f"the model {name}", "see its model page") for name in facts.base_models]
    lines += [(f"the training data {name}", "see its data set page") for name in facts.datasets]
    lines.append((f"the method of {PAPER['title']!r} by {PAPER['authors']}", PAPER["url"]))
    return lines


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Delta-LLaVA folder. Raises `UserError` for anything else."""
    config = read_json(folder / "config.json")
    vision, text = config.get("vision_config"), config.get("text_config")
    whole = isinstance(vision, dict) and isinstance(text, dict)
    counts = [config.get("num_visual_tokens"), vision.get("image_size"), vision.get("patch_size")] if whole else []
    whole = whole and all(isinstance(count, int) and count > 0 for count in counts)
    if config.get("model_type") != "delta_llava" or not whole:
        raise UserError(
            f"{folder}/config.json is not a Delta-LLaVA config (model_type {config.get('model_type')!r}): give the "
            "folder that `delta-llava convert` wrote"
        )
    return config


def _config_base_models(config: dict[str, Any]) -> tuple[str, ...]:
    """Hub ids that the config records for its language model and tower; paths are no ids."""
    names = [config[part].get("_name_or_path") for part in ("text_config", "vision_config")]
    return tuple(name for name in names if name and is_hub_id(str(name)))


def _trainers_record(folder: Path) -> dict[str, Any] | None:
    """How far transformers' Trainer got, from the state that it keeps beside a model."""
    file = folder / TRAINER_STATE_FILE
    if not file.is_file():
        return None
    with told(f"{file} cannot be read", "delete it or restore it"):
        return progress(TrainerState.load_from_json(str(file)))


def gather_facts(
    folder: Path,
    variant: Variant | None = None,
    repo_id: str | None = None,
    revision: str = DEFAULT_REVISION,
    licence: dict[str, str] | None = None,
    base_models: Sequence[str] = (),
    name: str | None = None,
) -> Facts:
    """Everything known about a folder. Raises `UserError` when it does not fit the variant."""
    config = read_config(folder)
    if variant and (differences := variant.shape_differences(config)):
        raise UserError(f"{folder} is not {variant.name}: {'; '.join(differences)}: leave out --variant")
    present = metadata_of(folder)
    bases = tuple(base_models) or ((variant.backbone.id, variant.tower.id) if variant else ())
    bases = bases or tuple(as_list(present.get("base_model"))) or _config_base_models(config)
    quantized, quantization = config.get("quantization_config"), None
    if quantized:
        bits = 4 if quantized.get("load_in_4bit") else 8
        method = f"bitsandbytes {quantized.get('bnb_4bit_quant_type', 'nf4').upper()}" if bits == 4 else "LLM.int8()"
        of = f"[{bases[0]}](https://huggingface.co/{bases[0]})" if bases else "a Delta-LLaVA model"
        quantization = {"bits": bits, "method": method, "of": of}
    stated = {field: present[field] for field in LICENCE_FIELDS if present.get(field)}
    licence = licence or (variant.licence if variant else {}) or stated
    text_known = bool(licence) and licence_text(licence["license"]) is not None
    return Facts(
        name or (variant.name if variant else folder.resolve().name),
        config,
        repo_id=repo_id,
        revision=revision,
        variant=variant.name if variant else None,
        licence=licence,
        licence_file=text_known or (folder / "LICENSE").is_file(),
        base_models=bases,
        datasets=variant.recipe.datasets if variant else tuple(as_list(present.get("datasets"))),
        languages=variant.backbone.language if variant else tuple(as_list(present.get("language"))),
        relation="quantized" if quantized else "finetune",
        parameters=None if quantized else count_parameters(folder),
        training=None if variant or quantized else state_of(present).get("training") or _trainers_record(folder),
        quantization=quantization,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all; a killed process leaves a hidden one, which the next call replaces."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write_card(
    folder: Path,
    variant: str | None = None,
    repo_id: str | None = None,
    revision: str = DEFAULT_REVISION,
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    base_models: Sequence[str] = (),
    results: Sequence[Path] = (),
    name: str | None = None,
) -> Path:
    """Writes README.md, NOTICE, the pictures, `.eval_results`, and LICENSE where its text is known; README's path.

    Args:
        folder: a Hub folder.
        variant: name of the listed variant that it is; by default none.
        repo_id: what the snippets load; by default a placeholder, which `publish` refuses.
        revision: tag that the snippets pin.
        licence: identifier of the Hub; by default the variant's, or what the present card states. "other" needs a name
            and a link.
        base_models: Hub ids for `base_model`; by default the variant's, or what the config records.
        results: result files of lmms-eval, or folders of them, which are copied into `eval/`.
        name: title; by default the variant's name, or the folder's.

    Raises:
        UserError: the folder is no Delta-LLaVA folder or not that variant, or brings code that is not this package's;
            the licence is not one of the Hub's, or a name cannot be one.
    """
    folder = Path(folder)
    read_config(folder)
    check_output_folder(folder, str(folder), "holds no model", is_ours=True)
    refuse_foreign_code(folder)
    for repository in (*([] if repo_id is None else [repo_id]), *base_models):
        check_repository(repository)
    check_reference(revision)
    stated = dict(zip(LICENCE_FIELDS, (licence, licence_name, licence_link), strict=True))
    stated = {field: value for field, value in stated.items() if value}
    if stated and (problem := licence_problem(stated, {path.name for path in folder.iterdir()})):
        raise UserError(f"--license: {problem} (https://huggingface.co/docs/hub/repositories-licenses)")
    listed = get_variant(variant) if variant else None
    facts = gather_facts(folder, listed, repo_id, revision, stated, base_models, name)
    compared = None if facts.quantization else listed
    measured, copied = read_measurements(folder, results, facts.config["num_visual_tokens"], compared)
    papers = list(paper_results(listed)) if listed and not facts.quantization else []
    ours = list(_measured_results(measured, repo_id, revision))
    sections = variant_sections(listed, bool(facts.quantization)) if listed else {}
    drawn = shown_scores(measured)
    several = len({entry.tokens for entry in drawn}) > 1
    sections["measured_figure"] = MEASURED_FIGURE if several else None
    card = render(facts, [old for old, _ in (*papers, *ours)], measured=measured, **sections)

    files = {**copied, EXAMPLE.name: EXAMPLE.read_bytes()}
    files[MEASURED_FIGURE] = draw_scores(drawn) if several else b""
    if sections.get("figure"):
        files[FIGURE] = draw_chart(chart_for(listed))
    for kind, found in (("paper", papers), ("measured", ours)):
        entries = eval_result_entries_to_yaml([new for _, new in found if new])
        text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=100) if entries else ""
        files[f".eval_results/{kind}.yaml"] = text.encode()
    identifier = facts.licence.get("license")
    if identifier and not (folder / "LICENSE").exists():
        files["LICENSE"] = (licence_text(identifier) or "").encode()
    files["NOTICE"] = notice(_components(facts, listed), identifier == "llama2").encode()
    files["README.md"] = str(card).encode()
    for path, content in files.items():
        if content:
            write_file(folder / path, content)
        else:
            (folder / path).unlink(missing_ok=True)
    return folder / "README.md"
