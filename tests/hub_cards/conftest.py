"""A Hub on loopback for each test, and this very process as its client: another one would spend seconds on imports."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import constants

from delta_llava.cli import main
from modeling_delta_llava import hub as hub_access
from tests import tiny

_sleep = time.sleep


@contextlib.contextmanager
def client_of(environment: dict[str, str], patient: bool = False):
    """Makes this process what a process with that environment would be to huggingface_hub, which reads it once."""
    changed = {
        "ENDPOINT": environment["HF_ENDPOINT"],
        "HUGGINGFACE_CO_URL_TEMPLATE": environment["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": environment.get("HF_HUB_OFFLINE") == "1",
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": f"{environment['HF_HOME']}/token",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
        for name, value in changed.items():
            stack.enter_context(mock.patch.object(constants, name, value))
        if not patient:
            # huggingface_hub pauses for seconds between its attempts.
            stack.enter_context(mock.patch.object(time, "sleep", lambda seconds: _sleep(min(seconds, 0.01))))
        stack.enter_context(mock.patch.object(hub_access, "FIRST_WAIT", 0.02))
        huggingface_hub.close_session()
        stack.callback(huggingface_hub.close_session)
        yield


@pytest.fixture
def as_client(hub, tmp_path, capfd) -> Callable[..., subprocess.CompletedProcess]:
    """Calls a function that returns an exit status as a client of the hub, with what it prints; as of a process.

    The client makes no pauses between its attempts unless `patient`.
    """

    def run(function: Callable[[], int], token="write", patient=False, **variables) -> subprocess.CompletedProcess:
        environment = hub.environment(tmp_path / "home", token) | variables
        capfd.readouterr()
        with client_of(environment, patient):
            status = function()
        printed = capfd.readouterr()
        for secret in {*hub.tokens, environment.get("HF_TOKEN")} - {None}:
            assert secret not in printed.out + printed.err, "a token was printed"
        return subprocess.CompletedProcess([], status, printed.out, printed.err)

    return run


@pytest.fixture
def cli(as_client) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `delta-llava ARGUMENTS` in this process."""
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
