"""Finds files that must not be published: secrets, training state, caches, pickles."""

import fnmatch
import re
from pathlib import Path

from delta_llava.redaction import WHOLE_TOKEN, tokens_in_use

TEXT_LIMIT = 32 * 2**20
"""Larger files are weights or data; a secret scanner does not read them either."""

SECRET_PATTERNS = {
    "a Hugging Face token": re.compile(WHOLE_TOKEN.pattern.encode()),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})\b"),
    "an OpenAI or Anthropic key": re.compile(rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
    "a Google API key": re.compile(rb"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a Slack token": re.compile(rb"\bxox[abprs]-[0-9A-Za-z-]{20,}"),
    "a Weights & Biases key": re.compile(rb"(?i)wandb_api_key[\"'\s:=]+[0-9a-f]{40}\b"),
    "a private key": re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a password in an address": re.compile(rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"'<>{}]+:[^/\s:@\"'<>{}]{4,}@[\w.-]+"),
}

SECRET_FILES = (
    ".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", ".pypirc",
    ".git-credentials", "credentials.json", "service-account*.json", "token", "stored_tokens",
)  # fmt: skip
TRAINING_STATE = (
    "optimizer*.pt", "optimizer*.bin", "optimizer*.safetensors", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    "random_states_*.pkl", "training_args.bin", "*_optim_states.pt", "*_model_states.pt", "pytorch_model_fsdp*",
    "events.out.tfevents.*", "latest", "zero_to_fp32.py",
)  # fmt: skip
TRAINING_FOLDERS = ("checkpoint-*", "global_step*", "runs", "wandb", "mlruns", "tb_logs")
CACHES = ("*.pyc", "*.lock", "*.incomplete", "*.tmp", "*.part", ".DS_Store", "Thumbs.db", "*.swp", "*~")
CACHE_FOLDERS = ("__pycache__", ".cache", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache", ".venv")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def forbidden_reason(path: str) -> str | None:
    """Why a file may not be published, judged by its path in the repository; None when it may."""
    *folders, name = path.split("/")
    if any(_matches(folder, TRAINING_FOLDERS) for folder in folders):
        return "training state"
    if any(_matches(folder, CACHE_FOLDERS) for folder in folders):
        return "a cache"
    if _matches(name, SECRET_FILES):
        return "a file for secrets"
    if _matches(name, TRAINING_STATE):
        return "training state"
    if _matches(name, CACHES):
        return "a cache or leftover"
    if _matches(name, PICKLES):
        return "a pickle, which runs code when loaded (publish safetensors)"
    return None


def secret_in(file: Path) -> str | None:
    """What kind of secret a file seems to hold, with its line ("an AWS access key in line 3"); None when none.

    The secret itself is never part of the answer.
    """
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")  # where text may stand
            content = stream.read(min(header, TEXT_LIMIT))
    elif file.stat().st_size > TEXT_LIMIT:
        return None
    else:
        content = file.read_bytes()
    used = [("the Hub token in use", re.compile(re.escape(token.encode()))) for token in tokens_in_use()]
    for kind, pattern in (*SECRET_PATTERNS.items(), *used):
        match = pattern.search(content)
        if match:
            line = content.count(b"\n", 0, match.start()) + 1
            return f"{kind} in line {line}"
    return None
