"""Fixtures shared by all tests: tiny models made on the spot, nothing from the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests import tiny


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
