"""Code that is not this package's: in a JSON file or beside it, it is refused or left behind, and never run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from delta_llava.cli import main
from delta_llava.errors import UserError
from modeling_delta_llava.configuration_delta_llava import AUTO_MAP
from modeling_delta_llava.foreign_code import code_files, refuse_foreign_code, strip_foreign_code
from tests.training_layout import TrainingLayout, write_base_model, write_json, write_stage2, write_tower

LAYOUT = TrainingLayout()
NAMES = re.compile(rb"evil\.Evil|evil\.py")
FILES = {
    "config.json": {"AutoConfig": "evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", None]},
    "processor_config.json": AUTO_MAP | {"AutoImageProcessor": "evil.Evil"},
    "preprocessor_config.json": {"AutoImageProcessor": "evil.Evil"},
    "generation_config.json": {"AutoModel": "someone/evil--evil.Evil"},
    "training/tokenizer_config.json": ["evil.Evil"],
}


def change(path: Path, **fields) -> None:
    """Sets fields of a JSON file, made if need be."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, (json.loads(path.read_text()) if path.is_file() else {}) | fields)


def plant(folder: Path, marker: Path) -> None:
    """A module that leaves `marker` behind when it is imported."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")


def contents(folder: Path) -> bytes:
    """Names and bytes of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return b"\n".join(bytes(path) + b"\n" + path.read_bytes() for path in files)


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "was-run"


@pytest.fixture
def folder(hub_folder, tmp_path) -> Path:
    """A Hub folder of the test's own."""
    return shutil.copytree(hub_folder, tmp_path / "hub" / "tiny")


@pytest.fixture
def refused(folder, tmp_path, capsys):
    """Gives `folder` to every command that takes a Hub folder; the errors, each of which is one line."""
    output = tmp_path / "output"
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps({"model": str(folder), "data_path": "none", "output_dir": str(output), "use_cpu": True}))
    commands = (
        ["verify", folder],
        ["card", folder],
        ["publish", folder, "user/tiny", "--dry-run"],
        ["quantize", folder, output, "--base-model", "user/tiny"],
        ["export", folder, output],
        ["finetune", run],
    )

    def errors() -> list[str]:
        before = contents(folder)
        lines = []
        for command in commands:
            assert main([str(word) for word in command]) == 2, command
            found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(found) == 1, command
            lines += found
        assert contents(folder) == before
        assert not output.exists()
        return lines

    return errors


def test_the_payload_runs_when_it_is_trusted(folder, marker, tmp_path, monkeypatch):
    """What the other tests rely on."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    plant(folder, marker)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(AttributeError):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("file", FILES)
def test_an_auto_map_of_others_is_refused_by_every_command(file, folder, refused, marker):
    plant(folder, marker)
    change(folder / file, auto_map=FILES[file])
    for line in refused():
        assert f"auto_map in {file}" in line
    assert not marker.exists()


def test_every_other_way_to_foreign_code_is_refused(folder, refused, marker, tmp_path):
    original = shutil.copytree(folder, tmp_path / "original")
    part = json.loads((folder / "config.json").read_text())["text_config"]
    pipelines = {"image-text-to-text": {"impl": "evil.Evil", "pt": ["AutoModel"]}}
    ways = {
        "auto_map in config.json": lambda: change(
            folder / "config.json", text_config=part | {"auto_map": {"AutoModel": "evil.Evil"}}
        ),
        "custom_pipelines in config.json": lambda: change(folder / "config.json", custom_pipelines=pipelines),
        "custom_generate in generation_config.json": lambda: change(
            folder / "generation_config.json", custom_generate="someone/evil"
        ),
        "trust_remote_code in tokenizer_config.json": lambda: change(
            folder / "tokenizer_config.json", trust_remote_code=True
        ),
        "the folder custom_generate": lambda: change(folder / "custom_generate" / "config.json"),
        "evil.py": lambda: plant(folder, marker),
    }
    for words, way in ways.items():
        way()
        for line in refused():
            assert words in line
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
    refuse_foreign_code(folder)
    assert not marker.exists()


def test_what_only_looks_like_foreign_code_is_left_alone(folder):
    change(folder / "vocab.json", auto_map=5, custom_generate=6, trust_remote_code=1)
    change(folder / "processor_config.json", auto_map=AUTO_MAP)
    change(folder / "eval" / "results.json", configs={"pope": {"dataset_kwargs": {"trust_remote_code": True}}})
    change(folder / "generation_config.json", auto_map={}, trust_remote_code=False)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "zero_to_fp32.py").touch()
    (folder / "notes.json").write_text("no JSON")
    refuse_foreign_code(folder)
    assert strip_foreign_code(folder / "checkpoint-1") == []


def test_json_too_deep_to_be_read_is_refused(folder):
    (folder / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"deep\.json is nested too deeply"):
        refuse_foreign_code(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A stage-2 checkpoint, its language model and its tower, with foreign code wherever it can be named."""
    root = tmp_path_factory.mktemp("parts")
    write_tower(root / "tower", LAYOUT)
    write_base_model(root / "llm", LAYOUT)
    write_stage2(root / "stage2", LAYOUT, tower=root / "tower")
    for name in ("tower", "llm", "stage2"):
        plant(root / name, root / "was-run")
        for file, auto_map in FILES.items():
            if (root / name / file).is_file():
                change(root / name / file, auto_map=auto_map, custom_pipelines={"x": {"impl": "evil.Evil"}})
        change(root / name / "generation_config.json", custom_generate="evil.Evil")
    return root


def test_convert_takes_no_foreign_code_over(parts, folder, tmp_path, capsys):
    """From a training checkpoint, whose files are also kept for `export`, and from a Hub folder."""
    plant(folder, parts / "was-run")
    for file, auto_map in FILES.items():
        change(folder / file, auto_map=auto_map)
    (folder / "modeling_delta_llava.py").write_text(f"open({str(parts / 'was-run')!r}, 'w')\n")
    for source in (parts / "stage2", folder):
        output = tmp_path / f"converted-{source.name}"
        assert main(["convert", str(source), str(output), "--no-progress"]) == 0
        assert "names code that is not this package's: auto_map" in capsys.readouterr().err
        assert not NAMES.search(contents(output))
        assert main(["verify", str(output), "--no-progress"]) == 0
    for file in (tmp_path / "converted-stage2", tmp_path / "converted-tiny"):
        assert json.loads((file / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert main(["export", str(tmp_path / "converted-stage2"), str(tmp_path / "exported"), "--no-progress"]) == 0
    assert not NAMES.search(contents(tmp_path / "exported"))
    assert not (parts / "was-run").exists()


def test_finetune_takes_no_foreign_code_over(parts, tmp_path):
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "It is."}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 2))
    settings = {
        "language_model": str(parts / "llm"),
        "vision_tower": str(parts / "tower"),
        "projector": {"memory_feature_layers": [2, 4, 6, 7]},
        "data_path": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "max_steps": 1,
        "save_steps": 1,
        "trial_save": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert main(["finetune", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "run" / "checkpoint-1" / "tokenizer_config.json").is_file()
    assert not NAMES.search(contents(tmp_path / "run"))
    assert not (parts / "was-run").exists()


def test_changed_code_of_ours_is_not_run(folder, marker, tmp_path, capsys):
    """`publish` compares it before it loads the folder as strangers do; `quantize` loads with this package's."""
    assert main(["card", str(folder), "--repo-id", "user/tiny", "--revision", "main", "--license", "mit"]) == 0
    path = folder / "modeling_delta_llava.py"
    path.write_text(f"open({str(marker)!r}, 'w')\n" + path.read_text())
    capsys.readouterr()
    assert main(["publish", str(folder), "user/tiny", "--dry-run"]) == 2
    assert f"error: {path} differs from this version of the package" in capsys.readouterr().err
    assert main(["verify", str(folder), "--no-progress"]) == 1
    assert "differs from this version" in capsys.readouterr().out
    pytest.importorskip("bitsandbytes")
    assert main(["quantize", str(folder), str(tmp_path / "output"), "--device", "cpu"]) == 0
    for file in code_files():
        assert (tmp_path / "output" / file.name).read_bytes() == file.read_bytes()
    assert not marker.exists()


def test_an_adapter_among_whole_weights_is_not_published(folder, capsys):
    """transformers would load the model that the adapter names, with its code."""
    change(folder / "adapter_config.json", base_model_name_or_path="someone/evil")
    assert main(["publish", str(folder), "user/tiny", "--dry-run"]) == 2
    assert "adapter_config.json has transformers load the model that it names" in capsys.readouterr().err


def test_a_json_file_without_end_is_not_read(folder):
    with (folder / "notes.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match=r"notes.json has 8,192 MiB, and no such file needs more than 8"):
        refuse_foreign_code(folder)
