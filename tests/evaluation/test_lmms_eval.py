"""`delta-llava evaluate` and the model of lmms-eval, with lmms-eval itself, on drawn pictures.

Opt-in: `make test-evaluation`, which makes an environment with lmms-eval.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

pytestmark = [
    pytest.mark.evaluation,
    pytest.mark.timeout(900),
    # lmms-eval's own
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]
pytest.importorskip("lmms_eval")

from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from PIL import Image  # noqa: E402

from delta_llava import cli  # noqa: E402
from delta_llava.errors import UserError  # noqa: E402
from examples.demo import drawings  # noqa: E402
from modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor  # noqa: E402
from modeling_delta_llava.evaluation import lmms_model  # noqa: E402
from modeling_delta_llava.evaluation.lmms_model import DeltaLlavaForEvaluation  # noqa: E402
from modeling_delta_llava.hub_cards.variants import paper_tasks  # noqa: E402
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaModel  # noqa: E402
from tests import tiny  # noqa: E402
from tests.evaluation import drawn_tasks  # noqa: E402

BUDGETS = (16, 4)
NEW_TOKENS = 6
PICTURES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_hub_folder(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def generated(folder):
    """`generate`'s own answer to one question about one picture, or none."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = DeltaLlavaProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def answer(image, question: str, budget: int) -> str:
        parts = [{"type": "image", "image": image}] if image else []
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": budget} if image else {},
        )
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.partition("\n\n")[0].strip()

    return answer


@pytest.fixture(scope="module")
def rows(generated) -> list[dict]:
    """Questions whose right answers a random model gives at 16 tokens to the even ones, at 4 to the first."""
    rows = drawn_tasks.short_rows(PICTURES)
    for number, row in enumerate(rows):
        if number % 2 == 0:
            row["answer"] = generated(row["image"], row["question"] + drawn_tasks.POST_PROMPT, BUDGETS[number == 0])
    return rows


@pytest.fixture(scope="module")
def captions(generated) -> list[dict]:
    rows = drawn_tasks.caption_rows(PICTURES)
    for row in rows[:2]:
        row["caption"].append(generated(row["image"], drawn_tasks.PROMPT, 16))
    return rows


@pytest.fixture(scope="module")
def tasks(rows, captions, tmp_path_factory) -> Path:
    return drawn_tasks.write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", rows, captions, NEW_TOKENS)


@pytest.fixture(scope="module")
def expected(rows, generated) -> dict[int, float]:
    """By budget, the share of right answers of `generate`, one question at a time."""
    scores = {}
    for budget in BUDGETS:
        said = [generated(row["image"], row["question"] + drawn_tasks.POST_PROMPT, budget) for row in rows]
        scores[budget] = sum(text == row["answer"] for text, row in zip(said, rows, strict=True)) / len(rows)
    assert 0 < scores[4] < scores[16] < 1
    return scores


def evaluate(folder, tasks, output, *options, names=drawn_tasks.SHORT, budgets="16,4") -> int:
    arguments = [str(folder), "--tasks", names, "--include-path", str(tasks), "--num-visual-tokens", budgets]
    return cli.main(["evaluate", *arguments, "--output", str(output), "--device", "cpu", *map(str, options)])


def scores(output: Path, task: str = drawn_tasks.SHORT, metric: str = "exact_match") -> dict[int, float]:
    """By budget, what the result files in a folder hold."""
    found = {}
    for file in (output / "results").glob("*_results.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        found[document["config"]["num_visual_tokens"]] = document["results"][task][f"{metric},none"]
    return found


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Pictures that the tower sees, call by call."""
    seen, get_patch_features = [], DeltaLlavaModel.get_patch_features

    def counted(self, pixel_values, **kwargs):
        seen.append(len(pixel_values))
        return get_patch_features(self, pixel_values, **kwargs)

    monkeypatch.setattr(DeltaLlavaModel, "get_patch_features", counted)
    return seen


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_score_equals_generates(batch_size, folder, tasks, expected, tmp_path, encoded):
    assert evaluate(folder, tasks, tmp_path / "out", "--batch-size", batch_size) == 0
    assert scores(tmp_path / "out") == pytest.approx(expected)
    # Two budgets, and two questions about each picture.
    assert sum(encoded) == PICTURES
    if batch_size == 4:
        encoded.clear()
        assert evaluate(folder, tasks, tmp_path / "out", "--batch-size", 8) == 0
        assert encoded == []
        assert scores(tmp_path / "out") == pytest.approx(expected)


@pytest.mark.skipif(shutil.which("java") is None, reason="lmms-eval scores captions with Java")
def test_captions_equal_generates(folder, tasks, captions, generated, tmp_path):
    assert evaluate(folder, tasks, tmp_path / "out", "--batch-size", 4, names=drawn_tasks.CAPTIONS, budgets="16") == 0
    (file,) = (tmp_path / "out" / "results").glob("samples_*")
    said = {sample["doc_id"]: sample["filtered_resps"][0] for sample in map(json.loads, file.open(encoding="utf-8"))}
    assert said == {number: generated(row["image"], drawn_tasks.PROMPT, 16) for number, row in enumerate(captions)}

    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(texts: dict) -> dict:
        return PTBTokenizer().tokenize({key: [{"caption": text} for text in value] for key, value in texts.items()})

    references = {row["img_id"]: row["caption"] for row in captions}
    score, _ = Cider().compute_score(tokens(references), tokens({key: [text] for key, text in said.items()}))
    assert score > 0
    assert scores(tmp_path / "out", drawn_tasks.CAPTIONS, "flickr_CIDEr") == {16: pytest.approx(score)}


def test_lmms_eval_alone_finds_the_model(folder, tasks, expected):
    """By its entry point, as `lmms-eval --model delta_llava --model_args pretrained=...,num_visual_tokens=4` does."""
    results = simple_evaluate(
        model="delta_llava",
        model_args=f"pretrained={folder},num_visual_tokens=4",
        tasks=[drawn_tasks.SHORT],
        task_manager=TaskManager("ERROR", include_path=str(tasks)),
        batch_size="4",
        device="cpu",
    )
    assert results["results"][drawn_tasks.SHORT]["exact_match,none"] == pytest.approx(expected[4])
    assert lmms_model.__name__ in results["config"]["model_backend"]


def test_what_is_written(folder, tasks, tmp_path, capsys):
    report = tmp_path / "report"
    assert evaluate(folder, tasks, tmp_path / "out", "--limit", 4, "--report", report, "--batch-size", 4) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split("\t")[:3] == [drawn_tasks.SHORT, "exact_match", "16"]
    assert "(4 of 11 rows)" in printed[0]
    results = tmp_path / "out" / "results"
    assert {path.name.partition("_")[0] for path in results.iterdir()} >= {"samples", "scores.png"}
    (file,) = results.glob("*_16_results.json")
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert set(config["versions_of_packages"]) == {"lmms_eval", "transformers", "torch", "delta_llava"}
    assert len(config["model_revision"]) == 16
    assert {path.name for path in report.iterdir()} == {"README.md", "scores.png", "cost.png"}
    page = (report / "README.md").read_text(encoding="utf-8")
    assert f"**Only a part of the rows was asked**: {drawn_tasks.SHORT} 4 of 11." in page
    assert "| **this model** | 4 |" in page
    assert "tokens/s" in page
    for name in ("scores.png", "cost.png"):
        with Image.open(report / name) as picture:
            assert picture.format == "PNG"
    # What a card makes of the same folder.
    hub = shutil.copytree(folder, tmp_path / "hub")
    assert cli.main(["card", str(hub), "--repo-id", "you/mine", "--results", str(results)]) == 0
    text = (hub / "README.md").read_text(encoding="utf-8")
    assert f"| {drawn_tasks.SHORT} | exact_match |" in text
    assert "(measured.png)" in text


def test_a_killed_run_goes_on(folder, tasks, expected, tmp_path):
    output = tmp_path / "out"
    arguments = [str(folder), "--tasks", drawn_tasks.SHORT, "--include-path", str(tasks), "--output", str(output)]
    slow = (
        "import sys, time\n"
        "from delta_llava import cli\n"
        "from modeling_delta_llava.evaluation.answers import Answers\n"
        "add = Answers.add\n"
        "Answers.add = lambda *given, **about: (add(*given, **about), time.sleep(0.5))\n"
        "cli.main(['evaluate', *sys.argv[1:], '--num-visual-tokens', '16,4', '--device', 'cpu'])\n"
    )
    answers = output / "answers" / "rank_0.jsonl"
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 200
        while not answers.exists() or answers.read_text(encoding="utf-8").count("answer") < 5:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "results").exists()
    # As if the kill had come in the middle of a line.
    whole = answers.read_text(encoding="utf-8").rstrip("\n")
    answers.write_text(whole[:-10], encoding="utf-8")
    assert evaluate(folder, tasks, output) == 0
    assert scores(output) == pytest.approx(expected)
    lines = [line for line in answers.read_text(encoding="utf-8").splitlines() if line]
    assert len(lines) == 1 + 22  # the one that was cut, and every answer once
    assert not list(output.glob(".*"))


def test_a_run_killed_before_its_first_answer_goes_on(folder, tasks, expected, tmp_path):
    output = tmp_path / "out"
    (output / ".results.unfinished" / "new").mkdir(parents=True)
    assert evaluate(folder, tasks, output) == 0
    assert scores(output) == expected
    assert not (output / ".results.unfinished").exists()


def test_rows_at_one_place_are_told_apart(folder, tmp_path):
    """A set that was repaired in place is asked again, and one in memory by every run."""
    place = tmp_path / "rows"
    found = []
    for answer in ("a", "b"):
        model = DeltaLlavaForEvaluation(str(folder))
        shutil.rmtree(place, ignore_errors=True)
        datasets.Dataset.from_list([{"question": answer}]).save_to_disk(place)
        model.task_dict = {
            "saved": {"test": datasets.load_from_disk(str(place))},
            "memory": {"test": datasets.Dataset.from_list([{"question": "a"}])},
        }
        found.append([model._data_of(task, "test") for task in ("saved", "memory")])
        assert found[-1] == [model._data_of(task, "test") for task in ("saved", "memory")]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_two_processes(folder, tasks, expected, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    command += ["-m", "delta_llava", "evaluate", str(folder), "--tasks", drawn_tasks.SHORT, "--device", "cpu"]
    command += ["--include-path", str(tasks), "--num-visual-tokens", "16", "4", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores(tmp_path / "out") == pytest.approx(expected)
    shares = [file.read_text(encoding="utf-8").count("answer") for file in (tmp_path / "out" / "answers").iterdir()]
    assert len(shares) == 2
    assert sum(shares) >= 22
    assert min(shares) >= 10


def test_the_demos_exam_is_a_task(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawings.write_set(Path("demo-output/data"), "exam", drawn_tasks.scenes(2), 5)
    rows = json.loads(Path("demo-output/data/exam_questions.json").read_text(encoding="utf-8"))
    tasks = Path(__file__).parents[2] / "examples" / "demo" / "tasks"
    assert evaluate(folder, tasks, "out", "--batch-size", 8, names="demo_shapes", budgets="4") == 0
    (file,) = Path("out", "results").glob("samples_demo_shapes_*")
    samples = [json.loads(line) for line in file.open(encoding="utf-8")]
    turns = [turn["value"].removeprefix("<image>\n") for row in rows for turn in row["conversations"]]
    assert [sample["doc"]["question"] for sample in samples] == turns[::2]
    assert [sample["target"] for sample in samples] == turns[1::2]


# --- prompts ---------------------------------------------------------------------------------------------------------

QUESTION = "What is on the table?"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
ROW = {
    "question": QUESTION,
    "choices": ["cup", "jug"],
    "index": 0,
    "answer": "A",
    "split": "dev",
    "category": "x",
    "L2-category": "y",
    "source": "z",
    "A": "cup",
    "B": "jug",
    "C": "nan",
    "D": "nan",
    "E": "nan",
}
# What the authors' scripts ask: lmms-eval's tasks with its LLaVA, whose prompts LLaVA-1.5's evaluation has.
ASKED = {
    "gqa": QUESTION + SHORT_ANSWER,
    "mmbench_en_dev": f"{QUESTION} There are several options:\nA. cup\nB. jug\n{LETTER}",
    "mme": QUESTION + SHORT_ANSWER,
    "pope": QUESTION + SHORT_ANSWER,
    "scienceqa_img": f"{QUESTION}\nA. cup\nB. jug{LETTER}",
    "textvqa_val": QUESTION + SHORT_ANSWER,
    "vizwiz_vqa_val": QUESTION
    + "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    + SHORT_ANSWER,
    "vqav2_val": QUESTION + SHORT_ANSWER,
    "nocaps_val": CAPTION,
    "flickr30k_test": CAPTION,
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager("ERROR", model_name="delta_llava")


def test_the_preset_is_the_ten_of_the_paper():
    assert paper_tasks() == list(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_prompt_is_the_released_evaluations(name, manager, folder):
    """Of the ten tasks: what a row asks, and what the chat template of training makes of it (vicuna_v1)."""
    assert name in manager.all_tasks
    from lmms_eval import utils

    config = utils.load_yaml_config(manager.task_index[name]["yaml_path"], mode="full")
    specific = (config.get("lmms_eval_specific_kwargs") or {}).get("default")
    # A row without a hint, as the two tasks that have hints write it.
    row = {**ROW, "hint": "nan" if name == "mmbench_en_dev" else ""}
    text = config["doc_to_text"](row, specific) if specific else config["doc_to_text"](row)
    assert text == ASKED[name]
    settings = config["generation_kwargs"]
    assert not settings.get("do_sample")
    assert not settings.get("temperature")
    assert lmms_model.generation_settings(settings)["do_sample"] is False
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt.removeprefix("<s>") == f"{SYSTEM} USER: <image>\n{text} ASSISTANT:"


# --- what cannot be --------------------------------------------------------------------------------------------------


def other_model(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    return place


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("other model", "model_type 'llama'"),
        ("no weights", "has no weights"),
        ("unknown task", "no task is called 'popee': did you mean pope"),
        ("budget", "num_visual_tokens"),
        ("no data", "the data of task gqa cannot be had"),
        ("no folder", "does not exist"),
        ("tasks", "--include-path"),
        ("output", "holds no evaluation"),
    ],
)
def test_one_line(case, said, folder, tasks, tmp_path, capsys):
    given = {"names": drawn_tasks.SHORT, "budgets": "4"}
    output = tmp_path / "out"
    if case == "other model":
        folder = other_model(folder, tmp_path / "other")
    elif case == "no weights":
        folder = shutil.copytree(folder, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    elif case == "unknown task":
        given["names"] = "popee"
    elif case == "budget":
        given["budgets"] = "5"
    elif case == "no data":
        given["names"] = "gqa"
    elif case == "no folder":
        folder = tmp_path / "nowhere"
    elif case == "tasks":
        tasks = tmp_path / "no_tasks"
    elif case == "output":
        output = Path(shutil.copytree(tasks, output))
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert evaluate(folder, tasks, output, **given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_that_cannot_be_read(folder, rows, tmp_path, capsys):
    """What was answered before it is kept, and nothing else is there."""
    broken = {**rows[1], "image": {"bytes": b"no picture", "path": None}}
    tasks = drawn_tasks.write_tasks(tmp_path / "tasks", [rows[0], broken])
    assert evaluate(folder, tasks, tmp_path / "out", budgets="4") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: row 1 of task {drawn_tasks.SHORT} cannot be asked (cannot identify image file")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers"]


def test_no_other_kind_of_request(folder):
    model = lmms_model.DeltaLlavaForEvaluation(str(folder), device="cpu")
    with pytest.raises(UserError, match="generates answers and rates none"):
        model.loglikelihood([])
    with pytest.raises(UserError, match="one question at a time"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(("name", "value"), [("batch_size", "auto"), ("num_visual_tokens", "16+4"), ("dtype", "int3")])
def test_arguments_of_the_model_are_checked(name, value, folder):
    with pytest.raises(UserError, match=str(value).replace("+", r"\+")):
        lmms_model.DeltaLlavaForEvaluation(str(folder), device="cpu", **{name: value})


def test_settings_of_a_task():
    assert lmms_model.generation_settings({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 2}) == {
        "num_beams": 2,
        "max_new_tokens": 16,
        "do_sample": False,
    }
    sampled = lmms_model.generation_settings({"do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert sampled == {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert lmms_model.until("a cup\n\nASSISTANT: a jug", ["\n\n", "ASSISTANT:"]) == "a cup"


assert os.environ.get("HF_HUB_OFFLINE") == "1", "these tests want no network: HF_HUB_OFFLINE=1"
