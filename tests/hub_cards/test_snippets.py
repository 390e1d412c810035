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


def test_every_heading_has_its_snippet(published):
    assert list(snippets(published[1], "python")) == [
        "Pipeline",
        "AutoModel",
        "Several pictures, each with its own budget",
        "In 4 bit",
        "Flash attention",
    ]
    assert list(snippets(published[1], "bash")) == ["vLLM", "Finetuning"]


# Each snippet in a namespace of its own, with an empty cache at the beginning; prints a mark behind each.
RUN_ALL = """
import json, sys
for heading, code in json.loads(sys.stdin.read()).items():
    print(f"<<{heading}>>")
    exec(compile(code, heading, "exec"), {"__name__": "__main__"})
"""


def test_snippets_run_as_they_stand(published, tmp_path):
    hub, text = published
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
    process = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        env=hub.environment(tmp_path / "home", token=None),
        input=json.dumps(codes),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    printed = dict(re.findall(r"<<(.*?)>>\n(.*?)(?=<<|\Z)", process.stdout, re.DOTALL))
    for heading in ("Pipeline", "AutoModel", several):
        assert printed[heading].strip(), "an answer is printed"
    assert "visual tokens: 5" in printed[several], "4 for the first picture, 1 for the second"
    assert "In 4 bit" not in codes or "GB" in printed["In 4 bit"]


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
