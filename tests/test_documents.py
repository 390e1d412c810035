"""README.md and docs/: every command and every piece of Python in them runs, links lead somewhere, files exist.

A page's fenced `bash` and `python` blocks run in this process, in their order, in a folder where the names that the
documents use exist (`NAMES`); the pieces of Python of a page share their variables. What makes a command small enough
is added to it (`ADDED`). What cannot run here is listed with its reason (`NOT_RUN`); its options are checked all the
same.
"""

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import uvicorn
from huggingface_hub import constants
from PIL import Image
from transformers import dynamic_module_utils

from delta_llava import cli
from modeling_delta_llava.conversion.convert import convert
from modeling_delta_llava.conversion.verify import passed
from modeling_delta_llava.conversion.verify import verify as verify_folder
from modeling_delta_llava.finetuning.arguments import load_arguments
from modeling_delta_llava.hub_cards import preflight
from modeling_delta_llava.hub_cards.card import write_card
from tests.clips import write_clip
from tests.hub_cards.local_hub import LocalHub
from tests.training_layout import (
    TrainingLayout,
    write_base_model,
    write_lora,
    write_stage1,
    write_stage2,
    write_tower,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What the names in the documents stand for: folders and files of these names, in the folder where a page runs. Ids of
# Hub repositories are folders too; `you/...` is on a Hub of this machine.
NAMES = {
    "CHECKPOINT": "a tiny stage-2 checkpoint on the released 24 x 24 grid",
    "STAGE1": "a tiny stage-1 result",
    "LORA": "a tiny LoRA result",
    "FOLDER": "CHECKPOINT in the Hub's format; on pages that convert it, what they made",
    "FOLDERS": "two copies of FOLDER, with cards",
    "lmsys/vicuna-7b-v1.5": "the tiny language model of all of these",
    "openai/clip-vit-large-patch14-336": "their tiny vision tower",
    "demo-output": "what the README names of `make demo`: FOLDER and a picture",
    "photo.jpg": "assets/cat.jpg",
    "thumbnail.jpg": "assets/cat.jpg, smaller",
    "page.png": "a white picture",
    "clip.mp4": "a video of two seconds",
    "images": "three pictures",
    "captions.json": "rows about them, as LLaVA JSON",
    "mine.jsonl": "the same rows as JSONL",
}
LAYOUT = TrainingLayout(text_intermediate_size=128, image_size=48, patch_size=2)

# What makes a command small enough for a test.
ADDED = {
    "ask": ["--max-new-tokens", "2"],
    "explain": ["--max-new-tokens", "2"],
    "finetune": [
        *("--use_cpu", "true", "--max_steps", "1", "--per_device_train_batch_size", "1"),
        *("--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0", "--dataloader_pin_memory", "false"),
        *("--num_visual_tokens", "16"),
    ],
    "profile": ["--num-visual-tokens", "144,1", "--repeats", "1", "--new-tokens", "2", "--batch-size", "1"],
    # tests/hub_cards loads what is published in a fresh process.
    "publish": ["--no-load"],
}
# Commands that do not run here, by how they begin.
NOT_RUN = {
    "git clone": "names no address",
    "cd ": "as before it",
    "pip install": "installs packages",
    "make ": "sets up an environment, and takes minutes; that the target exists is checked",
    "CONFIGS=": "a variable of the next command",
    "accelerate launch": "needs several devices; its recipe and settings are checked",
    "delta-llava app": "serves until it is interrupted; tests/serving/test_app_in_browser.py asks it",
    "delta-llava evaluate": "needs lmms-eval; tests/evaluation/test_lmms_eval.py runs it",
    "lmms-eval": "as before it",
    "delta-llava card FOLDER --results": "takes what the command before it writes; tests/evaluation does so",
    "vllm serve": "needs vLLM; tests/serving/test_vllm.py tries it",
    "python -m vllm": "as before it",
    "curl": "needs a server; tests/serving/test_vllm.py runs it",
    "python -m sglang": "needs SGLang, which cannot be installed here",
    "pip uninstall": "changes the environment",
    "delta-llava convert mzamini/DeltaLLaVA-36B-144": "150 GB of disk",
    "delta-llava verify delta-llava-36b": "150 GB of disk",
    "delta-llava ask delta-llava-36b": "80 GB of memory",
    "delta-llava explain demo-output/model": "asks the trained model; tests/evaluation tries the rest",
    "delta-llava profile delta-llava-vicuna-7b-144 --random-weights --device cuda": "needs a CUDA device",
}
# Pieces of Python that do not run here, by what they hold: they need a vLLM, and tests/serving/test_vllm.py runs them.
SERVED = ("mm_processor_kwargs",)
# Pieces of Python that need what is no dependency, by what they hold.
NEEDS = {"BitsAndBytesConfig": "bitsandbytes", "torch.onnx": "onnxscript"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shows_something(page: Path) -> bool:
    return any(language in ("bash", "python") for language, _ in blocks(page))


def commands(text: str) -> list[str]:
    """The commands of a bash block, one by one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def why_not_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A folder in which everything of `NAMES` exists."""
    root = tmp_path_factory.mktemp("documents")
    tower = write_tower(root / "openai" / "clip-vit-large-patch14-336", LAYOUT)
    write_base_model(root / "lmsys" / "vicuna-7b-v1.5", LAYOUT)
    write_stage2(root / "CHECKPOINT", LAYOUT, tower=tower)
    write_stage1(root / "STAGE1", LAYOUT, tower=tower)
    write_lora(root / "LORA", LAYOUT, tower=tower)
    convert(str(root / "CHECKPOINT"), root / "FOLDER", progress=False)
    for name in ("first", "second"):
        shutil.copytree(root / "FOLDER", root / "FOLDERS" / name)
        write_card(root / "FOLDERS" / name, repo_id=f"you/{name}", licence="mit")
    shutil.copytree(root / "FOLDER", root / "demo-output" / "model")
    pictures = root / "demo-output" / "data" / "images"
    pictures.mkdir(parents=True)
    (root / "images").mkdir()
    with Image.open(ROOT / "assets" / "cat.jpg") as cat:
        cat.save(root / "photo.jpg")
        cat.resize((45, 30)).save(root / "thumbnail.jpg")
        cat.save(pictures / "exam_00000.png")
        for number in range(3):
            cat.rotate(90 * number).save(root / "images" / f"{number}.png")
    Image.new("RGB", (60, 80), "white").save(root / "page.png")
    write_clip(root / "clip.mp4")
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": str(number), "image": f"{number}.png", "conversations": said} for number in range(3)]
    (root / "captions.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert all((root / name).exists() for name in NAMES)
    return root


@pytest.fixture
def place(originals, tmp_path, monkeypatch):
    """A copy of the originals as working folder, with a Hub on this machine and a cache of its own."""
    folder = shutil.copytree(originals, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    forget_remote_code()
    with LocalHub(tmp_path / "hub", tokens={"hf_" + "w" * 34: ("you", "write")}) as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        # What huggingface_hub read of these when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # Publishing checks a folder in a process of its own, which tests/hub_cards tries. Here the same runs without.
        monkeypatch.setattr(preflight, "check_in_process", check_here)
        huggingface_hub.close_session()
        yield folder
    forget_remote_code()


def check_here(folder: Path, load: bool, verify: bool) -> None:
    assert not load
    assert passed(verify_folder(folder, progress=False))


def forget_remote_code() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def options_of(command: str, capsys) -> set[str]:
    """The options that `delta-llava COMMAND --help` shows."""
    capsys.readouterr()
    assert cli.main([command, "--help"]) == 0
    return set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def check_options(words: list[str], capsys) -> None:
    """Options of `delta-llava COMMAND ...` exist; settings of a training run do."""
    command, *arguments = words[1:]
    if command == "finetune" and "--help" not in arguments:
        load_arguments(arguments[0], [*arguments[1:], "--use_cpu", "true"])
    else:
        assert {word for word in arguments if word.startswith("--")} <= options_of(command, capsys)


@pytest.fixture
def servers(monkeypatch):
    """The servers that a page starts, which run in threads until its end."""
    started, threads = [], []

    class Server(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            started.append(self)

    def start(arguments: list[str]) -> None:
        threads.append(threading.Thread(target=cli.main, args=(arguments,), daemon=True))
        threads[-1].start()
        while len(started) < len(threads) or not started[-1].started:
            assert threads[-1].is_alive(), arguments
            time.sleep(0.1)

    monkeypatch.setattr(uvicorn, "Server", Server)
    yield start
    for server, thread in zip(started, threads, strict=True):
        server.should_exit = True
        thread.join(30)


def run_command(command: str, capsys, servers) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    if words[:2] == ["accelerate", "launch"] and "modeling_delta_llava.finetuning" in words:
        start = words.index("modeling_delta_llava.finetuning")
        check_options(["delta-llava", "finetune", *words[start + 1 :]], capsys)
    if words[0] == "delta-llava":
        check_options(words, capsys)
    if why_not_run(command):
        return
    assert words[0] == "delta-llava", f"{command}: neither a command of ours nor listed in NOT_RUN"
    if words[1] == "serve":
        servers(words[1:])
        return
    added = [] if "--help" in words else ADDED.get(words[1], [])
    assert cli.main([*words[1:], *added]) == 0, command


# Among themselves, libraries use names that others of them have deprecated: peft transformers' (`is_gradient_...`),
# huggingface_hub httpx's, and torch's ONNX exporter its own.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("page", [*filter(shows_something, PAGES)], ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, place, servers, capsys):
    if "convert CHECKPOINT FOLDER" in page.read_text(encoding="utf-8"):
        shutil.rmtree(place / "FOLDER")
    variables = {"__name__": "__main__"}
    for number, (language, text) in enumerate(blocks(page)):
        if language == "bash":
            for command in commands(text):
                run_command(command, capsys, servers)
        elif language == "python" and not any(mark in text for mark in SERVED):
            needed = {name for mark, name in NEEDS.items() if mark in text}
            if all(importlib.util.find_spec(name) for name in needed):
                with contextlib.redirect_stdout(None):
                    exec(compile(text, f"{page.name}, block {number}", "exec"), variables)
        else:
            assert language in ("", "python"), f"{page.name}: a block of {language}"


def test_what_is_not_run_is_in_a_document():
    shown = [
        command
        for page in PAGES
        for language, text in blocks(page)
        if language == "bash"
        for command in commands(text)
    ]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in shown), f"{start}: in no document"


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        assert f"| `delta-llava {command.name or command.callback.__name__}` |" in text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"], ids=str)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_architecture_names_what_exists():
    """The tree of docs/architecture.md: every path in it is there, and every file of the model and the package is."""
    (tree,) = [text for language, text in blocks(ROOT / "docs" / "architecture.md") if not language]
    shown, folder = set(), Path()
    for line in tree.splitlines():
        names = line.strip().split("  ")[0].split()
        if not line.startswith(" "):
            folder = Path(names[0] if names[0].endswith("/") else "")
            shown.add(Path(names[0]))
        else:
            shown |= {folder / name for name in names}
    assert [path for path in shown if not (ROOT / path).exists()] == []
    packages = (ROOT / "modeling_delta_llava", ROOT / "delta_llava")
    files = {path.relative_to(ROOT) for package in packages for path in package.glob("*.py")}
    unnamed = ("modeling_delta_llava/__init__.py", "delta_llava/__init__.py", "delta_llava/__main__.py")
    assert files - shown == set(map(Path, unnamed))


def test_benchmark_results_that_are_named_exist():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w.-]+\.json)`", text):
        assert (ROOT / "benchmarks" / "results" / name).is_file(), name
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (ROOT / "benchmarks" / name).is_file(), name
