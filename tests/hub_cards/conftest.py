"""A Hub on loopback for each test, and client processes that talk to it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from delta_llava.cli import main
from tests import tiny
from tests.forked import REPOSITORY

IMPATIENT = Path(__file__).parent / "impatient"


@pytest.fixture
def as_client(hub, tmp_path, capfd) -> Callable[..., subprocess.CompletedProcess]:
    """Calls a function that returns an exit status, with the environment of a client of the hub; as of a process.

    For publishing: what talks to the Hub is then a fresh process in any case, with that environment. It makes no
    pauses between its attempts unless `patient`.
    """

    def run(function: Callable[[], int], token="write", patient=False, **variables) -> subprocess.CompletedProcess:
        path = [str(REPOSITORY)] if patient else [str(REPOSITORY), str(IMPATIENT)]
        environment = hub.environment(tmp_path / "home", token) | {"PYTHONPATH": os.pathsep.join(path)} | variables
        capfd.readouterr()
        with mock.patch.dict(os.environ, environment, clear=True):
            status = function()
        printed = capfd.readouterr()
        for secret in {*hub.tokens, environment.get("HF_TOKEN")} - {None}:
            assert secret not in printed.out + printed.err, "a token was printed"
        return subprocess.CompletedProcess([], status, printed.out, printed.err)

    return run


@pytest.fixture
def cli(as_client) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `delta-llava ARGUMENTS`: no fresh process, save those that a command starts itself."""
    return lambda *arguments, **options: as_client(lambda: main([*map(str, arguments)]), **options)


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
