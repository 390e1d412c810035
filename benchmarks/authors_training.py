"""One run of the released training loop, started by `released_training.py` in the environment of the released code.

Their `train()` is called as it is, with its command line behind this file's name. It is imported from a checkout of
github.com/mzamini92/Delta-LLaVA on PYTHONPATH; none of their code is in this repository. What an exact comparison
needs is set from outside: rows in the order of the file, no stochastic depth, and a vision tower in fp32, where their
loop has half precision unless bf16 is asked for. The losses go to `losses.json` in the run's folder.
"""

import json
from pathlib import Path

import llava.train.train as released
from torch.utils.data import SequentialSampler


class ObservedTrainer(released.LLaVATrainer):
    """Their trainer, with its losses unrounded."""

    def __init__(self, model, **kwargs):
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        model.get_vision_tower().float()
        self.losses = []
        super().__init__(model=model, **kwargs)

    def _get_train_sampler(self):
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args):
        loss = super().training_step(*args)
        self.losses.append(loss.item())
        return loss

    def save_state(self):
        super().save_state()
        (Path(self.args.output_dir) / "losses.json").write_text(json.dumps(self.losses))


if __name__ == "__main__":
    released.LLaVATrainer = ObservedTrainer
    released.train()
