"""The model that `make demo` trained, as a model that knows something."""

import json
import random

import pytest
import torch
from PIL import Image

from examples.demo.drawings import COLOURS, KINDS, Thing, distinct_scenes, paint, questions
from modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor

# As `demo.__main__` trains at. Held-out answers must beat blind ones by this share at 16 tokens or more.
BUDGETS = (64, 16, 4, 1)
MARGIN = 0.2


@pytest.fixture(scope="module")
def summary(demo_output):
    return json.loads((demo_output / "demo.json").read_text())


@pytest.fixture(scope="module")
def model(demo_output):
    return DeltaLlavaForConditionalGeneration.from_pretrained(demo_output / "model").eval()


@pytest.fixture(scope="module")
def processor(demo_output):
    return DeltaLlavaProcessor.from_pretrained(demo_output / "model", backend="pil")


def answers(model, processor, asked, budget=16):
    """Greedy answers to (picture or None, question) pairs, in one batch."""
    conversations = []
    for picture, question in asked:
        content = [{"type": "image", "image": picture}] if picture is not None else []
        conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": budget, "padding": True},
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@pytest.fixture(scope="module")
def exam():
    """Pictures of scenes from another seed, with one question of every kind that each allows."""
    rng = random.Random(99)
    asked = []
    for scene in distinct_scenes(30, seed=4321):
        picture, _ = paint(scene, rng)
        kinds = {question.kind: question for question in questions(scene, rng)}
        asked += [(picture, kinds[kind]) for kind in KINDS if kind in kinds]
    return asked


def share_right(model, processor, exam, budget, blind=False):
    given = answers(model, processor, [(None if blind else picture, one.text) for picture, one in exam], budget)
    return sum(answer == one.answer for answer, (_, one) in zip(given, exam, strict=True)) / len(exam)


def test_the_demo_beats_the_blind_baseline(summary):
    shares = summary["accuracy"]
    names = {*map(str, BUDGETS), "no picture"}
    assert shares.keys() == summary["seconds_per_answer"].keys() == names
    assert all(0 <= share <= 1 for share in shares.values())
    assert summary["seconds"] > summary["questions"] * sum(summary["seconds_per_answer"].values()) > 0
    for budget in (64, 16):
        assert shares[str(budget)] >= shares["no picture"] + MARGIN


def test_new_pictures_from_another_seed(model, processor, exam):
    blind = share_right(model, processor, exam, 16, blind=True)
    for budget in (64, 16):
        assert share_right(model, processor, exam, budget) >= blind + MARGIN


def test_the_answer_follows_the_picture(model, processor):
    """One question, pictures that differ in nothing but the colour."""
    pictures = [paint((Thing("circle", colour, 5),), random.Random(1))[0] for colour in COLOURS]
    given = answers(model, processor, [(picture, "What colour is the circle?") for picture in pictures])
    assert sum(answer == colour for answer, colour in zip(given, COLOURS, strict=True)) >= 3


def test_each_picture_of_a_batch_gets_its_own_answer(model, processor, exam):
    asked = [(picture, one.text) for picture, one in exam[:12]]
    together = answers(model, processor, asked)
    assert together == [answers(model, processor, [pair])[0] for pair in asked]
    assert together == answers(model, processor, asked[::-1])[::-1]


def test_blank_pictures_hold_nothing(model, processor):
    blank = Image.new("RGB", (96, 96), (230, 230, 230))
    question = "Is there a red circle?"
    full, _ = paint((Thing("circle", "red", 5), Thing("circle", "red", 10)), random.Random(2))
    assert answers(model, processor, [(full, question), (blank, question)]) == ["yes", "no"]


def test_trained_budgets_are_recorded(model):
    assert sorted(model.config.trained_num_visual_tokens) == sorted(BUDGETS)
    assert not torch.isnan(next(model.parameters())).any()


def test_the_sheet_of_answers_is_a_picture(demo_output):
    with Image.open(demo_output / "answers.png") as sheet:
        assert sheet.width > 1000
        assert len(sheet.getcolors(1 << 24)) > 20
