"""The figures of a card: scores against visual tokens, as the paper prints them and as they were measured."""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from delta_llava.errors import UserError
from modeling_delta_llava.card import PAPER
from modeling_delta_llava.hub_cards.measured import Measurement
from modeling_delta_llava.hub_cards.variants import MISSING, Variant, benchmarks, paper_tables, variants

FAINT, OURS = "#6b7280", "#c2410c"
PANELS_PER_LINE = 3
OTHERS = ("#2563eb", "#059669", "#7c3aed", "#a16207", "#0891b2")


@dataclass(frozen=True)
class Series:
    """One line: points are (visual tokens, score)."""

    label: str
    points: tuple[tuple[int, float], ...]
    main: bool = False


@dataclass(frozen=True)
class Chart:
    """Scores of one benchmark over visual tokens.

    Attributes:
        reference: label and score of the uncompressed model, drawn as a dashed line.
        marked: tokens and score of the point that the chart is about.
    """

    benchmark: str
    sources: str
    series: tuple[Series, ...]
    reference: tuple[str, float] | None = None
    marked: tuple[int, float] | None = None

    @property
    def title(self) -> str:
        metric = " (CIDEr)" if benchmarks()[self.benchmark]["metric"] == "cider" else ""
        return f"{self.benchmark}{metric} against visual tokens per picture"

    @property
    def alternative_text(self) -> str:
        main = next(series for series in self.series if series.main)
        points = ", ".join(f"{score:g} at {tokens}" for tokens, score in main.points)
        return f"{self.title}: {main.label} {points}"


def _points(rows, benchmark: str) -> tuple[tuple[int, float], ...]:
    found = {}
    for row in rows:
        text = row.cells.get(benchmark, MISSING)
        if text != MISSING and row.tokens.isdigit():
            found[int(row.tokens)] = float(text)
    return tuple(sorted(found.items()))


def chart_for(variant: Variant) -> Chart | None:
    """The chart of a variant among those with the same language model; None when there is no line to draw."""
    tables = paper_tables()
    family = [entry for entry in variants().values() if entry.backbone == variant.backbone]
    tower = family[0].tower
    rows = [row for entry in family if entry.tower == tower for row in entry.rows]
    benchmark = next((name for name in ("GQA", "Nocaps") if len(_points(rows, name)) > 1), None)
    if benchmark is None:
        return None
    label = "Delta-LLaVA" if variant.tower == tower else "Delta-LLaVA, CLIP 336"
    series, reference = [Series(label, _points(rows, benchmark), main=True)], None
    if benchmark == "Nocaps":
        size = "13B" if "13b" in variant.name else "7B"
        fastv = [row for row in tables["6"].rows if row.method == f"FastV {size}"]
        series.append(Series("FastV", tuple(point for point in _points(fastv, benchmark) if point[0] != 576)))
        reference = (f"LLaVA-1.5 {size}, 576 tokens", float(tables["6"].row(f"FastV {size}", 576).cells["Nocaps"]))
    elif "vicuna-7b" in variant.name:
        for method in dict.fromkeys(row.method for row in tables["1"].rows):
            points = _points([row for row in tables["1"].rows if row.method == method], benchmark)
            if len(points) > 1 and "Delta" not in method:
                series.append(Series(method, points))
        reference = ("LLaVA-1.5, 576 tokens", float(tables["1"].row("LLaVA-1.5", 576).cells["GQA"]))
    elif "qwen" in variant.name:
        reference = ("Qwen-VL-Chat, 448 tokens", float(tables["2"].row("Qwen-VL-Chat", 448).cells["GQA"]))
    printed = {row.source for row in (*rows, *variant.rows) if row.cells.get(benchmark, MISSING) != MISSING}
    numbers = sorted(source.removeprefix("Table ") for source in printed)
    named = f"Table{'s' if len(numbers) > 1 else ''} {' and '.join(numbers)}"
    marked = next(iter(_points(variant.rows, benchmark)), None)
    return Chart(benchmark, named, tuple(series), reference, marked)


def draw_chart(chart: Chart) -> bytes:
    """The chart as a PNG of 960 x 540 pixels.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(9.6, 5.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colours = iter(OTHERS)
    for series in sorted(chart.series, key=lambda entry: entry.main):
        colour, width, size = (OURS, 3, 7) if series.main else (next(colours), 1.8, 4)
        axes.plot(*zip(*series.points, strict=True), "o-", color=colour, lw=width, ms=size, label=series.label)
    if chart.reference:
        axes.axhline(chart.reference[1], color=FAINT, linestyle="--", linewidth=1.5, label=chart.reference[0])
    budgets = {tokens for series in chart.series for tokens, _ in series.points}
    if chart.marked:
        tokens, score = chart.marked
        axes.plot(tokens, score, "o", color=OURS, ms=15, mfc="none", mew=2, label=f"this variant: {score:g}")
        budgets.add(tokens)
    _over_tokens(axes, budgets)
    axes.set_xlabel("visual tokens per picture (logarithmic)")
    axes.set_title(f"{chart.title}\nas printed in {chart.sources} of arXiv {PAPER['arxiv']}", loc="left", fontsize=12)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def draw_scores(measured: Sequence[Measurement]) -> bytes:
    """Score against visual tokens as a PNG: a panel for each task, the paper's scores beside where there are any."""
    titles = list(dict.fromkeys(entry.title for entry in measured))
    columns = min(PANELS_PER_LINE, len(titles))
    lines = -(-len(titles) // columns)
    figure = figure_class()(figsize=(4.2 * columns + 1, 3.2 * lines), dpi=100, layout="constrained")
    for number, title in enumerate(titles, start=1):
        axes = figure.add_subplot(lines, columns, number)
        entries = sorted((entry for entry in measured if entry.title == title), key=lambda entry: entry.tokens)
        printed = [(entry.tokens, entry.paper.value) for entry in entries if entry.paper]
        if printed:
            axes.plot(*zip(*printed, strict=True), "o--", color=FAINT, lw=1.5, ms=4, label="paper")
        points = [(entry.tokens, entry.value * entry.factor) for entry in entries]
        axes.plot(*zip(*points, strict=True), "o-", color=OURS, lw=2.5, ms=6, label="this model")
        _over_tokens(axes, {entry.tokens for entry in entries})
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("visual tokens per picture", fontsize=9)
        if printed:
            axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _over_tokens(axes, budgets: Collection[int]) -> None:
    """Budgets as a logarithmic axis that names each of them."""
    ticks = sorted(budgets)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)


def figure_class():
    """matplotlib's `Figure`.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a figure of scores needs matplotlib: pip install 'delta-llava[profile]'") from error
    return Figure


def _png(figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
