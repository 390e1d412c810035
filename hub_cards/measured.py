"""Scores measured from a repository, read from lmms-eval's result files."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError
from modeling_delta_llava.foreign_code import RESULTS_FOLDER
from modeling_delta_llava.hub_cards.contents import secret_in
from modeling_delta_llava.hub_cards.variants import MISSING, Score, Variant, benchmarks


@dataclass(frozen=True)
class Measurement:
    """One score of one task.

    Attributes:
        task, metric: as lmms-eval names them, the metric without its filter.
        tokens: visual tokens per picture in that run.
        file: result file, as a path in the repository.
        dataset: Hub data set when the task is one of the paper's benchmarks.
        date: of the run, ISO 8601, if the file has it.
        rows: how many rows were asked and how many the task has, if the run left some out.
        column: of the paper's tables, if this is the metric that is set beside it.
        factor: from the score to that column's scale.
        paper: what the paper prints there for the same language model, tower and budget.
    """

    task: str
    metric: str
    value: float
    tokens: int
    file: str
    dataset: str | None = None
    date: str | None = None
    rows: tuple[int, int] | None = None
    column: str | None = None
    factor: float = 1.0
    paper: Score | None = None

    @property
    def text(self) -> str:
        return (f"{self.value:.4g}" if abs(self.value) < 1000 else f"{self.value:.2f}") + self.part

    @property
    def part(self) -> str:
        """What is said behind a score of a part of the rows."""
        return "" if self.rows is None else f" ({self.rows[0]} of {self.rows[1]} rows)"

    @property
    def is_caption(self) -> bool:
        return "cider" in self.metric.lower()

    @property
    def title(self) -> str:
        """What tables and figures call it: the paper's column, or the task with its metric."""
        return self.column or f"{self.task} ({self.metric})"

    @property
    def scaled(self) -> str:
        """The score on the scale of the paper's tables, or its own."""
        return f"{self.value * self.factor:.2f}" if self.column else f"{self.value:.4g}"

    @property
    def difference(self) -> str:
        """This score less the paper's, with its sign; a dash where the paper has none."""
        return MISSING if self.paper is None else f"{self.value * self.factor - self.paper.value:+.2f}"

    @property
    def beside_paper(self) -> str:
        """The difference as a card states it."""
        if self.paper is None:
            return MISSING
        return f"{self.scaled} to {self.paper.text} ({self.paper.source}): {self.difference}"


def _dataset_of(task: str) -> str | None:
    """Hub data set of an lmms-eval task, by its exact name: `gqa_ru` is not GQA."""
    return next((entry["dataset"] for entry in benchmarks().values() if task in entry["tasks"]), None)


def _beside(task: str, metric: str, tokens: int, variant: Variant | None) -> dict[str, Any]:
    """What a `Measurement` knows of the paper's tables."""
    wanted = {"task": task, "metric": metric}
    for column, entry in benchmarks().items():
        if wanted.items() <= entry["measured"].items():
            listed = variant and variant.at(tokens)
            scores = [score for score in (listed.scores if listed else ()) if score.benchmark == column]
            return {"column": column, "factor": entry["measured"]["factor"], "paper": scores[0] if scores else None}
    return {}


def scores_of(path: Path, default_tokens: int, variant: Variant | None = None) -> Iterator[Measurement]:
    """The scores in a result file, see [`read_measurements`]."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        results = [(task, *found) for task, values in data["results"].items() for found in values.items()]
        arguments = str((data.get("config") or {}).get("model_args") or "")
        counts = {task: (int(n["effective"]), int(n["original"])) for task, n in data.get("n-samples", {}).items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it has no results"
        raise UserError(f"{path} is no result file of lmms-eval ({why}): give its *_results.json") from error
    asked = re.search(r"num_visual_tokens['\"]?\s*[=:]\s*(\d+)", arguments)
    tokens = int(asked[1]) if asked else default_tokens
    date = re.match(r"(\d{4})(\d{2})(\d{2})_", path.name)
    day = "-".join(date.groups()) if date else None
    for task, key, value in results:
        metric = key.split(",")[0]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and "," in key and "_stderr" not in metric:
            file = f"{RESULTS_FOLDER}/{path.name}"
            rows = counts.get(task, (0, 0))
            about = {"rows": rows if rows[0] < rows[1] else None, **_beside(task, metric, tokens, variant)}
            yield Measurement(task, metric, float(value), tokens, file, _dataset_of(task), day, **about)


def shown_scores(measured: Sequence[Measurement]) -> list[Measurement]:
    """One score for each task and budget, in the order of the paper's tables: the one that they would show.

    That is the metric of the paper's column, else CIDEr, else the task's first one.
    """
    chosen: dict[tuple[str, int], Measurement] = {}
    for entry in sorted(measured, key=lambda entry: (entry.column is None, not entry.is_caption)):
        chosen.setdefault((entry.task, entry.tokens), entry)
    order = [*benchmarks(), None]
    return sorted(
        chosen.values(), key=lambda entry: (order.index(entry.column), entry.is_caption, entry.task, -entry.tokens)
    )


def _result_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*_results.json"))
    if not files:
        raise UserError(f"{folder} holds no *_results.json: give the `results` folder that `evaluate` wrote")
    return files


def read_measurements(
    folder: Path, results: Sequence[Path], default_tokens: int, variant: Variant | None = None
) -> tuple[list[Measurement], dict[str, bytes]]:
    """Scores of the given result files and of those that the folder holds already; and what to copy into the folder.

    Args:
        folder: a Hub folder; its result files lie in `eval/`.
        results: result files, or folders that hold them.
        default_tokens: visual tokens of a run whose arguments name none.
        variant: the paper's scores to set them beside, if the folder is one of its variants.

    Raises:
        UserError: a file is not what lmms-eval writes, or holds a secret.
    """
    results = [file for path in results for file in (_result_files(path) if path.is_dir() else [path])]
    files = {path.name: path for path in [*sorted((folder / RESULTS_FOLDER).glob("*.json")), *results]}
    measured = [entry for name in sorted(files) for entry in scores_of(files[name], default_tokens, variant)]
    for path in results:
        if secret := secret_in(path):
            raise UserError(f"{path} holds {secret}: take it out before the file is copied into {folder}")
    return measured, {f"{RESULTS_FOLDER}/{path.name}": path.read_bytes() for path in results}
