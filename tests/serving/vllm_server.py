"""A vLLM server of one folder, as a process of vLLM's own environment."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
}


def environment(**more: str) -> dict[str, str]:
    """Variables for a process of vLLM's environment: not this one's packages and threads, nothing from the network."""
    ours = ("PYTHONPATH", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in ours} | ENVIRONMENT | more


@contextlib.contextmanager
def vllm_server(
    python: str, folder: Path, *options: str, log: Path, seconds: int = 600, **variables: str
) -> Iterator[str]:
    """Runs `vllm serve FOLDER` on a free port until the block ends; gives its address.

    The module is what that command starts: of the CPU build, whose package has another name, the command itself fails.

    Args:
        python: Python of an environment with vLLM.
        folder: what to serve; its path is the model's name in requests.
        options: more options of `vllm serve`.
        log: where the server's output goes.
        seconds: how long it may take to start.
        variables: more of its environment.

    Raises:
        RuntimeError: it ended before it answered, with the end of its log, or took too long.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment(**variables), cwd=log.parent)
        try:
            end = time.monotonic() + seconds
            while not answers(address):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-6000:]}")
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
    except OSError:
        return False
    return True
