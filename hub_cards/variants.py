"""The variants of the paper and of the authors' release, and the figures the paper prints for them.

Figures live in `paper_tables.yaml` alone, variants in `variants.yaml`; a variant names the rows that belong to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from delta_llava.errors import UserError

FOLDER = Path(__file__).parent
MISSING = "–"
MAIN_BENCHMARKS = ("GQA", "POPE")
"""Those that a list shows where not all of them fit."""
PARTS = ("architecture", "recipe", "prompt_format", "weights")
UNCOMPRESSED_TOKENS = "576"
"""Every published figure at this budget is LLaVA-1.5's own."""


@dataclass(frozen=True)
class Row:
    """One row of one table: `cells` are the printed texts by column, the key columns included."""

    table: str
    cells: dict[str, str]

    @property
    def method(self) -> str:
        return self.cells.get("method", "")

    @property
    def tokens(self) -> str:
        """Visual tokens as printed ("36", "~32"), or "" when the table has no such column."""
        return self.cells.get("tokens", "")

    def values(self, columns: Sequence[str]) -> list[str]:
        """The printed texts of some columns, dashes where there is none."""
        return [self.cells.get(name, MISSING) for name in columns]

    @property
    def source(self) -> str:
        """Where the row is printed: "Table 1", "Figure 3"."""
        return self.table if self.table.startswith("Figure") else f"Table {self.table}"

    @property
    def scores(self) -> dict[str, str]:
        """The printed scores by benchmark, without dashes."""
        return {
            name: text for name, text in self.cells.items() if name not in ("method", "tokens") and text != MISSING
        }


@dataclass(frozen=True)
class Table:
    """A table of the paper: `key` names the columns that identify a row."""

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def row(self, *key: str | int) -> Row:
        """The row whose key columns hold `key`. Raises `KeyError` when there is none."""
        wanted = tuple(str(part) for part in key)
        for row in self.rows:
            if tuple(row.cells[column] for column in self.key) == wanted:
                return row
        raise KeyError(f"table {self.name} has no row {wanted}")


@dataclass(frozen=True)
class Score:
    """One published figure: the printed text, the benchmark it is for and the table it comes from."""

    benchmark: str
    text: str
    source: str

    @property
    def value(self) -> float:
        return float(self.text)


@dataclass(frozen=True)
class Part:
    """A language model or a vision tower: Hub id, name in prose, the shape that its config must have."""

    id: str
    label: str
    shape: dict[str, int]
    licence: dict[str, str] = field(default_factory=dict)
    language: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """How a variant is trained: Hub data sets, one sentence per stage, what the stages share."""

    datasets: list[str]
    stages: list[str]
    shared: str


@dataclass(frozen=True)
class Variant:
    """One trained model, and so one Hub repository named `name`."""

    name: str
    backbone: Part
    tower: Part
    num_visual_tokens: int
    recipe: Recipe
    provenance: dict[str, str]
    rows: tuple[Row, ...]
    baselines: tuple[Row, ...]
    training_time: Row | None
    rates: Row | None
    weights_source: str | None
    note: str

    @property
    def scores(self) -> tuple[Score, ...]:
        """Every score that the paper reports for this variant, with its table."""
        return tuple(Score(name, text, row.source) for row in self.rows for name, text in row.scores.items())

    @property
    def licence(self) -> dict[str, str]:
        """Licence metadata of the repository: the language model's. Empty for weights whose authors state none."""
        return {} if self.provenance["weights"] == "released" else dict(self.backbone.licence)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for note in (self.note, self.backbone.note, self.tower.note) if note)

    def at(self, num_visual_tokens: int) -> "Variant | None":
        """The variant of the same language model and tower at another budget; None when the paper has none."""
        family = (
            entry for entry in variants().values() if (entry.backbone, entry.tower) == (self.backbone, self.tower)
        )
        return next((entry for entry in family if entry.num_visual_tokens == num_visual_tokens), None)

    def shape_differences(self, config: dict[str, Any]) -> list[str]:
        """How the config of a folder (config.json as a dict) differs from this variant; empty when it fits."""
        differences = []
        for section, part in (("text_config", self.backbone), ("vision_config", self.tower)):
            given = config.get(section) or {}
            for name, expected in part.shape.items():
                if given.get(name) != expected:
                    differences.append(f"{section}.{name} is {given.get(name)}, {part.label} has {expected}")
        if config.get("num_visual_tokens") != self.num_visual_tokens:
            differences.append(
                f"num_visual_tokens is {config.get('num_visual_tokens')}, {self.name} has {self.num_visual_tokens}"
            )
        return differences


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@cache
def paper_tables() -> dict[str, Table]:
    """The paper's tables by name: "1" to "6" and "Figure 3"."""
    tables = {}
    for name, entry in _read("paper_tables.yaml").items():
        columns = tuple(str(column) for column in entry["columns"])
        rows = []
        for line in entry["rows"].splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) != len(columns):
                raise ValueError(f"table {name}: {len(cells)} cells for {len(columns)} columns in {line.strip()!r}")
            rows.append(Row(name, dict(zip(columns, cells, strict=True))))
        tables[name] = Table(name, tuple(entry["key"]), columns, tuple(rows))
    return tables


@cache
def benchmarks() -> dict[str, dict[str, Any]]:
    """Hub data set, tasks, metric and what is measured of each column of the tables, by the name of the column."""
    return _read("variants.yaml")["benchmarks"]


def paper_tasks() -> list[str]:
    """The tasks of lmms-eval whose scores stand beside the paper's, in the order of its columns."""
    return [entry["measured"]["task"] for entry in benchmarks().values()]


@cache
def variants() -> dict[str, Variant]:
    """All variants by repository name, in the order of `variants.yaml`."""
    data = _read("variants.yaml")
    tables = paper_tables()
    recipes = {name: Recipe(**entry) for name, entry in data["recipes"].items()}
    rates = {row.tokens: row for row in tables["Figure 3"].rows}
    result = {}
    for entry in data["variants"]:
        tokens = entry["num_visual_tokens"]
        backbone, tower = data["backbones"][entry["backbone"]], data["towers"][entry["tower"]]
        training_time = entry.get("training_time")
        # Table 4 and Figure 3 belong to the 7B model with the 336-pixel tower.
        has_rates = (entry["backbone"], entry["tower"]) == ("vicuna-7b", "clip-l-336")
        result[entry["name"]] = Variant(
            name=entry["name"],
            backbone=Part(**backbone),
            tower=Part(**tower),
            num_visual_tokens=tokens,
            recipe=recipes[entry["recipe"]],
            provenance=entry["provenance"],
            rows=tuple(tables[table].row(*key) for table, *key in entry["scores"]),
            baselines=tuple(tables[table].row(*key) for table, *key in entry["baselines"]),
            training_time=tables["4"].row(training_time) if training_time else None,
            rates=rates.get(str(tokens)) if has_rates and str(tokens) != UNCOMPRESSED_TOKENS else None,
            weights_source=entry.get("weights_source"),
            note=entry.get("note", ""),
        )
    return result


def get_variant(name: str) -> Variant:
    """The variant called `name`. Raises `UserError` naming the nearest ones when there is none."""
    import difflib

    known = variants()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"no variant is called {name!r}: {hint}`delta-llava variants` lists them all")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def variants_table(benchmark_columns: Sequence[str], sources: bool = False) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the variants: budget, provenance of the weights, scores and where they are from."""
    head = ["variant", "tokens", "weights", *benchmark_columns, *["source"] * sources]
    rows = []
    for variant in variants().values():
        scores = {score.benchmark: score.text for score in variant.scores}
        tables = ", ".join(dict.fromkeys(score.source for score in variant.scores)) or MISSING
        cells = [variant.name, str(variant.num_visual_tokens), variant.provenance["weights"]]
        rows.append([*cells, *(scores.get(name, MISSING) for name in benchmark_columns), *[tables] * sources])
    return head, rows


def variant_record(variant: Variant) -> dict[str, Any]:
    """Everything known about a variant as plain data, each figure with the table it is printed in."""
    record: dict[str, Any] = {
        "name": variant.name,
        "language_model": variant.backbone.id,
        "vision_tower": variant.tower.id,
        "num_visual_tokens": variant.num_visual_tokens,
        "license": variant.licence.get("license"),
        "provenance": dict(variant.provenance),
        "weights_source": variant.weights_source,
        "scores": [{"benchmark": s.benchmark, "value": s.text, "source": s.source} for s in variant.scores],
        "baselines": [
            {"method": row.method, "tokens": row.tokens, "scores": row.scores, "source": row.source}
            for row in variant.baselines
        ],
        "notes": list(variant.notes),
    }
    if variant.training_time is not None:
        record["training_time"] = {**variant.training_time.scores, "source": variant.training_time.source}
    if variant.rates is not None:
        record["rates"] = {**variant.rates.scores, "source": variant.rates.source}
    return record
