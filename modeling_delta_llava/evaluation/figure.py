"""The profile as the paper's Figure 3 draws it: FLOPs stacked by component, tokens per second above each bar."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError

from .units import flop_unit

COMPONENTS = {
    "vision_tower": ("Vision tower", "#4c72b0"),
    "projector": ("Projector", "#55a868"),
    "prefill": ("Prefill", "#dd8452"),
    "decode": ("Decode", "#c44e52"),
}


def check(path: Path):
    """Refuse early what `draw` could only refuse after all measurements.

    Raises:
        UserError: if matplotlib is not installed, or `path` does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: the figure is written as PNG; give a name that ends in .png")
    if find_spec("matplotlib") is None:
        raise UserError("the figure needs matplotlib: pip install 'delta-llava[profile]'")


def draw(document: dict[str, Any], path: Path):
    """Write the figure of a profile as a PNG file.

    Raises:
        UserError: as `check`.
    """
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = document["budgets"]
    is_measured = "measured_on" in document
    unit, size = flop_unit(document)
    figure = Figure(figsize=(max(6.4, 0.95 * len(rows) + 3), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottoms = [0.0] * len(rows)
    for component, (label, colour) in COMPONENTS.items():
        heights = [row["flops"]["counted"][component] / size for row in rows]
        axes.bar(range(len(rows)), heights, 0.66, bottom=bottoms, label=label, color=colour)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, (row, total) in enumerate(zip(rows, bottoms, strict=True)):
        text = f"{row['measured']['generate_tokens_per_s']:.3g} tok/s" if is_measured else f"{total:.2f}"
        axes.annotate(text, (position, total), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(rows)), [str(row["num_visual_tokens"]) for row in rows])
    axes.set_xlabel("Visual tokens per image")
    axes.set_ylabel(unit)
    axes.set_ylim(0, max(bottoms) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    detail = f"{document['text_tokens']} text tokens, {document['new_tokens']} new tokens"
    if is_measured:
        detail += f"; {document['measured_on']['device']}, {document['measured_on']['dtype']}"
    axes.set_title(f"{document['model']}\n{detail}", loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
