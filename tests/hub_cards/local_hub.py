"""A Hub on loopback: the HTTP API that the real `huggingface_hub` client speaks, with faults on demand.

`LocalHub` serves model repositories out of a folder: repositories, preupload, LFS batch with single and multipart
uploads, commits, trees, model info, downloads with ranges and redirects, tags, branches, pull requests, collections;
and data sets for reading.
Nothing of the client is replaced; a test starts the server, hands `hub.environment(...)` to a fresh process and looks
at `hub.repos` and `hub.log` afterwards. LFS objects lie on disk, everything else in memory.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_cards.hub_state import Commit, Entry, Fault, Repo, Request, git_oid, pointer

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".pt", ".pth", ".npz", ".zip", ".gz")
LFS_SIZE = 10 * 2**20
BLOCK = 2**20
# Faults whose answer has no end: how it starts behind the status, and what follows again and again.
ENDLESS = {
    "drip headers": (b"X-More: ", b"x"),
    "endless": (b"Content-Type: application/json\r\nConnection: close\r\n\r\n[", b"0, " * 2**16),
}
# A model repository in a route of the API, or a dataset repository, whose id keeps its prefix: "datasets/user/name".
REPO = r"(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)"
# A part of https://huggingface.co/docs/hub/repositories-licenses, enough for what the tests publish.
LICENCES = ("apache-2.0", "mit", "llama2", "cc-by-4.0", "cc-by-nc-4.0", "other", "unknown")


class LocalHub:
    """The server and its state.

    Args:
        root: folder for LFS objects.
        tokens: user name and role ("write" or "read") by token; organisations are "org-*", open to every writer.
        multipart_size: LFS files above this many bytes are uploaded in parts of that size.
        redirect: serve LFS downloads through a redirect to a second origin, as the Hub does.
    """

    def __init__(
        self,
        root: Path,
        tokens: dict[str, tuple[str, str]] | None = None,
        multipart_size: int | None = None,
        redirect: bool = True,
        port: int = 0,
    ):
        self.objects = Path(root) / "objects"
        self.tokens = tokens or {"hf_" + "w" * 34: ("user", "write"), "hf_" + "r" * 34: ("reader", "read")}
        self.redirect = redirect
        self.reset(multipart_size)
        self.lock = threading.RLock()
        self.server, self.cdn = (self._start(port), self._start(0))

    def reset(self, multipart_size: int | None = None) -> None:
        """Forgets everything but the tokens."""
        shutil.rmtree(self.objects, ignore_errors=True)
        self.objects.mkdir(parents=True)
        self.multipart_size = multipart_size
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.parts: dict[tuple[str, int], str] = {}

    def _start(self, port: int) -> ThreadingHTTPServer:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that goes away is what tests are about
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    def close(self) -> None:
        for server in (self.server, self.cdn):
            server.shutdown()
            server.server_close()

    def __enter__(self) -> "LocalHub":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self.cdn.server_port}"

    @property
    def writer(self) -> str:
        return next(token for token, (_, role) in self.tokens.items() if role == "write")

    @property
    def reader(self) -> str:
        return next(token for token, (_, role) in self.tokens.items() if role == "read")

    def environment(self, home: Path, token: str | None = "write") -> dict[str, str]:
        """Environment of a client process: this Hub, an empty cache under `home`, no proxy, no xet."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
        }
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            environment["HF_TOKEN"] = self.writer if token == "write" else token
        return environment

    def fail(self, pattern: str, action: str = "status", **options) -> Fault:
        fault = Fault(pattern, action, **options)
        self.faults.append(fault)
        return fault

    def requests(self, pattern: str) -> list[Request]:
        return [request for request in self.log if re.search(pattern, f"{request.method} {request.path}")]

    # State, as the handlers and the tests change it.

    def create_repo(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.commit(repo, "main", {".gitattributes": Entry(git_oid(attributes), len(attributes), content=attributes)})
        return repo

    def commit(
        self,
        repo: Repo,
        branch: str,
        added: dict[str, Entry],
        deleted: tuple[str, ...] = (),
        title: str = "initial commit",
        author: str = "user",
    ) -> Commit:
        """Adds a commit on a branch ("main", "refs/pr/1"); a folder in `deleted` ends in "/"."""
        with self.lock:
            parent = repo.find(branch)
            tree = dict(parent.tree) if parent else {}
            for name in deleted:
                for path in [path for path in tree if path == name or (name.endswith("/") and path.startswith(name))]:
                    del tree[path]
            tree.update(added)
            date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            text = json.dumps([parent and parent.sha, title, sorted((p, e.etag()) for p, e in tree.items()), date])
            sha = hashlib.sha1(f"{text}{len(repo.commits)}".encode()).hexdigest()
            commit = Commit(sha, parent.sha if parent else None, tree, title, author, date)
            repo.commits[sha] = commit
            match = re.fullmatch(r"refs/pr/(\d+)", branch)
            if match:
                repo.pulls[int(match[1])]["head"] = sha
            else:
                repo.branches[branch] = sha
            return commit

    def add_text(self, repo: Repo, path: str, text: str, branch: str = "main", title: str = "edit") -> Commit:
        """A commit by somebody else."""
        content = text.encode()
        entry = Entry(git_oid(content), len(content), content=content)
        return self.commit(repo, branch, {path: entry}, title=title, author="somebody")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, str]:
        """Path -> sha256 of the bytes that a download would give."""
        result = {}
        for path, entry in self.repos[repo_id].find(revision).tree.items():
            if entry.sha256 is None:
                result[path] = hashlib.sha256(entry.content).hexdigest()
            else:
                result[path] = hashlib.sha256((self.objects / entry.sha256).read_bytes()).hexdigest()
        return result


class CutError(Exception):
    """The connection is to be reset."""


class AnswerError(Exception):
    """An answer other than the expected one."""

    def __init__(self, status: int, body: dict | None = None, code: str | None = None):
        self.status, self.body, self.code = status, body or {"error": code or str(status)}, code


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    # Plumbing.

    def handle_request(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        self.remaining = int(self.headers.get("Content-Length") or 0)
        self.received = 0
        self.tampered = None
        name = f"{self.command} {self.path}"
        with self.hub.lock:
            faults = [fault for fault in self.hub.faults if fault.applies(name)]
        swallow, self.drip = False, None
        try:
            for fault in faults:
                if fault.action == "status":
                    list(self.blocks())
                    self.answer(fault.status, fault.body.encode(), fault.headers)
                    return
                if fault.action == "cut":
                    self.read(min(fault.at, self.remaining))
                    raise CutError
                if fault.action == "stall":
                    time.sleep(fault.seconds)
                elif fault.action == "swallow":
                    swallow = True
                elif fault.action in ENDLESS:
                    self.answer_without_end(*ENDLESS[fault.action], fault.seconds)
                elif fault.action == "drip":
                    self.drip = fault.seconds
                elif fault.action == "tamper":
                    self.tampered = fault.path
                elif fault.action == "call":
                    fault.function(self.hub)
            self.swallow = swallow
            self.dispatch()
        except AnswerError as error:
            list(self.blocks())
            headers = {"X-Error-Code": error.code} if error.code else {}
            self.answer(error.status, json.dumps(error.body).encode(), headers)
        except (CutError, ConnectionError, BrokenPipeError):
            self.record(0)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def record(self, status: int) -> None:
        self.hub.log.append(Request(self.command, unquote(self.path), status, self.received))

    def read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        self.remaining -= len(data)
        self.received += len(data)
        if len(data) < size:
            raise ConnectionError
        return data

    def blocks(self) -> Iterator[bytes]:
        """The request's body, a mebibyte at a time; chunked transfer included."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.received += size
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            self.headers.replace_header("Transfer-Encoding", "done")
            return
        while self.remaining > 0:
            yield self.read(min(BLOCK, self.remaining))

    def json(self) -> dict:
        return json.loads(b"".join(self.blocks()) or b"{}")

    def answer_without_end(self, start: bytes, more: bytes, seconds: float) -> None:
        self.record(200)
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + start)
        while True:
            self.wfile.write(more)
            time.sleep(seconds)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if getattr(self, "swallow", False):
            raise CutError
        self.record(status)
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in [body] if self.drip is None else map(bytes, zip(body, strict=True)):
            self.wfile.write(piece)
            time.sleep(self.drip or 0)

    def reply(self, data, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(data).encode(), headers)

    # Who asks, and for what.

    def user(self, write: bool = False) -> str | None:
        header = self.headers.get("Authorization", "")
        token = header.removeprefix("Bearer ").strip()
        known = self.hub.tokens.get(token)
        if token and known is None:
            raise AnswerError(401, {"error": "Invalid credentials in Authorization header"})
        if write and known is None:
            raise AnswerError(401, {"error": "Invalid username or password."})
        if write and known[1] != "write":
            raise AnswerError(403, {"error": "Forbidden: you must use a write token to upload to a repository."})
        return known[0] if known else None

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        user = self.user(write)
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.may_write(user, repo_id)):
            raise AnswerError(404 if user else 401, {"error": "Repository not found"}, "RepoNotFound")
        if write and not self.may_write(user, repo_id):
            raise AnswerError(403, {"error": "Forbidden: you don't have write access to this repository"})
        return repo

    @staticmethod
    def may_write(user: str | None, repo_id: str) -> bool:
        namespace = repo_id.split("/")[0]
        return user is not None and (namespace == user or namespace.startswith("org-"))

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(unquote(revision))
        if commit is None:
            raise AnswerError(404, {"error": f"Invalid rev id: {unquote(revision)}"}, "RevisionNotFound")
        return commit

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
        ("PUT", r"/lfs/([0-9a-f]{64})/(\d+)", "lfs_part"),
        ("POST", r"/lfs/([0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/lfs/([0-9a-f]{64})/verify", "lfs_verify"),
        ("GET|HEAD", r"/lfs/([0-9a-f]{64})", "lfs_get"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", "tag"),
        ("DELETE", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", "untag"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/([^/]+/[^/]+)/discussions", "discussions"),
        ("GET", rf"/api/{REPO}/tree/([^/]+)/?(.*)", "tree"),
        ("POST", rf"/api/{REPO}/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", "commits"),
        ("GET", rf"/api/{REPO}(?:/revision/([^/]+))?", "info"),
        ("POST", r"/api/collections", "create_collection"),
        ("GET", r"/api/collections", "list_collections"),
        ("POST", r"/api/collections/([^/]+/[^/]+)/items", "add_item"),
        ("GET", r"/api/collections/([^/]+/[^/]+)", "get_collection"),
        ("GET|HEAD", r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def dispatch(self) -> None:
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in methods.split("|"):
                getattr(self, f"on_{name}")(*match.groups())
                return
        raise AnswerError(404, {"error": f"no such endpoint: {self.command} {self.route}"})

    # Accounts and repositories.

    def on_whoami(self) -> None:
        name = self.user()
        if name is None:
            raise AnswerError(401, {"error": "Invalid username or password."})
        role = self.hub.tokens[self.headers["Authorization"].removeprefix("Bearer ")][1]
        self.reply({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def on_create(self) -> None:
        body = self.json()
        user = self.user(write=True)
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        if not self.may_write(user, repo_id):
            raise AnswerError(
                403, {"error": f"You don't have the rights to create a model under {repo_id.split('/')[0]!r}"}
            )
        url = f"{self.hub.url}/{repo_id}"
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise AnswerError(409, {"error": "You already created this model repo", "url": url})
            private = body.get("private") or body.get("visibility") == "private"
            self.hub.create_repo(repo_id, bool(private))
        self.reply({"url": url})

    def on_validate(self) -> None:
        content = self.json()["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        errors = []
        data = yaml.safe_load(match[1]) if match else {}
        if "license" in data and data["license"] not in LICENCES:
            errors.append({"message": f'"license" must be one of {list(LICENCES)}'})
        if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
            errors.append({"message": '"base_model_relation" must be one of [adapter, merge, quantized, finetune]'})
        for entry in data.get("model-index") or []:
            if not entry.get("name") or not isinstance(entry.get("results"), list):
                errors.append({"message": '"model-index[0]" needs a name and results'})
            for result in entry.get("results") or []:
                dataset = result.get("dataset") or {}
                if not (result.get("task") or {}).get("type") or not {"type", "name"} <= set(dataset):
                    errors.append({"message": '"model-index[0].results[0]" needs task.type, dataset.type and .name'})
                if not all({"type", "value"} <= set(metric) for metric in result.get("metrics") or [{}]):
                    errors.append({"message": '"model-index[0].results[0].metrics" needs type and value'})
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    # Uploading.

    def on_preupload(self, repo_id: str, revision: str) -> None:
        body = self.json()
        tree = self.commit_at(self.repo(repo_id, write=True), revision).tree
        files = []
        for file in body["files"]:
            sample = base64.b64decode(file["sample"])
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE or b"\0" in sample
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in tree:
                entry["oid"] = tree[file["path"]].etag()
            files.append(entry)
        self.reply({"files": files})

    def on_lfs_batch(self, repo_id: str) -> None:
        body = self.json()
        self.repo(repo_id, write=True)
        size_limit, objects, transfer = self.hub.multipart_size, [], "basic"
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if not (self.hub.objects / oid).exists():
                href = f"{self.hub.cdn_url}/lfs/{oid}"
                upload = {"href": href}
                if size_limit and size > size_limit and "multipart" in body["transfers"]:
                    transfer = "multipart"
                    parts = range(1, -(-size // size_limit) + 1)
                    urls = {f"{part:05d}": f"{href}/{part}?X-Amz-Signature=secret" for part in parts}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(size_limit), **urls}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(entry)
        self.reply({"transfer": transfer, "objects": objects})

    def receive(self, name: str) -> str:
        """Writes the body to objects/`name` once it has arrived whole; its sha256."""
        temporary = self.hub.objects / f"{name}.{threading.get_ident()}.part"
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for block in self.blocks():
                    digest.update(block)
                    file.write(block)
            temporary.rename(self.hub.objects / name)
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def on_lfs_put(self, oid: str) -> None:
        if self.receive(f"{oid}.unchecked") != oid:
            (self.hub.objects / f"{oid}.unchecked").unlink()
            raise AnswerError(400, {"error": "the bytes do not have the hash they were announced with"})
        (self.hub.objects / f"{oid}.unchecked").rename(self.hub.objects / oid)
        self.answer(200, headers={"ETag": f'"{oid}"'})

    def on_lfs_part(self, oid: str, part: str) -> None:
        etag = self.receive(f"{oid}.{int(part)}")
        self.hub.parts[oid, int(part)] = etag
        self.answer(200, headers={"ETag": f'"{etag}"'})

    def on_lfs_complete(self, oid: str) -> None:
        parts = self.json()["parts"]
        digest = hashlib.sha256()
        whole = self.hub.objects / f"{oid}.whole"
        with whole.open("wb") as file:
            for part in parts:
                if self.hub.parts.get((oid, part["partNumber"])) != part["etag"].strip('"'):
                    raise AnswerError(400, {"error": f"part {part['partNumber']} has another ETag"})
                piece = self.hub.objects / f"{oid}.{part['partNumber']}"
                with piece.open("rb") as source:
                    while block := source.read(BLOCK):
                        digest.update(block)
                        file.write(block)
                piece.unlink()
        if digest.hexdigest() != oid:
            whole.unlink()
            raise AnswerError(400, {"error": "the parts do not add up to the announced hash"})
        whole.rename(self.hub.objects / oid)
        self.reply({})

    def on_lfs_verify(self, oid: str) -> None:
        size = self.json()["size"]
        path = self.hub.objects / oid
        if not path.exists() or path.stat().st_size != size:
            raise AnswerError(404, {"error": "object is not stored"})
        self.reply({})

    def on_commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in b"".join(self.blocks()).splitlines()]
        repo = self.repo(repo_id, write=True)
        author = self.user()
        header, added, deleted = {}, {}, []
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                if self.tampered and re.search(self.tampered, value["path"]):
                    content += b"\n"
                added[value["path"]] = Entry(git_oid(content), len(content), content=content)
            elif line["key"] == "lfsFile":
                if not (self.hub.objects / value["oid"]).exists():
                    raise AnswerError(400, {"error": f"LFS object {value['oid']} does not exist"})
                entry = Entry(git_oid(pointer(value["oid"], value["size"])), value["size"], value["oid"])
                if self.tampered and re.search(self.tampered, value["path"]):
                    entry.sha256 = hashlib.sha256(value["oid"].encode()).hexdigest()
                added[value["path"]] = entry
            else:
                deleted.append(value["path"] + ("/" if line["key"] == "deletedFolder" else ""))
        revision = unquote(revision)
        with self.hub.lock:
            head = self.commit_at(repo, revision)
            parent = header.get("parentCommit")
            pull_url = None
            if "create_pr" in self.query:
                number = len(repo.pulls) + 1
                base = repo.commits.get(parent, head) if parent else head
                title = header["summary"]
                repo.pulls[number] = {"head": base.sha, "title": title, "author": author, "status": "open"}
                revision, pull_url = f"refs/pr/{number}", f"{self.hub.url}/{repo_id}/discussions/{number}"
            elif parent and not head.sha.startswith(parent):
                raise AnswerError(412, {"error": "A commit has happened since. Please refresh and try again."})
            for name in deleted:
                if not any(path == name or path.startswith(name) for path in head.tree):
                    raise AnswerError(404, {"error": f"A file with this name doesn't exist: {name}"}, "EntryNotFound")
            commit = self.hub.commit(repo, revision, added, tuple(deleted), header["summary"], author)
        result = {"commitOid": commit.sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.sha}"}
        self.reply({**result, "success": True, **({"pullRequestUrl": pull_url} if pull_url else {})})

    # Tags, branches, pull requests, history.

    def on_tag(self, repo_id: str, revision: str) -> None:
        body = self.json()
        repo = self.repo(repo_id, write=True)
        commit = self.commit_at(repo, revision)
        if body["tag"] in repo.tags:
            raise AnswerError(409, {"error": "Tag reference exists already"})
        repo.tags[body["tag"]] = commit.sha
        self.reply({})

    def on_untag(self, repo_id: str, tag: str) -> None:
        if self.repo(repo_id, write=True).tags.pop(unquote(tag), None) is None:
            raise AnswerError(404, {"error": "no such tag"}, "RevisionNotFound")
        self.reply({})

    def on_branch(self, repo_id: str, branch: str) -> None:
        body = self.json()
        repo = self.repo(repo_id, write=True)
        branch = unquote(branch)
        if branch in repo.branches:
            raise AnswerError(409, {"error": "Reference already exists"})
        repo.branches[branch] = self.commit_at(repo, body.get("startingPoint", "main")).sha
        self.reply({})

    def on_refs(self, repo_id: str) -> None:
        repo = self.repo(repo_id)

        def refs(kind: str, entries: dict[str, str]) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in entries.items()]

        pulls = [
            {"name": f"refs/pr/{number}", "ref": f"refs/pr/{number}", "targetCommit": pull["head"]}
            for number, pull in repo.pulls.items()
        ]
        body = {"branches": refs("heads", repo.branches), "tags": refs("tags", repo.tags), "converts": []}
        self.reply({**body, **({"pullRequests": pulls} if "include_prs" in self.query else {})})

    def on_discussions(self, repo_id: str) -> None:
        repo = self.repo(repo_id)
        status = self.query.get("status", ["all"])[0]
        found = [
            {
                "num": number,
                "title": pull["title"],
                "author": {"name": pull["author"]},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": pull["status"],
                "repo": {"name": repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for number, pull in repo.pulls.items()
            if status in ("all", pull["status"])
        ]
        self.reply({"discussions": found, "count": len(found), "start": 0})

    def on_commits(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        self.commit_at(repo, revision)
        self.reply(
            [
                {"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": [{"user": c.author}]}
                for c in repo.history(unquote(revision))
            ]
        )

    # Looking.

    @staticmethod
    def item(path: str, entry: Entry) -> dict:
        item = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.sha256:
            size = len(pointer(entry.sha256, entry.size))
            item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
        return item

    def on_info(self, repo_id: str, revision: str | None) -> None:
        repo = self.repo(repo_id)
        commit = self.commit_at(repo, revision or "main")
        siblings = []
        for path, entry in commit.tree.items():
            sibling = {"rfilename": path}
            if "blobs" in self.query:
                item = self.item(path, entry)
                sibling |= {"size": entry.size, "blobId": entry.oid}
                if "lfs" in item:
                    lfs = item["lfs"]
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            siblings.append(sibling)
        body = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit.sha, "siblings": siblings}
        self.reply({**body, "private": repo.private, "tags": [], "downloads": 0, "likes": 0})

    def on_tree(self, repo_id: str, revision: str, folder: str) -> None:
        tree = self.commit_at(self.repo(repo_id), revision).tree
        folder = unquote(folder).strip("/")
        prefix = f"{folder}/" if folder else ""
        inside = {path: entry for path, entry in sorted(tree.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise AnswerError(404, {"error": f"{folder} does not exist"}, "EntryNotFound")
        items, folders = [], set()
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        for path, entry in inside.items():
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(len(parents) if recursive else min(len(parents), 1)):
                folders.add(prefix + "/".join(parents[: depth + 1]))
            if recursive or not parents:
                items.append(self.item(path, entry))
        items += [{"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders]
        start = int(self.query.get("cursor", ["0"])[0])
        page, headers = items[start : start + 50], {}
        if start + 50 < len(items):
            query = f"recursive={str(recursive).lower()}&cursor={start + 50}"
            headers["Link"] = f'<{self.hub.url}{self.route}?{query}>; rel="next"'
        self.reply(page, headers=headers)

    def on_paths_info(self, repo_id: str, revision: str) -> None:
        raw = b"".join(self.blocks())
        json_body = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(raw)["paths"] if json_body else parse_qs(raw.decode()).get("paths", [])
        tree = self.commit_at(self.repo(repo_id), revision).tree
        self.reply([self.item(path, tree[path]) for path in paths if path in tree])

    def on_resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.commit_at(self.repo(repo_id), revision)
        entry = commit.tree.get(unquote(path))
        headers = {"X-Repo-Commit": commit.sha}
        if entry is None:
            self.answer(404, b"{}", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        headers["ETag"] = f'"{entry.etag()}"'
        if entry.sha256 and self.hub.redirect:
            location = f"{self.hub.cdn_url}/lfs/{entry.sha256}?X-Amz-Signature=secret"
            linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
            self.answer(302, b"", {**headers, **linked, "Location": location})
        elif entry.sha256:
            self.send_object(self.hub.objects / entry.sha256, headers)
        else:
            self.answer(200, entry.content, {**headers, "Content-Type": "application/octet-stream"})

    def on_lfs_get(self, oid: str) -> None:
        self.send_object(self.hub.objects / oid, {"ETag": f'"{oid}"'})

    def send_object(self, path: Path, headers: dict[str, str]) -> None:
        if not path.exists():
            raise AnswerError(404, {"error": "no such object"}, "EntryNotFound")
        size = path.stat().st_size
        start, end, status = 0, size - 1, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            start, end, status = int(match[1]), int(match[2] or size - 1), 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.record(status)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(end - start + 1), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            left = end - start + 1
            while left:
                block = file.read(min(BLOCK, left))
                self.wfile.write(block)
                left -= len(block)

    # Collections.

    def collection_body(self, slug: str) -> dict:
        collection = self.hub.collections[slug]
        fixed = {"slug": slug, "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 1, "theme": "blue", "upvotes": 0}
        return {**fixed, **collection}

    def on_create_collection(self) -> None:
        body = self.json()
        user = self.user(write=True)
        if not self.may_write(user, f"{body['namespace']}/x"):
            raise AnswerError(403, {"error": "Forbidden"})
        name = re.sub(r"[^a-z0-9]+", "-", body["title"].lower()).strip("-")
        digest = hashlib.sha1(f"{body['namespace']}/{body['title']}".encode()).hexdigest()[:24]
        slug = f"{body['namespace']}/{name}-{digest}"
        if slug in self.hub.collections:
            raise AnswerError(409, {"error": "exists", "slug": slug})
        owner = {"_id": "0", "avatarUrl": "", "fullname": body["namespace"], "name": body["namespace"], "type": "user"}
        title, private = body["title"], body.get("private", False)
        self.hub.collections[slug] = {"title": title, "owner": owner, "private": private, "items": []}
        self.reply(self.collection_body(slug))

    def on_list_collections(self) -> None:
        owner = self.query.get("owner", [None])[0]
        found = [slug for slug, c in self.hub.collections.items() if owner in (None, c["owner"]["name"])]
        bodies = [self.collection_body(slug) for slug in found]
        self.reply([{name: value for name, value in body.items() if name != "position"} for body in bodies])

    def on_get_collection(self, slug: str) -> None:
        self.user()
        if slug not in self.hub.collections:
            raise AnswerError(404, {"error": "Collection not found"})
        self.reply(self.collection_body(slug))

    def on_add_item(self, slug: str) -> None:
        body = self.json()
        self.user(write=True)
        if slug not in self.hub.collections:
            raise AnswerError(404, {"error": "Collection not found"})
        items = self.hub.collections[slug]["items"]
        if any(item["id"] == body["item"]["id"] for item in items):
            raise AnswerError(409, {"error": "Item already in the collection"})
        item = {"_id": f"{len(items):024x}", "id": body["item"]["id"], "type": body["item"]["type"]}
        note = {"note": {"text": body["note"]}} if body.get("note") else {}
        items.append({**item, "position": len(items), "repoType": "model", **note})
        self.reply(self.collection_body(slug))


def main() -> None:
    """Serves an empty Hub until interrupted, for trying things by hand."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", type=Path, help="folder for LFS objects")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with LocalHub(arguments.root, port=arguments.port) as hub:
        print(f"HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={hub.writer}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
