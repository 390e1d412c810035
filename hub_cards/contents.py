"""What of a folder is published: an allow list of what a model repository holds, free of secrets, and its hashes."""

import fnmatch
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detect_secrets.core.plugins.initialize import from_plugin_classname
from PIL import Image
from safetensors import SafetensorError, safe_open

from delta_llava.redaction import tokens_in_use

# What huggingface_hub never uploads, and what a training run keeps beside its result: caches and settings of ours
# (`_*`), checkpoints, state and logs.
LEFT_OUT = (
    ".git", ".cache/huggingface", "_*", "checkpoint-*", "training_args.bin", "trainer_state.json", "runs",
)  # fmt: skip
TRAINING_STATE = ("checkpoint-*", "global_step*", "optimizer*", "last-checkpoint")
# A stale file of these kinds changes what a repository loads; other files that only the Hub has are left alone.
MANAGED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")

# --- what a model repository holds -----------------------------------------------------------------------------------


def _check_text(file: Path) -> None:
    if b"\0" in file.read_bytes():
        raise ValueError("a NUL")
    file.read_text(encoding="utf-8")


def _check_json(file: Path) -> None:
    json.loads(file.read_text(encoding="utf-8"))


def _check_safetensors(file: Path) -> None:
    with safe_open(file, framework="np"):
        pass


def _check_sentencepiece(file: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    SentencePieceProcessor(model_proto=file.read_bytes())


def _check_picture(file: Path) -> None:
    with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as picture:
        picture.verify()


CHECKS: dict[str, tuple[str, Callable[[Path], None]]] = {
    **dict.fromkeys((".md", ".txt", ".jinja", ".yaml", ".yml", ".py"), ("UTF-8 text", _check_text)),
    ".json": ("JSON", _check_json),
    ".safetensors": ("safetensors", _check_safetensors),
    ".model": ("sentencepiece model", _check_sentencepiece),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), ("picture", _check_picture)),
}
"""What may be published, by suffix: what a file of that kind is, and a check that raises when it is something else."""
WITHOUT_SUFFIX = ("LICENSE", "NOTICE")
HIDDEN = (".gitattributes", ".eval_results/*.yaml")
# Files for secrets can have any suffix.
SECRET_NAMES = ("*credential*", "*secret*", "service*account*", "*password*")


def why_not(folder: Path, path: str) -> str | None:
    """Why a file does not belong into a model repository ("is training state"); None when it does."""
    parts = path.lower().split("/")
    suffix = os.path.splitext(parts[-1])[1]
    hidden = any(part.startswith(".") for part in parts)
    if any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in TRAINING_STATE):
        return "is training state"
    if any(fnmatch.fnmatchcase(parts[-1], pattern) for pattern in SECRET_NAMES):
        return "has the name of a file for secrets"
    if (hidden and any(fnmatch.fnmatchcase(path, pattern) for pattern in HIDDEN)) or path in WITHOUT_SUFFIX:
        kind, check = CHECKS[".txt"]
    elif hidden or suffix not in CHECKS:
        return "is not of a kind that model repositories hold"
    else:
        kind, check = CHECKS[suffix]
    try:
        check(folder / path)
    except (OSError, ValueError, RecursionError, RuntimeError, SyntaxError, SafetensorError):
        return f"is no {kind}"
    return None


def list_files(folder: Path, exclude: Iterable[str] = (), include: Iterable[str] = ()) -> list[str]:
    """Paths in the repository of what is to be published, sorted; what a training run keeps for itself is left out.

    Args:
        exclude: patterns of paths to leave out.
        include: paths that are taken although a pattern leaves them out.
    """
    left_out, wanted = (*LEFT_OUT, *exclude), set(include)

    def is_left_out(path: str) -> bool:
        above = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 2)]
        return any(fnmatch.fnmatchcase(part, pattern) for part in above for pattern in left_out)

    # A link to a folder stays in the list, for `check_contents` to object to.
    files = [file for file in sorted(folder.rglob("*")) if file.is_symlink() or not file.is_dir()]
    paths = [file.relative_to(folder).as_posix() for file in files]
    return [path for path in paths if path in wanted or not is_left_out(path)]


def problem_of(folder: Path, path: str, included: bool = False) -> str | None:
    """Why a file may not be published ("PATH is no JSON"); None when it may.

    Args:
        included: the user has named it: then it may be of any kind, and still hold no secret.
    """
    file = folder / path
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
        return f"{path} is a link out of the folder"
    if not file.is_file():
        return f"{path} is no regular file"
    reason = None if included else why_not(folder, path)
    if reason is None and (secret := secret_in(file)):
        reason = f"holds {secret}"
    return reason and f"{path} {reason}"


# --- secrets ---------------------------------------------------------------------------------------------------------

# Those of detect-secrets that look for tokens of one form. Its others guess from entropy or from a word nearby, and
# object to vocabularies and hashes.
DETECTORS = [
    from_plugin_classname(f"{name}Detector")
    for name in (
        "AWSKey", "AzureStorageKey", "BasicAuth", "DiscordBotToken", "GitHubToken", "GitLabToken", "JwtToken",
        "Mailchimp", "OpenAI", "PrivateKey", "PypiToken", "SendGrid", "Slack", "SquareOAuth", "Stripe",
        "TelegramBotToken", "TwilioKey",
    )
]  # fmt: skip
# What it does not know.
MORE_SECRETS = {
    "Hugging Face token": re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    "GitHub token": re.compile(r"github_pat_[A-Za-z0-9_]{60,}"),
    "OpenAI or Anthropic key": re.compile(r"(?<![A-Za-z0-9])sk-(?:proj-|ant-)[A-Za-z0-9_-]{32,}"),
    "Google API key": re.compile(r"(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),
    "Weights & Biases key": re.compile(r"(?i)wandb_api_key[\"'\s:=]+[0-9a-f]{40}(?![0-9a-f])"),
    "npm token": re.compile(r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
}
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))")
WINDOW, OVERLAP = 2**20, 2**13


def _windows(stream: io.BufferedIOBase, size: int) -> Iterator[tuple[int, bytes]]:
    """Pieces of a stream, each with the lines before it; they overlap by more than a secret is long."""
    lines, window = 0, stream.read(min(WINDOW, size))
    left = size - len(window)
    while window:
        yield lines, window
        if not left or not (more := stream.read(min(WINDOW, left))):
            return
        left -= len(more)
        lines += window[:-OVERLAP].count(b"\n")
        window = window[-OVERLAP:] + more


def _unescaped(match: re.Match) -> str:
    code = match[1] or match[2]
    character = chr(int(code, 16)) if code else match[3]
    # `\n` and the like are a blank, so that lines are counted as they stand in the file.
    return " " if character.isspace() or (not code and character in "nrtbf") else character


def _secret_in_text(text: str) -> tuple[str, int] | None:
    """Kind and position of a secret; of a token without the quotes and escapes of JSON, Python or a template, too."""
    for view in (text, ESCAPE.sub(_unescaped, text)) if "\\" in text else (text,):
        for kind, pattern in MORE_SECRETS.items():
            if match := pattern.search(view):
                return kind, view.count("\n", 0, match.start())
        for detector in DETECTORS:
            for secret in detector.analyze_string(view):
                return detector.secret_type, view.count("\n", 0, max(view.find(secret), 0))
        for token in tokens_in_use():
            if token in view:
                return "Hub token in use", view.count("\n", 0, view.find(token))
    return None


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """Lines before it, and text: of a file's bytes; of the header of weights; of a picture's compressed comments."""
    with file.open("rb") as stream:
        size = file.stat().st_size
        if file.suffix.lower() == ".safetensors":
            size = int.from_bytes(stream.read(8), "little")
        for lines, window in _windows(stream, size):
            # Without the zero bytes, what is ASCII in UTF-16 and UTF-32 is ASCII, as it is in UTF-8 and Latin-1.
            yield lines, window.replace(b"\0", b"").decode("latin-1")
    if file.suffix.lower() in (".png", ".webp", ".jpg", ".jpeg"):
        try:
            with Image.open(file) as picture:
                picture.load()
                yield 0, "\n".join(f"{name} {value}" for name, value in picture.info.items())
        except (OSError, ValueError, SyntaxError):
            pass  # `why_not` says so, unless the file was asked for as it is


def secret_in(file: Path) -> str | None:
    """What kind of secret a file seems to hold, with its line ("a secret (AWS Access Key) in line 3"); None when none.

    The secret itself is never part of the answer. Of weights the header is read, where text may stand.
    """
    for lines, text in _texts(file):
        if found := _secret_in_text(text):
            return f"a secret ({found[0]}) in line {lines + found[1] + 1}"
    return None


# --- hashes ----------------------------------------------------------------------------------------------------------


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


def hash_file(path: str, source: Path | bytes) -> FileHash:
    """Both hashes of a file, or of bytes, in one reading and in constant memory."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    sha256, oid = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        while block := stream.read(4 * 2**20):
            sha256.update(block)
            oid.update(block)
    return FileHash(path, size, oid.hexdigest(), sha256.hexdigest())


def hash_files(sources: Mapping[str, Path | bytes]) -> list[FileHash]:
    """Hashes of files by their path in the repository."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(hash_file, sources.keys(), sources.values()))


@dataclass(frozen=True)
class Difference:
    """What has to change on the Hub to make it hold the local files: to add, to delete; and what only the Hub has."""

    add: tuple[FileHash, ...] = ()
    delete: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

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
