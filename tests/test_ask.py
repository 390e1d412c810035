"""`delta-llava ask`: answers, one-line errors, exit status 2."""

import json
from pathlib import Path

import pytest

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava import asking
from tests.tiny import encoded, picture

CAT = Path(__file__).parents[1] / "assets" / "cat.jpg"


def test_answers_about_a_photograph(hub_folder, capsys):
    assert cli.main(["ask", str(hub_folder), str(CAT), "What is weird here?", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip()


def test_wrong_budget_is_one_line(hub_folder, capsys):
    assert cli.main(["ask", str(hub_folder), str(CAT), "What?", "--num-visual-tokens", "7"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "error: num_visual_tokens=7 is not possible on a 4 x 4 patch grid; choose one of [16, 4, 1]"
    ]


def test_answer_depends_on_picture_and_budget(hub_folder, tmp_path, capsys):
    white = tmp_path / "white.png"
    white.write_bytes(encoded(picture("white")))
    answers = set()
    for path in (white, CAT):
        for budget in ("4", "16"):
            asking.ask(str(hub_folder), "What is it?", [str(path)], budget, max_new_tokens=40)
            answers.add(capsys.readouterr().out)
    assert len(answers) == 4


def test_several_images_with_a_budget_each(hub_folder, capsys):
    asking.ask(str(hub_folder), "Compare.", [str(CAT), str(CAT)], "1,16", max_new_tokens=4)
    assert capsys.readouterr().out.strip()


def test_text_alone(hub_folder, capsys):
    asking.ask(str(hub_folder), "Hello?", max_new_tokens=4)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, r"no such image: .*picture"),
        (b"plain text", "not an image"),
        (encoded(picture((1, 2, 3), (64, 64)), "JPEG")[:400], "damaged"),
        ("folder", "is a folder"),
    ],
    ids=["missing", "text", "truncated", "folder"],
)
def test_bad_images(write, message, hub_folder, tmp_path):
    path = tmp_path / "picture.jpg"
    if write == "folder":
        path.mkdir()
    elif write is not None:
        path.write_bytes(write)
    with pytest.raises(UserError, match=message):
        asking.ask(str(hub_folder), "What?", [str(path)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "no such model"),
        ("name", "no such model"),
        ("some/body", "no usable model at some/body"),
        ("{tmp}", "no config.json"),
        ("{tmp}/config.json", "is a file"),
    ],
)
def test_bad_models(model, message, tmp_path):
    model = model.format(tmp=tmp_path)
    if model.endswith("config.json"):
        Path(model).write_text("{}")
    with pytest.raises(UserError, match=message):
        asking.ask(model, "What?")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (json.dumps({"model_type": "llava_llama", "mm_vision_tower": "openai/x"}), "delta-llava convert"),
        ("{not json", "not valid JSON"),
        (json.dumps({"model_type": "bert"}), "no usable model"),
        (json.dumps({"model_type": "delta_llava", "num_visual_tokens": 5}), "no usable model.*num_visual_tokens=5"),
    ],
    ids=["training", "broken", "other", "impossible"],
)
def test_bad_configs(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        asking.ask(str(tmp_path), "What?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": str(CAT), "images": []}, "question is missing"),
        ({"num_visual_tokens": "many"}, "not a number"),
        ({"num_visual_tokens": "4,4"}, "for each of 1 image"),
        ({"dtype": "int8"}, "choose one of auto"),
        ({"device": "abacus"}, "abacus"),
        ({"question": "word " * 600}, "context is 512"),
    ],
)
def test_bad_settings(arguments, message, hub_folder):
    with pytest.raises(UserError, match=message):
        asking.ask(**{"model": str(hub_folder), "question": "What?", "images": [str(CAT)], **arguments})
