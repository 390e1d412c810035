"""The part of publishing that talks to the Hub, run as a process of its own.

`publish` starts `python -m delta_llava.transfer`, writes a `Request` as one line of JSON to its
standard input and reads events, one line of JSON each, from its standard output. A process of its own can be ended at
a time limit, which huggingface_hub's blocking calls cannot; when the starting process dies, standard input closes and
this one ends too. Everything happens in one commit, so that a revision on the Hub is either whole or absent.
"""

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.utils import logging as hub_logging

from delta_llava.errors import UserError
from delta_llava.hub_errors import is_transient, one_line, retry_after, status_of
from delta_llava.manifest import Difference, FileHash, compare, from_json
from delta_llava.redaction import ScrubbedRecords, scrub

MAIN = "main"
PULL_REQUEST = "refs/pr/"
MAX_WAIT = 60.0


@dataclass(frozen=True)
class Request:
    """What to publish and how; times in seconds. `pinned` are the revisions that the card's snippets load."""

    folder: str
    repo_id: str
    files: list[dict[str, Any]] = field(default_factory=list)
    private: bool = False
    revision: str = MAIN
    tag: str | None = None
    create_pr: bool = False
    message: str = "Upload Delta-LLaVA"
    pinned: list[str] = field(default_factory=list)
    dry_run: bool = False
    attempts: int = 4
    retry_wait: float = 2.0


@dataclass(frozen=True)
class Report:
    """What came of it: `commit` holds exactly the local files, besides `kept` ones that only the Hub has."""

    url: str
    revision: str
    commit: str | None
    added: list[str]
    deleted: list[str]
    kept: list[str]
    size: int
    seconds: float
    pull_request: str | None = None
    tag: str | None = None


class Transfer:
    """One publication. `say` receives one-line notes on what is being done."""

    def __init__(self, request: Request, say: Callable[[str], None]):
        self.request, self.say = request, say
        self.repo_id = request.repo_id
        self.files = from_json(request.files)
        self.api = HfApi(library_name="delta-llava", library_version=version("delta-llava"))

    def wait(self, error: Exception, doing: str, attempt: int) -> None:
        """Sleeps before the next attempt, or raises a `UserError` when there is none or it would not help."""
        if attempt >= self.request.attempts or not is_transient(error):
            raise UserError(one_line(error, doing, self.repo_id)) from error
        pause = min(self.request.retry_wait * 2 ** (attempt - 1), MAX_WAIT)
        pause = max(pause, retry_after(error) or 0.0)
        reason = status_of(error) or type(error).__name__
        self.say(f"{doing}: {reason}, attempt {attempt + 1} of {self.request.attempts} in {pause:.1f} s")
        time.sleep(pause)

    def call(self, doing: str, function: Callable[[], Any]) -> Any:
        """Calls `function`, again after transient trouble: for calls that are safe to repeat."""
        for attempt in range(1, self.request.attempts + 1):
            try:
                return function()
            except UserError:
                raise
            except Exception as error:
                self.wait(error, doing, attempt)
        raise AssertionError("the last attempt returns or raises")

    # Looking at the Hub.

    def remote(self, revision: str) -> tuple[str, list[FileHash]]:
        """Commit and files of a revision."""
        info = self.call(
            f"listing {revision}",
            lambda: self.api.model_info(self.repo_id, revision=revision, files_metadata=True),
        )
        files = [
            FileHash(
                sibling.rfilename,
                sibling.size or 0,
                oid="" if sibling.lfs else sibling.blob_id or "",
                sha256=sibling.lfs.sha256 if sibling.lfs else "",
            )
            for sibling in info.siblings or []
        ]
        return info.sha, files

    def exists(self) -> bool:
        def ask() -> bool:
            try:
                info = self.api.model_info(self.repo_id)
            except Exception as error:
                if status_of(error) == 404:
                    return False
                raise
            if self.request.private and not info.private:
                raise UserError(
                    f"{self.repo_id}: the repository exists and is public: make it private in its settings first, "
                    "or leave out --private"
                )
            return True

        return self.call("looking for the repository", ask)

    def check_tag(self, head: str, difference: Difference) -> bool:
        """Whether the tag is there already, on this very content. Raises when it points anywhere else."""
        tag = self.request.tag
        refs = self.call("listing tags", lambda: self.api.list_repo_refs(self.repo_id))
        target = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if target is None:
            return False
        if target == head and difference.empty:
            return True
        raise UserError(
            f"{self.repo_id}: tag {tag!r} already points to commit {target[:8]}, not to what would be published: "
            f"choose another tag, or remove it with `hf repos tag delete {self.repo_id} {tag}`"
        )

    def check_pinned(self) -> None:
        """Makes sure that the revisions which the card tells readers to load will exist."""
        request = self.request
        missing = [name for name in request.pinned if name not in (MAIN, request.tag, request.revision)]
        if not missing or request.create_pr:
            return
        known: list[str] = []
        if self.exists():
            refs = self.call("listing tags", lambda: self.api.list_repo_refs(self.repo_id))
            known = [ref.name for ref in (*refs.tags, *refs.branches)]
        for name in missing:
            if name not in known:
                raise UserError(
                    f"{self.repo_id}: the snippets in README.md load revision {name!r}, which would not exist: "
                    f"publish with --tag {name}, or write the card with another --revision"
                )

    def matching_pull_request(self) -> tuple[str, str] | None:
        """Reference and commit of an open pull request that already holds exactly the local files."""
        opened = self.call(
            "listing pull requests",
            lambda: list(
                self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
            ),
        )
        for discussion in opened:
            reference = f"{PULL_REQUEST}{discussion.num}"
            sha, files = self.remote(reference)
            if compare(self.files, files).empty:
                return reference, sha
        return None

    # Changing it.

    def prepare(self) -> bool:
        """Makes sure that the repository and the branch exist. False in a dry run when they do not."""
        request = self.request
        if not self.exists():
            if request.dry_run:
                return False
            self.call(
                "creating the repository",
                lambda: self.api.create_repo(self.repo_id, private=request.private, exist_ok=True),
            )
            self.say(f"created {'private ' if request.private else ''}repository {self.repo_id}")
        if request.revision == MAIN or request.revision.startswith(PULL_REQUEST):
            return True
        refs = self.call("listing branches", lambda: self.api.list_repo_refs(self.repo_id))
        if any(ref.name == request.revision for ref in refs.tags):
            raise UserError(f"{self.repo_id}: --revision {request.revision!r} is a tag: name a branch to commit to")
        if not any(ref.name == request.revision for ref in refs.branches):
            if request.dry_run:
                return False
            self.call(
                "creating the branch",
                lambda: self.api.create_branch(self.repo_id, branch=request.revision, exist_ok=True),
            )
        return True

    def commit(self, difference: Difference, head: str) -> tuple[str, str, str | None]:
        """Commits the difference on top of `head`; reference, commit and address of the pull request.

        An attempt whose answer was lost may have been applied: the Hub is looked at before the next one. When
        somebody else commits meanwhile, the attempt is repeated on their commit as long as it leaves our files alone.
        """
        request = self.request
        for attempt in range(1, request.attempts + 1):
            operations = [CommitOperationDelete(path_in_repo=path) for path in difference.delete]
            operations += [CommitOperationAdd(file.path, Path(request.folder) / file.path) for file in difference.add]
            try:
                info = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=request.message,
                    revision=request.revision,
                    create_pr=request.create_pr,
                    parent_commit=head,
                )
            except Exception as error:
                if status_of(error) == 412 and attempt < request.attempts:
                    head = self.rebase(head, difference)
                    continue
                self.wait(error, "uploading", attempt)
                if request.create_pr:
                    found = self.matching_pull_request()
                    if found:
                        return *found, self.pull_request_url(found[0])
                else:
                    now, files = self.remote(request.revision)
                    difference = compare(self.files, files)
                    if difference.empty:
                        return request.revision, now, None
                    if now != head:
                        head = self.rebase(head, difference)
                continue
            return (info.pr_revision or request.revision), info.oid, info.pr_url and scrub(info.pr_url)
        raise AssertionError("the last attempt returns or raises")

    def rebase(self, old: str, difference: Difference) -> str:
        """The present head, if nothing that we are about to change has changed since `old`."""
        ours = {file.path for file in difference.add} | set(difference.delete)
        _, before = self.remote(old)
        now, after = self.remote(self.request.revision)
        was = {file.path: file for file in before}
        changed = {file.path for file in after if was.get(file.path) != file} | (was.keys() - {f.path for f in after})
        clash = sorted(changed & ours)
        if clash:
            raise UserError(
                f"{self.repo_id}: somebody else has changed {', '.join(clash[:3])} in commit {now[:8]} meanwhile: "
                "look at it, then run the same command again to publish over it"
            )
        self.say(f"somebody else has committed ({now[:8]}), not touching these files: going on top of it")
        return now

    def pull_request_url(self, reference: str) -> str:
        return scrub(f"{self.api.endpoint}/{self.repo_id}/discussions/{reference.removeprefix(PULL_REQUEST)}")

    def verify(self, commit: str) -> Difference:
        """What the Hub holds at `commit` against the local files: names, sizes, hashes, and the code byte by byte."""
        difference = compare(self.files, self.remote(commit)[1])
        if not difference.empty:
            return difference
        code = [file for file in self.files if file.path.endswith(".py")]
        with tempfile.TemporaryDirectory() as scratch:
            for file in code:
                served = self.call(
                    f"reading back {file.path}",
                    lambda path=file.path: hf_hub_download(
                        self.repo_id, path, revision=commit, local_dir=scratch, endpoint=self.api.endpoint
                    ),
                )
                if Path(served).read_bytes() != (Path(self.request.folder) / file.path).read_bytes():
                    return Difference((file,), (), difference.kept)
        return difference

    def set_tag(self, commit: str) -> None:
        tag = self.request.tag

        def create() -> None:
            try:
                self.api.create_tag(self.repo_id, tag=tag, revision=commit)
            except Exception as error:
                if status_of(error) != 409:
                    raise
                # Ours, with its answer lost, or somebody else's.
                self.check_tag(commit, Difference((), (), ()))

        self.call(f"setting tag {tag}", create)

    def run(self) -> Report:
        request = self.request
        started = time.monotonic()
        name = self.call("checking the token", self.api.whoami).get("name")
        self.say(f"publishing as {name}")
        url = scrub(f"{self.api.endpoint}/{self.repo_id}")
        self.check_pinned()
        if not self.prepare():
            size = sum(file.size for file in self.files)
            paths = [file.path for file in self.files]
            return Report(url, request.revision, None, paths, [], [], size, 0.0)
        head, files = self.remote(request.revision)
        difference = compare(self.files, files)
        planned = difference
        tagged = self.check_tag(head, difference) if request.tag else False
        if request.dry_run:
            added = [file.path for file in planned.add]
            return Report(
                url, request.revision, head, added, list(planned.delete), list(planned.kept), planned.size, 0.0
            )
        reference, commit, pull_url = request.revision, head, None
        if not difference.empty and request.create_pr:
            found = self.matching_pull_request()
            if found:
                reference, commit = found
                pull_url, difference = self.pull_request_url(reference), Difference((), (), planned.kept)
                planned = difference
        if not difference.empty:
            self.say(f"uploading {len(difference.add)} files, {difference.size / 1e9:.3f} GB, in one commit")
            reference, commit, pull_url = self.commit(difference, head)
        wrong = self.verify(commit)
        if not wrong.empty and reference == request.revision:
            names = ", ".join([file.path for file in wrong.add][:3] + list(wrong.delete)[:3])
            self.say(f"the Hub holds other bytes for {names}: uploading them once more")
            _, commit, _ = self.commit(wrong, self.remote(reference)[0])
            wrong = self.verify(commit)
        if not wrong.empty:
            names = ", ".join([file.path for file in wrong.add][:3] + list(wrong.delete)[:3])
            raise UserError(
                f"{self.repo_id}: commit {commit[:8]} does not hold the local bytes of {names}: no tag was set; check "
                "that nothing writes to the folder, then run the same command again"
            )
        if request.tag and not tagged:
            self.set_tag(commit)
        return Report(
            url,
            reference,
            commit,
            [file.path for file in planned.add],
            list(planned.delete),
            list(wrong.kept),
            planned.size,
            time.monotonic() - started,
            pull_url,
            request.tag,
        )


def add_to_collection(api: HfApi, name: str, namespace: str, repo_ids: list[str], call: Callable) -> str:
    """Puts repositories into a collection, made if need be; its slug.

    Args:
        name: title of a collection of `namespace`, or a slug ("namespace/title-0123...").
        call: `Transfer.call`.
    """
    slug = name if "/" in name else None
    if slug is None:
        owned = call("listing collections", lambda: list(api.list_collections(owner=namespace)))
        slug = next((collection.slug for collection in owned if collection.title == name), None)
    if slug is None:
        made = call(
            "creating the collection", lambda: api.create_collection(name, namespace=namespace, exists_ok=True)
        )
        slug = made.slug
    for repo_id in repo_ids:
        call(
            "adding to the collection",
            lambda item=repo_id: api.add_collection_item(slug, item, item_type="model", exists_ok=True),
        )
    return slug


def _end_with_parent(stream: TextIO) -> None:
    """Ends this process when the one that started it has gone."""
    stream.read()
    os._exit(1)


def main() -> int:
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing but events goes to standard output

    def emit(event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), file=events, flush=True)

    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()
    hub_logging.get_logger()
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(ScrubbedRecords())
    request = Request(**order["request"])
    transfer = Transfer(request, lambda text: emit("note", text=scrub(text)))
    try:
        if "collection" in order:
            namespace = request.repo_id.split("/")[0]
            slug = add_to_collection(transfer.api, order["collection"], namespace, order["repo_ids"], transfer.call)
            emit("collection", slug=slug, url=scrub(f"{transfer.api.endpoint}/collections/{slug}"))
        else:
            emit("report", **asdict(transfer.run()))
    except UserError as error:
        emit("error", line=scrub(str(error)))
        return 2
    except Exception as error:
        emit("error", line=one_line(error, "publishing", request.repo_id))
        return 2
    return 0


if __name__ == "__main__":
    # The interpreter would wait for upload threads that are still busy; nothing is left to do for them.
    status = main()
    sys.stderr.flush()
    os._exit(status)
