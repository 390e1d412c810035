"""A Hub on loopback for each test, and fresh client processes that talk to it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.hub_cards.local_hub import LocalHub

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def client(hub, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python ARGUMENTS` as a client of the hub; `token` and `variables` change its environment."""

    def run(*arguments, token="write", home="home", timeout=240, **variables) -> subprocess.CompletedProcess:
        environment = hub.environment(tmp_path / home, token) | variables
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")]).strip(":")
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        process = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment,
            cwd=work,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        for secret in {*hub.tokens, environment.get("HF_TOKEN")} - {None}:
            assert secret not in process.stdout + process.stderr, "a token was printed"
        return process

    return run


@pytest.fixture
def cli(client) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `delta-llava ARGUMENTS` as a client of the hub."""

    def run(*arguments, **options) -> subprocess.CompletedProcess:
        return client("-m", "delta_llava_cli", *arguments, **options)

    return run


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A tiny Hub folder of its own, without a card."""
    return tiny.write_hub_folder(tmp_path / "tiny-delta-llava")


def assert_one_line(process: subprocess.CompletedProcess, *parts: str) -> str:
    """The process ended with status 2 and one line of error that has the given parts; that line."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    lines = process.stderr.rstrip("\n").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert lines[-1] == errors[0]
    for part in parts:
        assert part in errors[0], errors[0]
    return errors[0]
