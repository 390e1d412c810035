"""From a folder to an answer out of a repository: `delta-llava publish` end to end."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from modeling_delta_llava.hub_cards import preflight
from modeling_delta_llava.hub_cards.card import write_card
from tests import tiny
from tests.hub_cards.conftest import assert_one_line
from tests.hub_cards.test_transfer import assert_holds

REPO = "user/delta-llava-tiny"

ANSWER = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
name, options = sys.argv[1], json.loads(sys.argv[2])
assert "modeling_delta_llava" not in sys.modules
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **options)
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, **options)
content = [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
assert "modeling_delta_llava" not in sys.modules, "the package must not be needed"
print(json.dumps(output[0].tolist()))
"""


@pytest.fixture
def folder(model_folder):
    write_card(model_folder, repo_id=REPO, licence="apache-2.0")
    return model_folder


@pytest.fixture
def checks(monkeypatch):
    """In place of the process that loads and verifies (see `test_preflight`): what it was asked for."""
    asked = []

    def check(folder, load, verify):
        asked.append((load, verify))

    monkeypatch.setattr(preflight, "check_in_process", check)
    return asked


def answer(client, name, home, **options) -> list[int]:
    process = client("-c", ANSWER, name, json.dumps(options), home=home, token=None)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_publish_load_answer_update_the_card(hub, client, cli, folder, checks):
    published = cli("publish", folder, REPO, "--tag", "v1.0", "--collection", "Delta-LLaVA", "--message", "First")
    assert published.returncode == 0, published.stderr
    assert "checked on the Hub" in published.stdout
    assert checks == [(True, True)]
    assert hub.writer not in published.stdout + published.stderr
    assert_holds(hub, folder, "v1.0", REPO)
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [REPO]

    local = answer(client, str(folder), "empty-1")
    assert answer(client, REPO, "empty-2", revision="v1.0") == local

    write_card(folder, repo_id=REPO, revision="v1.1")
    hub.log.clear()
    updated = cli("publish", folder, REPO, "--tag", "v1.1", "--no-load")
    assert updated.returncode == 0, updated.stderr
    assert "1 files" in updated.stdout
    assert hub.requests("^PUT") == []
    repo = hub.repos[REPO]
    first, second = repo.find("v1.0").tree, repo.find("v1.1").tree
    assert {path for path in second if second[path] != first.get(path)} == {"README.md"}
    assert answer(client, REPO, "empty-3", revision="v1.1") == local

    again = cli("publish", folder, REPO, "--tag", "v1.1", "--no-load", "--collection", "Delta-LLaVA")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("nothing to upload")
    assert len(repo.history()) == 3
    assert len(hub.collections) == 1


@pytest.mark.usefixtures("checks")
def test_private_repository_is_read_with_its_token_only(hub, client, cli, folder):
    published = cli("publish", folder, REPO, "--tag", "v1.0", "--private", "--no-load")
    assert published.returncode == 0, published.stderr
    assert hub.repos[REPO].private
    fetch = "import huggingface_hub; huggingface_hub.snapshot_download('user/delta-llava-tiny', revision='v1.0')"
    refused = client("-c", fetch, home="a", token=None)
    assert "401" in refused.stderr
    process = client("-c", fetch, home="b")
    assert process.returncode == 0, process.stderr


@pytest.mark.usefixtures("checks")
def test_dry_run(hub, cli, folder):
    process = cli("publish", folder, REPO, "--tag", "v1.0", "--dry-run", "--no-load")
    assert process.returncode == 0, process.stderr
    assert "dry run" in process.stdout
    assert "does not exist yet" in process.stdout
    assert hub.repos == {}


@pytest.mark.usefixtures("checks")
def test_licence_can_be_stated_on_the_way(hub, cli, model_folder):
    write_card(model_folder, repo_id=REPO)
    assert_one_line(cli("publish", model_folder, REPO, "--tag", "v1.0", "--no-load"), "no licence is stated")
    before = {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()}
    dry = cli("publish", model_folder, REPO, "--tag", "v1.0", "--license", "apache-2.0", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    process = cli("publish", model_folder, REPO, "--tag", "v1.0", "--license", "apache-2.0")
    assert process.returncode == 0, process.stderr
    tree = hub.repos[REPO].find("v1.0").tree
    assert "license: apache-2.0" in tree["README.md"].content.decode()
    assert "Apache License" in tree["LICENSE"].content.decode()
    assert {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()} == before
    again = cli("publish", model_folder, REPO, "--tag", "v1.0", "--license", "apache-2.0")
    assert again.stdout.startswith("nothing to upload")


def test_folder_with_damaged_weights_is_not_published(hub, cli, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    process = cli("publish", folder, REPO, "--tag", "v1.0")
    assert_one_line(process, "cannot be published", "NaN")
    assert hub.log == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--create-pr", "--tag", "v1.0"], "--tag and --create-pr do not go together"),
        (["--create-pr", "--revision", "dev"], "leave out --revision"),
        (["--revision", "refs/pr/1", "--tag", "v1.0"], "do not go together"),
        (["--refresh-code", "--dry-run"], "leave out one of them"),
        (["--all", "."], "with --all give"),
    ],
)
def test_options_that_do_not_go_together(hub, cli, folder, arguments, expected):
    assert_one_line(cli("publish", folder, REPO, *arguments), expected)
    assert hub.log == []


@pytest.mark.usefixtures("checks")
def test_all_variants_of_a_folder_are_gathered(hub, cli, tmp_path):
    everything = tmp_path / "variants"
    for index, name in enumerate(("delta-llava-a", "delta-llava-b")):
        made = tiny.write_hub_folder(everything / name, num_visual_tokens=[4, 1][index])
        write_card(made, repo_id=f"org-lab/{name}", licence="mit")
    (everything / "notes").mkdir()
    for name in ("_base", ".x.building-77", "checkpoint-5"):
        shutil.copytree(made, everything / name)
    process = cli("publish", "--all", everything, "--namespace", "org-lab", "--tag", "v1.0", "--no-load")
    assert process.returncode == 0, process.stderr
    for name in ("delta-llava-a", "delta-llava-b"):
        assert_holds(hub, everything / name, "v1.0", f"org-lab/{name}")
    ((slug, collection),) = hub.collections.items()
    assert slug.startswith("org-lab/delta-llava-")
    assert [item["id"] for item in collection["items"]] == ["org-lab/delta-llava-a", "org-lab/delta-llava-b"]


@pytest.mark.usefixtures("checks")
def test_all_checks_every_folder_before_it_sends_the_first(hub, cli, tmp_path):
    everything = tmp_path / "variants"
    good = tiny.write_hub_folder(everything / "a")
    write_card(good, repo_id="user/a", licence="mit")
    shutil.copytree(good, everything / "b")
    write_card(everything / "b", repo_id="user/b")
    (everything / "b" / "optimizer.pt").write_text("x")
    process = cli("publish", "--all", everything, "--namespace", "user", "--tag", "v1.0", "--no-load")
    assert_one_line(process, "optimizer.pt is training state")
    assert hub.repos == {}


def test_all_of_nothing(hub, cli, tmp_path):
    assert_one_line(cli("publish", "--all", tmp_path, "--namespace", "user"), "holds no Hub folders")
