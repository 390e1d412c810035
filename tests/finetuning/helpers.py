"""What tests of whole runs share: running one, and comparing what came out."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback

from modeling_delta_llava.finetuning.run import prepare

REPOSITORY = Path(__file__).resolve().parents[2]


class BudgetRecorder(TrainerCallback):
    """Remembers the budget of each optimizer step, as the model was told it."""

    def __init__(self, trainer):
        self.budgets = []
        self._batch = None
        trainer.model.register_forward_pre_hook(self._look, with_kwargs=True)
        trainer.add_callback(self)

    def _look(self, model, args, kwargs):
        if model.training:
            (self._batch,) = set(kwargs["num_visual_tokens"].tolist())

    def on_step_end(self, args, state, control, **kwargs):
        self.budgets.append(self._batch)


class LastGradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}


def trained(arguments):
    """Runs the training and gives the trainer back."""
    trainer, checkpoint = prepare(arguments)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def write_config(file, settings):
    """Settings as the YAML file of a run."""
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def python(*arguments, timeout=280, cwd=None, **variables):
    """Runs a fresh `python ARGUMENTS` on this checkout."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
