"""What may be published: whole, safe, licensed and loadable folders; everything else is one line."""

import json
import os
import shutil
import subprocess

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from delta_llava.errors import UserError
from delta_llava.manifest import FileHash, compare, hash_file, list_files
from modeling_delta_llava.hub_cards.card import write_card
from modeling_delta_llava.hub_cards.licences import LLAMA_2_NOTICE
from modeling_delta_llava.hub_cards.preflight import (
    check_card,
    check_contents,
    check_loading,
    check_structure,
    preflight,
)
from modeling_delta_llava.hub_cards.scan import forbidden_reason, secret_in


@pytest.fixture
def folder(model_folder):
    write_card(model_folder, repo_id="user/tiny", licence="mit")
    return model_folder


def test_good_folder_passes(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    checked = preflight(folder, "user/tiny")
    assert checked.pinned == ["v1.0"]
    assert checked.loaded["class"] == "DeltaLlavaForConditionalGeneration"
    assert len(checked.loaded["new_ids"]) == 2
    assert {file.path for file in checked.files} == set(list_files(folder))
    assert "README.md" in {file.path for file in checked.files}
    assert not os.path.exists(tmp_path / "modules"), "the user's module cache is not touched"
    assert list_files(copy) == list_files(folder), "nothing local is changed"
    assert all((copy / path).read_bytes() == (folder / path).read_bytes() for path in list_files(copy))


def test_snippets_must_load_this_repository(folder):
    with pytest.raises(UserError, match=r"the snippets load user/tiny, not user/other.*--repo-id user/other"):
        preflight(folder, "user/other")


def test_hashes_are_gits_and_sha256(folder):
    file = hash_file(folder, "config.json")
    git = subprocess.run(
        ["git", "hash-object", "--no-filters", str(folder / "config.json")], capture_output=True, text=True, check=True
    )
    assert file.oid == git.stdout.strip()
    assert file.size == (folder / "config.json").stat().st_size
    assert len(file.sha256) == 64


def test_equality_needs_a_common_hash():
    lfs, regular = FileHash("a", 3, sha256="s"), FileHash("a", 3, oid="o")
    assert not lfs.same_bytes(regular)
    assert lfs.same_bytes(FileHash("a", 3, oid="x", sha256="s"))
    assert not FileHash("a", 4, oid="o").same_bytes(regular)
    assert compare([FileHash("a", 3, "o", "s")], [regular, FileHash("b.py", 1, "p")]).delete == ("b.py",)


SECRETS = {
    "Hugging Face": "hf_" + "aB3" * 12,
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub": "ghp_" + "a1B2" * 9,
    "OpenAI": "sk-" + "proj-" + "x9Y8" * 10,
    "Google": "AIza" + "b" * 35,
    "Slack": "xoxb-" + "1234567890-" * 3,
    "Weights & Biases": "WANDB_API_KEY=" + "0a1b" * 10,
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "password in an address": "https://me:" + "hunter22@example.org/x",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found_and_not_repeated(folder, kind):
    secret = SECRETS[kind]
    (folder / "notes.txt").write_text(f"first line\nkey: {secret}\n")
    with pytest.raises(UserError) as caught:
        check_contents(folder)
    assert kind in str(caught.value)
    assert "notes.txt" in str(caught.value)
    assert "line 2" in str(caught.value)
    assert secret not in str(caught.value)


def test_a_clean_folder_has_no_false_alarm(folder):
    assert all(secret_in(folder / path) is None for path in list_files(folder))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("optimizer.pt", "training state"),
        ("rng_state_0.pth", "training state"),
        ("nested/checkpoint-100/model.safetensors", "training state"),
        ("global_step100/mp_rank_00_model_states.pt", "training state"),
        ("events.out.tfevents.1", "training state"),
        ("nested/__pycache__/x.pyc", "cache"),
        (".ipynb_checkpoints/x.py", "cache"),
        ("model.safetensors.incomplete", "cache or leftover"),
        (".env", "file for secrets"),
        ("deploy.pem", "file for secrets"),
        ("pytorch_model.bin", "pickle"),
    ],
)
def test_forbidden_files(folder, path, reason):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text("x")
    with pytest.raises(UserError, match=reason) as caught:
        check_contents(folder)
    assert path in str(caught.value)
    assert "--exclude" in str(caught.value)
    assert path not in check_contents(folder, [path])
    assert path not in check_contents(folder, [path.split("/")[0]])


@pytest.mark.parametrize("path", ["model-00001-of-00002.safetensors", "tokenizer.json", ".eval_results/paper.yaml"])
def test_what_belongs_there_is_not_forbidden(path):
    assert forbidden_reason(path) is None


def test_link_out_of_the_folder(folder, tmp_path):
    (tmp_path / "outside.txt").write_text("x")
    (folder / "inside.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UserError, match=r"inside.txt is a link out of the folder"):
        check_contents(folder)


def test_links_to_folders_and_loops(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    with pytest.raises(UserError) as caught:
        check_contents(folder)
    for part in ("linked is a link out", "loop is no regular file", "dangling is no regular file"):
        assert part in str(caught.value)
    assert "linked" not in check_contents(folder, ["linked", "loop", "dangling"])


def test_what_the_client_never_uploads_is_not_looked_at(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]")
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/x.lock").write_text("")
    assert not any(path.startswith((".git/", ".cache/")) for path in check_contents(folder))


def test_what_training_keeps_beside_its_result_is_left_out(folder):
    result = check_contents(folder)
    for path in (
        "_base/model.safetensors",
        "_finetuning.yaml",
        "__pycache__/x.pyc",
        "checkpoint-100/optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "runs/Nov21/events.out.tfevents.1",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    assert check_contents(folder) == result


def test_licence_is_demanded_and_can_be_stated(model_folder):
    write_card(model_folder, repo_id="user/tiny")
    with pytest.raises(UserError, match=r"no licence is stated: state one with --license"):
        check_card(model_folder)
    with pytest.raises(UserError, match="is no licence identifier"):
        check_card(model_folder, "unknown")
    assert check_card(model_folder, "apache-2.0").data.license == "apache-2.0"
    assert ModelCard.load(model_folder / "README.md").data.license == "apache-2.0"
    assert "Apache License" in (model_folder / "LICENSE").read_text()
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    assert "`apache-2.0`, see [LICENSE](LICENSE); NOTICE lists" in text
    assert "No licence is stated" not in text
    assert check_card(model_folder).data.license == "apache-2.0"
    with pytest.raises(UserError, match="make them agree"):
        check_card(model_folder, "mit")


def test_llama_2_licence_stated_on_the_way_has_its_notice(model_folder):
    write_card(model_folder, repo_id="user/tiny")
    for _ in range(2):
        check_card(model_folder, "llama2")
    assert (model_folder / "NOTICE").read_text(encoding="utf-8").count(LLAMA_2_NOTICE) == 1
    assert "LLAMA 2 COMMUNITY LICENSE" in (model_folder / "LICENSE").read_text(encoding="utf-8").upper()


def change_card(folder, **fields):
    card = ModelCard.load(folder / "README.md")
    for name, value in fields.items():
        card.data[name] = value
    card.save(folder / "README.md")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"license": "no-such-licence"}, "no licence identifier"),
        ({"license": "other"}, "license_name"),
        ({"pipeline_tag": "text-generation"}, "pipeline_tag"),
        ({"library_name": "timm"}, "library_name"),
        ({"base_model": "a/b/c"}, "no Hub id"),
        ({"base_model": ["a/b", "c/d"]}, "base_model_relation"),
        ({"base_model": "a/b", "base_model_relation": "child"}, "base_model_relation is 'child'"),
        ({"language": "english"}, "ISO 639"),
        ({"datasets": ["not a name"]}, "no Hub id"),
    ],
)
def test_invalid_metadata_is_named(folder, fields, expected):
    change_card(folder, **fields)
    with pytest.raises(UserError, match=expected):
        check_card(folder)


def test_broken_cards_are_named(folder):
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text("# no metadata\n")
    with pytest.raises(UserError, match="no metadata block"):
        check_card(folder)
    readme.write_text("---\na: [\n---\n")
    with pytest.raises(UserError, match="no valid YAML"):
        check_card(folder)
    readme.write_text(text + "\n![figure](missing.png)\n")
    with pytest.raises(UserError, match=r"shows missing.png"):
        check_card(folder)
    readme.write_text(text)
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results/x.yaml").write_text("- value: 3\n")
    with pytest.raises(UserError, match=r"\.eval_results/x.yaml cannot be read"):
        check_card(folder)
    readme.unlink()
    with pytest.raises(UserError, match=r"there is no README\.md"):
        check_card(folder)


def test_structure_is_checked(folder, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        check_structure(tmp_path / "nowhere")
    (folder / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r"processor_config.json is missing"):
        check_structure(folder)


def test_code_and_weights_must_be_there(folder):
    (folder / "modeling_delta_llava.py").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"modeling_delta_llava.py is missing; there are no safetensors weights"):
        check_structure(folder)


def test_auto_map_must_name_the_headless_class(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks AutoModel"):
        check_structure(folder)


def test_missing_weights_fail_the_load_check(folder, client):
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "multi_modal_projector" in key)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    process = client("-m", "modeling_delta_llava.hub_cards.load_check", folder)
    assert process.returncode == 1
    assert json.loads(process.stdout) == {"error": f"ValueError: 1 missing keys, the first is {name}"}


def test_code_that_needs_this_package_fails_the_load_check(folder):
    path = folder / "configuration_delta_llava.py"
    path.write_text("import no_such_package_anywhere\n" + path.read_text())
    with pytest.raises(UserError, match=r"does not load in a fresh process.*no_such_package_anywhere"):
        check_loading(folder)


def test_problems_are_listed_together(folder):
    for name in ("optimizer.pt", "a.pt", "b.pt", "c.pt", "d.pt", "e.pt"):
        (folder / name).write_text("x")
    with pytest.raises(UserError, match=r"and 2 more") as caught:
        check_contents(folder)
    assert "\n" not in str(caught.value)
