"""Sources on the Hub, downloaded by the real client from a server on loopback: only the files that are needed."""

import hashlib
import json
import re
import time
from pathlib import Path

import pytest

from tests.conversion.conftest import LAYOUT, assert_same_tensors, read_tensors
from tests.hub_cards.local_hub import Entry, LocalHub
from tests.training_layout import write_base_model, write_stage1, write_stage2, write_tower


@pytest.fixture
def run(client, tmp_path):
    """Runs `delta-llava ARGUMENTS` as a client of the hub, in the test's folder, after the code `first`."""

    def call(*arguments, first="", **variables):
        code = f"import sys\n{first}\nfrom delta_llava.cli import main\nsys.exit(main(sys.argv[1:]))"
        return client("-c", code, *arguments, token=None, cwd=tmp_path, **variables)

    return call


def upload(
    hub: LocalHub, repo_id: str, folder: Path, extra: dict[str, bytes] | None = None, branch: str = "main"
) -> None:
    """Puts a folder into a repository of the server, as if it had always been there."""
    repo = hub.repos.get(repo_id) or hub.create_repo(repo_id)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} | (extra or {})
    entries = {}
    for name, data in files.items():
        digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entries[name] = Entry(digest, len(data), content=data)
    hub.commit(repo, branch, entries)


def downloaded(tmp_path: Path, repo_id: str) -> set[str]:
    snapshots = tmp_path / "home" / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    return {path.name for path in snapshots.glob("*/*")}


def test_source_and_tower_from_the_hub(hub, run, tmp_path):
    source = tmp_path / "source"
    write_stage2(source, LAYOUT, shards=2)
    config = (source / "config.json").read_text().replace(str(tmp_path / "source-tower"), "someone/tower")
    (source / "config.json").write_text(config)
    unneeded = {"pytorch_model.bin": b"x" * 1000, "optimizer.bin": b"x", "README.md": b"x", "flax_model.msgpack": b"x"}
    upload(hub, "someone/delta", source, unneeded)
    upload(hub, "someone/tower", tmp_path / "source-tower", {"pytorch_model.bin": b"x", "tf_model.h5": b"x"})
    # On this position tqdm draws its bars on what is no terminal, too.
    done = run("convert", "someone/delta", "hub", "--max-shard-size", "1MB", TQDM_POSITION="-1")
    assert done.returncode == 0, done.stderr
    assert "%|" in done.stderr, "the download has a progress bar"
    assert downloaded(tmp_path, "someone/delta") == {path.name for path in source.iterdir()}
    assert downloaded(tmp_path, "someone/tower") == {"config.json", "preprocessor_config.json"}, (
        "its weights are inside"
    )

    hub.log.clear()
    offline = "import huggingface_hub.constants\nhuggingface_hub.constants.HF_HUB_OFFLINE = True"
    done = run("verify", "hub", "--against", "someone/delta", "--no-progress", first=offline)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.log == []

    done = run("export", "hub", "back")
    assert done.returncode == 0, done.stderr
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(source))


def test_a_base_model_of_bin_files_and_a_tower_with_its_weights(hub, run, tmp_path):
    write_base_model(tmp_path / "base", LAYOUT, weights_format="bin", shards=2)
    write_tower(tmp_path / "tower", LAYOUT)
    write_stage1(tmp_path / "stage1", LAYOUT, tower="someone/tower")
    for name in ("base", "tower", "stage1"):
        upload(hub, f"someone/{name}", tmp_path / name)
    arguments = ("convert", "someone/stage1", "hub", "--base-model", "someone/base", "--no-progress")
    done = run(*arguments, TQDM_POSITION="-1")
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr
    assert "pytorch_model-00001-of-00002.bin" in downloaded(tmp_path, "someone/base")
    assert "model.safetensors" in downloaded(tmp_path, "someone/tower")


def test_revision(hub, run, tmp_path):
    write_stage2(tmp_path / "one", LAYOUT)
    tower = tmp_path / "one-tower"
    write_stage2(tmp_path / "two", LAYOUT, seed=5, tower=tower)
    upload(hub, "someone/delta", tmp_path / "one")
    upload(hub, "someone/delta", tmp_path / "two", branch="trained-longer")
    done = run("convert", "someone/delta", "hub", "--revision", "trained-longer")
    assert done.returncode == 0, done.stderr
    done = run("export", "hub", "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "two"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["someone/nothing"], "it is no folder here, and downloading it failed: no such repository"),
        (["someone/delta", "--revision", "v9"], "at revision 'v9' failed: it has no such revision"),
    ],
)
def test_what_the_hub_does_not_have(hub, run, tmp_path, arguments, message):
    write_stage2(tmp_path / "source", LAYOUT)
    upload(hub, "someone/delta", tmp_path / "source")
    done = run("convert", arguments[0], "hub", *arguments[1:])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "hub").exists()


def test_an_index_on_the_hub_that_names_files_elsewhere(hub, run, tmp_path):
    write_stage2(tmp_path / "source", LAYOUT)
    index = {"weight_map": {"lm_head.weight": "/etc/passwd"}}
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps(index))
    upload(hub, "someone/delta", tmp_path / "source")
    done = run("convert", "someone/delta", "hub", "--no-progress")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "model.safetensors.index.json names '/etc/passwd', which leaves" in done.stderr


def test_no_space_for_the_download(hub, run, tmp_path):
    write_stage2(tmp_path / "source", LAYOUT)
    upload(hub, "someone/delta", tmp_path / "source")
    full = "from modeling_delta_llava import sources; sources.free_bytes = lambda path: 100_000"
    done = run("convert", "someone/delta", "hub", first=full)
    assert done.returncode == 2
    assert "error: no space to download SOURCE someone/delta" in done.stderr
    assert "model.safetensors" not in downloaded(tmp_path, "someone/delta")


def test_a_hub_that_does_not_answer(hub, run, tmp_path):
    hub.fail("", "cut", times=999)
    done = run("convert", "someone/delta", "hub")
    assert done.returncode == 2
    assert (
        "error: SOURCE someone/delta: it is no folder here, and downloading it failed: no connection to the Hub"
        in done.stderr
    )
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("request_of", ["GET /api/models/someone/delta", "GET .*/config.json"])
def test_a_hub_that_drips(hub, run, tmp_path, request_of):
    write_stage2(tmp_path / "source", LAYOUT)
    upload(hub, "someone/delta", tmp_path / "source")
    hub.fail(request_of, "drip", times=999, seconds=0.05)
    begin = time.monotonic()
    done = run("convert", "someone/delta", "hub", first="from modeling_delta_llava import hub; hub.SILENCE = 0.5")
    assert done.returncode == 2
    assert "error: SOURCE someone/delta: it is no folder here, and downloading it failed" in done.stderr
    assert "less than 1000 bytes per second" in done.stderr
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("request_of", "action", "seconds", "message"),
    [
        ("GET /api/models/someone/delta", "drip headers", 0.05, "no answer within 1 seconds"),
        ("GET /api/models/someone/delta", "endless", 0, "longer than 1,000,000 bytes"),
    ],
)
def test_a_hub_that_never_ends(hub, run, tmp_path, request_of, action, seconds, message):
    write_stage2(tmp_path / "source", LAYOUT)
    upload(hub, "someone/delta", tmp_path / "source")
    hub.fail(request_of, action, times=999, seconds=seconds)
    limits = "from modeling_delta_llava import hub; hub.SILENCE = 0.5; hub.LARGEST_ANSWER = 1_000_000"
    begin = time.monotonic()
    done = run("convert", "someone/delta", "hub", first=limits)
    assert done.returncode == 2
    assert "error: SOURCE someone/delta: it is no folder here, and downloading it failed" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("beside", ["mm_projector.bin", "adapter_config.json"])
def test_whole_weights_beside_another_form(hub, run, tmp_path, beside):
    """A repository and a folder with the same files get the same answer."""
    write_base_model(tmp_path / "base", LAYOUT)
    extra = {beside: b"{}"}
    upload(hub, "someone/base", tmp_path / "base", extra)
    (tmp_path / "base" / beside).write_bytes(extra[beside])
    answers = []
    for source, folder in (("someone/base", ".*/snapshots/[0-9a-f]+"), ("base", "base")):
        done = run("convert", source, "hub", "--no-progress")
        assert done.returncode == 2
        answers.append(re.sub(f"error: {folder} ", "error: ", done.stderr.splitlines()[-1]))
    assert answers[0] == answers[1]
    assert re.match("error: holds (a language model|whole weights) and ", answers[0])
