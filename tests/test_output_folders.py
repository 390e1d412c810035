"""No command writes into a root, a home, a mount point, a git checkout or a folder that holds something else."""

import json
import os
import shutil
from pathlib import Path

import pytest

from delta_llava.cli import main
from delta_llava.errors import UserError
from examples.demo.__main__ import MARKER_FILE, clear_output
from modeling_delta_llava.finetuning.arguments import ModelArguments
from modeling_delta_llava.finetuning.checkpoints import SETTINGS_FILE
from modeling_delta_llava.finetuning.run import check_output_dir
from modeling_delta_llava.folders import check_output_folder

EVERY_PLACE = {
    "home": "is your home folder",
    "link": "is your home folder",
    "around/inside/../../home": "is your home folder",
    "mount": "is a mount point",
    "checkout": "is the root of a git checkout",
    "worktree": "is the root of a git checkout",
    "theirs": "exists",
    "config": "exists",
    "file": "is a file",
}


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A folder with one of each place that must not be written into."""
    for name in ("home", "mount", "checkout/.git", "worktree", "theirs", "config", "around/inside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "worktree" / ".git").write_text("gitdir: elsewhere")
    (tmp_path / "theirs" / "thesis.tex").touch()
    (tmp_path / "config" / "config.json").write_text('{"name": "an application"}')
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name in ("mount", ""))
    return tmp_path


@pytest.mark.parametrize("place", EVERY_PLACE)
@pytest.mark.parametrize("command", ["convert", "export", "quantize", "finetune"])
def test_commands_refuse_places_before_they_read(command, place, places, hub_folder, capsys):
    """The sources are on no disk: only a command that looks at its output first says this."""
    output = places / place
    run = places / "around" / "run.yaml"
    run.write_text(json.dumps({"model": "user/none", "data_path": "none", "output_dir": str(output), "use_cpu": True}))
    commands = {
        "convert": ["convert", "user/none", output, "--overwrite"],
        "export": ["export", hub_folder, output, "--overwrite"],
        "quantize": ["quantize", hub_folder, output],
        "finetune": ["finetune", run],
    }
    before = sorted(places.rglob("*"))
    assert main([str(word) for word in commands[command]]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert EVERY_PLACE[place] in lines[0]
    assert str(output) in lines[0]
    assert sorted(places.rglob("*")) == before


def test_the_root_folder_is_refused(places, capsys):
    run = places / "run.yaml"
    run.write_text(json.dumps({"model": "user/none", "data_path": "none", "output_dir": "/tmp/..", "use_cpu": True}))
    assert main(["finetune", str(run)]) == 2
    assert "error: output_dir: /tmp/.. is the root folder; give another folder" in capsys.readouterr().err
    assert main(["convert", "user/none", "/", "--overwrite"]) == 2
    assert "error: OUTPUT / is the root folder; give another folder" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^/ is the root folder"):
        check_output_folder(Path("/"), "/", "holds no model", is_ours=True)


def test_cards_and_publications_take_no_home(hub_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(hub_folder, tmp_path / "home")
    monkeypatch.setenv("HOME", str(folder))
    before = sorted(folder.rglob("*"))
    for command in (["card", str(folder)], ["publish", str(folder), "user/tiny", "--dry-run"]):
        assert main(command) == 2
        assert f"error: {folder} is your home folder; give another folder" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_card_goes_into_a_clone_of_a_model_repository(hub_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(hub_folder, tmp_path / "clone")
    (folder / ".git").mkdir()
    assert main(["card", str(folder)]) == 0
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == folder)
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").is_file()


def test_a_clone_is_not_replaced(hub_folder, tmp_path, capsys):
    """A card goes into it, but `--overwrite` would take its history along."""
    folder = shutil.copytree(hub_folder, tmp_path / "clone")
    (folder / ".git").mkdir()
    assert main(["convert", str(hub_folder), str(folder), "--overwrite"]) == 2
    assert "is the root of a git checkout" in capsys.readouterr().err
    assert (folder / ".git").is_dir()


def test_a_runs_own_folder_is_taken_again(tmp_path):
    """Whatever of a run is there when it was killed, and also where the folder has become a checkout."""
    for made in ("", "checkpoint-5", "_base"):
        folder = tmp_path / f"run-{made}"
        (folder / made / "x").mkdir(parents=True)
        (folder / made / SETTINGS_FILE).touch()
        check_output_dir(folder, ModelArguments())
        (folder / ".git").mkdir()
        check_output_dir(folder, ModelArguments())
    check_output_dir(tmp_path / "new", ModelArguments())
    with pytest.raises(UserError, match="holds files that `finetune` did not write"):
        check_output_dir(tmp_path, ModelArguments())


def test_the_demo_replaces_its_own_folder_only(places):
    for name, words in EVERY_PLACE.items():
        with pytest.raises(UserError, match=words):
            clear_output(places / name)
    for name in ("home", "mount", "checkout"):
        (places / name / MARKER_FILE).touch()
        with pytest.raises(UserError, match=EVERY_PLACE[name]):
            clear_output(places / name)
    (places / "theirs" / MARKER_FILE).touch()
    clear_output(places / "theirs")
    assert os.listdir(places / "theirs") == [MARKER_FILE]


def test_profile_overwrites_its_own_results_only(hub_folder, tmp_path, capsys):
    command = ["profile", str(hub_folder), "--analytic", "--num-visual-tokens", "4"]
    file = tmp_path / "result.json"
    file.write_text('{"name": "an application"}')
    assert main([*command, "--json", str(file)]) == 2
    assert f"error: {file} exists and `profile` did not write it; give another file" in capsys.readouterr().err
    assert file.read_text() == '{"name": "an application"}'
    file.unlink()
    for _ in range(2):
        assert main([*command, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["budgets"]
