"""What the demo shows at the end: a table of accuracy and time, and pictures with their answers as one PNG."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from .drawings import KINDS

TILE_WIDTH = 288
MARGIN = 14
FONT_SIZE = 15
LINE_HEIGHT = 20
INK, RIGHT, WRONG, PAPER = (35, 35, 40), (20, 120, 60), (185, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class ExamQuestion:
    """A question about a picture file, the right answer, and which of `KINDS` it is."""

    image: str
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class ExamResult:
    """Answers at one budget (None: without the picture), and the mean seconds of one."""

    budget: int | None
    answers: list[str]
    seconds: float

    @property
    def name(self) -> str:
        return "no picture" if self.budget is None else str(self.budget)


def accuracy(result: ExamResult, questions: list[ExamQuestion], kind: str | None = None) -> float:
    """Share of right answers, of one kind of question or of all; NaN if there is none of this kind."""
    right = [
        answer == question.answer
        for answer, question in zip(result.answers, questions, strict=True)
        if kind is None or question.kind == kind
    ]
    return sum(right) / len(right) if right else float("nan")


def results_table(results: list[ExamResult], questions: list[ExamQuestion]) -> Table:
    """Accuracy by kind of question and time of an answer, one row for each budget."""
    table = Table(title=f"{len(questions)} questions about pictures that training never saw")
    table.add_column("visual tokens", justify="right")
    table.add_column("accuracy", justify="right", style="bold")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    table.add_column("ms / answer", justify="right")
    for result in results:
        shares = [accuracy(result, questions, kind) for kind in (None, *KINDS)]
        table.add_row(result.name, *(f"{share:.0%}" for share in shares), f"{1000 * result.seconds:.0f}")
    return table


def draw_answers(
    questions: list[ExamQuestion], results: list[ExamResult], folder: Path, columns: int = 4, tiles: int = 12
) -> Image.Image:
    """A sheet of pictures, each with a question, the right answer and the answers at every number of visual tokens.

    Args:
        questions: what was asked; the first question of each of the first `tiles` pictures is shown.
        results: answers in the order of the questions.
        folder: what image names are relative to.
        columns, tiles: shape of the sheet.
    """
    shown: dict[str, int] = {}
    for number, question in enumerate(questions):
        shown.setdefault(question.image, number)
    chosen = list(shown.values())[:tiles]
    font = ImageFont.load_default(FONT_SIZE)
    tile_height = TILE_WIDTH + (2 + len(results)) * LINE_HEIGHT + MARGIN
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (TILE_WIDTH + MARGIN) + MARGIN, rows * (tile_height + MARGIN) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, number in enumerate(chosen):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * (TILE_WIDTH + MARGIN), MARGIN + row * (tile_height + MARGIN)
        question = questions[number]
        with Image.open(folder / question.image) as picture:
            sheet.paste(picture.resize((TILE_WIDTH, TILE_WIDTH), Image.Resampling.BICUBIC), (left, top))
        top += TILE_WIDTH + 4
        pen.text((left, top), question.question, INK, font)
        pen.text((left, top + LINE_HEIGHT), f"right answer: {question.answer}", INK, font)
        for line, result in enumerate(results, start=2):
            answer = result.answers[number]
            label = "no picture" if result.budget is None else f"at {result.budget}"
            colour = RIGHT if answer == question.answer else WRONG
            pen.text((left, top + line * LINE_HEIGHT), f"{label}: {answer}", colour, font)
    return sheet
