"""Model cards: README.md with metadata, `.eval_results`, a figure, LICENSE and NOTICE.

A listed variant's card quotes the paper's tables through `variants`. Any other folder's card says what its config and
its trainer's record say, and nothing else.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from safetensors import SafetensorError, safe_open

from delta_llava.errors import UserError
from modeling_delta_llava.configuration_delta_llava import TRANSFORMERS_RANGE
from modeling_delta_llava.folders import check_output_folder
from modeling_delta_llava.foreign_code import refuse_foreign_code
from modeling_delta_llava.hub_cards.figure import chart_for, draw_chart, draw_example
from modeling_delta_llava.hub_cards.licences import (
    NO_LICENCE,
    licence_sentence,
    licence_text,
    notice,
    write_licence_file,
)
from modeling_delta_llava.hub_cards.measured import Measurement, read_measurements
from modeling_delta_llava.hub_cards.metadata import (
    LIBRARY,
    PIPELINE_TAG,
    check_reference,
    check_repository,
    licence_problem,
    load_card,
    read_object,
)
from modeling_delta_llava.hub_cards.training_record import training_record
from modeling_delta_llava.hub_cards.variants import (
    MISSING,
    UNCOMPRESSED_TOKENS,
    Row,
    Variant,
    benchmarks,
    get_variant,
    paper,
    paper_tables,
)

TEMPLATE = Path(__file__).parent / "card_template.md"
EXAMPLE = "example.png"
FIGURE = "scores.png"
DEFAULT_REVISION = "v1.0"
SKIP_MODULES = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""What stays in 16 bit when a model is quantised, as bitsandbytes matches names: from the start of the full name."""

TAGS = ("delta-llava", "llava", "multimodal", "visual-token-compression", "custom_code")
FINETUNE_MARK = "<!-- training: written by the finetuning run -->"
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


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        name: title, and name of the model in model-index.
        repo_id, revision: what the snippets load.
        config: config.json.
        licence: `license`, and with "other" `license_name` and `license_link`; empty when none is known.
        licence_file: whether the repository has its text as LICENSE.
        base_models, datasets, languages: Hub ids and ISO codes for the metadata.
        relation: "finetune" or "quantized".
        parameters: in the weights, None when unknown.
        trainer: (label, value) pairs from the trainer's record.
        training_section: Markdown that `delta-llava finetune` wrote about the run.
        quantization: keys bits, method, of; None for full weights.
    """

    name: str
    repo_id: str
    revision: str
    config: dict[str, Any]
    variant: Variant | None = None
    licence: dict[str, str] | None = None
    licence_file: bool = False
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    relation: str = "finetune"
    parameters: int | None = None
    measured: tuple[Measurement, ...] = ()
    trainer: tuple[tuple[str, str], ...] = ()
    training_section: str = ""
    quantization: dict[str, Any] | None = None

    @property
    def num_visual_tokens(self) -> int:
        return self.config["num_visual_tokens"]

    @property
    def legal_budgets(self) -> list[int]:
        vision = self.config["vision_config"]
        grid = vision["image_size"] // vision["patch_size"]
        return [(grid // scale) ** 2 for scale in range(1, grid + 1) if grid % scale == 0]


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
    lines = [f"| method | visual tokens | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 2)]
    for row in baselines:
        cells = [_label(row, False), row.tokens, *(row.cells.get(name, MISSING) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        cells = [_label(row, True), row.tokens, *(row.cells.get(name, MISSING) for name in names)]
        lines.append("| " + " | ".join(cell if cell == MISSING else f"**{cell}**" for cell in cells) + " |")
    return "\n".join(lines)


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


def _paper_results(variant: Variant) -> tuple[list[EvalResult], list[EvalResultEntry]]:
    """The paper's scores as model-index entries and as `.eval_results` entries, each with its table."""
    url, old, new = paper()["url"], [], []
    for score in variant.scores:
        benchmark = benchmarks()[score.benchmark]
        source = f"Delta-LLaVA paper, {score.source}"
        old.append(
            EvalResult(
                task_type=PIPELINE_TAG,
                dataset_type=benchmark["dataset"],
                dataset_name=benchmark["name"],
                metric_type=benchmark["metric"],
                metric_name=f"{score.benchmark} (reported by the paper, {score.source})",
                metric_value=score.value,
                source_name=source,
                source_url=url,
            )
        )
        new.append(
            EvalResultEntry(
                dataset_id=benchmark["dataset"],
                task_id=benchmark["task_id"],
                value=score.value,
                source_name=source,
                source_url=url,
                notes=f"Reported by the paper for its authors' run at {variant.num_visual_tokens} visual tokens"
                + ("" if variant.provenance["weights"] == "released" else "; not measured from these weights"),
            )
        )
    return old, new


def _measured_results(facts: Facts) -> tuple[list[EvalResult], list[EvalResultEntry]]:
    old, new = [], []
    for entry in facts.measured:
        url = f"https://huggingface.co/{facts.repo_id}/blob/{facts.revision}/{entry.file}"
        old.append(
            EvalResult(
                task_type=PIPELINE_TAG,
                dataset_type=entry.dataset or entry.task,
                dataset_name=entry.task,
                metric_type=entry.metric,
                metric_name=f"{entry.metric} (measured from this repository)",
                metric_value=entry.value,
                source_name=entry.file,
                source_url=url,
            )
        )
        if entry.dataset:
            new.append(
                EvalResultEntry(
                    dataset_id=entry.dataset,
                    task_id=entry.task,
                    value=entry.value,
                    date=entry.date,
                    source_name=entry.file,
                    source_url=url,
                    notes=f"{entry.metric}, measured from this repository at {entry.tokens} visual tokens",
                )
            )
    return old, new


def card_metadata(facts: Facts) -> ModelCardData:
    """The card's metadata, as the Hub defines it."""
    results = (_paper_results(facts.variant)[0] if facts.variant and not facts.quantization else []) + (
        _measured_results(facts)[0]
    )
    tags = [*TAGS, f"arxiv:{paper()['arxiv']}"]
    if facts.quantization:
        tags += ["bitsandbytes", f"{facts.quantization['bits']}-bit"]
    base = list(facts.base_models)
    return ModelCardData(
        language=list(facts.languages) or None,
        **(facts.licence or {}),
        library_name=LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        base_model=(base if len(base) > 1 else base[0]) if base else None,
        base_model_relation=facts.relation if base else None,
        datasets=list(facts.datasets) or None,
        tags=tags,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _details(facts: Facts) -> list[tuple[str, str]]:
    """Rows of the card's table of model facts, from the variant where there is one, else from the config alone."""
    variant, text, vision = facts.variant, facts.config["text_config"], facts.config["vision_config"]

    def link(name: str) -> str:
        return f"[{name}](https://huggingface.co/{name})"

    rows = []
    if variant:
        rows += [("language model", link(variant.backbone.id)), ("vision tower", link(variant.tower.id))]
    else:
        shape = [text.get("model_type"), f"{text.get('num_hidden_layers')} layers of width {text.get('hidden_size')}"]
        rows.append(("language model", ", ".join(part for part in shape if part)))
        tower = f"{vision.get('model_type')}, {vision.get('num_hidden_layers')} layers of width"
        rows.append(("vision tower", f"{tower} {vision.get('hidden_size')}"))
    side = vision["image_size"] // vision["patch_size"]
    rows.append(("picture", f"{vision['image_size']} px, {side} x {side} patches"))
    rows.append(("visual tokens per picture", str(facts.num_visual_tokens)))
    if facts.parameters:
        rows.append(("parameters", f"{facts.parameters:,}"))
    if facts.config.get("dtype"):
        rows.append(("weights", str(facts.config["dtype"])))
    return rows


def _snippet_budgets(facts: Facts) -> list[int]:
    """Budgets of two pictures in the snippet: the model's own and the next smaller one."""
    smaller = [budget for budget in facts.legal_budgets if budget < facts.num_visual_tokens]
    return [facts.num_visual_tokens, smaller[0] if smaller else facts.num_visual_tokens]


def _rates(variant: Variant) -> str:
    if variant.rates is None:
        return ""
    words = {
        "tokens_per_second": "{} tokens per second",
        "total_tflops": "{} TFLOPs in all",
        "prefill_tflops": "{} TFLOPs of prefill",
        "decode_tflops": "{} TFLOPs of decoding",
        "vision_tflops": "{} TFLOPs in the tower",
    }
    return ", ".join(words[name].format(text) for name, text in variant.rates.scores.items() if name in words)


def render_card(facts: Facts) -> ModelCard:
    """The card of a repository, from facts alone (no file is read or written)."""
    variant = facts.variant
    tables = _score_tables(variant) if variant else []
    chart = chart_for(variant) if variant else None
    provenance = []
    if variant and not facts.quantization:
        provenance = [
            (part.replace("_", " "), origin, MEANINGS[part][origin]) for part, origin in variant.provenance.items()
        ]
    return ModelCard.from_template(
        card_metadata(facts),
        template_path=str(TEMPLATE),
        name=facts.name,
        paper=paper(),
        variant=variant,
        notes=variant.notes if variant and not facts.quantization else (),
        provenance=provenance,
        num_visual_tokens=facts.num_visual_tokens,
        details=_details(facts),
        legal_budgets=facts.legal_budgets,
        trained_budgets=facts.config.get("trained_num_visual_tokens") or [],
        repo_id=facts.repo_id,
        revision=facts.revision,
        example=EXAMPLE,
        transformers_range=TRANSFORMERS_RANGE,
        snippet_budgets=_snippet_budgets(facts),
        skip_modules=json.dumps(SKIP_MODULES),
        quantization=facts.quantization,
        score_tables=tables,
        attribution=_attribution(variant) if variant else "",
        reference_tables=_reference_tables(variant) if variant else [],
        figure=FIGURE if chart else None,
        figure_text=chart.alternative_text if chart else "",
        measured=facts.measured,
        recipe=variant.recipe if variant else None,
        training_time=variant.training_time.cells if variant and variant.training_time else None,
        baseline_time=paper_tables()["4"].row("LLaVA 576").cells,
        rates=_rates(variant) if variant else "",
        trainer=facts.trainer,
        training_section=facts.training_section.removeprefix(FINETUNE_MARK).strip(),
        finetune_mark=FINETUNE_MARK,
        licence_sentence=licence_sentence(facts.licence, facts.licence_file) if facts.licence else "",
        no_licence=NO_LICENCE,
    )


def count_parameters(folder: Path) -> int | None:
    """Elements of all tensors, from the headers of the safetensors files; None without any."""
    total = 0
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): convert or save it again") from error
    return total if files else None


def _components(facts: Facts) -> list[tuple[str, str]]:
    """What NOTICE lists, each with its licence in words."""
    lines = [("the modelling code (*.py)", "Apache-2.0, the contributors of delta-llava")]
    if facts.variant:
        backbone, tower = facts.variant.backbone, facts.variant.tower
        lines.append((f"the language model {backbone.id}", backbone.licence["license"]))
        lines.append((f"the vision tower {tower.id}", "see its model page"))
        if facts.variant.weights_source:
            lines.append((f"weights of {facts.variant.weights_source}", "no licence stated by their authors"))
    else:
        lines += [(f"the model {name}", "see its model page") for name in facts.base_models]
    lines += [(f"the training data {name}", "see its data set page") for name in facts.datasets]
    lines.append((f"the method of {paper()['title']!r} by {paper()['authors']}", paper()["url"]))
    return lines


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Delta-LLaVA folder. Raises `UserError` for anything else."""
    config = read_object(folder / "config.json")
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
    names = [(config.get(part) or {}).get("_name_or_path") for part in ("text_config", "vision_config")]
    return tuple(name for name in names if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists())


@dataclass(frozen=True)
class Previous:
    """What the folder's present card states and a new one keeps: metadata, and how the model was trained."""

    licence: dict[str, str]
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    training_section: str = ""


def read_previous(folder: Path) -> Previous:
    """The folder's present card; empty when there is none that can be read."""
    if not (folder / "README.md").is_file():
        return Previous({})
    try:
        present = load_card(folder)
    except ValueError:
        return Previous({})
    data = present.data.to_dict()

    def names(field: str) -> tuple[str, ...]:
        value = data.get(field) or ()
        return (value,) if isinstance(value, str) else tuple(value)

    licence = {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name)}
    section = re.search(r"^## Training\n(.*?)(?=^## |\Z)", present.text, re.DOTALL | re.MULTILINE)
    by_finetune = "`delta-llava finetune`" in present.text or FINETUNE_MARK in present.text
    text = section[1].strip() if section and by_finetune else ""
    return Previous(licence, names("base_model"), names("datasets"), names("language"), text)


def gather_facts(
    folder: Path,
    variant: Variant | None = None,
    repo_id: str | None = None,
    revision: str = DEFAULT_REVISION,
    licence: dict[str, str] | None = None,
    base_models: Sequence[str] = (),
    results: Sequence[Path] = (),
) -> Facts:
    """Everything known about a folder. Raises `UserError` when it does not fit the variant."""
    config = read_config(folder)
    if variant:
        differences = variant.shape_differences(config)
        if differences:
            raise UserError(f"{folder} is not {variant.name}: {'; '.join(differences)}: leave out --variant")
    name = variant.name if variant else folder.resolve().name
    quantized = config.get("quantization_config")
    previous = read_previous(folder)
    if base_models:
        bases = tuple(base_models)
    elif variant:
        bases = (variant.backbone.id, variant.tower.id)
    else:
        bases = previous.base_models or _config_base_models(config)
    quantization = None
    if quantized:
        bits = 4 if quantized.get("load_in_4bit") else 8
        method = f"bitsandbytes {quantized.get('bnb_4bit_quant_type', 'nf4').upper()}" if bits == 4 else "LLM.int8()"
        of = f"[{bases[0]}](https://huggingface.co/{bases[0]})" if bases else "a Delta-LLaVA model"
        quantization = {"bits": bits, "method": method, "of": of}
    licence = licence or (variant.licence if variant else None) or previous.licence or None
    text_known = bool(licence) and licence_text(licence["license"]) is not None
    return Facts(
        name=name,
        repo_id=repo_id or f"YOUR_NAME/{name}",
        revision=revision,
        config=config,
        variant=variant,
        licence=licence,
        licence_file=text_known or (folder / "LICENSE").is_file(),
        base_models=bases,
        datasets=variant.recipe.datasets if variant else previous.datasets,
        languages=variant.backbone.language if variant else previous.languages,
        relation="quantized" if quantized else "finetune",
        parameters=None if quantized else count_parameters(folder),
        measured=tuple(read_measurements(folder, results, config["num_visual_tokens"])),
        trainer=tuple(training_record(folder)),
        training_section="" if variant or quantized else previous.training_section,
        quantization=quantization,
    )


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
        results: result files of lmms-eval, which are copied into `eval/`.

    Raises:
        UserError: the folder is no Delta-LLaVA folder or not that variant, or brings code that is not this package's;
            the licence is not one of the Hub's, or a name cannot be one.
    """
    folder = Path(folder)
    read_config(folder)
    check_output_folder(folder, str(folder), "holds no model", is_ours=True)
    refuse_foreign_code(folder)
    for name in (*([] if repo_id is None else [repo_id]), *base_models):
        check_repository(name)
    check_reference(revision)
    stated = {"license": licence, "license_name": licence_name, "license_link": licence_link}
    stated = {name: value for name, value in stated.items() if value}
    if stated:
        problem = licence_problem(stated, folder)
        if problem:
            raise UserError(f"--license: {problem} (https://huggingface.co/docs/hub/repositories-licenses)")
    facts = gather_facts(
        folder, get_variant(variant) if variant else None, repo_id, revision, stated, base_models, results
    )
    draw_example(folder / EXAMPLE)
    chart = chart_for(facts.variant) if facts.variant else None
    if chart:
        draw_chart(chart, folder / FIGURE)
    entries = {
        "paper": _paper_results(facts.variant)[1] if facts.variant and not facts.quantization else [],
        "measured": _measured_results(facts)[1],
    }
    for name, found in entries.items():
        target = folder / ".eval_results" / f"{name}.yaml"
        target.unlink(missing_ok=True)
        if found:
            target.parent.mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True, width=100)
            target.write_text(text, encoding="utf-8")
    identifier = (facts.licence or {}).get("license")
    if identifier:
        write_licence_file(folder, identifier)
    llama_2 = identifier == "llama2"
    (folder / "NOTICE").write_text(notice(_components(facts), llama_2), encoding="utf-8")
    render_card(facts).save(folder / "README.md")
    return folder / "README.md"
