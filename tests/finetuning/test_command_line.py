"""`delta-llava finetune` as users start it: a whole recipe through a Hub, and every bad input in one line."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from delta_llava import cli
from modeling_delta_llava.conversion.verify import passed, verify
from modeling_delta_llava.finetuning.__main__ import main as launched
from modeling_delta_llava.finetuning.arguments import (
    DataArguments,
    DeltaLlavaTrainingArguments,
    ModelArguments,
    build_arguments,
)
from modeling_delta_llava.finetuning.rows import parse_row
from modeling_delta_llava.hub_cards import preflight
from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor
from tests import tiny
from tests.finetuning.conftest import EXACT, write_data
from tests.finetuning.helpers import REPOSITORY, losses, trained, write_config
from tests.hub_cards.hub_state import Entry, git_oid, pointer
from tests.training_layout import TrainingLayout, write_base_model, write_tower

# A process that has only transformers answers with each of several repositories or folders.
LOAD = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for name in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    print(json.dumps(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()))
assert "modeling_delta_llava" not in sys.modules, "the package must not be needed"
"""
# The packaged recipes at a size that a test can wait for.
SMALL = {
    "use_cpu": "true",
    "num_visual_tokens": 4,
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": "false",
    "push_to_hub": "true",
    "disable_tqdm": "true",
}


def upload(hub, name, folder):
    """A repository on the local Hub with the files of a folder; parquet files in LFS."""
    entries = {}
    for file in folder.iterdir():
        data = file.read_bytes()
        entries[file.name] = Entry(git_oid(data), len(data), content=data)
        if file.suffix == ".parquet":
            sha256 = hashlib.sha256(data).hexdigest()
            (hub.objects / sha256).write_bytes(data)
            entries[file.name] = Entry(git_oid(pointer(sha256, len(data))), len(data), sha256=sha256)
    hub.commit(hub.create_repo(name), "main", entries)


def options(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_both_recipes_from_the_hub_to_the_hub(hub, client, tmp_path, monkeypatch):
    """Language model and tower -> stage 1 -> stage 2, each pushed, and loaded by a process without this package."""
    layout = TrainingLayout()
    write_base_model(tmp_path / "llm", layout, dtype=torch.float16)
    llm_config = tmp_path / "llm" / "config.json"
    llm_config.write_text(llm_config.read_text().replace('"torch_dtype": "float32"', '"torch_dtype": "float16"'))
    write_tower(tmp_path / "tower", layout)
    data = write_data(tmp_path / "data")
    common = {"data_path": data, "image_folder": data.parent / "images", **SMALL}
    upload(hub, "user/llm", tmp_path / "llm")
    upload(hub, "user/tower", tmp_path / "tower")
    stage1 = client(
        *("-m", "delta_llava", "finetune", "stage1"),
        *options(language_model="user/llm", vision_tower="user/tower", output_dir="stage1", **common),
        *options(hub_model_id="user/stage1", projector="{memory_feature_layers: [2, 4, 6, 7]}"),
        cwd=tmp_path,
    )
    assert stage1.returncode == 0, stage1.stderr
    assert stage1.stdout.splitlines()[-1] == "wrote stage1"
    assert "projector       trained" in stage1.stderr
    stage2 = client(
        *("-m", "modeling_delta_llava.finetuning", "stage2"),
        *options(model="user/stage1", output_dir="stage2", hub_model_id="user/stage2", **common),
        *options(visual_token_budgets="16,4,1", save_steps=1, save_total_limit=2),
        cwd=tmp_path,
    )
    assert stage2.returncode == 0, stage2.stderr
    card = ModelCard(hub.repos["user/stage2"].find("main").tree["README.md"].content.decode())
    assert card.data.base_model == "user/stage1"
    assert card.data.base_model_relation == "finetune"
    assert not [name for name in hub.files("user/stage1") if name.startswith("_")]
    names = ("user/stage2", str(tmp_path / "stage2" / "checkpoint-2"))
    answered = client("-c", LOAD, *names, home="fresh", token=None)
    assert answered.returncode == 0, answered.stderr
    pushed, checkpoint = map(json.loads, answered.stdout.splitlines())
    assert pushed == checkpoint
    check_frozen_files(tmp_path)
    # What `publish` sends is what the Trainer pushed, less the files in which it keeps its own state.
    for stage in ("stage1", "stage2"):
        pushed = set(hub.files(f"user/{stage}")) - {".gitattributes", "training_args.bin", "trainer_state.json"}
        assert set(preflight.check_contents(tmp_path / stage)) == pushed
    assert (tmp_path / "stage1" / "_base").is_dir()
    assert passed(verify(tmp_path / "stage2", progress=False))
    monkeypatch.setattr(preflight, "check_in_process", lambda folder, load, verify: None)  # as verified here
    preflight.preflight(tmp_path / "stage2", "user/stage2", licence="mit", load=False)


def chat_data(rows):
    """A chat data set, as the Hub has them, with a picture in each row."""
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
        "images": datasets.List(datasets.Image()),
    }
    colours = ["red", "green", "blue", "white"]
    asked = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": f"What is number {number}?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"A {colours[number % 4]} square."}]},
            ],
            "images": [Image.new("RGB", (40, 30), colours[number % 4])],
        }
        for number in range(rows)
    ]
    return datasets.Dataset.from_list(asked, features=datasets.Features(features))


def test_a_dataset_is_streamed_from_the_hub(hub, client, workplace, tmp_path):
    """The same losses as by index from the file on disk, and nothing of the data set in the cache."""
    (tmp_path / "pets").mkdir()
    file = tmp_path / "pets" / "train-00000-of-00001.parquet"
    chat_data(16).to_parquet(file)
    settings = settings_of(workplace, max_steps=4)
    del settings["image_folder"]
    on_disk = {"data_path": str(file), "output_dir": str(tmp_path / "disk"), "train_sampling_strategy": "sequential"}
    expected = losses(trained(build_arguments({**settings, **on_disk})))
    from_hub = {"data_path": "user/pets", "output_dir": "streamed", "streaming": True}
    upload(hub, "datasets/user/pets", tmp_path / "pets")
    config = write_config(tmp_path / "run.yaml", {**settings, **from_hub})
    ran = client("-m", "delta_llava", "finetune", config, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert hub.requests(r"GET /datasets/user/pets/resolve/.*parquet")
    assert not [file for file in (tmp_path / "home").rglob("*") if file.suffix in (".parquet", ".arrow")]
    state = json.loads((tmp_path / "streamed" / "trainer_state.json").read_text())
    streamed = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(streamed) == 4
    assert streamed == pytest.approx(expected, rel=1e-5)


def check_frozen_files(folder):
    """Stage 1 in bf16 left tower (fp32) and language model (fp16) on disk as they were, bit for bit."""
    saved = load_file(folder / "stage1" / "model.safetensors")
    text, tower = (load_file(folder / name / "model.safetensors") for name in ("llm", "tower"))
    for name, tensor in text.items():
        ours = saved[name.replace("model.", "model.language_model.", 1)]
        assert ours.dtype == torch.float16, name
        assert torch.equal(ours[: len(tensor)], tensor), name
    found = {name.split("vision_tower.")[1]: tensor for name, tensor in saved.items() if "vision_tower." in name}
    tower = {name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}
    assert {
        name for name in tower if not name.startswith("encoder.layers.7.")
    } == found.keys()  # nothing reads that one
    for name, tensor in found.items():
        assert torch.equal(tensor, tower[name]), name


def settings_of(folder, **changes):
    return {
        **EXACT,
        "model": str(folder / "model"),
        "data_path": str(folder / "data" / "data.json"),
        "image_folder": str(folder / "data" / "images"),
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, exact_folder):
    """A folder with `model` and `data`, for runs that fail before they write anything."""
    folder = tmp_path_factory.mktemp("workplace")
    write_data(folder / "data", rows=8)
    shutil.copytree(exact_folder, folder / "model")
    return folder


def with_row(row, **settings):
    """Bad data: two good rows and then `row`, on line 3 of a JSONL file."""

    def change(folder, workplace):
        rows = [*json.loads((workplace / "data" / "data.json").read_text())[:2], row]
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / "data.jsonl").write_text(text)
        return {"data_path": str(folder / "data.jsonl"), **settings}

    return change


def with_parquet(**settings):
    """A chat data set in a parquet file."""

    def change(folder, workplace):
        chat_data(2).to_parquet(folder / "chat.parquet")
        return {"data_path": str(folder / "chat.parquet"), **settings}

    return change


def with_picture(write):
    """Bad data: `write(file)` changes the first picture."""

    def change(folder, workplace):
        shutil.copytree(workplace / "data", folder / "data")
        write(folder / "data" / "images" / "0.png")
        return {
            "data_path": str(folder / "data" / "data.json"),
            "image_folder": str(folder / "data" / "images"),
            "max_image_pixels": 10_000,
            "max_steps": -1,
        }

    return change


def with_model(file, edit):
    """A model folder in which `edit` changes the text of a file."""

    def change(folder, workplace):
        shutil.copytree(workplace / "model", folder / "model")
        path = folder / "model" / file
        path.write_text(edit(path.read_text()))
        return {"model": str(folder / "model")}

    return change


def without_pad_token(text):
    settings = json.loads(text)
    del settings["pad_token"]
    return json.dumps(settings)


def turns(*pairs):
    return [{"from": role, "value": value} for role, value in pairs]


ASKED, ANSWERED = ("human", "What?"), ("gpt", "A cat.")
SHOWN = ("human", "<image>\nWhat?")
BAD_INPUTS = {
    "missing JSON": ({"data_path": "none.json"}, "none.json: no such data file"),
    "no JSON": (with_row("{oops"), r"data.jsonl: line 3 \(row 2\): no JSON"),
    "malformed row": (with_row({"image": "0.png"}), r"data.jsonl: line 3 \(row 2\): neither `conversations`"),
    "empty conversation": (with_row({"conversations": []}), r"line 3 \(row 2\): `conversations` is empty"),
    "roles out of order": (
        with_row({"conversations": turns(ASKED, ASKED, ANSWERED)}),
        r"line 3 \(row 2\): .*roles out of order: turn 2 is user, expected assistant",
    ),
    "more marks than pictures": (
        with_row({"image": "0.png", "conversations": turns(("human", "<image><image>?"), ANSWERED)}),
        r"line 3 \(row 2\): .*2 <image> but the row lists 1 images",
    ),
    "picture without mark": (
        with_row({"image": "0.png", "conversations": turns(ASKED, ANSWERED)}),
        r"line 3 \(row 2\): .*0 <image> but the row lists 1 images",
    ),
    "missing picture": (
        with_picture(lambda file: file.unlink()),
        r"line 2 \(row 0\): image .*0\.png: missing, or no file.*--image_folder",
    ),
    "truncated picture": (
        with_picture(lambda file: file.write_bytes(file.read_bytes()[:60])),
        r"line 2 \(row 0\): image .*0\.png: cannot be decoded",
    ),
    "huge picture": (
        with_picture(lambda file: tiny.picture("red", (200, 100)).save(file)),
        r"line 2 \(row 0\): image .*0\.png: 200 x 100 is over the limit of 10,000 pixels",
    ),
    "no pad token": (with_model("tokenizer_config.json", without_pad_token), "the tokenizer has no pad token"),
    "no assistant marks": (
        with_model("chat_template.jinja", lambda text: "{% for m in messages %}{{ m.content }}{% endfor %}"),
        r"no {% generation %} marks.*pass --format v1",
    ),
    "layers without end": (
        with_model("config.json", lambda text: json.dumps({"text_config": {"num_hidden_layers": 10**9}})),
        "text_config.num_hidden_layers is 1000000000",
    ),
    "a template that divides by zero": (
        with_model("chat_template.jinja", lambda text: "{{ 1 / 0 }}"),
        "the chat template of .* cannot show a question .ZeroDivisionError",
    ),
    "a pipe for a picture": (
        with_picture(lambda file: (file.unlink(), os.mkfifo(file))),
        r"0\.png",
    ),
    "impossible budget": (
        {"visual_token_budgets": [16, 7]},
        "num_visual_tokens=7 is not possible.*16, 4, 1",
    ),
    "default never trained": ({"visual_token_budgets": [16, 1]}, "default of 4 visual tokens.*--num_visual_tokens 16"),
    "empty budget list": ({"visual_token_budgets": []}, "visual_token_budgets: expected at least one argument"),
    "no folder for a picture": ({"image_folder": "nowhere"}, "image_folder: nowhere is no folder"),
    "output is a file": (lambda folder, _: {"output_dir": str(write_config(folder / "file", {}))}, "is a file"),
    "output cannot be made": (
        {"output_dir": "/proc/run", "trial_save": True},
        "output_dir: /proc/run cannot be made .*give another",
    ),
    "sharding in one process": ({"fsdp": "full_shard"}, "fsdp needs several processes"),
    "no name for a repository": (
        {"push_to_hub": True, "hub_model_id": "a/b/c"},
        "a/b/c: making the repository failed: Repo id must be",
    ),
    "unknown setting": ({"learning_rat": 1}, "did you mean learning_rate"),
    "a turn that the format cannot show": (
        with_row({"conversations": turns(("system", "Be brief."), ASKED, ANSWERED)}, format="plain"),
        r"line 3 \(row 2\): the chat template cannot show this conversation .*not system.*--on_bad_row skip",
    ),
    "several workers for a stream of `datasets`": (
        with_parquet(streaming=True, dataloader_num_workers=4),
        r"chat.parquet is streamed from 1 files.*set dataloader_num_workers: 1",
    ),
    "another kind of model": (
        with_model("config.json", lambda text: json.dumps({"model_type": "llama"})),
        "is a llama model, no Delta-LLaVA",
    ),
}


@pytest.mark.parametrize(("change", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_one_line_and_status_2(workplace, tmp_path, capsys, change, words):
    changes = change(tmp_path, workplace) if callable(change) else change
    config = write_config(
        tmp_path / "run.yaml", {**settings_of(workplace, output_dir=str(tmp_path / "run")), **changes}
    )
    assert cli.main(["finetune", str(config)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(words, errors[0]), errors[0]
    is_met_in_a_batch = "cannot be decoded" in words or "is over the limit" in words
    assert (tmp_path / "run").exists() == is_met_in_a_batch
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_another_runs_checkpoint_is_left_alone(workplace, tmp_path, capsys):
    settings = settings_of(workplace, output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=1)
    config = write_config(tmp_path / "run.yaml", settings)
    assert cli.main(["finetune", str(config)]) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()}
    capsys.readouterr()
    for words, override in {
        "already holds checkpoint-1 of a run; continue it with --resume_from_checkpoint true": [],
        "belongs to another run: seed differ": ["--resume_from_checkpoint", "true", "--seed", "7"],
    }.items():
        assert cli.main(["finetune", str(config), *override]) == 2
        assert words in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_process_ends_with_status_2_and_without_a_traceback(client, exact_folder, tmp_path):
    settings = options(model=exact_folder, data_path="none.json", output_dir="run", **SMALL)
    ended = client("-m", "delta_llava", "finetune", "stage2", *settings)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: none.json: no such data file")
    assert not list((tmp_path / "work").iterdir())
    assert "Traceback" not in ended.stderr


def test_the_code_of_a_base_model_is_not_run(tmp_path, capsys):
    """A language model, tower or folder that brings code of its own is refused or read without it."""
    layout = TrainingLayout()
    write_base_model(tmp_path / "llm", layout)
    write_tower(tmp_path / "tower", layout)
    for name in ("llm", "tower"):
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text()) | {
            "model_type": "never-heard-of",
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        }
        (tmp_path / name / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
        good, _ = file.read_text(), file.write_text(json.dumps(config))
        settings = settings_of(tmp_path, language_model=str(tmp_path / "llm"), vision_tower=str(tmp_path / "tower"))
        del settings["model"]
        assert cli.main(["finetune", str(write_config(tmp_path / "run.yaml", settings))]) == 2
        assert "no readable config.json" in capsys.readouterr().err
        file.write_text(good)
    assert not (tmp_path / "was_run").exists()


def inference_length(folder, row):
    """Tokens of a row as the processor encodes it."""
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    sample = parse_row(row)
    images = [tiny.picture("red") for _ in sample.images] or None
    text = processor.apply_chat_template(sample.messages)
    return len(processor(images=images, text=text)["input_ids"][0])


def test_check_data_reports_everything(workplace, tmp_path, capsys):
    shutil.copytree(workplace / "data", tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "data.json").read_text())
    (tmp_path / "data" / "images" / rows[0]["image"]).unlink()
    (tmp_path / "data" / "images" / rows[1]["image"]).write_text("no picture")
    rows += [
        {"conversations": []},
        {"conversations": turns(("gpt", "Hi."), ASKED, ANSWERED)},
        {"image": rows[4]["image"], "conversations": turns(SHOWN, ("gpt", "A cat. " * 200))},
    ]
    (tmp_path / "data" / "data.json").write_text(json.dumps(rows, indent=1))
    settings = settings_of(tmp_path, model=str(workplace / "model"), max_length=300, max_steps=-1)
    config = write_config(tmp_path / "run.yaml", settings)
    assert cli.main(["finetune", str(config), "--check-data"]) == 0
    output = capsys.readouterr().out
    lines = {
        line.strip().rsplit(maxsplit=1)[0].rstrip(): line.split()[-1] for line in output.splitlines() if line.strip()
    }
    expected = {
        "rows": "11",
        "usable": "8",
        "without a picture": "3",
        "several pictures": "2",
        "cut at 300": "1",
        "leading answer left out": "1",
        "missing images": "1",
        "broken images": "1",
        "malformed rows": "1",
        "pictures": "7",
    }
    assert {name: lines.get(name) for name in expected} == expected
    assert "line " in next(line for line in output.splitlines() if "`conversations` is empty" in line)
    bars = [line for line in output.splitlines() if line.rstrip().endswith("#")]
    assert sum(int(line.split()[1]) for line in bars) == 8
    usable = [row for row in rows[2:] if row["conversations"]]
    lengths = [min(300, inference_length(workplace / "model", row)) for row in usable]
    words = next(line for line in output.splitlines() if line.startswith("Tokens per epoch")).split()
    assert int(words[3].replace(",", "")) == sum(lengths)
    assert "Steps per epoch                      2 of 4 rows; 2 planned" in output
    assert "GB (estimated, nothing sharded)" in output
    assert not (tmp_path / "run").exists()


def test_help_lists_every_setting(capsys, monkeypatch):
    """In all forms, before and behind a config, and when accelerate launches the module."""
    monkeypatch.setenv("COLUMNS", "119")
    shown = set()
    for words in (["--help"], ["--list-settings"], ["stage1", "-h"], ["stage1", "--seed", "3", "--help"]):
        assert cli.main(["finetune", *words]) == 0
        shown.add(capsys.readouterr().out)
        assert launched(words) == 0
        shown.add(capsys.readouterr().out)
    (listed,) = shown
    assert "vicuna-7b/stage2_qlora" in listed
    assert "Rank of LoRA on the language model; 0 trains no LoRA. (default: 0)" in listed
    assert "{stop,skip}" in listed
    assert "%%" not in listed
    sections = [listed.index(f"\n{title}:\n") for title in ("Model", "Data", "Training")]
    ends = [*sections[1:], len(listed)]
    groups = (ModelArguments, DataArguments, DeltaLlavaTrainingArguments)
    for group, begin, end in zip(groups, sections, ends, strict=True):
        for entry in dataclasses.fields(group):
            assert f"\n  --{entry.name}" in listed[begin:end] or not entry.init


def test_the_readme_finds_the_packaged_accelerate_configs(capsys):
    """The shell line that sets CONFIGS in the page about finetuning."""
    readme = (REPOSITORY / "docs" / "finetuning.md").read_text(encoding="utf-8")
    ((code, folder),) = re.findall(r"^CONFIGS=\$\(python -c '(.*)'\)(.*)$", readme, re.MULTILINE)
    exec(code, {})
    found = capsys.readouterr().out.strip() + folder
    named = set(re.findall(r"\$CONFIGS/(\S+\.yaml)", readme))
    assert named
    assert all((Path(found) / name).is_file() for name in named)
