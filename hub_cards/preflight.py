"""What is checked before anything is sent: what is sent is a whole, safe, licensed and loadable Hub repository."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from delta_llava.errors import UserError, reason
from modeling_delta_llava.card import load_card, state_of
from modeling_delta_llava.folders import check_output_folder
from modeling_delta_llava.foreign_code import check_code, code_files, refuse_foreign_code
from modeling_delta_llava.hub_cards.card import write_file
from modeling_delta_llava.hub_cards.contents import FileHash, hash_files, list_files, problem_of
from modeling_delta_llava.hub_cards.licences import licence_text, with_llama_2_notice
from modeling_delta_llava.hub_cards.metadata import card_problems, licence_problem
from modeling_delta_llava.json_files import read_json

REQUIRED = ("config.json", "processor_config.json", "tokenizer_config.json")
SHOWN = 4


@dataclass(frozen=True)
class Preflight:
    """What may be published.

    Attributes:
        sources: the file, or the bytes, for each path in the repository.
        files: the same with sizes and hashes.
        pinned: the revision that the card's snippets load, if it is a card of ours.
    """

    sources: dict[str, Path | bytes]
    files: list[FileHash]
    pinned: str | None = None


def _refuse(folder: Path, problems: Sequence[str], hint: str) -> None:
    """Raises one line for a list of problems; nothing when there are none."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"{folder} cannot be published: {'; '.join(problems[:SHOWN])}{more}: {hint}")


def check_structure(folder: Path, paths: Collection[str]) -> dict:
    """config.json of a Delta-LLaVA folder, of which weights, processor and code are sent, none of it foreign.

    Args:
        paths: what is to be sent.

    Raises:
        UserError: it is something else, a root or a home folder, or brings code that is not this package's.
    """
    hint = "publish the folder that `delta-llava convert` wrote, and exclude none of these"
    _refuse(folder, [f"{name} is missing" for name in REQUIRED if name not in paths], hint)
    config = read_json(folder / "config.json")
    problems = []
    if config.get("model_type") != "delta_llava":
        problems.append(f"config.json says model_type {config.get('model_type')!r}, not 'delta_llava'")
    auto_map = config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"):
        if name not in auto_map:
            problems.append(f"auto_map in config.json lacks {name}")
    problems += [f"{file.name} is missing" for file in code_files() if file.name not in paths]
    if "adapter_config.json" in paths:
        problems.append("adapter_config.json has transformers load the model that it names instead")
    weights = {path for path in paths if path.endswith(".safetensors")}
    index = folder / "model.safetensors.index.json"
    if not weights:
        problems.append("there are no safetensors weights")
    elif index.name in paths:
        named = read_json(index).get("weight_map")
        shards = {str(shard) for shard in named.values()} if isinstance(named, dict) else set()
        problems += [f"{shard} is missing" for shard in sorted(shards - weights)]
    elif "model.safetensors" not in weights:
        problems.append(f"{index.name} is missing")
    _refuse(folder, problems, hint)
    check_output_folder(folder, str(folder), "holds no model", is_ours=True)
    refuse_foreign_code(folder)
    return config


def check_contents(folder: Path, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> list[str]:
    """Paths to publish.

    Args:
        exclude: patterns of paths to leave out.
        include: paths of files that may be of any kind, and still hold no secret.

    Raises:
        UserError: something is not what a model repository holds, holds a secret, or is a link out of the folder.
    """
    paths = list_files(folder, exclude, include)
    if absent := sorted(set(include) - set(paths)):
        raise UserError(f"--include {absent[0]}: there is no such file in the folder: give its path in it")
    problems = [problem for path in paths if (problem := problem_of(folder, path, path in include))]
    hint = "delete them, leave them out with --exclude PATTERN, or name what is to be published with --include PATH"
    _refuse(folder, problems, hint)
    return paths


def check_card(
    folder: Path, paths: Collection[str], repo_id: str, licence: str | None = None
) -> tuple[ModelCard, dict[str, bytes]]:
    """The folder's card, valid, of this repository and with a licence; and files to send in place of the folder's.

    Args:
        paths: what is to be sent.
        licence: stated by the user. Goes into a card without one; must agree with a card that has one.
    """
    _refuse(folder, card_problems(folder, paths), "mend the card, or write it anew with `delta-llava card`")
    card = load_card(folder)
    state = state_of(card.data.to_dict())
    if state and state.get("repo_id") != repo_id:
        raise UserError(
            f"{folder}/README.md: the snippets load {state.get('repo_id') or 'no repository'}, not {repo_id}: write "
            f"the card with `delta-llava card {folder} --repo-id {repo_id}`"
        )
    stated, files = card.data.get("license"), {}
    if licence is not None and stated not in (None, licence):
        raise UserError(f"{folder}/README.md says licence {stated!r}, --license says {licence!r}: make them agree")
    if licence is not None and stated is None:
        card.data["license"] = licence
        text = licence_text(licence)
        files = {"README.md": str(card).encode()}
        if text is not None and "LICENSE" not in paths:
            files["LICENSE"] = text.encode()
        if licence == "llama2":
            notice = (folder / "NOTICE").read_text(encoding="utf-8") if "NOTICE" in paths else ""
            files["NOTICE"] = with_llama_2_notice(notice).encode()
    if problem := licence_problem(card.data.to_dict(), {*paths, *files}):
        raise UserError(
            f"{folder} cannot be published: {problem}: state one with --license ID, for example the language "
            "model's (identifiers: https://huggingface.co/docs/hub/repositories-licenses)"
        )
    return card, files


def check_in_process(folder: Path, load: bool, verify: bool) -> None:
    """Verifies and loads the folder in a fresh process, which ends with this one.

    Raises:
        UserError: it does not load, or its weights or its code are not what they should be.
    """
    script = str(Path(__file__).with_name("check_folder.py"))
    command = [sys.executable, "-P", script, str(folder.resolve()), *["--load"] * load, *["--verify"] * verify]
    pipe = subprocess.PIPE
    # Standard input stays open: its end tells the process that this one has gone.
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, errors="replace") as process:
        lines = process.stdout.read().strip().splitlines() or [""]
        status = process.wait()
    try:
        problem = json.loads(lines[-1])["problem"]
    except (ValueError, LookupError, TypeError):
        problem = f"the process that checks it ended with status {status}: {reason(ValueError(lines[-1]))}"
    _refuse(folder, [problem] if problem else [], "see `delta-llava verify`, and convert it again")


def refresh_code(folder: Path) -> None:
    """Writes this package's code into a Hub folder that an earlier release wrote. Raises `UserError`."""
    refuse_foreign_code(folder)
    for file in code_files():
        write_file(folder / file.name, file.read_bytes())


def preflight(
    folder: Path,
    repo_id: str,
    licence: str | None = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    load: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Preflight:
    """All checks, cheap ones first. Nothing is written.

    Args:
        folder: a Hub folder.
        repo_id: namespace/name that it is published as.
        licence: licence identifier stated by the user.
        exclude, include: see [`check_contents`].
        load: also load the folder in a fresh process (always done for quantised weights).
        say: receives a line about each step.

    Raises:
        UserError: one line with everything that one of the checks found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that `delta-llava convert` or training wrote")
    paths = list_files(folder, exclude, include)
    config = check_structure(folder, paths)
    card, replaced = check_card(folder, paths, repo_id, licence)
    paths = check_contents(folder, exclude, include)
    check_code(folder)  # loading runs it
    quantized = "quantization_config" in config
    say("quantised weights: verified by loading them" if quantized else "verifying the weights")
    check_in_process(folder, load or quantized, not quantized)
    say("hashing")
    sources = {**{path: folder / path for path in paths}, **replaced}
    return Preflight(sources, hash_files(sources), state_of(card.data.to_dict()).get("revision"))
