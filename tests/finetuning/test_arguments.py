"""Settings: YAML files, overrides, and every way in which they can be wrong."""

import pytest
import yaml

from delta_llava.errors import UserError
from modeling_delta_llava.finetuning.arguments import (
    CONFIG_FOLDER,
    build_arguments,
    config_path,
    load_arguments,
    packaged_recipes,
    parse_overrides,
    read_settings,
)
from modeling_delta_llava.finetuning.checkpoints import check_identity, write_settings

MINIMAL = {"model": "m", "data_path": "d.json", "output_dir": "o", "use_cpu": True}


def test_later_values_win(tmp_path):
    (tmp_path / "base.yaml").write_text("model: m\nlearning_rate: 1.0e-3\nseed: 1\nuse_cpu: true\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nseed: 2\noutput_dir: o\n")
    run = load_arguments(str(tmp_path / "run.yaml"), ["--data_path", "d.json", "--seed=3", "--learning-rate", "2e-5"])
    assert (run.training.seed, run.training.learning_rate, run.data.data_path) == (3, 2e-5, "d.json")


def test_overrides_are_typed():
    assert parse_overrides(["--a", "1", "--b=x", "--flag", "--list", "[576, 144]", "--none", "null"]) == {
        "a": 1,
        "b": "x",
        "flag": True,
        "list": [576, 144],
        "none": None,
    }
    with pytest.raises(UserError, match="unexpected argument"):
        parse_overrides(["learning_rate", "1"])


def test_both_spellings_of_checkpointing():
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert build_arguments({**MINIMAL, name: True}).training.gradient_checkpointing is True


BAD_SETTINGS = {
    "unknown key": ({"learning_rte": 1}, "did you mean learning_rate"),
    "word for a number": ({"learning_rate": "fast"}, "learning_rate must be a number"),
    "fraction for a count": ({"seed": 1.5}, "seed must be a whole number"),
    "word for a flag": ({"bf16": "perhaps"}, "bf16 must be true or false"),
    "no list": ({"visual_token_budgets": "many"}, "list of whole numbers"),
    "format": ({"format": "v7"}, "one of template, v1, plain"),
    "quantization": ({"quantization": "2bit"}, "one of none, 4bit, 8bit"),
    "empty budgets": ({"visual_token_budgets": []}, "different positive numbers"),
    "budget twice": ({"visual_token_budgets": [4, 4]}, "different positive numbers"),
    "negative budget": ({"visual_token_budgets": [4, -1]}, "different positive numbers"),
    "too few weights": (
        {"visual_token_budgets": [4, 1], "visual_token_budget_weights": [1.0]},
        "one number >= 0 for each",
    ),
    "zero weights": ({"visual_token_budgets": [4], "visual_token_budget_weights": [0]}, "not all 0"),
    "weights alone": ({"visual_token_budget_weights": [1.0]}, "without visual_token_budgets"),
    "nothing trained": ({"train_projector": False}, "nothing is trained"),
    "quantised training": ({"quantization": "4bit"}, "set lora_rank"),
    "LoRA and full": ({"lora_rank": 8, "train_language_model": True}, "train_language_model: false"),
    "stream without end": ({"streaming": True}, "set max_steps"),
    "grouped stream": (
        {"streaming": True, "max_steps": 3, "group_by_modality_length": True},
        "cannot be grouped by length",
    ),
    "evaluation without data": ({"eval_strategy": "steps"}, "eval_data_path"),
    "two starts": ({"language_model": "l", "vision_tower": "v"}, "already has a language model"),
    "no start": ({"model": None}, "to start from"),
    "no data": ({"data_path": None}, "no data_path"),
    "no output": ({"output_dir": None}, "no output_dir"),
    "no length": ({"max_length": 0}, "at least 1"),
    "unknown logger": ({"report_to": "foo"}, "report_to: foo is not supported"),
    "missing logger": ({"report_to": ["clearml"]}, "report_to: .*'clearml' to be installed"),
    "other grouping": ({"train_sampling_strategy": "group_by_length"}, "set group_by_modality_length: true"),
    "other balancing": ({"train_sampling_strategy": "batch_rebalance"}, "set group_by_modality_length: true"),
    "refused by transformers": ({"load_best_model_at_end": True}, "(?i)save and eval strategy"),
}


@pytest.mark.parametrize(("changes", "words"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings(changes, words):
    with pytest.raises(UserError, match=words) as raised:
        build_arguments({**MINIMAL, **changes}, where="run.yaml")
    assert "\n" not in str(raised.value)


def test_a_run_is_told_by_what_its_settings_mean(tmp_path):
    """Defaults said aloud and other splits of a batch are the same run; checkpoints may come from before a setting."""
    given = {**MINIMAL, "visual_token_budgets": [4, 1]}
    write_settings(tmp_path, build_arguments(given).settings)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for same in (
        {},
        {"seed": 42, "max_length": 2048, "lora_rank": "0"},
        split,
        {"learning_rate": 1.0, "save_steps": 7},
    ):
        check_identity(tmp_path, build_arguments({**given, **same}).settings)
    different = {
        "visual_token_budgets": [4],
        "visual_token_budget_weights": [2, 1],
        "num_visual_tokens": 4,
        "image_folder": "elsewhere",
        "image_aspect_ratio": "square",
        "max_length": 100,
        "group_by_modality_length": True,
        "train_sampling_strategy": "sequential",
        "seed": 7,
        "data_seed": 7,
    }
    for name, value in different.items():
        with pytest.raises(UserError, match=f"belongs to another run: {name} differ"):
            check_identity(tmp_path, build_arguments({**given, name: value}).settings)
    with pytest.raises(UserError, match=r"total_batch_size differ \(total_batch_size was 8, now 16\)"):
        check_identity(tmp_path, build_arguments({**given, "gradient_accumulation_steps": 2}).settings)
    with pytest.raises(UserError, match="projector_learning_rate_given differ"):
        check_identity(tmp_path, build_arguments({**given, "projector_learning_rate": 1e-4}).settings)
    write_settings(tmp_path, MINIMAL)
    check_identity(tmp_path, build_arguments({**given, "seed": 7}).settings)
    with pytest.raises(UserError, match="model differ"):
        check_identity(tmp_path, build_arguments({**given, "model": "n"}).settings)


def test_bad_files(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n  bad: [")
    with pytest.raises(UserError, match="line 2"):
        read_settings(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="key: value"):
        read_settings(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("base: c.yaml\n")
    with pytest.raises(UserError, match="back to itself"):
        read_settings(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("base: none.yaml\n")
    with pytest.raises(UserError, match="does not exist"):
        read_settings(tmp_path / "d.yaml")
    with pytest.raises(UserError, match=r"packaged recipes are .*vicuna-7b/stage1"):
        config_path("vicuna-8b/stage1")


PAPER = {"stage1": (1e-3, 256), "stage2": (2e-5, 128)}


@pytest.mark.parametrize("recipe", packaged_recipes())
def test_packaged_recipes_build_and_say_how_to_start_them(recipe, tmp_path):
    path = config_path(recipe)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert f"delta-llava finetune {recipe}" in path.read_text(encoding="utf-8")
    settings = read_settings(path)
    start = {"stage1": {"language_model": "l", "vision_tower": "v"}, "stage2": {"model": "m"}}.get(recipe, {})
    machine = {"data_path": "d.json", "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "tf32": None}
    run = build_arguments({**settings, **start, **machine})
    stage = path.stem
    if stage in PAPER:
        rate, batch = PAPER[stage]
        assert run.training.learning_rate == rate
        devices = 8
        per_device = run.training.per_device_train_batch_size * run.training.gradient_accumulation_steps
        assert per_device * devices == batch
        assert run.model.train_language_model == (stage == "stage2")
        assert run.model.train_projector
        assert not run.model.train_vision_tower
        assert run.training.lr_scheduler_type == "cosine"
        assert run.training.warmup_steps == 0.03
        assert run.training.weight_decay == 0
        assert settings["bf16"] is True
        assert run.data.max_length == 2048
        assert run.training.group_by_modality_length == (stage == "stage2")
        assert run.data.image_aspect_ratio == ("pad" if stage == "stage2" else "square")


def test_every_backbone_has_both_stages():
    backbones = {recipe.split("/")[0] for recipe in packaged_recipes() if recipe.endswith("/stage1")}
    assert backbones == {"vicuna-7b", "vicuna-13b", "qwen2.5-7b"}
    assert {f"{backbone}/stage2" for backbone in backbones} <= set(packaged_recipes())


@pytest.mark.parametrize("file", sorted((CONFIG_FOLDER / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_configs_are_read_by_accelerate(file):
    from accelerate.commands.config.config_args import ClusterConfig

    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = ClusterConfig.from_yaml_file(str(file))
    assert config.num_processes == settings["num_processes"] == 8
    assert config.mixed_precision == "bf16"
