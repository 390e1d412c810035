"""What may be published: whole, safe, licensed and loadable folders; everything else is one line."""

import base64
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from delta_llava.errors import UserError
from modeling_delta_llava import foreign_code
from modeling_delta_llava.hub_cards import check_folder
from modeling_delta_llava.hub_cards import preflight as module
from modeling_delta_llava.hub_cards.card import write_card
from modeling_delta_llava.hub_cards.contents import FileHash, compare, hash_file, list_files, secret_in
from modeling_delta_llava.hub_cards.licences import LLAMA_2_NOTICE
from modeling_delta_llava.hub_cards.preflight import check_card as check_card_of
from modeling_delta_llava.hub_cards.preflight import (
    check_contents,
    check_in_process,
    preflight,
    refresh_code,
)
from modeling_delta_llava.hub_cards.preflight import check_structure as check_structure_of


def check_card(folder, licence=None):
    return check_card_of(folder, list_files(folder), "user/tiny", licence)


def check_structure(folder, exclude=()):
    return check_structure_of(folder, list_files(folder, exclude))


@pytest.fixture
def folder(model_folder):
    write_card(model_folder, repo_id="user/tiny", licence="mit")
    return model_folder


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_good_folder_passes(folder, tmp_path, monkeypatch):
    before = contents(folder)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    checked = preflight(folder, "user/tiny")
    assert checked.pinned == "v1.0"
    assert {file.path for file in checked.files} == set(list_files(folder)) == set(checked.sources)
    assert not (tmp_path / "modules").exists(), "the user's module cache is not touched"
    assert list((tmp_path / "scratch").iterdir()) == []
    assert contents(folder) == before


def test_the_checking_process_ends_with_the_one_that_started_it(folder, tmp_path):
    """However that one ends: its end of the pipe is closed. Nothing is left behind."""
    script = Path(module.__file__).with_name("check_folder.py")
    process = subprocess.Popen(
        [sys.executable, "-P", script, folder, "--load", "--verify"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("delta-llava-check-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.stdin.close()
    assert process.wait(60) == 1
    assert list(tmp_path.glob("delta-llava-check-*")) == []
    assert process.stdout.read() == b""
    process.stdout.close()


def test_snippets_must_load_this_repository(folder):
    with pytest.raises(UserError, match=r"the snippets load user/tiny, not user/other.*--repo-id user/other"):
        preflight(folder, "user/other")


def test_hashes_are_gits_and_sha256(folder):
    file = hash_file("config.json", folder / "config.json")
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
    "Hugging Face token": "hf_" + "aB3" * 12,
    "AWS Access Key": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub Token": "ghp_" + "a1B2" * 9,
    "GitHub token": "github_pat_" + "a1B2_" * 16,
    "GitLab Token": "glpat-" + "a1B2C" * 4,
    "OpenAI or Anthropic key": "sk-" + "proj-" + "x9Y8" * 10,
    "Google API key": "AIza" + "b" * 35,
    "Slack Token": "xoxb-" + "1234567890-" * 3 + "ab12",
    "Weights & Biases key": "WANDB_API_KEY=" + "0a1b" * 10,
    "npm token": "npm_" + "a1B2" * 9,
    "Stripe Access Key": "sk_live_" + "a1B2" * 6,
    "Telegram Bot Token": "123456789:" + "a1B2_" * 7,
    "Private Key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "Basic Auth Credentials": "https://me:" + "hunter22@example.org/x",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found_and_not_repeated(folder, kind):
    secret = SECRETS[kind]
    (folder / "notes.txt").write_text(f"first line\nkey: {secret}\n")
    with pytest.raises(UserError) as caught:
        check_contents(folder)
    assert f"notes.txt holds a secret ({kind}) in line 2" in str(caught.value)
    assert secret not in str(caught.value)
    with pytest.raises(UserError, match="holds a secret"):
        check_contents(folder, include=["notes.txt"])


def in_picture(secret: str, compressed: bool) -> bytes:
    text, picture = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("Comment", f"made with {secret}", zip=compressed)
    Image.new("RGB", (4, 4)).save(picture, "PNG", pnginfo=text)
    return picture.getvalue()


TOKEN, GITLAB = SECRETS["Hugging Face token"], SECRETS["GitLab Token"]
HIDDEN_IN = {
    "utf-16": ("a.txt", f"x\n{TOKEN}".encode("utf-16")),
    "utf-16 without a mark": ("a.txt", f"x\n{TOKEN}".encode("utf-16-be")),
    "utf-32": ("a.txt", TOKEN.encode("utf-32")),
    "utf-8 with a mark": ("a.txt", TOKEN.encode("utf-8-sig")),
    "latin-1": ("a.txt", f"\xe9{TOKEN}\xe9".encode("latin-1")),
    "a JSON string": ("a.json", json.dumps({"note": f"first\n{TOKEN}"}).encode()),
    "a JSON string's escapes": ("a.json", json.dumps(TOKEN).replace("hf", "\\u0068f").encode()),
    "a nested JSON string": ("a.json", json.dumps(json.dumps({"note": f"x\t{GITLAB}"})).encode()),
    "a template": ("a.jinja", ("{{ 'x\\n" + GITLAB + "' }}").encode()),
    "behind a megabyte": ("a.txt", b"a b\n" * 300_000 + GITLAB.encode()),
    "across windows": ("a.txt", b"." * (2**20 - 10) + TOKEN.encode()),
    "a picture": ("a.png", in_picture(TOKEN, False)),
    "a picture's compressed text": ("a.png", in_picture(TOKEN, True)),
}


@pytest.mark.parametrize("place", HIDDEN_IN)
def test_secrets_are_found_wherever_they_stand(tmp_path, place):
    name, content = HIDDEN_IN[place]
    (tmp_path / name).write_bytes(content)
    assert "a secret (" in secret_in(tmp_path / name)


def test_secret_in_the_header_of_weights_is_found(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"format": "pt", "note": f"x\n{TOKEN}"})
    assert "Hugging Face token" in secret_in(tmp_path / "a.safetensors")


def test_a_clean_folder_has_no_false_alarm(folder, tmp_path):
    assert all(secret_in(folder / path) is None for path in list_files(folder))
    random = base64.b64encode(os.urandom(300_000)).decode()
    vocabulary = {piece: index for index, piece in enumerate(["hf_", "sk-", "://", "AKIA", "@", "eyJ", "BEGIN"])}
    texts = {
        "record.json": json.dumps({"dropped_tensors": {"x": {"base64": random}}}),
        "tokenizer.json": json.dumps({"vocab": vocabulary}, separators=(",", ":")),
        "a.yaml": f"sha256: {hashlib.sha256(b'x').hexdigest()}\nmd5: {hashlib.md5(b'x').hexdigest()}\n",
        "a.md": "See https://user@example.org/ and [x](https://example.org/a@b); pass `HF_TOKEN`.",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert secret_in(tmp_path / name) is None, name


NO_KIND = "is not of a kind that model repositories hold"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("optimizer.pt", "is training state"),
        ("optimizer.safetensors", "is training state"),
        ("nested/checkpoint-100/model.safetensors", "is training state"),
        ("global_step100/a.json", "is training state"),
        ("rng_state_0.pth", NO_KIND),
        ("events.out.tfevents.1", NO_KIND),
        ("nested/x.pyc", NO_KIND),
        (".ipynb_checkpoints/x.py", NO_KIND),
        ("model.safetensors.incomplete", NO_KIND),
        (".README.md.unfinished", NO_KIND),
        (".env", NO_KIND),
        (".ENV", NO_KIND),
        (".env.json", NO_KIND),
        ("id_ecdsa", NO_KIND),
        (".aws/credentials", "file for secrets"),
        ("client_secret_1.json", "file for secrets"),
        ("deploy.pem", NO_KIND),
        ("pytorch_model.bin", NO_KIND),
        ("x.PT", NO_KIND),
        ("objects.npy", NO_KIND),
        ("a.zip", NO_KIND),
        ("a.json", "is no JSON"),
        ("a.png", "is no picture"),
        ("a.model", "is no sentencepiece model"),
        ("other.safetensors", "is no safetensors"),
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
    assert path in check_contents(folder, include=[path])


def test_pickles_do_not_pass_as_text(folder):
    (folder / "a.txt").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(UserError, match=r"a.txt is no UTF-8 text"):
        check_contents(folder)


def test_what_is_included_must_be_there(folder):
    with pytest.raises(UserError, match=r"--include a.bin: there is no such file"):
        check_contents(folder, include=["a.bin"])


@pytest.mark.parametrize("path", ["model-00001-of-00002.safetensors", "assets/photo.PNG", ".eval_results/paper.yaml"])
def test_what_belongs_there_is_not_forbidden(folder, path):
    (folder / path).parent.mkdir(exist_ok=True)
    source = {"s": folder / "model.safetensors", "G": folder / "example.png", "l": folder / "NOTICE"}[path[-1]]
    shutil.copyfile(source, folder / path)
    assert path in check_contents(folder)


@pytest.mark.parametrize("pattern", ["*", "config.json", "*.py", "model.safetensors", "tokenizer_config.json", "c*"])
def test_what_a_model_needs_cannot_be_excluded(folder, pattern):
    """The checks look at exactly what is sent."""
    with pytest.raises(UserError, match=r"cannot be published: .* (is missing|are no safetensors weights)"):
        preflight(folder, "user/tiny", exclude=[pattern])


@pytest.mark.parametrize("pattern", ["README.md", "example.png"])
def test_what_the_card_needs_cannot_be_excluded(folder, pattern):
    readme = folder / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8") + "\n![x](example.png)\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no README|shows example.png"):
        preflight(folder, "user/tiny", exclude=[pattern])


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
    before = contents(model_folder)
    with pytest.raises(UserError, match=r"no licence is stated: state one with --license"):
        check_card(model_folder)
    with pytest.raises(UserError, match="is no licence identifier"):
        check_card(model_folder, "unknown")
    card, files = check_card(model_folder, "apache-2.0")
    assert card.data.license == "apache-2.0"
    assert ModelCard(files["README.md"].decode()).data.license == "apache-2.0"
    assert "Apache License" in files["LICENSE"].decode()
    assert contents(model_folder) == before, "nothing is written"
    for name, content in files.items():
        (model_folder / name).write_bytes(content)
    assert check_card(model_folder)[1] == {}
    with pytest.raises(UserError, match="make them agree"):
        check_card(model_folder, "mit")


def test_llama_2_licence_stated_on_the_way_has_its_notice(model_folder):
    write_card(model_folder, repo_id="user/tiny")
    _, files = check_card(model_folder, "llama2")
    assert files["NOTICE"].decode().startswith((model_folder / "NOTICE").read_text(encoding="utf-8"))
    assert files["NOTICE"].decode().count(LLAMA_2_NOTICE) == 1
    assert "LLAMA 2 COMMUNITY LICENSE" in files["LICENSE"].decode().upper()


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
    with pytest.raises(UserError, match="its metadata is not valid"):
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
        preflight(tmp_path / "nowhere", "user/tiny")
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


def test_missing_weights_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "multi_modal_projector" in key)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"ValueError: 1 missing keys, the first is {name}"):
        check_in_process(folder, load=True, verify=False)


def test_a_shard_that_the_index_names_must_be_there(folder):
    index = {"weight_map": {"x": "model.safetensors", "y": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-2.safetensors is missing"):
        check_structure(folder)


def test_code_of_an_earlier_release_is_refreshed_on_request(folder):
    old = folder / "modeling_delta_llava.py"
    new = old.read_bytes()
    old.write_text("# an earlier release\n")
    with pytest.raises(UserError, match=r"differs from this version of the package: .*--refresh-code"):
        foreign_code.check_code(folder)
    refresh_code(folder)
    assert old.read_bytes() == new
    foreign_code.check_code(folder)
    (folder / "other.py").write_text("")
    with pytest.raises(UserError, match="brings code that is not this package's"):
        refresh_code(folder)


def test_problems_are_listed_together(folder):
    for name in ("optimizer.pt", "a.pt", "b.pt", "c.pt", "d.pt", "e.pt"):
        (folder / name).write_text("x")
    with pytest.raises(UserError, match=r"and 2 more") as caught:
        check_contents(folder)
    assert "\n" not in str(caught.value)


def test_scratch_that_is_still_written_to_is_removed(tmp_path, monkeypatch):
    """The checking process whose parent was killed removes its scratch folder while another thread of it writes."""
    scratch, status = tmp_path / "scratch", []
    scratch.mkdir()
    remove = shutil.rmtree

    def remove_beside_a_writer(path, **options):
        monkeypatch.setattr(shutil, "rmtree", remove)
        remove(path, **options)
        scratch.mkdir()
        (scratch / "offload").touch()

    monkeypatch.setattr(shutil, "rmtree", remove_beside_a_writer)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(os, "_exit", status.append)
    check_folder.end_with_parent(str(scratch))
    assert status == [1]
    assert not scratch.exists()
