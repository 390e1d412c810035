"""Fixtures shared by all tests: tiny models made on the spot, nothing from the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import tiny
from tests.forked import READ_ONCE, REPOSITORY, Forker
from tests.hub_cards.local_hub import LocalHub


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory):
    """A tiny Hub folder; tests read it and never write to it."""
    return tiny.write_hub_folder(tmp_path_factory.mktemp("hub") / "tiny-delta-llava")


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    return tiny.tiny_processor(tmp_path_factory.mktemp("tokenizer"), tiny.tiny_config())


@pytest.fixture
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="session")
def loopback(tmp_path_factory):
    """The server behind `hub`, and the process that its clients are forked from."""
    root = tmp_path_factory.mktemp("loopback")
    home = root / "home"  # a link to the folder that the client at hand is to have as its home
    with LocalHub(root / "hub") as server:
        forkers = []

        def forker() -> Forker:
            if not forkers:
                forkers.append(Forker(server.environment(home) | {"PYTHONPATH": str(REPOSITORY)}))
            return forkers[0]

        yield server, home, forker
        for each in forkers:
            each.close()


@pytest.fixture
def hub(loopback):
    """An empty Hub."""
    server, _, _ = loopback
    server.reset()
    return server


@pytest.fixture
def client(hub, loopback, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -c CODE ...` or `python -m MODULE ...` as a client of the hub, which has torch imported already.

    Args:
        token: "write", None or a token of its own.
        home: name of the client's home, with its cache; a new name is an empty one.
        cwd: by default a folder `work` of the test.
        variables: more of its environment. With those of `READ_ONCE` the process is a fresh one.
    """
    _, link, forker = loopback

    def run(*arguments, token="write", home="home", timeout=240, cwd=None, **variables):
        environment = hub.environment(link, token) | {"PYTHONPATH": str(REPOSITORY)} | variables
        cwd = cwd or tmp_path / "work"
        for folder in (cwd, tmp_path / home):
            folder.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / home)
        arguments = [str(argument) for argument in arguments]
        if variables.keys() & set(READ_ONCE):
            process = subprocess.run(
                [sys.executable, *arguments],
                env=environment,
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        else:
            process = forker().run(arguments, environment, cwd, link.parent, timeout)
        for secret in {*hub.tokens, environment.get("HF_TOKEN")} - {None}:
            assert secret not in process.stdout + process.stderr, "a token was printed"
        return process

    return run
