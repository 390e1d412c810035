"""Client processes of the Hub on loopback that start at once: forks of a process that has imported torch and so on.

A fresh interpreter takes several seconds to import torch and transformers. `Forker` starts one that has done so, and
forks it for every `python ARGUMENTS` that it is asked to run. huggingface_hub reads the Hub's address and the cache's
folder when it is imported, so these are the same for all forks; everything else is as in a fresh process, and this
project's package is imported by none but the fork that asks for it.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# What the clients import sooner or later; what is not installed is left out.
PRELOADED = (
    "torch",
    "transformers",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.clip.image_processing_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "bitsandbytes",
    "datasets",
    "typer",
)
# Read while PRELOADED is imported: a process that wants another value must be a fresh one.
READ_ONCE = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE")


class Forker:
    """The process that forks. `environment` is that of all forks as far as READ_ONCE is concerned."""

    def __init__(self, environment: dict[str, str]):
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self, arguments: list[str], environment: dict[str, str], cwd: Path, scratch: Path, timeout: int
    ) -> subprocess.CompletedProcess:
        """`python ARGUMENTS`, which must begin with "-c CODE" or "-m MODULE"."""
        outputs = [str(scratch / "stdout.txt"), str(scratch / "stderr.txt")]
        order = {"arguments": arguments, "environment": environment, "cwd": str(cwd), "outputs": outputs}
        print(json.dumps({**order, "timeout": timeout}), file=self.server.stdin, flush=True)
        status = json.loads(self.server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(Path(path).read_text() for path in outputs))

    def close(self) -> None:
        # Closing its standard input would not do: processes that tests have forked may hold that open, too.
        self.server.kill()
        self.server.communicate()


def execute(order: dict) -> None:
    """What a fork does: it becomes the process that was ordered."""
    signal.alarm(order["timeout"])
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(order["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    kind, what, *arguments = order["arguments"]
    sys.path[0] = order["cwd"]
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


def serve() -> None:
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    assert "modeling_delta_llava" not in sys.modules
    while line := sys.stdin.readline():
        process = os.fork()
        if process == 0:
            execute(json.loads(line))
            return
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
