"""Checks a folder's model card the way the Hub does, without the Hub."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from delta_llava.errors import UserError

# https://huggingface.co/docs/hub/repositories-licenses
LICENCES = frozenset((Path(__file__).parent / "licenses" / "identifiers.txt").read_text(encoding="utf-8").split())
"""Identifiers that state a licence; the Hub's "unknown" states none."""
RELATIONS = ("adapter", "merge", "quantized", "finetune")
PIPELINE_TAG = "image-text-to-text"
LIBRARY = "transformers"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
PINNED = re.compile(r"""\brevision\s*=\s*["']([^"']+)["']|--revision[ =]([^\s`"']+)""")

REFERENCE = re.compile(r"[A-Za-z0-9][\w.+/-]*", re.ASCII)
SNIPPET_REPOSITORY = re.compile(r"""\bmodel_id\s*=\s*["']([^"']+)["']""")


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. Raises `UserError` for any other, and when there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give the folder that `delta-llava convert` or training wrote"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}): convert or train again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object: convert or train again")
    return data


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


def _as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def licence_problem(data: dict, folder: Path | None = None) -> str | None:
    """What is wrong with the licence in a card's metadata; None when nothing is. A missing one is a problem."""
    licence = data.get("license")
    if licence is None:
        return "no licence is stated"
    if licence not in LICENCES:
        return f"{licence!r} is no licence identifier of the Hub (for one that is not in its list, use 'other')"
    if licence == "other":
        link = data.get("license_link")
        if not data.get("license_name") or not link:
            return "licence 'other' needs license_name and license_link"
        if folder is not None and link in LICENCE_FILES and not (folder / link).is_file():
            return f"license_link names {link}, which is not in the folder"
    return None


def metadata_problems(data: dict) -> list[str]:
    """What the Hub would object to in a card's metadata, besides the licence."""
    problems = []
    if data.get("pipeline_tag") != PIPELINE_TAG:
        problems.append(f"pipeline_tag is {data.get('pipeline_tag')!r}, not {PIPELINE_TAG!r}")
    if data.get("library_name") != LIBRARY:
        problems.append(f"library_name is {data.get('library_name')!r}, not {LIBRARY!r}")
    for field in ("base_model", "datasets"):
        for name in _as_list(data.get(field)):
            try:
                validate_repo_id(name)
            except ValueError:
                problems.append(f"{field} {name!r} is no Hub id")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        problems.append(f"base_model_relation is {relation!r}, not one of {', '.join(RELATIONS)}")
    if relation is None and len(_as_list(data.get("base_model"))) > 1:
        problems.append("several base_model entries need base_model_relation")
    if relation is not None and not data.get("base_model"):
        problems.append("base_model_relation needs base_model")
    for language in _as_list(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", str(language)):
            problems.append(f"language {language!r} is no ISO 639 code")
    if not all(isinstance(tag, str) and tag for tag in _as_list(data.get("tags"))):
        problems.append("tags are not all texts")
    return problems


def eval_results_problems(folder: Path) -> list[str]:
    """What is wrong with `.eval_results/*.yaml`, by huggingface_hub's own reader."""
    from huggingface_hub import parse_eval_result_entries

    problems = []
    for file in sorted((folder / ".eval_results").glob("*.yaml")):
        try:
            entries = parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            problems.append(f".eval_results/{file.name} cannot be read ({type(error).__name__}: {error})")
            continue
        if not entries:
            problems.append(f".eval_results/{file.name} is empty")
    return problems


def load_card(folder: Path) -> ModelCard:
    """The folder's README.md. Raises `ValueError` when its metadata is not valid YAML or breaks model-index."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # a README without metadata is reported by our own words
    try:
        return ModelCard.load(folder / "README.md")
    except yaml.YAMLError as error:
        raise ValueError(f"its metadata is no valid YAML ({str(error).splitlines()[0]})") from error
    finally:
        hub_logging.set_verbosity(verbosity)


def pinned_revisions(text: str) -> list[str]:
    """Revisions that the snippets of a card load, in order of appearance."""
    return list(dict.fromkeys(match[1] or match[2] for match in PINNED.finditer(text)))


def snippet_repositories(text: str) -> list[str]:
    """Repositories that the snippets of a card load, in order of appearance."""
    return list(dict.fromkeys(SNIPPET_REPOSITORY.findall(text)))


def card_problems(folder: Path) -> list[str]:
    """Everything that keeps the folder's card from being valid on the Hub, the licence excepted."""
    if not (folder / "README.md").is_file():
        return ["there is no README.md"]
    try:
        card = load_card(folder)
    except ValueError as error:
        return [f"README.md: {error}"]
    data = card.data.to_dict()
    if not data:
        return ["README.md has no metadata block"]
    problems = [f"README.md: {problem}" for problem in metadata_problems(data)]
    for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card.text):
        if "://" not in picture and not (folder / picture).is_file():
            problems.append(f"README.md shows {picture}, which is not in the folder")
    return problems + eval_results_problems(folder)
