"""The demo's own visual question-answering set: coloured shapes on a plain ground, drawn with PIL.

A picture has four by four places, each empty or holding one shape in one colour; a position is one of the four
quarters. Questions ask for counts, colours, shapes and positions, and whether something is there; every answer follows
from the scene, never from the question.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
PLACES_PER_SIDE = 4
PLACE_SIZE = IMAGE_SIZE // PLACES_PER_SIDE
SUPERSAMPLING = 2

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 163, 82),
    "blue": (42, 96, 214),
    "yellow": (241, 196, 15),
}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
CAPTION_REQUEST = "Describe the picture."
KINDS = ("count", "colour", "shape", "position", "presence")


@dataclass(frozen=True)
class Thing:
    """One shape of a scene: what it is and in which of the sixteen places (numbered row by row) it lies."""

    shape: str
    colour: str
    place: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def position(self) -> str:
        row, column = divmod(self.place, PLACES_PER_SIDE)
        return POSITIONS[2 * (2 * row // PLACES_PER_SIDE) + 2 * column // PLACES_PER_SIDE]


@dataclass(frozen=True)
class Question:
    """One question about a scene, its answer, and which of `KINDS` it is."""

    kind: str
    text: str
    answer: str


Scene = tuple[Thing, ...]


def draw_scene(rng: random.Random) -> Scene:
    """A random scene of one to four things in different places."""
    places = sorted(rng.sample(range(PLACES_PER_SIDE**2), rng.randint(1, 4)))
    return tuple(Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), place) for place in places)


def distinct_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes that differ from each other."""
    rng = random.Random(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[draw_scene(rng)] = None
    return list(scenes)


def paint(scene: Scene, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """Draws a scene; sizes, offsets and the ground vary.

    Returns:
        The picture (`IMAGE_SIZE` squared, RGB) and a map of the same size that holds 1 + the index of the thing that
        covers a pixel, or 0.
    """
    ground = tuple(rng.randint(215, 250) for _ in range(3))
    size = IMAGE_SIZE * SUPERSAMPLING
    picture = Image.new("RGB", (size, size), ground)
    owners = Image.new("L", (size, size), 0)
    pen, owner_pen = ImageDraw.Draw(picture), ImageDraw.Draw(owners)
    for number, thing in enumerate(scene, start=1):
        radius = rng.uniform(8.0, 10.5)
        slack = PLACE_SIZE / 2 - radius - 1
        row, column = divmod(thing.place, PLACES_PER_SIDE)
        centre = (
            (column + 0.5) * PLACE_SIZE + rng.uniform(-slack, slack),
            (row + 0.5) * PLACE_SIZE + rng.uniform(-slack, slack),
        )
        colour = tuple(max(0, min(255, value + rng.randint(-14, 14))) for value in COLOURS[thing.colour])
        _draw_shape(pen, thing.shape, centre, radius, colour)
        _draw_shape(owner_pen, thing.shape, centre, radius, number)
    picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    owners = owners.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)
    return picture, np.asarray(owners, dtype=np.int64)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, fill: Any) -> None:
    x, y = (value * SUPERSAMPLING for value in centre)
    radius *= SUPERSAMPLING
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = radius * 0.88
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    else:  # a triangle
        corners = [
            (x + radius * math.sin(angle), y - radius * math.cos(angle) + radius * 0.15)
            for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)
        ]
        pen.polygon(corners, fill=fill)


def caption(scene: Scene) -> str:
    """Names every thing of a scene with its place, row by row."""
    return ", ".join(f"a {thing.name} at the {thing.position}" for thing in scene) + "."


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions of every kind that the scene allows, in random order.

    Colour, shape and position are asked of everything that can be named by one word or two; counts and presence are
    asked of what is there and of what is not alike, so that neither can be answered well without the picture.
    """
    asked = [Question("count", "How many shapes are there?", NUMBERS[len(scene)])]
    shape = rng.choice(SHAPES)
    asked.append(
        Question("count", f"How many {shape}s are there?", NUMBERS[sum(thing.shape == shape for thing in scene)])
    )
    for thing in scene:
        if sum(other.shape == thing.shape for other in scene) == 1:
            asked.append(Question("colour", f"What colour is the {thing.shape}?", thing.colour))
        if sum(other.colour == thing.colour for other in scene) == 1:
            asked.append(Question("shape", f"What shape is {thing.colour}?", thing.shape))
        if sum(other.name == thing.name for other in scene) == 1:
            asked.append(Question("position", f"Where is the {thing.name}?", thing.position))
    present = sorted({thing.name for thing in scene})
    absent = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in present]
    asked.append(Question("presence", f"Is there a {rng.choice(present)}?", "yes"))
    asked.append(Question("presence", f"Is there a {rng.choice(absent)}?", "no"))
    rng.shuffle(asked)
    return asked


@dataclass(frozen=True)
class DrawnSet:
    """What [`write_set`] wrote: pictures in `image_folder`, the two stages' rows, and each picture's questions."""

    image_folder: Path
    caption_file: Path
    question_file: Path
    questions: list[list[Question]]


def write_set(folder: Path, name: str, scenes: list[Scene], seed: int) -> DrawnSet:
    """Draws scenes to PNG files and writes captions (stage 1) and questions (stage 2) as LLaVA JSON.

    Args:
        folder: receives `images/` and the two JSON files.
        name: prefix of all file names, such as "train".
        scenes: what to draw.
        seed: seed of the drawing and of the questions.
    """
    image_folder = folder / "images"
    image_folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    captions, conversations, asked = [], [], []
    for number, scene in enumerate(scenes):
        file = f"{name}_{number:05d}.png"
        picture, _ = paint(scene, rng)
        picture.save(image_folder / file)
        captions.append(
            {
                "id": f"{name}_{number}",
                "image": file,
                "conversations": [
                    {"from": "human", "value": "<image>\n" + CAPTION_REQUEST},
                    {"from": "gpt", "value": caption(scene)},
                ],
            }
        )
        turns = []
        asked.append(questions(scene, rng))
        for place, question in enumerate(asked[-1]):
            turns.append({"from": "human", "value": ("<image>\n" if place == 0 else "") + question.text})
            turns.append({"from": "gpt", "value": question.answer})
        conversations.append({"id": f"{name}_{number}", "image": file, "conversations": turns})
    caption_file, question_file = folder / f"{name}_captions.json", folder / f"{name}_questions.json"
    caption_file.write_text(json.dumps(captions, indent=1), encoding="utf-8")
    question_file.write_text(json.dumps(conversations, indent=1), encoding="utf-8")
    return DrawnSet(image_folder, caption_file, question_file, asked)
