"""Runs that are killed or that fill the disk: what is finished stays whole, and the run goes on from there."""

import json
import os
import resource

import pytest

from modeling_delta_llava.errors import UserError
from modeling_delta_llava.finetuning import checkpoints
from modeling_delta_llava.finetuning.checkpoints import UNFINISHED_FOLDER, last_finished_checkpoint
from modeling_delta_llava.finetuning.run import run
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from tests.finetuning.helpers import REPOSITORY, python, trained, weights

MOMENTS = 4


def test_killed_at_any_moment_the_run_goes_on(settings, tmp_path):
    """Killed in the trial save, in checkpoints, in their rotation or in the result; the curve stays the same."""
    changes = {
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "trial_save": True,
    }
    (tmp_path / "settings.json").write_text(json.dumps({**settings, **changes}))
    script = REPOSITORY / "tests" / "finetuning" / "killed_runs.py"
    ended = python(script, tmp_path / "settings.json", tmp_path, MOMENTS)
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


def test_a_disk_that_is_too_small_is_noticed_first(arguments, monkeypatch):
    usage = os.statvfs("/")
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: type("Usage", (), {"total": usage.f_blocks, "used": 0, "free": 1000})
    )
    with pytest.raises(UserError, match=r"0\.0 GB free, but checkpoints need .*on another disk"):
        run(arguments(trial_save=True))
