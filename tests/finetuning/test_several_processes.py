"""Two CPU processes (gloo) give the losses and weights of one: DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2."""

import json

import pytest
import torch

from modeling_delta_llava.finetuning.run import prepare
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from tests.finetuning.helpers import REPOSITORY, assert_same_weights, losses, python, trained, weights

ELASTIC = {
    "visual_token_budgets": [16, 4, 1],
    "group_by_modality_length": True,
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
    assert ended.returncode == 0, ended.stderr[-6000:]


def saved_weights(folder):
    return weights(DeltaLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))


def plain_step(arguments):
    """Loss and weights of one process after a step on the first eight rows."""
    trainer, _ = prepare(arguments)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    batch.pop("skipped_rows")
    loss = model(**batch).loss
    loss.backward()
    trained_weights = [item for item in model.parameters() if item.requires_grad]
    torch.optim.AdamW(trained_weights, lr=1e-3, weight_decay=0).step()
    return loss.item(), weights(model)


def test_ddp_and_fsdp2_equal_one_process(settings, arguments, tmp_path):
    """DDP: plain, elastic with accumulation, and resumed. FSDP2: a step on a mesh, and the gathered save."""
    common = {**settings, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "plain")}
    elastic = {**common, **ELASTIC, "output_dir": str(tmp_path / "elastic")}
    themes = [
        {"theme": "train", "settings": common},
        {"theme": "train", "settings": elastic},
        {
            "theme": "train",
            "settings": {**elastic, "resume_from_checkpoint": "true"},
            "forget": str(tmp_path / "elastic" / "checkpoint-4"),
        },
        {"theme": "shard", "settings": common},
    ]
    for number, theme in enumerate(themes):
        theme["result"] = str(tmp_path / f"result{number}")
    two_processes(tmp_path, themes)

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
