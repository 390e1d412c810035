"""Uploading through every kind of trouble: the real client against the Hub on loopback.

The folders here hold random bytes; what a folder must be is tested with the preflight.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling_delta_llava import hub as hub_access
from tests.forked import REPOSITORY
from tests.hub_cards.conftest import assert_one_line
from tests.hub_cards.local_hub import LocalHub
from tests.hub_cards.publishing import REPO, publish_as_it_is

COMMIT = r"POST /api/models/user/model/commit/"
PUT = r"^PUT /lfs/"


def random_folder(folder: Path, shards: int = 2, size: int = 600_000) -> Path:
    folder.mkdir()
    for index in range(shards):
        (folder / f"model-{index + 1:05d}-of-{shards:05d}.safetensors").write_bytes(os.urandom(size))
    (folder / "modeling_x.py").write_text("x = 1\n")
    (folder / "config.json").write_text("{}\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return random_folder(tmp_path / "folder")


@pytest.fixture
def hub(tmp_path):
    """A server of the test's own: what killed clients asked for happens in no other test."""
    with LocalHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def publish(as_client):
    def run(folder, repo_id=REPO, token="write", patient=False, variables=None, **options):
        function = functools.partial(publish_as_it_is, folder, repo_id, **options)
        return as_client(function, token, patient, **(variables or {}))

    return run


def report_of(process: subprocess.CompletedProcess) -> dict:
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    return json.loads(process.stdout)


def local_files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_holds(hub: LocalHub, folder: Path, revision: str = "main", repo_id: str = REPO) -> None:
    remote = hub.files(repo_id, revision)
    del remote[".gitattributes"]
    assert remote == local_files(folder)


def commits(hub: LocalHub, branch: str = "main") -> list[str]:
    return [commit.title for commit in hub.repos[REPO].history(branch)]


def test_publishes_in_one_commit_and_then_nothing(hub, folder, publish):
    first = report_of(publish(folder, tag="v1.0"))
    assert_holds(hub, folder)
    assert commits(hub) == ["Upload model", "initial commit"]
    assert hub.repos[REPO].tags == {"v1.0": first["commit"]}
    assert sorted(first["added"]) == sorted(local_files(folder))
    hub.log.clear()
    second = report_of(publish(folder, tag="v1.0"))
    assert second["added"] == []
    assert second["commit"] == first["commit"]
    changing = [r for r in hub.log if r.method != "GET" and r.method != "HEAD"]
    assert changing == [], "a second run uploads nothing and changes nothing"


def test_only_what_changed_is_sent(hub, folder, publish):
    report_of(publish(folder))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A better card\n")
    hub.log.clear()
    report = report_of(publish(folder, message="Better card"))
    assert report["added"] == ["README.md"]
    assert hub.requests(PUT) == []
    assert commits(hub)[0] == "Better card"
    assert_holds(hub, folder)


def test_multipart_upload(hub, folder, publish):
    hub.multipart_size = 250_000
    process = publish(folder)
    report_of(process)
    assert len(hub.requests(r"^PUT /lfs/[0-9a-f]{64}/\d+")) == 6, "three parts for each of two files"
    assert_holds(hub, folder)


def test_signatures_of_addresses_are_not_printed(hub, folder, publish):
    hub.multipart_size = 250_000
    hub.fail(PUT, status=403, times=99, body="<Error><Code>AccessDenied</Code></Error>")
    process = publish(folder)
    line = assert_one_line(process, "the token may not do this (403")
    assert hub.cdn_url in line, "it names the address"
    assert "X-Amz" not in process.stderr
    assert "secret" not in process.stderr


def test_an_answer_that_drips_has_an_end(hub, folder, publish, monkeypatch):
    monkeypatch.setattr(hub_access, "SILENCE", 0.5)
    hub.fail("GET /api/", "drip", times=99, seconds=0.01)
    begin = time.monotonic()
    assert_one_line(publish(folder), "no connection to the Hub (the answer comes at less than 1000 bytes per second)")
    assert time.monotonic() - begin < 20


def test_stale_shards_and_code_are_removed_other_files_kept(hub, folder, publish):
    report_of(publish(folder))
    hub.add_text(hub.repos[REPO], "assets/photo.txt", "somebody's picture")
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "modeling_x.py").rename(folder / "modeling_y.py")
    report = report_of(publish(folder))
    assert report["deleted"] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "modeling_x.py",
    ]
    assert report["kept"] == ["assets/photo.txt"]
    assert "assets/photo.txt" in hub.files(REPO)
    assert not hub.requests(PUT)[2:], "the renamed shard is not sent again"


def test_private_repository(hub, folder, publish):
    report_of(publish(folder, private=True))
    assert hub.repos[REPO].private


def test_private_is_refused_for_a_public_repository(hub, folder, publish):
    hub.create_repo(REPO)
    assert_one_line(publish(folder, private=True), "is public")
    assert commits(hub) == ["initial commit"]


def test_branch_is_made_and_committed_to(hub, folder, publish):
    report_of(publish(folder, revision="dev"))
    assert_holds(hub, folder, "dev")
    assert commits(hub) == ["initial commit"]


def test_tag_named_as_branch_is_refused(hub, folder, publish):
    report_of(publish(folder, tag="v1"))
    assert_one_line(publish(folder, revision="v1"), "is a tag")


def test_pull_request_once(hub, folder, publish):
    hub.create_repo(REPO)
    first = report_of(publish(folder, create_pr=True))
    assert first["revision"] == "refs/pr/1"
    assert first["pull_request"].endswith("/user/model/discussions/1")
    assert_holds(hub, folder, "refs/pr/1")
    assert commits(hub) == ["initial commit"]
    second = report_of(publish(folder, create_pr=True))
    assert second["revision"] == "refs/pr/1"
    assert list(hub.repos[REPO].pulls) == [1]


def test_dry_run_sends_nothing(hub, folder, publish):
    report = report_of(publish(folder, dry_run=True))
    assert report["commit"] is None
    assert sorted(report["added"]) == sorted(local_files(folder))
    hub.create_repo(REPO)
    hub.log.clear()
    assert len(report_of(publish(folder, dry_run=True, tag="v1", revision="dev"))["added"]) == 5
    assert {request.method for request in hub.log} == {"GET"}


def test_pinned_revision_must_exist_afterwards(hub, folder, publish):
    """What the card's snippets load: the tag to set, or what the Hub has already."""
    assert_one_line(publish(folder, pinned="v1.0"), "load revision 'v1.0'", "publish with --tag v1.0")
    assert hub.repos == {}
    report_of(publish(folder, pinned="v1.0", tag="v1.0"))
    report_of(publish(folder, pinned="v1.0"))


def test_tag_elsewhere_is_refused_before_anything_is_sent(hub, folder, publish):
    report_of(publish(folder, tag="v1.0"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nchanged\n")
    hub.log.clear()
    assert_one_line(publish(folder, tag="v1.0"), "tag 'v1.0' already points to", "hf repos tag delete")
    assert {request.method for request in hub.log} == {"GET"}


def test_stored_blob_is_not_sent_again_under_another_name(hub, folder, publish):
    report_of(publish(folder))
    hub.log.clear()
    report_of(publish(folder, repo_id="user/copy"))
    assert hub.requests(PUT) == []
    assert_holds(hub, folder, repo_id="user/copy")


# Refusals: one line each, nothing on the Hub.


def test_no_token(hub, folder, publish):
    assert_one_line(publish(folder, token=None), "no token", "hf auth login")
    assert hub.repos == {}


def test_401_wrong_token(hub, folder, publish):
    wrong = "hf_" + "z" * 34
    process = publish(folder, token=wrong)
    assert_one_line(process, "refuses the token (401", "hf auth login")
    assert wrong not in process.stderr + process.stdout
    assert hub.repos == {}


def test_403_read_token(hub, folder, publish):
    process = publish(folder, repo_id="reader/model", token=hub.reader)
    assert_one_line(process, "(403", "write access to 'reader'")
    assert hub.reader not in process.stderr
    assert hub.repos == {}


def test_403_foreign_namespace(hub, folder, publish):
    assert_one_line(publish(folder, repo_id="stranger/model"), "(403", "'stranger'")


def test_403_on_commit_leaves_nothing_behind(hub, folder, publish):
    hub.create_repo(REPO)
    hub.fail(COMMIT, status=403, times=9, body='{"error": "Forbidden: quota exceeded"}')
    assert_one_line(publish(folder), "uploading failed", "(403, Forbidden: quota exceeded)")
    assert commits(hub) == ["initial commit"]


def test_404_while_uploading(hub, folder, publish):
    hub.fail(r"/preupload/", status=404, times=9, headers={"X-Error-Code": "RepoNotFound"})
    assert_one_line(publish(folder), "no such repository, or it is private (404)", "check the name")


def test_409_when_the_repository_exists(hub, folder, publish):
    hub.create_repo(REPO)
    hub.fail(r"GET /api/models/user/model$", status=404, headers={"X-Error-Code": "RepoNotFound"})
    report_of(publish(folder))
    assert hub.requests("POST /api/repos/create")[0].status == 409
    assert_holds(hub, folder)


def test_409_on_commit(hub, folder, publish):
    hub.fail(COMMIT, status=409, times=9, body='{"error": "another push is in progress"}')
    assert_one_line(publish(folder), "conflict (409, another push is in progress)", "run the same command again")
    assert commits(hub) == ["initial commit"]


def test_409_on_a_tag_that_somebody_set_meanwhile(hub, folder, publish):
    def tag_elsewhere(server):
        repo = server.repos[REPO]
        repo.tags["v1.0"] = repo.history()[-1].sha

    hub.fail("POST /api/models/user/model/tag/", "call", function=tag_elsewhere)
    assert_one_line(publish(folder, tag="v1.0"), "tag 'v1.0' already points to")
    assert_holds(hub, folder)


# Races.


def test_412_is_repeated_when_the_other_commit_leaves_our_files_alone(hub, folder, publish):
    hub.create_repo(REPO)
    hub.fail(COMMIT, "call", function=lambda server: server.add_text(server.repos[REPO], "notes.txt", "theirs"))
    report = report_of(publish(folder))
    assert commits(hub) == ["Upload model", "edit", "initial commit"]
    assert report["kept"] == ["notes.txt"]
    assert hub.files(REPO)["notes.txt"] == hashlib.sha256(b"theirs").hexdigest()


def test_412_stops_when_the_other_commit_touches_our_files(hub, folder, publish):
    hub.create_repo(REPO)
    card = "---\nlicense: mit\n---\ntheirs\n"
    hub.fail(COMMIT, "call", function=lambda server: server.add_text(server.repos[REPO], "README.md", card))
    assert_one_line(publish(folder), "somebody else has changed README.md", "run the same command again")
    assert commits(hub) == ["edit", "initial commit"]
    report_of(publish(folder))
    assert_holds(hub, folder)


def test_412_stops_when_the_other_commit_deletes_one_of_our_files(hub, folder, publish):
    report_of(publish(folder))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nours\n")
    hub.fail(
        COMMIT,
        "call",
        function=lambda server: server.commit(server.repos[REPO], "main", {}, ("README.md",), "theirs", "somebody"),
    )
    assert_one_line(publish(folder), "somebody else has changed README.md", "run the same command again")
    assert commits(hub) == ["theirs", "Upload model", "initial commit"]


# Trouble that passes.


@pytest.mark.parametrize(
    ("pattern", "status"),
    [
        ("GET /api/whoami-v2", 503),
        ("POST /api/repos/create", 500),
        ("GET /api/models/user/model/revision/main", 429),
        (COMMIT, 500),
        (COMMIT, 502),
        (COMMIT, 504),
        ("POST /api/models/user/model/tag/", 503),
    ],
)
def test_passing_trouble_is_outlasted(hub, folder, publish, pattern, status):
    fault = hub.fail(pattern, status=status, times=2)
    report_of(publish(folder, tag="v1.0"))
    assert fault.hits >= 3
    assert_holds(hub, folder)
    assert commits(hub) == ["Upload model", "initial commit"]
    assert "v1.0" in hub.repos[REPO].tags


@pytest.mark.parametrize("pattern", ["/preupload/", "/lfs/objects/batch", PUT, "POST /lfs/.*/verify"])
def test_passing_trouble_that_the_client_outlasts_itself(hub, folder, publish, pattern):
    hub.fail(pattern, status=503)
    report_of(publish(folder))
    assert_holds(hub, folder)


def test_retry_after_is_honoured(hub, folder, publish):
    hub.fail(COMMIT, status=429, headers={"Retry-After": "2"})
    process = publish(folder)
    report_of(process)
    assert "note: uploading: 429, attempt 2 of 4 in 2.0 s" in process.stderr
    assert_holds(hub, folder)


@pytest.mark.parametrize("pattern", ["GET /api/whoami-v2", "/preupload/", "/lfs/objects/batch", PUT, COMMIT])
@pytest.mark.parametrize("headers", [{"Retry-After": "100000"}, {"ratelimit": '"api";r=0;t=100000'}], ids=str)
def test_a_pause_of_hours_is_not_made(hub, folder, publish, pattern, headers):
    """Also where the client itself repeats a request, and obeys whatever it is told."""
    hub.fail(pattern, status=429, headers=headers, times=99)
    assert_one_line(publish(folder, patient=True), "the Hub asks to wait for 100000 s")
    assert REPO not in hub.repos or commits(hub) == ["initial commit"]


@pytest.mark.parametrize("pattern", ["GET /api/models/user/model", COMMIT])
def test_a_hub_that_stalls_ends_in_bounded_time(hub, folder, publish, pattern, monkeypatch):
    monkeypatch.setattr(hub_access, "SILENCE", 0.2)
    hub.fail(pattern, "stall", times=99, seconds=5)
    started = time.monotonic()
    assert_one_line(publish(folder, patient=True), "no connection to the Hub", "run the same command again")
    assert time.monotonic() - started < 5


def test_lasting_trouble_is_one_line(hub, folder, publish):
    hub.fail(COMMIT, status=500, times=99, body='{"error": "Internal Error"}')
    line = assert_one_line(publish(folder), "the Hub is in trouble (500, Internal Error)")
    assert "run the same command again" in line
    assert commits(hub) == ["initial commit"]


def test_connection_cut_in_the_middle_of_a_shard(hub, folder, publish):
    hub.fail(PUT, "cut", at=300_000)
    report_of(publish(folder))
    assert any(request.status == 0 for request in hub.requests(PUT))
    assert_holds(hub, folder)


def test_connection_cut_in_the_middle_of_every_shard_unwraps_the_cause(hub, folder, publish):
    hub.fail(PUT, "cut", at=300_000, times=999)
    before = local_files(folder)
    line = assert_one_line(publish(folder), "no connection to the Hub", "what is there already is not sent again")
    assert "Error while uploading" not in line, "the client's wrapper is not the reason"
    assert commits(hub) == ["initial commit"]
    assert local_files(folder) == before
    hub.faults.clear()
    report_of(publish(folder))
    assert_holds(hub, folder)


def test_commit_applied_but_answer_lost(hub, folder, publish):
    hub.fail(COMMIT, "swallow")
    report = report_of(publish(folder, tag="v1.0"))
    assert commits(hub) == ["Upload model", "initial commit"], "not committed twice"
    assert hub.repos[REPO].tags["v1.0"] == report["commit"]


def test_pull_request_opened_but_answer_lost(hub, folder, publish):
    hub.create_repo(REPO)
    hub.fail(COMMIT, "swallow")
    report = report_of(publish(folder, create_pr=True))
    assert list(hub.repos[REPO].pulls) == [1], "not opened twice"
    assert report["revision"] == "refs/pr/1"


def test_tag_set_but_answer_lost(hub, folder, publish):
    hub.fail("POST /api/models/user/model/tag/", "swallow")
    report = report_of(publish(folder, tag="v1.0"))
    assert hub.repos[REPO].tags == {"v1.0": report["commit"]}


def test_repository_made_but_answer_lost(hub, folder, publish):
    hub.fail("POST /api/repos/create", "swallow")
    report_of(publish(folder))
    assert_holds(hub, folder)


# What the Hub holds is not what was sent.


@pytest.mark.parametrize("path", ["config.json", r"model-00002-of-00002\.safetensors"])
def test_hash_mismatch_once_is_repaired(hub, folder, publish, path):
    hub.fail(COMMIT, "tamper", path=path)
    report = report_of(publish(folder, tag="v1.0"))
    assert_holds(hub, folder)
    assert hub.repos[REPO].tags["v1.0"] == report["commit"]


@pytest.mark.parametrize("path", ["modeling_x.py", r"model-00001-of-00002\.safetensors"])
def test_hash_mismatch_that_stays_is_one_line_and_no_tag(hub, folder, publish, path):
    hub.fail(COMMIT, "tamper", path=path, times=99)
    line = assert_one_line(publish(folder, tag="v1.0"), "does not hold the local bytes of", "no tag was set")
    assert path.replace("\\", "") in line
    assert hub.repos[REPO].tags == {}


def test_code_that_is_served_differently_is_found(hub, folder, publish):
    """Listing and hashes agree, yet a download gives other code."""
    fault = hub.fail(r"GET /user/model/resolve/.*/modeling_x\.py", status=200, times=99, body="x = 2\n")
    fault.headers = {"X-Repo-Commit": "0" * 40, "ETag": '"served"'}
    assert_one_line(publish(folder, tag="v1.0"), "modeling_x.py", "no tag was set")


def test_file_changed_while_uploading_is_found(hub, folder, publish):
    def change(_):
        (folder / "config.json").write_text('{"changed": true}\n')

    hub.fail("/preupload/", "call", function=change, times=1)
    assert_one_line(publish(folder, tag="v1.0"), "config.json", "nothing writes to the folder")
    assert hub.repos[REPO].tags == {}


# The process dies.


def start(hub, tmp_path, folder) -> subprocess.Popen:
    """A process of its own that publishes."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.hub_cards.publishing", str(folder)],
        env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_killed_half_way_and_resumed(hub, tmp_path, folder, publish):
    """SIGKILL when one shard is stored and the other is not: the second run sends the other one only."""
    stalled = hub.fail(PUT, "stall", after=1, seconds=600)
    process = start(hub, tmp_path, folder)
    wait_for(lambda: any(r.status == 200 for r in hub.requests(PUT)) and stalled.hits >= 2)
    process.kill()
    process.wait()
    assert commits(hub) == ["initial commit"], "no half of a revision"
    hub.faults.clear()
    hub.log.clear()
    report_of(publish(folder))
    assert len(hub.requests(PUT)) == 1
    assert_holds(hub, folder)


def test_offline_mode_is_named(hub, folder, publish):
    process = publish(folder, variables={"HF_HUB_OFFLINE": "1"})
    assert_one_line(process, "HF_HUB_OFFLINE is set")


def test_no_server(hub, folder, publish):
    process = publish(folder, variables={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert_one_line(process, "no connection to the Hub")


@pytest.mark.parametrize("options", [{"tag": "bad tag"}, {"tag": "-x"}, {"revision": "a..b"}, {"revision": "x.lock"}])
def test_tags_and_branches_are_checked(hub, folder, publish, options):
    assert_one_line(publish(folder, **options), "cannot name a tag or a branch")
    assert hub.log == []


@pytest.mark.parametrize("name", ["model", "user/", "user/a/b", "user/a--b", "user/.git", "user/with space"])
def test_repository_names_are_checked(hub, folder, publish, name):
    assert_one_line(publish(folder, repo_id=name), "is no repository name")
    assert hub.log == []
