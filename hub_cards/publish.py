"""Publishes Hub folders: preflight, one commit that resumes, a check of what the Hub then holds, a tag, a collection.

Everything happens in one commit, so that a revision on the Hub is either whole or absent.
"""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    GitRefs,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils import logging as hub_logging

from delta_llava.errors import UserError
from delta_llava.redaction import ScrubbedRecords, holds_secret, scrub
from modeling_delta_llava.hub import ATTEMPTS, HUB_ERRORS, call, hub_api, pause, request_of, status_of
from modeling_delta_llava.hub_cards.contents import Difference, FileHash, compare
from modeling_delta_llava.hub_cards.metadata import check_reference, check_repository
from modeling_delta_llava.hub_cards.preflight import Preflight, preflight, refresh_code

MAIN = "main"
PULL_REQUEST = "refs/pr/"
COLLECTION_TITLE = "Delta-LLaVA"
NAMES_SHOWN = 3
# Folders beside models that are none: hidden ones, `_base` of a finetuning run, its checkpoints.
NO_MODEL = re.compile(r"[._].*|checkpoint-\d+")


@dataclass(frozen=True)
class PublishOptions:
    """How to publish.

    Attributes:
        private: create the repository as a private one.
        revision: branch to commit to; made if need be. "refs/pr/N" adds to a pull request.
        tag: set on the published commit once it has been checked.
        create_pr: open a pull request instead of committing.
        collection: title or slug of a collection to put the repository into.
        message: commit message.
        licence: licence identifier, for a card that states none.
        exclude: patterns of paths to leave out.
        include: paths of files that a model repository does not usually hold.
        refresh_code: first write this package's code into a folder of an earlier release.
        dry_run: check everything, send nothing and write nothing.
        load: load the folder in a fresh process before publishing.
    """

    private: bool = False
    revision: str = MAIN
    tag: str | None = None
    create_pr: bool = False
    collection: str | None = None
    message: str | None = None
    licence: str | None = None
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    refresh_code: bool = False
    dry_run: bool = False
    load: bool = True


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
    seconds: float = 0.0
    pull_request: str | None = None
    tag: str | None = None


class Publication:
    """One folder on its way to one repository. `say` receives one-line notes on what is being done."""

    def __init__(self, checked: Preflight, repo_id: str, options: PublishOptions, say: Callable[[str], None]):
        self.checked, self.repo_id, self.options = checked, repo_id, options
        self.say = lambda text: say(scrub(text))
        self.api = hub_api()

    def call(self, doing, function):
        return call(doing, self.repo_id, function, self.say)

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

    def refs(self) -> GitRefs:
        return self.call("listing branches and tags", lambda: self.api.list_repo_refs(self.repo_id))

    def look(self) -> GitRefs | None:
        """Branches and tags of the repository; None when there is none."""

        def ask() -> GitRefs | None:
            try:
                info = self.api.model_info(self.repo_id)
            except HUB_ERRORS as error:
                if status_of(error) == 404:
                    return None
                raise
            if self.options.private and not info.private:
                raise UserError(
                    f"{self.repo_id}: the repository exists and is public: make it private in its settings first, "
                    "or leave out --private"
                )
            return self.api.list_repo_refs(self.repo_id)

        return self.call("looking for the repository", ask)

    def check_tag(self, refs: GitRefs, head: str, difference: Difference) -> bool:
        """Whether the tag is there already, on this very content. Raises when it points anywhere else."""
        tag = self.options.tag
        target = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if target is None:
            return False
        if target == head and difference.empty:
            return True
        raise UserError(
            f"{self.repo_id}: tag {tag!r} already points to commit {target[:8]}, not to what would be published: "
            f"choose another tag, or remove it with `hf repos tag delete {self.repo_id} {tag}`"
        )

    def check_pinned(self, refs: GitRefs | None) -> None:
        """Makes sure that the revision which the card tells readers to load will exist."""
        name, options = self.checked.pinned, self.options
        there = [ref.name for ref in (*refs.tags, *refs.branches)] if refs else []
        if name not in (None, MAIN, options.tag, options.revision, *there) and not options.create_pr:
            raise UserError(
                f"{self.repo_id}: the snippets in README.md load revision {name!r}, which would not exist: "
                f"publish with --tag {name}, or write the card with another --revision"
            )

    def matching_pull_request(self) -> tuple[str, str] | None:
        """Reference and commit of an open pull request that already holds exactly the local files."""
        filters = {"discussion_type": "pull_request", "discussion_status": "open"}
        opened = self.call(
            "listing pull requests", lambda: list(self.api.get_repo_discussions(self.repo_id, **filters))
        )
        for discussion in opened:
            reference = f"{PULL_REQUEST}{discussion.num}"
            sha, files = self.remote(reference)
            if compare(self.checked.files, files).empty:
                return reference, sha
        return None

    # Changing it.

    def prepare(self, refs: GitRefs | None) -> GitRefs | None:
        """Branches and tags, once the repository and the branch exist. None in a dry run when they do not."""
        options, revision = self.options, self.options.revision
        if refs is None:
            if options.dry_run:
                return None
            self.call(
                "creating the repository",
                lambda: self.api.create_repo(self.repo_id, private=options.private, exist_ok=True),
            )
            self.say(f"created {'private ' if options.private else ''}repository {self.repo_id}")
            refs = self.refs()
        if revision == MAIN or revision.startswith(PULL_REQUEST):
            return refs
        if any(ref.name == revision for ref in refs.tags):
            raise UserError(f"{self.repo_id}: --revision {revision!r} is a tag: name a branch to commit to")
        if not any(ref.name == revision for ref in refs.branches):
            if options.dry_run:
                return None
            self.call(
                "creating the branch",
                lambda: self.api.create_branch(self.repo_id, branch=revision, exist_ok=True),
            )
        return refs

    def commit(self, difference: Difference, head: str) -> tuple[str, str]:
        """Commits the difference on top of `head`; reference and commit.

        An attempt whose answer was lost may have been applied: the Hub is looked at before the next one. When
        somebody else commits meanwhile, the attempt is repeated on their commit as long as it leaves our files alone.
        """
        options = self.options
        for attempt in range(1, ATTEMPTS + 1):
            operations = [CommitOperationDelete(path_in_repo=path) for path in difference.delete]
            operations += [CommitOperationAdd(file.path, self.checked.sources[file.path]) for file in difference.add]
            try:
                info = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=options.message or f"Upload {self.repo_id.split('/')[1]}",
                    revision=options.revision,
                    create_pr=options.create_pr,
                    parent_commit=head,
                )
            except HUB_ERRORS as error:
                if status_of(error) == 412 and attempt < ATTEMPTS:
                    head = self.rebase(head, difference)
                    continue
                # What comes before the commit itself, the client has repeated.
                is_last = "/commit/" not in request_of(error)
                pause(error, "uploading", self.repo_id, ATTEMPTS if is_last else attempt, self.say)
                if options.create_pr:
                    if found := self.matching_pull_request():
                        return found
                    continue
                now, files = self.remote(options.revision)
                difference = compare(self.checked.files, files)
                if difference.empty:
                    return options.revision, now
                if now != head:
                    head = self.rebase(head, difference)
            else:
                return info.pr_revision or options.revision, info.oid
        raise AssertionError("the last attempt returns or raises")

    def rebase(self, old: str, difference: Difference) -> str:
        """The present head, if nothing that we are about to change has changed since `old`."""
        ours = {file.path for file in difference.add} | set(difference.delete)
        before = {file.path: file for file in self.remote(old)[1]}
        now, files = self.remote(self.options.revision)
        after = {file.path: file for file in files}
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        if clash := sorted(changed & ours):
            raise UserError(
                f"{self.repo_id}: somebody else has changed {', '.join(clash[:NAMES_SHOWN])} in commit {now[:8]} "
                "meanwhile: look at it, then run the same command again to publish over it"
            )
        self.say(f"somebody else has committed ({now[:8]}), not touching these files: going on top of it")
        return now

    def difference_at(self, commit: str) -> Difference:
        """What the Hub holds against what was sent: names, sizes, hashes, and the code byte by byte."""
        difference = compare(self.checked.files, self.remote(commit)[1])
        if not difference.empty:
            return difference
        sources = self.checked.sources
        code = [file for file in self.checked.files if file.path.endswith(".py")]
        wrong = [file for file in code if self.read_back(file.path, commit) != sources[file.path].read_bytes()]
        return Difference(tuple(wrong), (), difference.kept)

    def read_back(self, path: str, commit: str) -> bytes:
        url = hf_hub_url(self.repo_id, path, revision=commit, endpoint=self.api.endpoint)

        def get() -> bytes:
            response = get_session().get(url, headers=build_hf_headers())
            hf_raise_for_status(response)
            return response.content

        return self.call(f"reading back {path}", get)

    def set_tag(self, commit: str) -> None:
        def create() -> None:
            try:
                self.api.create_tag(self.repo_id, tag=self.options.tag, revision=commit)
            except HUB_ERRORS as error:
                if status_of(error) != 409:
                    raise
                self.check_tag(self.refs(), commit, Difference())  # ours, with its answer lost, or somebody else's

        self.call(f"setting tag {self.options.tag}", create)

    def run(self) -> Report:
        options, started = self.options, time.monotonic()
        self.say(f"publishing as {self.call('checking the token', self.api.whoami).get('name')}")
        url = scrub(f"{self.api.endpoint}/{self.repo_id}")
        refs = self.look()
        self.check_pinned(refs)
        refs = self.prepare(refs)
        head, files = self.remote(options.revision) if refs else (None, [])
        difference = compare(self.checked.files, files)
        added, deleted = [file.path for file in difference.add], list(difference.delete)
        tagged = bool(options.tag and refs) and self.check_tag(refs, head, difference)
        if options.dry_run:
            return Report(url, options.revision, head, added, deleted, list(difference.kept), difference.size)
        reference, commit = options.revision, head
        found = self.matching_pull_request() if options.create_pr and not difference.empty else None
        if found:
            (reference, commit), added, deleted = found, [], []
        elif not difference.empty:
            self.say(f"uploading {len(added)} files, {difference.size / 1e9:.3f} GB, in one commit")
            reference, commit = self.commit(difference, head)
        wrong = self.difference_at(commit)
        if not wrong.empty and reference == options.revision:
            self.say("the Hub holds other bytes than were sent: sending those once more")
            commit = self.commit(wrong, self.remote(reference)[0])[1]
            wrong = self.difference_at(commit)
        if not wrong.empty:
            names = [*(file.path for file in wrong.add), *wrong.delete][:NAMES_SHOWN]
            raise UserError(
                f"{self.repo_id}: commit {commit[:8]} does not hold the local bytes of {', '.join(names)}: no tag was "
                "set; check that nothing writes to the folder, then run the same command again"
            )
        if options.tag and not tagged:
            self.set_tag(commit)
        pull_request = None
        if options.create_pr and reference.startswith(PULL_REQUEST):
            pull_request = f"{url}/discussions/{reference.removeprefix(PULL_REQUEST)}"
        return Report(
            url,
            reference,
            commit,
            added,
            deleted,
            list(wrong.kept),
            difference.size,
            time.monotonic() - started,
            pull_request,
            options.tag,
        )


def gather(repo_ids: Sequence[str], name: str, say: Callable[[str], None]) -> str:
    """Puts repositories of one namespace into a collection, made if need be; its address. Raises `UserError`.

    Args:
        name: title of a collection of the namespace, or a slug ("namespace/title-0123...").
    """
    api, namespace = hub_api(), repo_ids[0].split("/")[0]

    def do(doing, function):
        return call(doing, repo_ids[0], function, say)

    slug = name if "/" in name else None
    if slug is None:
        owned = do("listing collections", lambda: list(api.list_collections(owner=namespace)))
        slug = next((collection.slug for collection in owned if collection.title == name), None)
    if slug is None:
        made = do("creating the collection", lambda: api.create_collection(name, namespace=namespace, exists_ok=True))
        slug = made.slug
    for repo_id in repo_ids:
        do(
            "adding to the collection",
            lambda item=repo_id: api.add_collection_item(slug, item, item_type="model", exists_ok=True),
        )
    return scrub(f"{api.endpoint}/collections/{slug}")


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
    if options.refresh_code and options.dry_run:
        raise UserError("--refresh-code writes into the folder, --dry-run writes nothing: leave out one of them")


def _checked(folder: Path, repo_id: str, options: PublishOptions, say: Callable[[str], None]) -> Preflight:
    if options.refresh_code:
        refresh_code(folder)
    return preflight(folder, repo_id, options.licence, options.exclude, options.include, options.load, say)


def publish_checked(
    checked: Preflight, repo_id: str, options: PublishOptions, say: Callable[[str], None] = lambda text: None
) -> Report:
    """Publishes a folder that has passed the preflight. Raises `UserError`."""
    hub_logging.get_logger()
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(ScrubbedRecords())
    return Publication(checked, repo_id, options, say).run()


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
    report = publish_checked(_checked(Path(folder), repo_id, options, say), repo_id, options, say)
    if options.collection and not options.dry_run:
        say(f"in collection {gather([repo_id], options.collection, say)}")
    return report


def publish_all(
    folder: Path,
    namespace: str,
    options: PublishOptions | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Report]:
    """Publishes every Hub folder inside `folder` as namespace/NAME-OF-THE-FOLDER and gathers them in a collection.

    All folders pass the preflight before the first is sent. Left out are hidden folders, names with a leading
    underscore such as `_base` of a finetuning run, and checkpoints (`checkpoint-N`).

    Raises:
        UserError: as [`publish`]; also when there is no Hub folder inside.
    """
    options = options or PublishOptions()
    folders = [file.parent for file in sorted(Path(folder).glob("*/config.json"))]
    folders = [entry for entry in folders if not NO_MODEL.fullmatch(entry.name)]
    if not folders:
        raise UserError(
            f"{folder} holds no Hub folders (no folder with a config.json; names with a leading . or _ and "
            "checkpoint-N do not count)"
        )
    repo_ids = [f"{namespace}/{entry.name}" for entry in folders]
    for repo_id in repo_ids:
        check_options(repo_id, options)
    checked = []
    for entry, repo_id in zip(folders, repo_ids, strict=True):
        say(f"checking {entry.name}")
        checked.append(_checked(entry, repo_id, options, say))
    reports = []
    for entry, repo_id in zip(checked, repo_ids, strict=True):
        reports.append(publish_checked(entry, repo_id, options, say))
        say(describe(reports[-1], options.dry_run))
    if not options.dry_run:
        say(f"in collection {gather(repo_ids, options.collection or COLLECTION_TITLE, say)}")
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
