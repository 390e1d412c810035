"""What a folder holds, hashed the way the Hub does, and how that differs from what the Hub holds."""

import fnmatch
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

BLOCK = 4 * 2**20
IGNORED = (".git", ".cache/huggingface")
"""What huggingface_hub itself never uploads."""
# What a training run keeps beside its result: caches and settings of ours (`_*`), checkpoints, state and logs.
TRAINING_LEFTOVERS = ("_*", "checkpoint-*", "training_args.bin", "trainer_state.json", "runs/*")

# A stale file of these kinds changes what a repository loads; other files that only the Hub has are left alone.
MANAGED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")


@dataclass(frozen=True)
class FileHash:
    """A file: path in the repository ("/" separates), bytes, git blob sha1 and sha256.

    What the Hub says of a file has one of the two hashes empty: it gives `sha256` for LFS files, `oid` for others.
    """

    path: str
    size: int
    oid: str = ""
    sha256: str = ""

    def same_bytes(self, other: "FileHash") -> bool:
        """Whether both have the same bytes, by the hashes that both know. No common hash is no equality."""
        if self.size != other.size:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return bool(self.oid and other.oid) and self.oid == other.oid


def list_files(folder: Path, exclude: Iterable[str] = ()) -> list[str]:
    """Paths of the files that would be published, sorted.

    `exclude` are patterns over the path in the repository; what a training run keeps beside its result is left out.
    """
    exclude = (*TRAINING_LEFTOVERS, *exclude)
    paths = []
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        # A link to a folder stays in the list, so that the preflight can object to it.
        if file.is_dir() and not file.is_symlink():
            continue
        if any(path == name or path.startswith(f"{name}/") for name in IGNORED):
            continue
        if not any(fnmatch.fnmatchcase(path, pattern) or path.startswith(f"{pattern}/") for pattern in exclude):
            paths.append(path)
    return paths


def hash_file(folder: Path, path: str) -> FileHash:
    """Both hashes of a file in one reading, in constant memory."""
    file = folder / path
    size = file.stat().st_size
    sha256, oid = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            sha256.update(block)
            oid.update(block)
    return FileHash(path, size, oid.hexdigest(), sha256.hexdigest())


def hash_files(folder: Path, paths: Iterable[str], threads: int = 2) -> list[FileHash]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda path: hash_file(folder, path), paths))


@dataclass(frozen=True)
class Difference:
    """What has to change on the Hub to make it hold the local files."""

    add: tuple[FileHash, ...]
    delete: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def empty(self) -> bool:
        return not self.add and not self.delete

    @property
    def size(self) -> int:
        """Bytes of the files to add."""
        return sum(file.size for file in self.add)


def compare(local: Iterable[FileHash], remote: Iterable[FileHash]) -> Difference:
    """The difference between the local files and those of a revision.

    Weights and code that only the Hub has are to be deleted; other files that only the Hub has are kept.
    """
    here = {file.path: file for file in local}
    there = {file.path: file for file in remote}
    add = tuple(file for path, file in here.items() if path not in there or not file.same_bytes(there[path]))
    extra = sorted(set(there) - set(here) - {".gitattributes"})
    delete = tuple(path for path in extra if any(fnmatch.fnmatchcase(path, pattern) for pattern in MANAGED))
    return Difference(add, delete, tuple(path for path in extra if path not in delete))


def as_json(files: Iterable[FileHash]) -> list[dict]:
    return [asdict(file) for file in files]


def from_json(entries: Iterable[dict]) -> list[FileHash]:
    return [FileHash(**entry) for entry in entries]
