"""What each of several CPU processes runs, under `torchrun --nproc_per_node 2 two_processes.py THEMES.json`.

THEMES.json is a list of `{"theme": ..., "settings": ..., "result": file, "forget": checkpoint}`; the main process
writes what each came to, and removes the checkpoint to forget before a theme starts.
"""

import json
import shutil
import sys

import torch
import torch.distributed as dist

from modeling_delta_llava.finetuning.arguments import build_arguments
from modeling_delta_llava.finetuning.run import prepare, run
from tests.finetuning.helpers import BudgetRecorder


def train(settings, result):
    """A whole run: losses, and the budgets that every rank drew and the checkpoint that it took for the best."""
    arguments = build_arguments(settings)
    if arguments.training.deepspeed:
        import deepspeed

        deepspeed.init_distributed("gloo")  # on CPUs, ZeRO-3 would otherwise build the model for a world of one
    trainer, checkpoint = prepare(arguments)
    assert dist.get_world_size() == trainer.args.world_size == 2
    recorder = BudgetRecorder(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    ranks = [None, None]
    dist.all_gather_object(ranks, (recorder.budgets, trainer.state.best_model_checkpoint))
    if trainer.args.process_index == 0:
        budgets, best = zip(*ranks, strict=True)
        log = trainer.state.log_history
        losses = [entry["loss"] for entry in log if "loss" in entry]
        engine = type(trainer.model_wrapped).__name__
        torch.save({"losses": losses, "log": log, "budgets": budgets, "best": best, "engine": engine}, result)
    dist.barrier()


def whole_run(settings, result):
    """As `delta-llava finetune` does it."""
    run(build_arguments(settings))


def shard_model(model):
    """Shards a model with FSDP2 on a mesh of CPUs, as accelerate does it on devices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def evaluate(settings, result):
    """Evaluation of a sharded model: a rank that skipped a part of it would leave the other one waiting for ever."""
    trainer, _ = prepare(build_arguments(settings))
    shard_model(trainer.model)
    metrics = trainer.evaluate()
    if dist.get_rank() == 0:
        torch.save({name: metrics[name] for name in ("eval_loss", "eval_exact_match")}, result)
    dist.barrier()


def shard(settings, result):
    """One step with FSDP2 on a mesh of CPUs, and the gathered state saved by the trainer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    trainer, _ = prepare(build_arguments(settings))
    model = trainer.model.train()
    shard_model(model)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-3, weight_decay=0)
    rows = [trainer.train_dataset[index] for index in range(8)]
    batch, _ = trainer.expanded(trainer.data_collator(rows[dist.get_rank() :: 2]), model.config.num_visual_tokens)
    learned = (batch["labels"][:, 1:] != -100).sum()
    dist.all_reduce(learned)
    # FSDP averages gradients over ranks: twice a rank's share of the sum is the mean over all tokens.
    loss = model(**batch, num_items_in_batch=learned / 2).loss
    loss.backward()
    optimizer.step()
    dist.all_reduce(loss.detach_())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        trainer._save(result, state_dict=state)  # as `Trainer.save_model` does where it shards itself
        torch.save({"loss": loss.item() / 2}, f"{result}/loss.pt")
    dist.barrier()


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        themes = json.load(file)
    for theme in themes:
        if "forget" in theme:
            if dist.get_rank() == 0:
                shutil.rmtree(theme["forget"])
            dist.barrier()
        run_theme = {"train": train, "run": whole_run, "shard": shard, "evaluate": evaluate}[theme["theme"]]
        run_theme(theme["settings"], theme["result"])
    dist.barrier()  # gloo aborts a process that leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
