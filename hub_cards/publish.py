"""Publishes Hub folders: preflight, one commit that resumes, a check of what the Hub then holds, a tag, a collection.

The traffic itself is in `transfer`, which runs as a process of its own (see there).
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from delta_llava.errors import UserError
from delta_llava.manifest import as_json
from delta_llava.redaction import holds_secret
from delta_llava.transfer import MAIN, PULL_REQUEST, Report, Request
from modeling_delta_llava.hub_cards.metadata import check_reference, check_repository
from modeling_delta_llava.hub_cards.preflight import Preflight, preflight

COLLECTION_TITLE = "Delta-LLaVA"
HOUR = 3600.0


@dataclass(frozen=True)
class PublishOptions:
    """How to publish. Times in seconds.

    Attributes:
        private: create the repository as a private one.
        revision: branch to commit to; made if need be. "refs/pr/N" adds to a pull request.
        tag: set on the published commit once it has been checked.
        create_pr: open a pull request instead of committing.
        collection: title or slug of a collection to put the repository into.
        message: commit message.
        licence: licence identifier, for a card that states none.
        exclude: patterns of paths to leave out.
        dry_run: check everything, send nothing.
        load: load the folder in a fresh process before publishing.
        time_limit: for each folder, of all that follows the preflight.
        attempts: of each request to the Hub.
        retry_wait: before the second attempt; doubles with each one.
    """

    private: bool = False
    revision: str = MAIN
    tag: str | None = None
    create_pr: bool = False
    collection: str | None = None
    message: str | None = None
    licence: str | None = None
    exclude: Sequence[str] = field(default_factory=tuple)
    dry_run: bool = False
    load: bool = True
    time_limit: float = 12 * HOUR
    attempts: int = 4
    retry_wait: float = 2.0


def run_worker(order: dict, time_limit: float, say: Callable[[str], None]) -> dict:
    """Runs `transfer` on an order and returns its last event.

    Args:
        order: `{"request": ...}`, with "collection" and "repo_ids" to gather repositories instead.
        time_limit: seconds after which the process is ended.
        say: receives its notes.

    Raises:
        UserError: the worker's own line, or that it was ended or died.
    """
    repo_id = order["request"]["repo_id"]
    worker = subprocess.Popen(
        [sys.executable, "-m", "delta_llava.transfer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    expired = threading.Event()

    def end() -> None:
        expired.set()
        worker.kill()

    timer = threading.Timer(time_limit, end)
    timer.daemon = True
    timer.start()
    event: dict = {}
    try:
        # Standard input stays open: its end tells the worker that this process has gone.
        worker.stdin.write(json.dumps(order) + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            event = json.loads(line)
            if event["event"] == "note":
                say(event["text"])
        worker.wait()
    except BrokenPipeError:
        worker.wait()
    finally:
        timer.cancel()
        if worker.poll() is None:
            worker.kill()
            worker.wait()
        worker.stdin.close()
        worker.stdout.close()
    if event.get("event") == "error":
        raise UserError(event["line"])
    if worker.returncode != 0:
        print(file=sys.stderr)  # it died in the middle of a progress bar
    if expired.is_set():
        raise UserError(
            f"{repo_id}: not done within {time_limit:.0f} s: run the same command again, with a longer --time-limit; "
            "what the Hub holds is not resent"
        )
    if event.get("event") not in ("report", "collection"):
        raise UserError(
            f"{repo_id}: the uploading process ended with status {worker.returncode}: run the same command again; "
            "what the Hub holds is not resent"
        )
    return event


def check_options(repo_id: str, options: PublishOptions) -> None:
    """Raises `UserError` for a repository name or options that cannot work."""
    check_repository(repo_id)
    if holds_secret(f"{options.message} {options.collection}"):
        raise UserError("--message or --collection holds a token or a password: everybody could read it on the Hub")
    for name in (options.revision, *([] if options.tag is None else [options.tag])):
        check_reference(name)
    if options.create_pr and options.tag:
        raise UserError("--tag and --create-pr do not go together: set the tag once the pull request is merged")
    if options.create_pr and options.revision != MAIN:
        raise UserError("--create-pr opens a pull request against main: leave out --revision")
    if options.tag and options.revision.startswith(PULL_REQUEST):
        raise UserError("--tag and a pull request do not go together: set the tag once it is merged")
    if options.time_limit <= 0 or options.attempts < 1 or options.retry_wait < 0:
        raise UserError("--time-limit and --attempts must be positive")


def _request(checked: Preflight, repo_id: str, options: PublishOptions) -> Request:
    return Request(
        folder=str(checked.folder.resolve()),
        repo_id=repo_id,
        files=as_json(checked.files),
        private=options.private,
        revision=options.revision,
        tag=options.tag,
        create_pr=options.create_pr,
        message=options.message or f"Upload {repo_id.split('/')[1]}",
        pinned=list(checked.pinned),
        dry_run=options.dry_run,
        attempts=options.attempts,
        retry_wait=options.retry_wait,
    )


def publish_checked(
    checked: Preflight, repo_id: str, options: PublishOptions, say: Callable[[str], None] = lambda text: None
) -> Report:
    """Publishes a folder that has passed the preflight. Raises `UserError`."""
    request = asdict(_request(checked, repo_id, options))
    event = run_worker({"request": request}, options.time_limit, say)
    del event["event"]
    return Report(**event)


def gather(
    repo_ids: Sequence[str], collection: str, options: PublishOptions, say: Callable[[str], None] = lambda text: None
) -> str:
    """Puts repositories of one namespace into a collection; its address. Raises `UserError`."""
    request = asdict(Request(folder="", repo_id=repo_ids[0], attempts=options.attempts, retry_wait=options.retry_wait))
    order = {"request": request, "collection": collection, "repo_ids": list(repo_ids)}
    return run_worker(order, options.time_limit, say)["url"]


def publish(
    folder: Path, repo_id: str, options: PublishOptions | None = None, say: Callable[[str], None] = lambda text: None
) -> Report:
    """Publishes one folder as one repository.

    Args:
        folder: a Hub folder, as `delta-llava convert` or training writes it, with a card.
        repo_id: namespace/name.
        options: see [`PublishOptions`].
        say: receives a line about each step.

    Returns:
        What was sent, and the commit that holds exactly the folder's files.

    Raises:
        UserError: one line: what is wrong, where, and what to do next. The Hub then shows no half of a revision, and
            the same call can be repeated.
    """
    options = options or PublishOptions()
    check_options(repo_id, options)
    checked = preflight(folder, repo_id, options.licence, options.exclude, options.load, options.time_limit, say)
    report = publish_checked(checked, repo_id, options, say)
    if options.collection and not options.dry_run:
        say(f"in collection {gather([repo_id], options.collection, options, say)}")
    return report


def publish_all(
    folder: Path,
    namespace: str,
    options: PublishOptions | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Report]:
    """Publishes every Hub folder inside `folder` as namespace/NAME-OF-THE-FOLDER and gathers them in a collection.

    All folders pass the preflight before the first is sent. Names with a leading underscore are left out, such as
    `_base` of a finetuning run.

    Raises:
        UserError: as [`publish`]; also when there is no Hub folder inside.
    """
    options = options or PublishOptions()
    folder = Path(folder)
    folders = sorted(file.parent for file in folder.glob("[!_]*/config.json"))
    if not folders:
        raise UserError(f"{folder} holds no Hub folders (no folder with a config.json and a name without leading _)")
    repo_ids = [f"{namespace}/{entry.name}" for entry in folders]
    for repo_id in repo_ids:
        check_options(repo_id, options)
    checked = []
    for entry, repo_id in zip(folders, repo_ids, strict=True):
        say(f"checking {entry.name}")
        checked.append(
            preflight(entry, repo_id, options.licence, options.exclude, options.load, options.time_limit, say)
        )
    reports = []
    for entry, repo_id in zip(checked, repo_ids, strict=True):
        reports.append(publish_checked(entry, repo_id, options, say))
        say(describe(reports[-1], options.dry_run))
    if not options.dry_run:
        say(f"in collection {gather(repo_ids, options.collection or COLLECTION_TITLE, options, say)}")
    return reports


def describe(report: Report, dry_run: bool = False) -> str:
    """A report in one line."""
    if dry_run:
        state = "does not exist yet" if report.commit is None else f"is at {report.commit[:8]}"
        return (
            f"dry run: {report.url} ({report.revision}) {state}; would add {len(report.added)} files, "
            f"{report.size / 1e9:.3f} GB, and delete {len(report.deleted)}"
        )
    where = report.pull_request or f"{report.url}/tree/{report.tag or report.revision}"
    if not report.added and not report.deleted:
        return f"nothing to upload: {where} holds these files already (commit {report.commit[:8]})"
    rate = report.size / 1e6 / report.seconds if report.seconds else 0.0
    return (
        f"published {where} (commit {report.commit[:8]}): {len(report.added)} files, {report.size / 1e9:.3f} GB in "
        f"{report.seconds:.1f} s, {rate:.0f} MB/s; checked on the Hub"
    )


def timed(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` with the seconds since now in front."""
    started = time.monotonic()
    return lambda text: say(f"[{time.monotonic() - started:6.1f} s] {text}")
