"""Scores measured from a repository, read from lmms-eval's result files."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.foreign_code import RESULTS_FOLDER
from modeling_delta_llava.hub_cards.contents import secret_in
from modeling_delta_llava.hub_cards.variants import benchmarks


@dataclass(frozen=True)
class Measurement:
    """One score of one task.

    Attributes:
        task, metric: as lmms-eval names them, the metric without its filter.
        tokens: visual tokens per picture in that run.
        file: result file, as a path in the repository.
        dataset: Hub data set when the task is one of the paper's benchmarks.
        date: of the run, ISO 8601, if the file has it.
    """

    task: str
    metric: str
    value: float
    tokens: int
    file: str
    dataset: str | None = None
    date: str | None = None

    @property
    def text(self) -> str:
        return f"{self.value:.4g}" if abs(self.value) < 1000 else f"{self.value:.2f}"


def _dataset_of(task: str) -> str | None:
    """Hub data set of an lmms-eval task, by its exact name: `gqa_ru` is not GQA."""
    return next((entry["dataset"] for entry in benchmarks().values() if task in entry["tasks"]), None)


def _scores(path: Path, default_tokens: int) -> Iterator[Measurement]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        results = [(task, *found) for task, values in data["results"].items() for found in values.items()]
        arguments = str((data.get("config") or {}).get("model_args") or "")
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
        if is_number and "," in key and not metric.endswith("_stderr"):
            file = f"{RESULTS_FOLDER}/{path.name}"
            yield Measurement(task, metric, float(value), tokens, file, _dataset_of(task), day)


def read_measurements(
    folder: Path, results: Sequence[Path], default_tokens: int
) -> tuple[list[Measurement], dict[str, bytes]]:
    """Scores of the given result files and of those that the folder holds already; and what to copy into the folder.

    Args:
        folder: a Hub folder; its result files lie in `eval/`.
        default_tokens: visual tokens of a run whose arguments name none.

    Raises:
        UserError: a file is not what lmms-eval writes, or holds a secret.
    """
    files = {path.name: path for path in [*sorted((folder / RESULTS_FOLDER).glob("*.json")), *results]}
    measured = [entry for name in sorted(files) for entry in _scores(files[name], default_tokens)]
    for path in results:
        if secret := secret_in(path):
            raise UserError(f"{path} holds {secret}: take it out before the file is copied into {folder}")
    return measured, {f"{RESULTS_FOLDER}/{path.name}": path.read_bytes() for path in results}
