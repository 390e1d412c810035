"""The page of an evaluation: scores, captions and cost at every budget, as the paper's tables show them."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError
from modeling_delta_llava.asking import model_folder
from modeling_delta_llava.card import PAPER, metadata_of, state_of
from modeling_delta_llava.folders import atomic_folder, check_output_folder
from modeling_delta_llava.hub_cards.card import read_config, write_file
from modeling_delta_llava.hub_cards.figure import draw_scores, figure_class
from modeling_delta_llava.hub_cards.measured import Measurement, scores_of, shown_scores
from modeling_delta_llava.hub_cards.variants import (
    MISSING,
    UNCOMPRESSED_TOKENS,
    Row,
    Variant,
    get_variant,
    markdown,
    paper_tables,
)

PAGE, SCORES, COST = "README.md", "scores.png", "cost.png"
HEADING = "scores and cost by visual tokens per picture"


def prepare(
    model: str, revision: str | None, variant: str | None, folder: Path | None, output: Path
) -> Variant | None:
    """What a model's scores are set beside: the given variant, or the one that the card of its folder names.

    Args:
        folder: where a page is to be written, which may hold an earlier one.
        output: the folder of answers and results.

    Raises:
        UserError: no such model or variant, or the model is not that one; no place for a page; no matplotlib.
    """
    if folder is not None:
        page, evaluation = folder.resolve(), output.resolve()
        if page == evaluation or page in evaluation.parents or evaluation in page.parents:
            raise UserError(f"REPORT {folder} would take the place of what is in OUTPUT {output}; give another folder")
        check_output_folder(folder, f"REPORT {folder}", "holds no report", holds_page(folder), replaces=True)
    figure_class()
    place = model_folder(model, revision, weights=False)
    variant = variant or state_of(metadata_of(place)).get("variant")
    if variant is None:
        return None
    listed = get_variant(variant)
    config = {**read_config(place), "num_visual_tokens": listed.num_visual_tokens}
    if differences := listed.shape_differences(config):
        raise UserError(
            f"{model} is not {variant}: {'; '.join(differences)}: leave out --variant, or name another one"
        )
    return listed


def holds_page(folder: Path) -> bool:
    """Whether a folder holds an earlier page, and nothing else."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return names == {PAGE, SCORES, COST} and HEADING in (folder / PAGE).read_text(encoding="utf-8", errors="replace")


def read_results(files: Sequence[Path], variant: Variant | None) -> list[Measurement]:
    """What the paper's tables would show of result files, see `shown_scores`."""
    return shown_scores([entry for file in files for entry in scores_of(file, 0, variant)])


def table(measured: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what the command line prints."""
    head = ["task", "metric", "visual tokens", "score", "paper", "difference"]
    rows = [
        [
            *(entry.task, entry.metric, str(entry.tokens), entry.scaled + entry.part),
            *(MISSING if entry.paper is None else entry.paper.text, entry.difference),
        ]
        for entry in measured
    ]
    return head, rows


def write_figure(measured: Sequence[Measurement], folder: Path) -> None:
    """Draws the scores beside the result files."""
    write_file(folder / SCORES, draw_scores(measured))


def new_page(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder for a page and its figures, which takes the place of `folder`, and of an earlier page, when whole."""
    return atomic_folder(folder, overwrite=True)


# --- page ------------------------------------------------------------------------------------------------------------


def write_page(
    folder: Path, files: Sequence[Path], measured: Sequence[Measurement], variant: Variant | None, cost: dict[str, Any]
) -> None:
    """Writes README.md and the figure of the scores; that of the cost is there already.

    Args:
        files: result files of lmms-eval.
        cost: what `evaluation.efficiency.cost_rows` says.
    """
    (folder / SCORES).write_bytes(draw_scores(measured))
    first = json.loads(files[0].read_text(encoding="utf-8"))
    about = first["config"]
    packages = about["versions_of_packages"]
    day = "-".join((first["date"][:4], first["date"][4:6], first["date"][6:8]))
    parts = [f"# {cost['name']}: {HEADING}"]
    parts.append(
        f"Scored on {day} (UTC) with lmms-eval {packages['lmms_eval']}, transformers {packages['transformers']}, "
        f"torch {packages['torch']} and delta-llava {packages['delta_llava']}, in {about['dtype']}; revision "
        f"`{about['model_revision']}` of the model; greedy, with the prompt of training."
    )
    if limited := sorted({f"{entry.task} {entry.rows[0]} of {entry.rows[1]}" for entry in measured if entry.rows}):
        parts.append(f"**Only a part of the rows was asked**: {', '.join(limited)}.")
    if variant is not None:
        parts.append(
            f"Rows named after a table are the [paper]({PAPER['url']})'s; those at 576 tokens are LLaVA-1.5's own. "
            "The tables name no metric except CIDEr, and no split: the metrics here are those in which LLaVA-1.5's "
            "own row is known."
        )
    for title, entries in (
        ("Scores", [entry for entry in measured if not entry.is_caption]),
        ("Captions (CIDEr)", [entry for entry in measured if entry.is_caption]),
    ):
        if entries:
            parts += [f"## {title}", _score_table(entries, variant)]
    parts += [
        f"![Scores against visual tokens per picture]({SCORES})",
        "## Speed and cost",
        _cost_table(variant, cost),
    ]
    parts += [cost["about"], f"![Cost and speed by visual tokens per picture]({COST})"]
    (folder / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _score_table(measured: Sequence[Measurement], variant: Variant | None) -> str:
    """Budgets down, tasks across: the paper's rows above this model's, and the difference below."""
    titles = list(dict.fromkeys(entry.title for entry in measured))

    def printed(label: str, row: Row) -> list[str]:
        return [f"{label} ({row.source})", *row.values(["tokens", *titles])]

    baselines = [row for row in variant.baselines if row.tokens == UNCOMPRESSED_TOKENS] if variant else []
    rows = [printed(f"LLaVA-1.5{' 13B' * ('13B' in row.method)}", row) for row in baselines]
    for tokens in sorted({entry.tokens for entry in measured}, reverse=True):
        at = {entry.title: entry for entry in measured if entry.tokens == tokens}
        listed = variant.at(tokens) if variant else None
        rows += [printed("Delta-LLaVA", row) for row in (listed.rows if listed else ())]
        cells = [f"**{at[title].scaled}**" if title in at else MISSING for title in titles]
        rows.append(["**this model**", str(tokens), *cells])
        differences = [at[title].difference if title in at else MISSING for title in titles]
        if set(differences) != {MISSING}:
            rows.append(["difference", str(tokens), *differences])
    rows = [row for row in rows if set(row[2:]) != {MISSING}]
    return markdown(["", "visual tokens", *titles], rows)


def _cost_table(variant: Variant | None, cost: dict[str, Any]) -> str:
    """Tokens/s and FLOPs by part at every budget, beside Figure 3 where it is about this model."""
    head = ["visual tokens", *cost["columns"]]
    printed = {row.tokens: row for row in paper_tables()["Figure 3"].rows} if variant and variant.rates else {}
    if printed:
        head += ["Figure 3: tokens/s", "Figure 3: TFLOPs"]
    rows = []
    for tokens, *cells in cost["rows"]:
        row = printed.get(tokens)
        figures = row.values(["tokens_per_second", "total_tflops"]) if row else [MISSING, MISSING]
        rows.append([tokens, *cells, *(figures if printed else [])])
    return markdown(head, rows)
