"""What the Hub on loopback keeps: repositories, commits, pull requests, faults and the log of requests."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Entry:
    """A file at a commit: `oid` is the git blob's sha1; LFS files also have a sha256, other files their content."""

    oid: str
    size: int
    sha256: str | None = None
    content: bytes = b""

    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass
class Commit:
    sha: str
    parent: str | None
    tree: dict[str, Entry]
    title: str
    author: str
    date: str


@dataclass
class Repo:
    """A repository: branches, tags and pull requests point at commits."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, dict] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        match = re.fullmatch(r"refs/pr/(\d+)", revision)
        if match:
            pull = self.pulls.get(int(match[1]))
            sha = pull["head"] if pull else None
        else:
            sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    def history(self, revision: str = "main") -> list[Commit]:
        commits, commit = [], self.find(revision)
        while commit:
            commits.append(commit)
            commit = self.commits.get(commit.parent)
        return commits


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `pattern`, `times` times after the first `after`.

    action:
        "status"    answer `status` with `headers` and `body` instead of doing anything
        "cut"       read `at` bytes of the request's body, then reset the connection
        "swallow"   do what was asked, then reset the connection instead of answering
        "stall"     sleep `seconds`, then do what was asked
        "drip"      do what was asked, and answer a byte every `seconds`; "drip headers" so from the first header on
        "endless"   answer JSON without an end
        "tamper"    (commits) store other bytes than those sent for the files that match `path`
        "call"      call `function(hub)` first, then do what was asked
    """

    pattern: str
    action: str = "status"
    times: int = 1
    after: int = 0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "injected"}'
    at: int = 0
    seconds: float = 0.0
    path: str = ""
    function: Callable[[Any], None] | None = None
    hits: int = 0

    def applies(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.hits += 1
        return self.after < self.hits <= self.after + self.times


@dataclass
class Request:
    """One line of the log: what was asked, what was answered (0: the connection was cut), bytes of body received."""

    method: str
    path: str
    status: int
    received: int = 0


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
