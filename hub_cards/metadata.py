"""Checks a folder's model card the way the Hub does, without the Hub."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.utils import validate_repo_id

from delta_llava.errors import UserError, reason
from modeling_delta_llava.card import LIBRARY, PIPELINE_TAG, load_card

# https://huggingface.co/docs/hub/repositories-licenses
LICENCES = frozenset((Path(__file__).parent / "licenses" / "identifiers.txt").read_text(encoding="utf-8").split())
"""Identifiers that state a licence; the Hub's "unknown" states none."""
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
REFERENCE = re.compile(r"[A-Za-z0-9][\w.+/-]*", re.ASCII)


def check_repository(name: str) -> None:
    """Raises `UserError` unless a name can be that of a repository on the Hub."""
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise ValueError("no namespace")
    except ValueError as error:
        raise UserError(f"{name!r} is no repository name: write NAMESPACE/NAME, as in user/delta-llava-7b") from error


def check_reference(name: str) -> None:
    """Raises `UserError` unless a name can be that of a tag or branch."""
    if not REFERENCE.fullmatch(name) or ".." in name or "//" in name or name.endswith((".", "/", ".lock")):
        raise UserError(f"{name!r} cannot name a tag or a branch: use letters, digits and . _ - /, as in v1.0")


def as_list(value: Any) -> list:
    """What a field of the metadata holds, which may be one value or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def licence_problem(data: dict, files: Collection[str]) -> str | None:
    """What is wrong with the licence in a card's metadata; None when nothing is. A missing one is a problem.

    Args:
        files: names of the repository's files.
    """
    licence = data.get("license")
    if licence is None:
        return "no licence is stated"
    if not isinstance(licence, str) or licence not in LICENCES:
        return f"{licence!r} is no licence identifier of the Hub (for one that is not in its list, use 'other')"
    if licence == "other":
        link = data.get("license_link")
        if not data.get("license_name") or not link:
            return "licence 'other' needs license_name and license_link"
        if link in LICENCE_FILES and link not in files:
            return f"license_link names {link}, which is not among the files"
    return None


def metadata_problems(data: dict) -> list[str]:
    """What the Hub would object to in a card's metadata, besides the licence."""
    problems = []
    if data.get("pipeline_tag") != PIPELINE_TAG:
        problems.append(f"pipeline_tag is {data.get('pipeline_tag')!r}, not {PIPELINE_TAG!r}")
    if data.get("library_name") != LIBRARY:
        problems.append(f"library_name is {data.get('library_name')!r}, not {LIBRARY!r}")
    for field in ("base_model", "datasets"):
        for name in as_list(data.get(field)):
            try:
                validate_repo_id(name)
            except ValueError:
                problems.append(f"{field} {name!r} is no Hub id")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        problems.append(f"base_model_relation is {relation!r}, not one of {', '.join(RELATIONS)}")
    if relation is None and len(as_list(data.get("base_model"))) > 1:
        problems.append("several base_model entries need base_model_relation")
    if relation is not None and not data.get("base_model"):
        problems.append("base_model_relation needs base_model")
    for language in as_list(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", str(language)):
            problems.append(f"language {language!r} is no ISO 639 code")
    if not all(isinstance(tag, str) and tag for tag in as_list(data.get("tags"))):
        problems.append("tags are not all texts")
    return problems


def eval_results_problems(folder: Path, files: Collection[str]) -> list[str]:
    """What is wrong with `.eval_results/*.yaml`, by huggingface_hub's own reader."""
    problems = []
    for file in sorted((folder / ".eval_results").glob("*.yaml")):
        if f".eval_results/{file.name}" not in files:
            continue
        try:
            entries = parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            problems.append(f".eval_results/{file.name} cannot be read ({reason(error)})")
            continue
        if not entries:
            problems.append(f".eval_results/{file.name} is empty")
    return problems


def card_problems(folder: Path, files: Collection[str]) -> list[str]:
    """Everything that keeps a card from being valid on the Hub, the licence excepted.

    Args:
        files: paths of the repository's files, all of them in `folder`.
    """
    if "README.md" not in files:
        return ["there is no README.md"]
    try:
        card = load_card(folder)
    except ValueError as error:
        return [f"README.md: {reason(error)}"]
    data = card.data.to_dict()
    if not data:
        return ["README.md has no metadata block"]
    problems = [f"README.md: {problem}" for problem in metadata_problems(data)]
    for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card.text):
        if "://" not in picture and picture not in files:
            problems.append(f"README.md shows {picture}, which is not among the files")
    return problems + eval_results_problems(folder, files)
