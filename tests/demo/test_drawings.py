import random

import numpy as np
from PIL import Image

from examples.demo.drawings import (
    COLOURS,
    KINDS,
    NUMBERS,
    PLACES_PER_SIDE,
    SHAPES,
    Thing,
    caption,
    distinct_scenes,
    draw_scene,
    paint,
    questions,
    write_set,
)
from examples.demo.report import ExamQuestion, ExamResult, accuracy, draw_answers, results_table


def true_answer(scene, text):
    """The answer by reading the question's words, independently of how the question was made."""
    words = text.rstrip("?").split()
    if text == "How many shapes are there?":
        return NUMBERS[len(scene)]
    if text.startswith("How many"):
        return NUMBERS[sum(thing.shape + "s" == words[2] for thing in scene)]
    if text.startswith("Is there a"):
        return "yes" if any(thing.name == " ".join(words[3:]) for thing in scene) else "no"
    named = [thing for thing in scene if {thing.shape, thing.colour} & set(words)]
    if text.startswith("Where"):
        named = [thing for thing in scene if thing.name == " ".join(words[3:])]
    (thing,) = named
    if text.startswith("What colour"):
        return thing.colour
    return thing.shape if text.startswith("What shape") else thing.position


def test_every_answer_follows_from_the_scene():
    rng = random.Random(3)
    seen = set()
    for _ in range(300):
        scene = draw_scene(rng)
        for question in questions(scene, rng):
            assert question.answer == true_answer(scene, question.text), (scene, question)
            seen.add(question.kind)
    assert seen == set(KINDS)


def test_presence_is_answered_yes_and_no_equally_often():
    rng = random.Random(4)
    asked = [question for _ in range(100) for question in questions(draw_scene(rng), rng)]
    answers = [question.answer for question in asked if question.kind == "presence"]
    assert answers.count("yes") == answers.count("no")


def test_scenes_of_one_draw_are_all_different():
    scenes = distinct_scenes(400, seed=0)
    assert len(set(scenes)) == 400
    assert distinct_scenes(20, seed=0) == scenes[:20]


def test_a_thing_is_painted_in_its_colour_at_its_place():
    for shape in SHAPES:
        for place in range(PLACES_PER_SIDE**2):
            picture, owners = paint((Thing(shape, "blue", place),), random.Random(place))
            covered = np.asarray(picture)[owners == 1].astype(float)
            assert np.abs(np.median(covered, axis=0) - COLOURS["blue"]).max() <= 15
            rows, columns = np.nonzero(owners)
            row, column = divmod(place, PLACES_PER_SIDE)
            assert (rows // 24 == row).mean() > 0.95
            assert (columns // 24 == column).mean() > 0.95


def test_written_set(tmp_path):
    from modeling_delta_llava.finetuning.data import load_rows, row_of

    scenes = distinct_scenes(5, seed=2)
    drawn = write_set(tmp_path, "train", scenes, seed=0)
    for file, turns in ((drawn.caption_file, 2), (drawn.question_file, 6)):
        rows = [row_of(record) for record in load_rows(str(file))]
        assert len(rows) == 5
        assert all(len(row["conversations"]) >= turns for row in rows)
    with Image.open(drawn.image_folder / "train_00000.png") as picture:
        assert picture.size == (96, 96)
    assert caption(scenes[0]) in drawn.caption_file.read_text()


def test_report(tmp_path):
    Image.new("RGB", (96, 96), "white").save(tmp_path / "a.png")
    asked = [
        ExamQuestion("a.png", "count", "How many shapes are there?", "one"),
        ExamQuestion("a.png", "colour", "What colour is the circle?", "red"),
    ]
    good, bad = ExamResult(16, ["one", "red"], 0.05), ExamResult(None, ["two", "red"], 0.04)
    assert accuracy(good, asked) == 1.0
    assert accuracy(bad, asked) == 0.5
    assert accuracy(bad, asked, "count") == 0.0
    table = results_table([good, bad], asked)
    assert table.row_count == 2
    assert list(table.columns[1].cells) == ["100%", "50%"]
    sheet = draw_answers(asked, [good, bad], tmp_path)
    assert sheet.size[0] > sheet.size[1] > 288
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert (20, 120, 60) in colours
    assert (185, 40, 40) in colours
