"""The sheet of `delta-llava explain`, after the paper's Figure 1: a picture, a heat map per budget, the answers."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from delta_llava.errors import UserError, printable

from . import figure

if TYPE_CHECKING:
    from .explain import Explanation

# Written into the file, and looked for before one is replaced.
SOFTWARE = "delta-llava explain"
# Inches, and points of the font.
PANEL, GAP, MARGIN, HEADING, LINE, FONT = 2.3, 0.12, 0.2, 0.28, 0.2, 10
PIXELS_PER_INCH = 150
SIDE = round(PANEL * PIXELS_PER_INCH)
INK, FAINT = "#222222", "#6b6b6b"


def check_output(path: Path):
    """Refuses early what `draw` could only refuse after all work.

    Raises:
        UserError: matplotlib is not installed, `path` is no .png in a folder that can be written, or it is a file that
            is no sheet.
    """
    figure.check(path)
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it, or write {path.name} elsewhere")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write in {path.parent}: give another file")
    is_sheet = path.is_file() and SOFTWARE.encode() in path.read_bytes()
    if os.path.lexists(path) and not is_sheet:
        raise UserError(f"{path} exists and is no sheet of `explain`: give another file")


def draw(
    explanations: Sequence["Explanation"],
    question: str,
    path: Path,
    token: str | None = None,
    method: str = "Grad-CAM",
):
    """Writes the sheet as a PNG file, which appears when it is whole.

    The upper row shows the picture as the model sees it and the heat of every budget, the lower one how much visual
    tokens read the patches of their windows, compared with reading all of them alike.

    Args:
        explanations: of one picture and question.
        token: the word that the heat is of, if not the whole answer.
        method: what the heat is.

    Raises:
        UserError: as `check_output`.
    """
    check_output(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 2 * MARGIN + (1 + len(explanations)) * (PANEL + GAP) - GAP
    target = "the answer" if token is None else f"“{printable(token.strip())}”"
    notes = (
        f"Above: {method} of {target}. Coloured patches speak for it, red ones most.",
        "Right: the windows of patches that visual tokens read. Bright patches are read most.",
    )
    note = "\n\n".join("\n".join(wrapped(text, PANEL, FONT - 1)) for text in notes)
    said = [("bold", line) for line in wrapped(printable(question, None), width - 2 * MARGIN, FONT, "bold")]
    for each in explanations:
        answer = f"{visual_tokens(each)}: {printable(each.answer, None) or '(no answer)'}"
        said += [("normal", line) for line in wrapped(answer, width - 2 * MARGIN, FONT)]
    height = 2 * MARGIN + HEADING + 2 * PANEL + 2 * GAP + len(said) * LINE
    sheet = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH)
    FigureCanvasAgg(sheet)

    def write(left: float, top: float, text: str, **style):
        sheet.text(left / width, 1 - top / height, text, parse_math=False, va="top", **{"fontsize": FONT, **style})

    def panel(row: int, column: int, pixels: np.ndarray):
        left, top = MARGIN + column * (PANEL + GAP), MARGIN + HEADING + row * (PANEL + GAP)
        box = (left / width, 1 - (top + PANEL) / height, PANEL / width, PANEL / height)
        axes = sheet.add_axes(box, xticks=[], yticks=[])
        axes.spines[:].set_color("#bbbbbb")
        axes.imshow(pixels, extent=(0, 1, 1, 0))
        return axes

    def heading(column: int, text: str):
        write(MARGIN + column * (PANEL + GAP) + PANEL / 2, MARGIN, text, ha="center", color=INK)

    heading(0, "as the model sees it")
    panel(0, 0, enlarged(explanations[0].picture))
    write(MARGIN, MARGIN + HEADING + PANEL + 2 * GAP, note, fontsize=FONT - 1, color=FAINT, linespacing=1.4)
    for column, each in enumerate(explanations, start=1):
        heading(column, visual_tokens(each))
        panel(0, column, heated(each.picture, each.heat))
        reading = panel(1, column, read(each.picture, each.attention))
        grid_size = round(each.num_visual_tokens**0.5)
        for edge in range(1, grid_size):
            style = {"color": "white", "linewidth": 1.2 if grid_size <= 8 else 0.5}
            reading.axhline(edge / grid_size, **style)
            reading.axvline(edge / grid_size, **style)
    for number, (weight, line) in enumerate(said):
        top = MARGIN + HEADING + 2 * (PANEL + GAP) + number * LINE
        write(MARGIN, top, line, fontweight=weight, color=INK)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        sheet.savefig(unfinished, format="png", metadata={"Software": SOFTWARE})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def wrapped(text: str, inches: float, points: float, weight: str = "normal") -> list[str]:
    """Lines of a text that are no wider than that, in letters of a size in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=points, weight=weight)
    most = inches * 72
    letters = int(most / (0.4 * points))  # of a line of narrow ones
    while True:
        lines = textwrap.wrap(text, letters)
        widest = max((text_to_path.get_text_width_height_descent(line, font, False)[0] for line in lines), default=0)
        if widest <= most or letters == 1:
            return lines
        letters = max(1, min(letters - 1, int(letters * most / widest)))


def visual_tokens(explanation: "Explanation") -> str:
    count = explanation.num_visual_tokens
    return f"{count} visual token{'s' * (count > 1)}"


def enlarged(pixels: np.ndarray, resample: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """A picture `(S, S, 3)` or a map `(H, W)` at the size of a panel."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), resample))


def heated(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A picture `(S, S, 3)` in pale grey under its heat `(H, W)`, at the size of a panel."""
    from matplotlib import colormaps

    heat = enlarged(heat, Image.Resampling.BICUBIC).clip(0, 1)
    opacity = 0.75 * np.sqrt(heat)[..., None]
    return (1 - opacity) * pale(picture) + opacity * colormaps["turbo"](0.15 + 0.8 * heat)[..., :3]


def read(picture: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A picture `(S, S, 3)` under what visual tokens read of it, `(V, H, W)`, at the size of a panel."""
    from matplotlib import colormaps

    window = attention[0].size / len(attention)
    shares = attention.sum(0) * window  # 1 where a patch is read like the others of its window
    brightness = np.sqrt(shares / max(2, shares.max()))  # where all are read alike nothing is bright
    colours = colormaps["viridis"](enlarged(brightness, Image.Resampling.NEAREST))[..., :3]
    return 0.4 * pale(picture) + 0.6 * colours


def pale(picture: np.ndarray) -> np.ndarray:
    """A picture `(S, S, 3)` in light grey, in which colours laid over it show, at the size of a panel."""
    grey = enlarged(picture).mean(-1, keepdims=True) / 255
    return np.repeat(0.35 + 0.65 * grey, 3, axis=-1)
