"""The snippets of a card run as they stand, out of a repository on the loopback Hub."""

import importlib.util
import itertools
import json
import re
import shlex

import pytest

from modeling_delta_llava.hub_cards.card import write_card
from tests import tiny
from tests.hub_cards.publishing import publish_as_it_is

REPO = "user/delta-llava-tiny"
# Sizes that 4-bit kernels of some CPUs ask for: multiples of 64.
TEXT = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its card."""
    folder = tiny.write_hub_folder(
        tmp_path_factory.mktemp("snippets") / "delta-llava-tiny", text=TEXT, trained_num_visual_tokens=[4]
    )
    write_card(folder, repo_id=REPO, licence="mit")
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def snippets(text: str, language: str) -> dict[str, str]:
    """Snippets by the heading they stand under."""
    found = {}
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        match = re.search(rf"^```{language}\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        if match:
            found[heading] = match[1]
    return found


def test_every_heading_has_its_snippet(text):
    assert list(snippets(text, "python")) == [
        "Pipeline",
        "AutoModel",
        "Several pictures, each with its own budget",
        "In 4 bit",
        "Flash attention",
    ]
    assert list(snippets(text, "bash")) == ["vLLM", "Finetuning"]


# Each snippet in a namespace of its own, with an empty cache at the beginning; prints a mark behind each.
RUN_ALL = """
import json, sys
for heading, code in json.loads(sys.argv[1]).items():
    print(f"<<{heading}>>")
    exec(compile(code, heading, "exec"), {"__name__": "__main__"})
"""


def test_snippets_run_as_they_stand(folder, text, as_client, client):
    assert as_client(lambda: publish_as_it_is(folder, REPO, tag="v1.0")).returncode == 0
    codes = snippets(text, "python")
    several = "Several pictures, each with its own budget"
    codes[several] += "\nprint('visual tokens:', int((inputs['input_ids'] == model.config.image_token_id).sum()))\n"
    # Without a GPU the same call runs with the kernel and the device replaced.
    flash = codes["Flash attention"].replace('"flash_attention_2"', '"sdpa"').replace('"cuda"', '"cpu"')
    assert flash != codes["Flash attention"]
    codes["Flash attention"] = flash + "\nassert model.config._attn_implementation == 'sdpa'\n"
    codes["In 4 bit"] += """
kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
assert {kind for name, kind in kinds.items() if "language_model" in name} == {"Linear4bit"}, kinds
assert not {kind for name, kind in kinds.items() if "language_model" not in name and "bit" in kind}, kinds
"""
    if importlib.util.find_spec("bitsandbytes") is None:
        del codes["In 4 bit"]
    process = client("-c", RUN_ALL, json.dumps(codes), home="empty", token=None)
    assert process.returncode == 0, process.stderr
    printed = dict(re.findall(r"<<(.*?)>>\n(.*?)(?=<<|\Z)", process.stdout, re.DOTALL))
    for heading in ("Pipeline", "AutoModel", several):
        assert printed[heading].strip(), "an answer is printed"
    assert "visual tokens: 5" in printed[several], "4 for the first picture, 1 for the second"
    assert "In 4 bit" not in codes or "GB" in printed["In 4 bit"]


def test_vllm_command(text):
    words = shlex.split(snippets(text, "bash")["vLLM"])
    assert words[:3] == ["vllm", "serve", REPO]
    options = dict(itertools.pairwise(words))
    assert options["--revision"] == options["--code-revision"] == "v1.0"
    assert {"--trust-remote-code", "--model-impl"} <= set(words)


def test_finetuning_command_is_understood(text):
    from modeling_delta_llava.finetuning.arguments import load_arguments

    words = shlex.split(snippets(text, "bash")["Finetuning"])
    assert words[:2] == ["delta-llava", "finetune"]
    arguments = load_arguments(words[2], [*words[3:], "--use_cpu", "true", "--tf32", "false"])
    assert arguments.model.model == REPO
    assert arguments.model.model_revision == "v1.0"
