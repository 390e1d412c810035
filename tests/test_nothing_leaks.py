"""A token reaches no file, however it is given: not the result folder, not what the Hub receives, not the screen."""

import base64
import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from delta_llava.cli import main
from delta_llava.errors import UserError
from delta_llava.redaction import ScrubbedRecords, scrub
from modeling_delta_llava.finetuning.arguments import build_arguments
from modeling_delta_llava.finetuning.run import prepare
from modeling_delta_llava.hub_cards.contents import secret_in
from tests.hub_cards.local_hub import LocalHub

TOKEN = "hf_" + "s" * 34
PASSWORD = "correct-horse-battery"
SETTINGS = {
    "use_cpu": True,
    "max_steps": 1,
    "save_steps": 1,
    "per_device_train_batch_size": 1,
    "push_to_hub": True,
    "hub_model_id": "user/tuned",
    "hub_strategy": "checkpoint",
    "report_to": "tensorboard",
    "disable_tqdm": True,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback, which this very process talks to: another one would spend seconds on its imports."""
    basic = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    tokens = {TOKEN: ("user", "write"), f"Basic {basic}": ("user", "write")}
    with LocalHub(tmp_path / "hub", tokens=tokens) as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        use_endpoint(monkeypatch, server.url)
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


def use_endpoint(monkeypatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    # Every client object, also those that were made when their module was imported.
    monkeypatch.setattr(HfApi, "endpoint", property(lambda self: url, lambda self, value: None), raising=False)


@pytest.fixture
def work(tmp_path, hub_folder) -> Path:
    """A folder with a model and a data set, and a YAML file for a run into `run`."""
    shutil.copytree(hub_folder, tmp_path / "model")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red picture."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    paths = {"model": "model", "data_path": "data.json", "image_folder": ".", "output_dir": "run"}
    settings = SETTINGS | {name: str(tmp_path / path) for name, path in paths.items()}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return tmp_path


def files_with(secret: str, folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def received_with(secret: str, hub: LocalHub) -> list[str]:
    """What the Hub holds of a secret: in files of any commit, in large files, in titles."""
    commits = [commit for repo in hub.repos.values() for commit in repo.commits.values()]
    found = [name for commit in commits for name, entry in commit.tree.items() if secret.encode() in entry.content]
    return found + [commit.title for commit in commits if secret in commit.title] + files_with(secret, hub.objects)


def assert_pushed(hub: LocalHub, folder: Path) -> None:
    pushed = hub.files("user/tuned")
    assert {"config.json", "model.safetensors", "last-checkpoint/trainer_state.json"} <= set(pushed)
    assert not [name for name in pushed if name.endswith("training_args.bin")]
    assert [
        path for path in folder.rglob("events.out.tfevents*") if b"per_device_train_batch_size" in path.read_bytes()
    ]


@pytest.mark.parametrize("way", ["flag", "yaml", "environment", "login", "endpoint"])
def test_a_token_stays_out_of_every_file(way, hub, work, monkeypatch, capfd):
    command = ["finetune", str(work / "run.yaml")]
    secret = PASSWORD if way == "endpoint" else TOKEN
    if way == "flag":
        command += ["--hub_token", TOKEN]
    elif way == "yaml":
        settings = json.loads((work / "run.yaml").read_text()) | {"hub_token": TOKEN}
        (work / "run.yaml").write_text(json.dumps(settings))
    elif way == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    elif way == "login":
        Path(constants.HF_TOKEN_PATH).parent.mkdir()
        Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    else:
        use_endpoint(monkeypatch, hub.url.replace("://", f"://user:{PASSWORD}@"))
    assert main(command) == 0
    assert_pushed(hub, work / "run")
    assert files_with(secret, work / "run") == []
    assert received_with(secret, hub) == []
    assert secret not in "".join(capfd.readouterr())


def test_the_arguments_that_trainer_and_loggers_write_down_hold_no_token(work):
    settings = json.loads((work / "run.yaml").read_text()) | {"push_to_hub": False, "hub_token": TOKEN}
    trainer, _ = prepare(build_arguments(settings))
    assert trainer.hub_token == TOKEN
    assert TOKEN not in repr(vars(trainer.args))


def test_a_result_of_an_earlier_version_loses_its_arguments(hub, work):
    """They may hold a token, and would be uploaded with the rest of the folder."""
    assert main(["finetune", str(work / "run.yaml"), "--push_to_hub", "false"]) == 0
    (work / "run" / "training_args.bin").write_text(TOKEN)
    command = ["finetune", str(work / "run.yaml"), "--hub_token", TOKEN, "--resume_from_checkpoint", "auto"]
    assert main([*command, "--max_steps", "2"]) == 0
    assert files_with(TOKEN, work / "run") == []
    assert received_with(TOKEN, hub) == []


def test_a_refused_token_is_not_printed(hub, work, capfd):
    """The Hub's answer, with the address it came from, is part of the error."""
    del hub.tokens[TOKEN]
    assert main(["finetune", str(work / "run.yaml"), "--hub_token", TOKEN]) == 2
    printed = "".join(capfd.readouterr())
    assert "error: " in printed
    assert "401" in printed
    assert TOKEN not in printed
    assert files_with(TOKEN, work / "run") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hub_model_id", f"https://user:{PASSWORD}@huggingface.co/user/tuned"),
        ("run_name", f"run of {TOKEN}"),
        ("report_to", ["none", TOKEN]),
        ("projector", {"note": TOKEN}),
        ("hub_tokn", TOKEN),
    ],
)
def test_settings_that_every_save_would_repeat_hold_no_token(name, value, work):
    settings = json.loads((work / "run.yaml").read_text()) | {name: value}
    with pytest.raises(UserError, match=f"{name} holds a token or a password.*set HF_TOKEN") as caught:
        build_arguments(settings)
    assert TOKEN not in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_a_token_of_no_known_form_is_known_by_its_use(work, monkeypatch):
    """The Hub of a company may give out others than `hf_...`."""
    settings = json.loads((work / "run.yaml").read_text())
    monkeypatch.setenv("HF_TOKEN", "a-companys-own-token")
    with pytest.raises(UserError, match="run_name holds a token"):
        build_arguments(settings | {"run_name": "with a-companys-own-token"})
    monkeypatch.delenv("HF_TOKEN")
    arguments = build_arguments(settings | {"hub_token": "another-companys-token"})
    assert "hub_token" not in arguments.settings
    assert scrub("refused: another-companys-token") == "refused: <token>"
    with pytest.raises(UserError, match="a value too many") as caught:
        build_arguments(settings | {"hub_token": [TOKEN, TOKEN]})
    assert TOKEN not in str(caught.value)


def test_what_is_printed_and_logged_holds_no_secret():
    record = logging.LogRecord(
        "x", logging.WARNING, "x", 1, "sent %s to %s", (TOKEN, f"https://me:{PASSWORD}@h/x"), None
    )
    assert ScrubbedRecords().filter(record)
    assert record.getMessage() == "sent <token> to https://h/x"
    assert scrub("https://cdn/x?Signature=abc and https://h/a@b") == "https://cdn/x and https://h/a@b"


def test_publish_looks_for_the_token_in_use(hub_folder, tmp_path, monkeypatch):
    """Whatever its form, and in the text that weights can carry."""
    weights = load_file(hub_folder / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "a-companys-own-token"})
    assert secret_in(tmp_path / "model.safetensors") is None
    monkeypatch.setenv("HF_TOKEN", "a-companys-own-token")
    assert secret_in(tmp_path / "model.safetensors") == "a secret (Hub token in use) in line 1"


def test_no_secret_gets_into_a_card_or_a_commit_message(hub_folder, tmp_path, capsys):
    """lmms-eval records the arguments of the model, its token among them."""
    folder = shutil.copytree(hub_folder, tmp_path / "model")
    results = tmp_path / "a_results.json"
    results.write_text(json.dumps({"results": {}, "config": {"model_args": f"token={TOKEN}"}}))
    assert main(["card", str(folder), "--results", str(results)]) == 2
    assert f"error: {results} holds a secret (Hugging Face token) in line 1" in capsys.readouterr().err
    assert files_with(TOKEN, folder) == []
    assert main(["publish", str(folder), "user/tiny", "--message", f"with {TOKEN}"]) == 2
    printed = capsys.readouterr().err
    assert "error: --message or --collection holds a token" in printed
    assert TOKEN not in printed
