"""What is checked before anything is sent: the folder is a whole, safe, licensed and loadable Hub repository."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from delta_llava.errors import UserError
from delta_llava.manifest import FileHash, hash_files, list_files
from modeling_delta_llava.folders import check_output_folder
from modeling_delta_llava.foreign_code import check_code, refuse_foreign_code
from modeling_delta_llava.hub_cards.licences import add_llama_2_notice, state_licence, write_licence_file
from modeling_delta_llava.hub_cards.metadata import (
    card_problems,
    licence_problem,
    load_card,
    pinned_revisions,
    read_object,
    snippet_repositories,
)
from modeling_delta_llava.hub_cards.scan import forbidden_reason, secret_in

REQUIRED = ("config.json", "processor_config.json", "tokenizer_config.json")
SHOWN = 4


@dataclass(frozen=True)
class Preflight:
    """A folder that may be published.

    Attributes:
        files: what will be on the Hub, with hashes.
        pinned: revisions that the card's snippets load.
        loaded: what the load check reported, or None when it was left out.
    """

    folder: Path
    files: list[FileHash]
    pinned: list[str]
    loaded: dict | None


def _refuse(folder: Path, problems: Sequence[str], hint: str) -> None:
    """Raises one line for a list of problems; nothing when there are none."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"{folder} cannot be published: {'; '.join(problems[:SHOWN])}{more}: {hint}")


def check_structure(folder: Path) -> dict:
    """config.json of a Delta-LLaVA folder that has weights, processor and code, none of it foreign.

    Raises:
        UserError: it is something else, a root or a home folder, or brings code that is not this package's.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that `delta-llava convert` or training wrote")
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    _refuse(folder, [f"{name} is missing" for name in missing], "publish the folder that `delta-llava convert` wrote")
    config = read_object(folder / "config.json")
    problems = []
    if config.get("model_type") != "delta_llava":
        problems.append(f"config.json says model_type {config.get('model_type')!r}, not 'delta_llava'")
    auto_map = config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"):
        if name not in auto_map:
            problems.append(f"auto_map in config.json lacks {name}")
    for target in auto_map.values():
        for reference in target if isinstance(target, list) else [target]:
            code = folder / f"{str(reference).split('--')[-1].split('.')[0]}.py"
            if reference and not code.is_file():
                problems.append(f"{code.name} is missing")
    if (folder / "adapter_config.json").is_file():
        problems.append("adapter_config.json has transformers load the model that it names instead")
    if not list(folder.glob("*.safetensors")):
        problems.append("there are no safetensors weights")
    _refuse(folder, list(dict.fromkeys(problems)), "publish the folder that `delta-llava convert` wrote")
    check_output_folder(folder, str(folder), "holds no model", is_ours=True)
    refuse_foreign_code(folder)
    return config


def check_contents(folder: Path, exclude: Sequence[str] = ()) -> list[str]:
    """Paths to publish. Raises `UserError` for secrets, training state, caches, pickles and links out of it."""
    paths = list_files(folder, exclude)
    problems = []
    root = os.path.realpath(folder)
    for path in paths:
        file = folder / path
        if not Path(os.path.realpath(file)).is_relative_to(root):
            problems.append(f"{path} is a link out of the folder")
            continue
        if not file.is_file():
            problems.append(f"{path} is no regular file")
            continue
        forbidden, secret = forbidden_reason(path), secret_in(file)
        reason = f"is {forbidden}" if forbidden else f"holds {secret}" if secret else None
        if reason:
            problems.append(f"{path} {reason}")
    _refuse(folder, problems, "delete them, or leave them out with --exclude PATTERN")
    return paths


def check_card(folder: Path, licence: str | None = None) -> ModelCard:
    """The folder's card, valid and with a licence.

    Args:
        licence: stated by the user. Written into a card without one; must agree with a card that has one.
    """
    _refuse(folder, card_problems(folder), "mend the card, or write it anew with `delta-llava card`")
    card = load_card(folder)
    stated = card.data.get("license")
    if licence is not None and stated not in (None, licence):
        raise UserError(f"{folder}/README.md says licence {stated!r}, --license says {licence!r}: make them agree")
    if licence is not None and stated is None:
        card.data["license"] = licence
        problem = licence_problem(card.data.to_dict(), folder)
        if problem is None:
            card.text = state_licence(card.text, licence, write_licence_file(folder, licence))
            card.save(folder / "README.md")
            if licence == "llama2":
                add_llama_2_notice(folder)
    else:
        problem = licence_problem(card.data.to_dict(), folder)
    if problem:
        raise UserError(
            f"{folder} cannot be published: {problem}: state one with --license ID, for example the language "
            "model's (identifiers: https://huggingface.co/docs/hub/repositories-licenses)"
        )
    return card


def check_snippets(folder: Path, card: ModelCard, repo_id: str) -> None:
    """Raises `UserError` when the card's snippets load another repository than `repo_id`."""
    for name in snippet_repositories(card.text):
        if name != repo_id:
            raise UserError(
                f"{folder}/README.md: the snippets load {name}, not {repo_id}: write the card with "
                f"`delta-llava card {folder} --repo-id {repo_id}`"
            )


def _run(folder: Path, command: list[str], doing: str, time_limit: float | None) -> dict:
    """Runs a checking process and returns the JSON of its last line; `{"error": ...}` when there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        try:
            process = subprocess.run(
                [sys.executable, *command, str(folder.resolve())],
                cwd=scratch,
                env=environment,
                capture_output=True,
                text=True,
                timeout=time_limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{folder}: {doing} took longer than {time_limit:.0f} s: raise --time-limit") from error
    try:
        return json.loads(process.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        return {"error": lines[-1]}


def check_weights(folder: Path, time_limit: float | None = None) -> None:
    """Runs the converter's verification, in a process of its own; raises `UserError` naming what does not fit."""
    result = _run(folder, ["-m", "modeling_delta_llava.hub_cards.verify_check"], "verifying it", time_limit)
    problems = [result["error"]] if "error" in result else result["problems"]
    _refuse(folder, problems, "see `delta-llava verify`, and convert again")


def check_loading(folder: Path, time_limit: float | None = None) -> dict:
    """Loads the folder in a fresh process without this package, with an empty module cache; what that reported."""
    script = str(Path(__file__).with_name("load_check.py"))
    result = _run(folder, [script], "loading it", time_limit)
    if "error" in result:
        raise UserError(
            f"{folder} does not load in a fresh process with trust_remote_code: {result['error']}: convert it again, "
            "or mend it until `AutoModelForImageTextToText.from_pretrained` loads it"
        )
    return result


def preflight(
    folder: Path,
    repo_id: str,
    licence: str | None = None,
    exclude: Sequence[str] = (),
    load: bool = True,
    time_limit: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Preflight:
    """All checks, cheap ones first.

    Args:
        folder: a Hub folder.
        repo_id: namespace/name that it is published as.
        licence: licence identifier stated by the user.
        exclude: patterns of paths to leave out.
        load: also load the folder in a fresh process (always done for quantised weights).
        time_limit: seconds for each of the two checking processes.
        say: receives a line about each step.

    Raises:
        UserError: one line with everything that one of the checks found.
    """
    folder = Path(folder)
    config = check_structure(folder)
    card = check_card(folder, licence)
    check_snippets(folder, card, repo_id)
    paths = check_contents(folder, exclude)
    check_code(folder)  # the load check runs it
    if "quantization_config" in config:
        say("quantised weights: verified by loading them")
        load = True
    else:
        say("verifying the weights")
        check_weights(folder, time_limit)
    loaded = None
    if load:
        say("loading the folder in a fresh process")
        loaded = check_loading(folder, time_limit)
    say("hashing")
    files = hash_files(folder, paths)
    return Preflight(folder, files, pinned_revisions(card.text), loaded)
