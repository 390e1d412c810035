"""Runs that are killed or that fill the disk: what is finished stays whole, and the run goes on from there."""

import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch

from delta_llava.errors import UserError
from modeling_delta_llava.finetuning import __main__ as launched
from modeling_delta_llava.finetuning import checkpoints
from modeling_delta_llava.finetuning.checkpoints import (
    COMPLETE_FOLDER,
    UNFINISHED_FOLDER,
    finish_move,
    last_finished_checkpoint,
    move_result,
)
from modeling_delta_llava.finetuning.run import prepare, run
from modeling_delta_llava.finetuning.trainer import DeltaLlavaTrainer
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from tests.finetuning.helpers import trained, weights

MOMENTS = 4


def test_killed_at_any_moment_the_run_goes_on(client, settings, tmp_path):
    """Killed in the trial save, in checkpoints, in their rotation or in the result; the curve stays the same."""
    changes = {
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "trial_save": True,
    }
    (tmp_path / "settings.json").write_text(json.dumps({**settings, **changes}))
    ended = client("-m", "tests.finetuning.killed_runs", tmp_path / "settings.json", tmp_path, MOMENTS)
    assert ended.returncode == 0, ended.stderr[-4000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert len(result["whole"]["losses"]) == 4
    for killed in result["killed"]:
        assert killed["losses"] == result["whole"]["losses"]
        assert killed["from"] == killed["kept"]
    *spread, moved = result["killed"]
    assert (moved["kept"], moved["loads"]) == ("checkpoint-4", False), "half a result loads nowhere"
    kept = [killed["kept"] for killed in spread]
    assert kept[0] is None
    assert len(set(kept)) >= 3, "the moments are spread over the run"
    expected = weights(DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "whole"))
    for number in range(MOMENTS + 1):
        for name in ("", "checkpoint-4"):
            found = weights(DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / f"killed{number}" / name))
            assert all((found[key] == value).all() for key, value in expected.items())


RESULTS = {
    "old": ("config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "README.md"),
    "new": ("config.json", "model.safetensors", "README.md"),
}


@pytest.mark.parametrize("renamed", range(5))
def test_a_move_that_was_cut_short_is_finished_later(tmp_path, monkeypatch, renamed):
    """After any number of renamings the folder holds one result, or loads nowhere until the move is finished."""
    written = tmp_path / UNFINISHED_FOLDER / "result"
    written.mkdir(parents=True)
    for folder, kind in ((tmp_path, "old"), (written, "new")):
        for name in RESULTS[kind]:
            (folder / name).write_text(kind)
    replace, calls = os.replace, []

    def cut_short(source, target):
        if len(calls) == renamed:
            raise KeyboardInterrupt
        calls.append(replace(source, target))

    monkeypatch.setattr(os, "replace", cut_short)
    with pytest.raises(KeyboardInterrupt):
        move_result(written, tmp_path)
    monkeypatch.undo()

    def held():
        return {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}

    whole = {kind: dict.fromkeys(names, kind) for kind, names in RESULTS.items()}
    assert held() in whole.values() or "config.json" not in held()
    finish_move(tmp_path)
    assert held() == whole["old" if renamed == 0 else "new"]


def test_a_result_is_not_lost_when_its_move_was_killed(arguments):
    folder = run(arguments(max_steps=1))
    expected = weights(DeltaLlavaForConditionalGeneration.from_pretrained(folder))
    complete = folder / UNFINISHED_FOLDER / COMPLETE_FOLDER
    complete.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(complete / path.name)
    trainer, _ = prepare(arguments(max_steps=1))
    trainer.begin_run()
    found = weights(DeltaLlavaForConditionalGeneration.from_pretrained(folder))
    assert all((found[name] == value).all() for name, value in expected.items())
    assert not (folder / UNFINISHED_FOLDER).exists()


@pytest.fixture
def file_size_limit():
    """Sets the size at which files cannot grow further: to a writing program, that is a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_loses_nothing(arguments, tmp_path, file_size_limit, monkeypatch):
    """Weights still fit when the optimizer state does not; then nothing fits; then there is space again."""
    common = {"save_strategy": "steps", "save_steps": 2, "trial_save": True}
    whole = trained(arguments(**common, output_dir=str(tmp_path / "whole")))
    first = tmp_path / "whole" / "checkpoint-2"
    sizes = [(first / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")]
    assert sizes[0] < sizes[1]
    folder = tmp_path / "run"
    save = checkpoints.write_settings

    def write_settings(target, stored):
        save(target, stored)
        if target.name == "checkpoint-4":
            file_size_limit(sum(sizes) // 2)

    monkeypatch.setattr("modeling_delta_llava.finetuning.trainer.write_settings", write_settings)
    with pytest.raises(
        UserError, match=r"no space left in .*checkpoint of step 4; earlier checkpoints are whole"
    ) as error:
        run(arguments(**common))
    assert "\n" not in str(error.value)
    assert last_finished_checkpoint(folder).name == "checkpoint-2"
    assert not (folder / UNFINISHED_FOLDER).exists()

    file_size_limit(sizes[0] // 2)
    with pytest.raises(UserError, match=r"a trial save to .* failed"):
        run(arguments(**common, resume_from_checkpoint="true"))
    assert last_finished_checkpoint(folder).name == "checkpoint-2"

    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    monkeypatch.undo()
    assert run(arguments(**common, resume_from_checkpoint="true")) == folder
    found = weights(DeltaLlavaForConditionalGeneration.from_pretrained(folder))
    assert all((found[name] == value).all() for name, value in weights(whole.model).items())


def test_a_disk_that_is_full_at_the_end_is_left_without_half_a_result(arguments, tmp_path, file_size_limit):
    trainer, _ = prepare(arguments())
    file_size_limit(100_000)
    with pytest.raises(checkpoints.SAVE_ERRORS) as error:
        trainer.save_model()
    assert checkpoints.is_no_space(error.value)
    assert not (tmp_path / "run" / UNFINISHED_FOLDER).exists()


def test_a_disk_that_is_too_small_is_noticed_first(arguments, monkeypatch, tmp_path):
    """Asked for is what will be written: the result, or two checkpoints, or the one beside one that lies there."""
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    checkpoint = run(arguments(**common)) / "checkpoint-2"
    weights_size = (checkpoint / "model.safetensors").stat().st_size
    size = weights_size + (checkpoint / "optimizer.pt").stat().st_size
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)

    def begin(**changes):
        trainer, _ = prepare(arguments(trial_save=True, **{**common, **changes}))
        trainer.begin_run()

    with pytest.raises(UserError, match=r"0\.0 GB free, but this run's saves need .*on another disk"):
        begin(output_dir=str(tmp_path / "new"))
    free.free = 1.5 * size
    with pytest.raises(UserError, match="this run's saves need"):
        begin(output_dir=str(tmp_path / "new"))
    begin(resume_from_checkpoint="true")
    free.free = 1.1 * weights_size
    begin(output_dir=str(tmp_path / "new"), save_strategy="no")


def test_a_trial_save_that_cannot_be_opened_stops_the_run(arguments, monkeypatch):
    def write_settings(folder, settings):
        os.truncate(folder / "model.safetensors", 1000)

    monkeypatch.setattr("modeling_delta_llava.finetuning.trainer.write_settings", write_settings)
    with pytest.raises(UserError, match=r"a trial save to .* failed"):
        run(arguments(trial_save=True))


def test_too_little_memory_is_one_line(arguments, monkeypatch):
    def training_step(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(DeltaLlavaTrainer, "training_step", training_step)
    with pytest.raises(UserError, match=r"2 GiB.*per_device_train_batch_size.*gradient_checkpointing") as error:
        run(arguments())
    assert "\n" not in str(error.value)


def test_an_interrupted_process_says_no_more_than_that(monkeypatch, capsys):
    def finetune(config, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_delta_llava.finetuning.run.finetune", finetune)
    assert launched.main(["run.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
