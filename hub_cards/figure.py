"""Pictures of a Hub repository: score against visual tokens, and a drawing to try the model on."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from modeling_delta_llava.hub_cards.variants import MISSING, Variant, benchmarks, paper_tables, variants

SCALE = 2  # drawn at twice the size, then reduced: smooth lines
WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 70, 75
INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
OURS = "#c2410c"
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
    same_tower = [entry for entry in family if entry.tower.id == family[0].tower.id]
    rows = [row for entry in same_tower for row in entry.rows]
    for benchmark in ("GQA", "Nocaps"):
        line = _points(rows, benchmark)
        if len(line) < 2:
            continue
        other_tower = variant.tower != family[0].tower
        series = [Series("Delta-LLaVA, CLIP 336" if other_tower else "Delta-LLaVA", line, main=True)]
        sources = {row.source for row in rows if row.cells.get(benchmark, MISSING) != MISSING}
        reference = None
        if benchmark == "Nocaps":
            size = "13B" if "13b" in variant.name else "7B"
            fastv = [row for row in tables["6"].rows if row.method == f"FastV {size}"]
            series.append(Series("FastV", tuple(p for p in _points(fastv, benchmark) if p[0] != 576)))
            reference = (f"LLaVA-1.5 {size}, 576 tokens", float(tables["6"].row(f"FastV {size}", 576).cells["Nocaps"]))
        elif "vicuna-7b" in variant.name:
            methods = dict.fromkeys(row.method for row in tables["1"].rows if row.tokens.isdigit())
            for method in methods:
                points = _points([row for row in tables["1"].rows if row.method == method], benchmark)
                if len(points) > 1 and "Delta" not in method:
                    series.append(Series(method, points))
            reference = ("LLaVA-1.5, 576 tokens", float(tables["1"].row("LLaVA-1.5", 576).cells["GQA"]))
        elif "qwen" in variant.name:
            row = tables["2"].row("Qwen-VL-Chat", 448)
            reference = ("Qwen-VL-Chat, 448 tokens", float(row.cells["GQA"]))
        own = _points(variant.rows, benchmark)
        marked = own[0] if own else None
        sources |= {row.source for row in variant.rows if benchmark in row.cells}
        numbers = sorted(source.removeprefix("Table ") for source in sources)
        named = f"Table{'s' if len(numbers) > 1 else ''} {' and '.join(numbers)}"
        return Chart(benchmark, named, tuple(series), reference, marked)
    return None


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


class _Canvas:
    """Maps (log2 of tokens, score) to pixels and draws in the units of the finished picture."""

    def __init__(self, tokens: tuple[int, int], scores: tuple[float, float]):
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.tokens, self.scores = tokens, scores

    def x(self, tokens: int) -> float:
        low, high = (math.log2(value) for value in self.tokens)
        return LEFT + (math.log2(tokens) - low) / (high - low) * (WIDTH - LEFT - RIGHT - 190) + 20

    def y(self, score: float) -> float:
        low, high = self.scores
        return HEIGHT - BOTTOM - (score - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def dashes(self, start: float, end: float, y: float, colour: str) -> None:
        while start < end:
            self.line([(start, y), (min(start + 8, end), y)], colour, 1.5)
            start += 14

    def dot(self, x: float, y: float, radius: float, colour: str, ring: bool = False) -> None:
        box = [(v) * SCALE for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, fill="white" if ring else colour, outline=colour, width=2 * SCALE)

    def text(self, x: float, y: float, text: str, size: int, colour: str = INK, anchor: str = "la", halo=0) -> None:
        """Writes at a point; `halo` is the width of a white rim that keeps the text legible on lines."""
        place = (x * SCALE, y * SCALE)
        rim = {"stroke_width": halo * SCALE, "stroke_fill": "white"}
        self.draw.text(place, text, fill=colour, font=_font(size), anchor=anchor, **rim)


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Positions near the wanted ones, in the same order, at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    overflow = max(placed, default=0) - (HEIGHT - BOTTOM)
    return [position - max(overflow, 0) for position in placed]


def _height_at(line: list[tuple[float, float]], x: float) -> list[float]:
    """The height of a line through points at `x`; empty when the line does not reach there."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= x <= x1:
            return [y0 + (y1 - y0) * (x - x0) / (x1 - x0)]
    return []


def draw_chart(chart: Chart, path: Path) -> None:
    """Draws the chart as a PNG of 960 x 540 pixels."""
    every = [point for series in chart.series for point in series.points] + ([chart.marked] if chart.marked else [])
    scores = [score for _, score in every] + ([chart.reference[1]] if chart.reference else [])
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100) if (max(scores) - min(scores)) / s <= 7)
    low = math.floor(min(scores) / step) * step
    high = math.ceil(max(scores) / step + 0.2) * step
    ticks = sorted({tokens for tokens, _ in chart.series[0].points} | ({chart.marked[0]} if chart.marked else set()))
    all_tokens = [tokens for tokens, _ in every]
    canvas = _Canvas((min(all_tokens), max(all_tokens)), (low, high))
    canvas.text(LEFT, 22, chart.title, 20)
    ring = "; the ring marks this variant" if chart.marked else ""
    canvas.text(LEFT, 47, f"as printed in {chart.sources} of arXiv 2512.18910{ring}", 13, FAINT)
    end = canvas.x(max(all_tokens)) + 20
    value = low
    while value <= high + 1e-9:
        canvas.line([(LEFT, canvas.y(value)), (end, canvas.y(value))], GRID, 1)
        canvas.text(LEFT - 10, canvas.y(value), f"{value:g}", 14, FAINT, "rm")
        value += step
    for index, tokens in enumerate(ticks):
        lift = 16 if index and canvas.x(tokens) - canvas.x(ticks[index - 1]) < 26 else 0
        canvas.text(canvas.x(tokens), HEIGHT - BOTTOM + 10 + lift, str(tokens), 14, FAINT, "ma")
    canvas.text((LEFT + end) / 2, HEIGHT - 18, "visual tokens per picture (logarithmic)", 14, FAINT, "ms")
    labels, lines = [], []
    if chart.reference:
        y = canvas.y(chart.reference[1])
        canvas.dashes(LEFT, end, y, FAINT)
        lines.append([(LEFT, y), (end, y)])
        labels.append((y, chart.reference[0], FAINT))
    colours = iter(OTHERS)
    for series in sorted(chart.series, key=lambda entry: entry.main):
        colour = OURS if series.main else next(colours)
        points = [(canvas.x(tokens), canvas.y(score)) for tokens, score in series.points]
        canvas.line(points, colour, 3.5 if series.main else 2)
        lines.append(points)
        for x, y in points:
            canvas.dot(x, y, 5 if series.main else 3.5, colour)
        labels.append((points[-1][1], series.label, colour))
    if chart.marked:
        x, y = canvas.x(chart.marked[0]), canvas.y(chart.marked[1])
        canvas.dot(x, y, 9, OURS, ring=True)
        canvas.dot(x, y, 4, OURS)
        heights = [height for line in lines for height in _height_at(line, x)]
        on_line = chart.marked in next(series.points for series in chart.series if series.main)
        places = (y - 22, y + 22) if on_line else (y + 22,)
        centre = max(places, key=lambda place: min(abs(place - height) for height in heights))
        canvas.text(x, centre, f"{chart.marked[1]:g}", 15, OURS, "mm", halo=3)
    for place, (_, label, colour) in zip(_spread([label[0] for label in labels], 19), labels, strict=True):
        canvas.text(end + 8, place, label, 14, colour, "lm")
    canvas.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path, optimize=True)


def draw_example(path: Path) -> None:
    """A drawing to ask about: three red circles, two blue squares and a yellow triangle; PNG of 336 x 336 pixels."""
    image = Image.new("RGB", (336 * SCALE, 336 * SCALE), "#f8fafc")
    draw = ImageDraw.Draw(image)
    for x, y in ((70, 80), (170, 60), (270, 90)):
        draw.ellipse([(v) * SCALE for v in (x - 35, y - 35, x + 35, y + 35)], fill="#dc2626")
    for x, y in ((90, 240), (250, 250)):
        draw.rectangle([(v) * SCALE for v in (x - 38, y - 38, x + 38, y + 38)], fill="#2563eb")
    draw.polygon([(v) * SCALE for v in (170, 150, 130, 215, 210, 215)], fill="#facc15")
    image.resize((336, 336), Image.Resampling.LANCZOS).save(path, optimize=True)
