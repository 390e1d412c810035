"""What `delta-llava evaluate` does without lmms-eval: answers on disk, comparison with the paper, page, refusals.

tests/evaluation/test_lmms_eval.py has the rest, with lmms-eval itself.
"""

import importlib.util
import json
import os
import shutil

import pytest
from PIL import Image

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava.evaluation import evaluate
from modeling_delta_llava.evaluation.answers import Answers, revision_of
from modeling_delta_llava.hub_cards import report
from modeling_delta_llava.hub_cards.variants import get_variant, paper_tasks
from tests import tiny

VARIANT = "delta-llava-vicuna-7b-36"
COST = {
    "name": "mine",
    "columns": ["tokens/s", "TFLOPs: total"],
    "rows": [["144", "30.00", "2.900"], ["36", "35.00", "1.800"]],
    "about": "Measured on a test.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_hub_folder(tmp_path_factory.mktemp("hub") / "model")


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_outlive_their_process_and_a_cut_line(tmp_path):
    first, second = Answers(tmp_path / "answers"), Answers(tmp_path / "answers", rank=1)
    assert not (tmp_path / "answers").exists()
    keys = [Answers.key({"task": "gqa", "doc_id": number}) for number in range(4)]
    first.add(keys[0], "a cup\nof tea", task="gqa")
    second.add(keys[1], "été", task="gqa")
    first.add(keys[2], "lost", task="gqa")
    file = tmp_path / "answers" / "rank_0.jsonl"
    file.write_bytes(file.read_bytes().rstrip()[:-3])
    again = Answers(tmp_path / "answers")
    assert [again.get(key) for key in keys] == ["a cup\nof tea", "été", None, None]
    again.add(keys[2], "found", task="gqa")
    assert [Answers(tmp_path / "answers").get(key) for key in keys] == ["a cup\nof tea", "été", "found", None]


def test_other_files_among_answers_are_passed_over(tmp_path):
    (tmp_path / "rank_7.jsonl").write_bytes(b'\xff\xfe\n[]\n{"key": []}\n"x"\n{"key": "k", "answer": "a"}\n')
    assert Answers(tmp_path).get("k") == "a"


@pytest.mark.parametrize(
    "changed",
    [{"model": "b"}, {"task": "pope"}, {"doc_id": 2}, {"num_visual_tokens": 4}, {"settings": {"max_new_tokens": 9}}],
)
def test_a_question_is_known_by_all_that_decides_its_answer(changed):
    asked = {"model": "a", "task": "gqa", "doc_id": 1, "num_visual_tokens": 36, "settings": {"max_new_tokens": 8}}
    assert Answers.key(asked) == Answers.key(dict(reversed(asked.items())))
    assert Answers.key(asked) != Answers.key({**asked, **changed})


def test_revision_is_that_of_weights_and_settings(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert revision_of(copy) == revision_of(folder)
    (copy / "README.md").write_text("a card")
    assert revision_of(copy) == revision_of(folder)
    template = copy / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text + " ", encoding="utf-8")
    assert revision_of(copy) != revision_of(folder)
    template.write_text(text, encoding="utf-8")
    os.utime(copy / "model.safetensors", (1, 1))
    assert revision_of(copy) != revision_of(folder)
    snapshot = tmp_path / "models--you--mine" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    assert revision_of(snapshot) == "a" * 40
    for file in copy.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="has no weights"):
        revision_of(copy)


# --- beside the paper ------------------------------------------------------------------------------------------------


def result_file(path, tokens: int, scores: dict, rows=(5000, 5000)):
    """As `evaluate` writes it."""
    document = {
        "results": {task: {"alias": task, f"{metric},none": value} for task, (metric, value) in scores.items()},
        "n-samples": {task: {"original": rows[1], "effective": rows[0]} for task in scores},
        "date": "20261126_101112",
        "config": {
            "model_args": f"pretrained=mine,num_visual_tokens={tokens}",
            "model_revision": "0123456789abcdef",
            "dtype": "bfloat16",
            "versions_of_packages": dict.fromkeys(("lmms_eval", "transformers", "torch", "delta_llava"), "1.0"),
        },
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for tokens, gqa, cider in ((144, 0.62, 1.0), (36, 0.615, 0.99)):
        scores = {"gqa": ("exact_match", gqa), "nocaps_val": ("nocaps_CIDEr", cider), "mine": ("accuracy", 0.5)}
        result_file(folder / f"20261126_101112_{tokens}_results.json", tokens, scores)
    return sorted(folder.iterdir(), reverse=True)


def test_scores_stand_beside_the_papers(results):
    measured = report.read_results(results, get_variant(VARIANT))
    _, rows = report.table(measured)
    assert rows == [
        ["gqa", "exact_match", "144", "62.00", "62.34", "-0.34"],
        ["gqa", "exact_match", "36", "61.50", "61", "+0.50"],
        ["nocaps_val", "nocaps_CIDEr", "144", "100.00", "102.6", "-2.60"],
        ["nocaps_val", "nocaps_CIDEr", "36", "99.00", "99.8", "-0.80"],
        ["mine", "accuracy", "144", "0.5", "–", "–"],
        ["mine", "accuracy", "36", "0.5", "–", "–"],
    ]
    assert {row[-1] for row in report.table(report.read_results(results, None))[1]} == {"–"}


def test_page_has_the_papers_tables(results, tmp_path):
    variant = get_variant(VARIANT)
    place = tmp_path / "report"
    with report.new_page(place) as building:
        shutil.copy(tiny_picture(tmp_path), building / report.COST)
        report.write_page(building, results, report.read_results(results, variant), variant, COST)
    page = (place / "README.md").read_text(encoding="utf-8")
    for line in (
        "|  | visual tokens | GQA | mine (accuracy) |",
        "| LLaVA-1.5 (Table 1) | 576 | 62.0 | – |",
        "| Delta-LLaVA (Table 1) | 144 | 62.34 | – |",
        "| **this model** | 144 | **62.00** | **0.5** |",
        "| difference | 144 | -0.34 | – |",
        "| difference | 36 | +0.50 | – |",
        "|  | visual tokens | Nocaps |",
        "| LLaVA-1.5 (Table 6) | 576 | 99.8 |",
        "| Delta-LLaVA (Table 6) | 36 | 99.8 |",
        "| **this model** | 36 | **99.00** |",
        "| 144 | 30.00 | 2.900 | – | 2.84 |",
        "| 36 | 35.00 | 1.800 | – | 1.74 |",
    ):
        assert f"\n{line}\n" in page, line
    assert "Only a part" not in page
    with Image.open(place / "scores.png") as picture:
        assert picture.width > 1000
    # What is there is replaced as a whole.
    (place / "old").touch()
    with report.new_page(place) as building:
        shutil.copy(tiny_picture(tmp_path), building / report.COST)
        report.write_page(building, results, report.read_results(results, None), None, COST)
    assert not (place / "old").exists()
    assert "Table" not in (place / "README.md").read_text(encoding="utf-8")


def test_only_a_page_of_ours_is_replaced(tmp_path):
    page = tmp_path / "page"
    assert not report.holds_page(page)
    page.mkdir()
    for name in (report.SCORES, report.COST):
        (page / name).touch()
    (page / report.PAGE).write_text("# Mine\n")
    assert not report.holds_page(page)
    (page / report.PAGE).write_text(f"# model: {report.HEADING}\n")
    assert report.holds_page(page)
    (page / "answers").mkdir()
    assert not report.holds_page(page)


def tiny_picture(folder):
    tiny.picture().save(folder / "picture.png")
    return folder / "picture.png"


def test_a_part_of_the_rows_says_so(tmp_path):
    file = result_file(tmp_path / "a_results.json", 36, {"gqa": ("exact_match", 0.5)}, rows=(100, 12578))
    (entry,) = report.read_results([file], None)
    assert entry.text == "0.5 (100 of 12578 rows)"


def test_a_part_of_the_rows_is_no_result_for_the_hub(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = result_file(tmp_path / "a_results.json", 4, {"gqa": ("exact_match", 0.5)}, rows=(100, 12578))
    assert cli.main(["card", str(copy), "--results", str(file)]) == 0
    assert "| gqa | exact_match | 0.5 (100 of 12578 rows) | 4 |" in (copy / "README.md").read_text(encoding="utf-8")
    assert not (copy / ".eval_results").exists()


def test_card_of_a_variant_sets_scores_beside_the_papers(results, tmp_path):
    variant = get_variant(VARIANT)
    folder = tmp_path / "hub"
    folder.mkdir()
    config = {
        "model_type": "delta_llava",
        "num_visual_tokens": 36,
        "vision_config": dict(variant.tower.shape),
        "text_config": dict(variant.backbone.shape),
    }
    (folder / "config.json").write_text(json.dumps(config))
    given = ["card", str(folder), "--variant", VARIANT, "--repo-id", "you/mine", "--results", str(results[0].parent)]
    assert cli.main(given) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    file = "eval/20261126_101112_36_results.json"
    assert f"| gqa | exact_match | 0.615 | 36 | 61.50 to 61 (Table 1): +0.50 | [{file}]({file}) |" in text
    assert "| mine | accuracy | 0.5 | 144 | – |" in text
    with Image.open(folder / "measured.png") as picture:
        assert picture.format == "PNG"
    assert report.prepare(str(folder), None, None, None, tmp_path / "out") == variant


def test_paper_names_ten_tasks():
    assert len(set(paper_tasks())) == 10


# --- what cannot be --------------------------------------------------------------------------------------------------


def error_of(capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def test_without_lmms_eval(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None if name == "lmms_eval" else find_spec(name))
    line = error_of(capsys, folder, "--tasks", "gqa")
    assert line.startswith("error: lmms-eval is not installed: pip install 'delta-llava[evaluation]'")
    assert line.endswith("pip install --no-deps lmms-eval==0.7.3")
    assert list(tmp_path.iterdir()) == []


def test_with_a_filelock_that_lmms_eval_cannot_use(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "find_spec", lambda name: name)
    monkeypatch.setattr(evaluate, "version", {"filelock": "4.3.1"}.__getitem__)
    line = error_of(capsys, folder, "--tasks", "gqa")
    assert line.endswith("needs filelock before 4.3, and 4.3.1 is installed: pip install 'filelock<4.3'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--variant", VARIANT], "is not delta-llava-vicuna-7b-36: text_config.hidden_size is 32"),
        (["--variant", "vicuna-7b-36"], f"did you mean {VARIANT}"),
        (["--num-visual-tokens", "36,x"], "'36,x' is not a number"),
        (["36"], "unexpected extra argument"),
        (["--report", "."], "REPORT . would take the place of what is in OUTPUT"),
        (["--report", "model-evaluation"], "would take the place"),
        (["--output", "x", "--report", "x/page"], "would take the place"),
        (["--output", "x", "--report", "."], "would take the place"),
        (["--output", "x", "--report", ".."], "REPORT .. "),
    ],
)
def test_one_line(given, said, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    assert said in error_of(capsys, folder, *given)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
