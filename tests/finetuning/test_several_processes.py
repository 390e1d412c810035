"""Two CPU processes (gloo) give the losses and weights of one: DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2."""

import json
import re

import pytest
import torch

from modeling_delta_llava.finetuning.run import prepare
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from tests.finetuning.conftest import write_data
from tests.finetuning.helpers import REPOSITORY, assert_same_weights, losses, python, trained, weights
from tests.training_layout import TrainingLayout, write_base_model, write_tower

ELASTIC = {
    "visual_token_budgets": [16, 4, 1],
    "train_sampling_strategy": "group_by_length",
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "projector_learning_rate": 5e-4,
    "save_strategy": "steps",
    "save_steps": 2,
}


def two_processes(folder, themes, **variables):
    """Runs themes of `two_processes.py` in two processes."""
    file = folder / "themes.json"
    file.write_text(json.dumps(themes))
    script = REPOSITORY / "tests" / "finetuning" / "two_processes.py"
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, file)
    ended = python(*command, USE_LIBUV="0", **variables)
    assert ended.returncode == 0, ended.stderr
    return ended


def saved_weights(folder):
    return weights(DeltaLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))


def mean_loss(trainer, indices):
    """Loss per token of some rows in one batch."""
    rows = [trainer.train_dataset[index] for index in indices]
    batch, _ = trainer.expanded(trainer.data_collator(rows), trainer.model.config.num_visual_tokens)
    return trainer.model(**batch).loss


def evaluated_on(rows, folder):
    """Settings of an evaluation in which the second of two ranks gets a batch without a picture."""
    held_out = [rows[number] for number in (0, 1, 3, 7, 2)]
    assert ["image" in row for row in held_out[:4]] == [True, True, False, False]
    (folder / "held_out.json").write_text(json.dumps(held_out))
    return {
        "eval_data_path": str(folder / "held_out.json"),
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 2,
        "predict_with_generate": True,
        "generation_max_new_tokens": 3,
    }


def evaluations(log):
    """What each evaluation of a run measured, one after the other."""
    names = ("eval_loss", "eval_exact_match")
    return [entry[name] for entry in log if "eval_loss" in entry for name in names]


def plain_step(arguments):
    """Loss and weights of one process after a step on the first eight rows."""
    trainer, _ = prepare(arguments)
    model = trainer.model.train()
    loss = mean_loss(trainer, range(8))
    loss.backward()
    trained_weights = [item for item in model.parameters() if item.requires_grad]
    torch.optim.AdamW(trained_weights, lr=1e-3, weight_decay=0).step()
    return loss.item(), weights(model)


@pytest.mark.slow
def test_ddp_and_fsdp2_equal_one_process(settings, arguments, data_folder, tmp_path):
    """DDP: plain, elastic with accumulation, and resumed. FSDP2: a step on a mesh, the gathered save, and evaluation.

    A stream is repeated in whole steps, every rank loads the best weights, and rows left out on any rank are named.
    """
    common = {**settings, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "plain")}
    elastic = {**common, **ELASTIC, "output_dir": str(tmp_path / "elastic")}
    rows = json.loads((data_folder / "data.json").read_text())[:14]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    streamed = {
        "data_path": str(tmp_path / "rows.jsonl"),
        "streaming": True,
        "max_steps": 5,
        "visual_token_budgets": [16, 4, 1],
    }
    broken = write_data(tmp_path / "broken")
    for name in ("0.png", "4.png"):  # rows 0 and 4 go to different ranks below
        (tmp_path / "broken" / "images" / name).write_text("no picture")
    evaluated = evaluated_on(rows, tmp_path)
    smoothed = {"label_smoothing_factor": 0.1, "max_steps": 2}
    apart = {"average_tokens_across_devices": False, "train_sampling_strategy": "sequential", "max_steps": 1}
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_data_path": settings["data_path"],
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    themes = [
        {"theme": "train", "settings": common},
        {"theme": "train", "settings": elastic},
        {
            "theme": "train",
            "settings": {**elastic, "resume_from_checkpoint": "true"},
            "forget": str(tmp_path / "elastic" / "checkpoint-4"),
        },
        {"theme": "shard", "settings": common},
        {"theme": "train", "settings": {**common, **streamed, "output_dir": str(tmp_path / "streamed")}},
        {"theme": "train", "settings": {**common, **best, "output_dir": str(tmp_path / "best")}},
        {
            "theme": "run",
            "settings": {
                **common,
                "data_path": str(broken),
                "image_folder": str(tmp_path / "broken" / "images"),
                "on_broken_image": "skip",
                "train_sampling_strategy": "sequential",
                "per_device_train_batch_size": 4,
                "max_steps": 1,
                "log_level": "warning",
                "log_level_replica": "warning",
                "output_dir": str(tmp_path / "skipping"),
            },
        },
        {"theme": "evaluate", "settings": {**common, **evaluated, "output_dir": str(tmp_path / "evaluated")}},
        {"theme": "train", "settings": {**common, **smoothed, "output_dir": str(tmp_path / "smoothed")}},
        {"theme": "train", "settings": {**common, **apart, "output_dir": str(tmp_path / "apart")}},
    ]
    for number, theme in enumerate(themes):
        theme["result"] = str(tmp_path / f"result{number}")
    log = two_processes(tmp_path, themes).stderr

    plain, whole, resumed = (torch.load(theme["result"]) for theme in themes[:3])
    assert plain["engine"] == whole["engine"] == "DistributedDataParallel"
    one = trained(arguments(output_dir=str(tmp_path / "one")))
    assert plain["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert_same_weights(saved_weights(tmp_path / "plain"), weights(one.model), atol=1e-4, rtol=1e-3)

    first, second = whole["budgets"]
    assert first == second
    assert len(set(first)) > 1
    one = trained(arguments(**ELASTIC, output_dir=str(tmp_path / "elastic-one")))
    assert whole["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert resumed["losses"] == whole["losses"]
    assert_same_weights(saved_weights(tmp_path / "elastic"), weights(one.model), atol=1e-4, rtol=1e-3)

    loss, stepped = plain_step(arguments(output_dir=str(tmp_path / "step")))
    sharded = tmp_path / "result3"
    assert torch.load(sharded / "loss.pt")["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_weights(saved_weights(sharded), stepped, atol=1e-4, rtol=1e-3)
    code = {file.name for file in sharded.glob("*.py")}
    assert code == {file.name for file in (tmp_path / "plain").glob("*.py")} >= {"modeling_delta_llava.py"}
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (sharded, tmp_path / "plain")]
    assert maps[0] == maps[1]

    one = trained(arguments(**streamed, output_dir=str(tmp_path / "streamed-one")))
    two = torch.load(themes[4]["result"])
    assert two["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert two["budgets"][0][:5] == two["budgets"][1][:5]

    first = str(tmp_path / "best" / "checkpoint-2")  # the highest loss was asked for
    assert torch.load(themes[5]["result"])["best"] == (first, first)
    assert_same_weights(saved_weights(tmp_path / "best"), saved_weights(first), atol=0, rtol=0)

    one, _ = prepare(arguments(**evaluated, output_dir=str(tmp_path / "evaluated-one")))
    expected = one.evaluate()
    names = ("eval_loss", "eval_exact_match")
    assert torch.load(themes[7]["result"]) == pytest.approx({name: expected[name] for name in names}, rel=1e-5)

    one = trained(arguments(**smoothed, output_dir=str(tmp_path / "smoothed-one")))
    assert torch.load(themes[8]["result"])["losses"] == pytest.approx(losses(one), rel=1e-5)
    one, _ = prepare(arguments(output_dir=str(tmp_path / "apart-one")))
    ranks = [mean_loss(one, range(*rows)).item() for rows in ((0, 2), (2, 4))]
    assert torch.load(themes[9]["result"])["losses"] == pytest.approx([sum(ranks) / 2], rel=1e-5)

    named = " ".join(line for line in log.splitlines() if line.startswith("left out: "))
    assert sorted(re.findall(r"images/(\d)\.png", named)) == ["0", "4"]
    assert log.count("2 rows were left out: ") == 1


def zero(stage, folder):
    """A DeepSpeed config file; what it leaves open follows the run's settings."""
    config = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
    }
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps(config))
    return str(file)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(settings, arguments, data_folder, tmp_path, stage):
    """A run from its parts (composed on one rank), and resumed from its checkpoint; both save whole Hub folders.

    Both evaluate, before the first step and after the last, where one rank has no picture.
    """
    pytest.importorskip("deepspeed")
    layout = TrainingLayout()
    write_base_model(tmp_path / "llm", layout)
    write_tower(tmp_path / "tower", layout)
    start = {
        "model": None,
        "language_model": str(tmp_path / "llm"),
        "vision_tower": str(tmp_path / "tower"),
        "projector": {"memory_feature_layers": [2, 4, 6, 7], "drop_path_rate": 0.0},
        "num_visual_tokens": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_on_start": True,
        **evaluated_on(json.loads((data_folder / "data.json").read_text()), tmp_path),
    }
    one = trained(arguments(**start, output_dir=str(tmp_path / "one")))
    common = {
        **settings,
        **start,
        "per_device_train_batch_size": 2,
        "output_dir": str(tmp_path / "two"),
        "deepspeed": zero(stage, tmp_path),
    }
    themes = [
        {"theme": "train", "settings": common},
        {
            "theme": "train",
            "settings": {**common, "resume_from_checkpoint": "true"},
            "forget": str(tmp_path / "two" / "checkpoint-4"),
        },
    ]
    for number, theme in enumerate(themes):
        theme["result"] = str(tmp_path / f"result{number}")
    two_processes(tmp_path, themes, DS_ACCELERATOR="cpu")
    whole, resumed = (torch.load(theme["result"]) for theme in themes)
    assert whole["engine"] == "DeepSpeedEngine"
    expected = evaluations(one.state.log_history)
    assert len(expected) == 4
    assert evaluations(whole["log"]) == pytest.approx(expected, rel=1e-5)
    assert whole["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    for folder in (tmp_path / "two", tmp_path / "two" / "checkpoint-4"):
        assert_same_weights(saved_weights(folder), weights(one.model), atol=1e-4, rtol=1e-3)
