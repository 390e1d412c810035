"""`python -m modeling_delta_llava.finetuning CONFIG.yaml [--key value ...]`: what accelerate and torchrun launch."""

import sys

import torch.distributed as dist

from delta_llava import cli


def main(arguments: list[str]) -> int:
    """`delta-llava finetune` in one of several processes; returns its exit status."""
    status = cli.main(["finetune", *arguments])
    if status == 0 and dist.is_initialized():
        dist.barrier()  # no process leaves while another still talks to it
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
