"""The snippets of a card run as they stand, out of a repository on the loopback Hub, in fresh processes."""

import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys

import pytest

from modeling_delta_llava.hub_cards.card import write_card
from modeling_delta_llava.hub_cards.manifest import as_json, hash_files, list_files
from modeling_delta_llava.hub_cards.transfer import Request
from tests import tiny
from tests.hub_cards.conftest import REPOSITORY
from tests.hub_cards.local_hub import LocalHub

REPO = "user/delta-llava-tiny"
# Sizes that 4-bit kernels of some CPUs ask for: multiples of 64.
TEXT = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published tiny model: the Hub and the card's text."""
    root = tmp_path_factory.mktemp("published")
    folder = tiny.write_hub_folder(root / "delta-llava-tiny", text=TEXT, trained_num_visual_tokens=[4])
    write_card(folder, repo_id=REPO, licence="mit")
    with LocalHub(root / "hub") as hub:
        files = as_json(hash_files(folder, list_files(folder)))
        request = Request(folder=str(folder), repo_id=REPO, files=files, tag="v1.0")
        process = subprocess.Popen(
            [sys.executable, "-m", "modeling_delta_llava.hub_cards.transfer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=hub.environment(root / "publisher"),
            cwd=REPOSITORY,
            text=True,
        )
        process.stdin.write(json.dumps({"request": vars(request)}) + "\n")
        process.stdin.flush()
        assert '"event": "report"' in process.stdout.read()
        process.wait()
        yield hub, (folder / "README.md").read_text(encoding="utf-8")


def snippets(text: str, language: str) -> dict[str, str]:
    """Snippets by the heading they stand under."""
    found = {}
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        match = re.search(rf"^```{language}\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        if match:
            found[heading] = match[1]
    return found


def run(published, tmp_path, code: str) -> str:
    hub, _ = published
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(tmp_path / "home", token=None),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_heading_has_its_snippet(published):
    assert list(snippets(published[1], "python")) == [
        "Pipeline",
        "AutoModel",
        "Several pictures, each with its own budget",
        "In 4 bit",
        "Flash attention",
    ]
    assert list(snippets(published[1], "bash")) == ["vLLM", "Finetuning"]


@pytest.mark.parametrize("heading", ["Pipeline", "AutoModel", "Several pictures, each with its own budget"])
def test_snippet_runs_as_it_stands(published, tmp_path, heading):
    printed = run(published, tmp_path, snippets(published[1], "python")[heading])
    assert printed.strip(), "an answer is printed"


def test_budgets_of_the_snippet_arrive(published, tmp_path):
    code = snippets(published[1], "python")["Several pictures, each with its own budget"]
    code += "\nprint('visual tokens:', int((inputs['input_ids'] == model.config.image_token_id).sum()))\n"
    assert "visual tokens: 5" in run(published, tmp_path, code), "4 for the first picture, 1 for the second"


def test_four_bit_snippet(published, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    code = snippets(published[1], "python")["In 4 bit"]
    code += """
kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
assert {kind for name, kind in kinds.items() if "language_model" in name} == {"Linear4bit"}, kinds
assert not {kind for name, kind in kinds.items() if "language_model" not in name and "bit" in kind}, kinds
"""
    assert "GB" in run(published, tmp_path, code)


def test_flash_attention_snippet_but_for_the_kernel(published, tmp_path):
    """Without a GPU the same call runs with the kernel and the device replaced."""
    code = snippets(published[1], "python")["Flash attention"]
    replaced = code.replace('"flash_attention_2"', '"sdpa"').replace('"cuda"', '"cpu"')
    assert replaced != code
    run(published, tmp_path, replaced + "\nassert model.config._attn_implementation == 'sdpa'\n")


def test_vllm_command(published):
    words = shlex.split(snippets(published[1], "bash")["vLLM"])
    assert words[:3] == ["vllm", "serve", REPO]
    options = dict(itertools.pairwise(words))
    assert options["--revision"] == options["--code-revision"] == "v1.0"
    assert {"--trust-remote-code", "--model-impl"} <= set(words)


def test_finetuning_command_is_understood(published):
    from modeling_delta_llava.finetuning.arguments import load_arguments

    words = shlex.split(snippets(published[1], "bash")["Finetuning"])
    assert words[:2] == ["delta-llava", "finetune"]
    arguments = load_arguments(words[2], [*words[3:], "--use_cpu", "true", "--tf32", "false"])
    assert arguments.model.model == REPO
    assert arguments.model.model_revision == "v1.0"
