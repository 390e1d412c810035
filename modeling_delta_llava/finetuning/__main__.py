"""`python -m modeling_delta_llava.finetuning CONFIG.yaml [--key value ...]`: what accelerate and torchrun launch."""

import sys

import torch.distributed as dist

from delta_llava.errors import UserError, printable
from delta_llava.redaction import scrub

from .arguments import settings_help
from .run import finetune

HELP = {"-h", "--help", "--list-settings"}


def main(arguments: list[str]) -> int:
    """Runs `finetune`; returns the exit status: 2 for an error that the user can mend, 130 when interrupted."""
    if not arguments or HELP.intersection(arguments):
        print(settings_help() if arguments else __doc__)
        return 0 if arguments else 2
    try:
        finetune(arguments[0], arguments[1:])
        if dist.is_initialized():
            dist.barrier()  # no process leaves while another still talks to it
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        print(f"error: {scrub(printable(str(error), None))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
