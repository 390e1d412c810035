"""Settings: YAML files, overrides, and every way in which they can be wrong."""

import dataclasses
import re
import typing

import pytest
import yaml
from hypothesis import example, given, strategies
from hypothesis import settings as hypothesis_settings
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from delta_llava.errors import UserError
from delta_llava.redaction import tokens_in_use
from modeling_delta_llava.finetuning.arguments import (
    CONFIG_FOLDER,
    EXCLUSIVE,
    LIMITS,
    NEEDS,
    REFUSED,
    DataArguments,
    DeltaLlavaTrainingArguments,
    ModelArguments,
    build_arguments,
    config_path,
    load_arguments,
    packaged_recipes,
    read_settings,
)
from modeling_delta_llava.finetuning.checkpoints import check_identity, write_settings

MINIMAL = {"model": "m", "data_path": "d.json", "output_dir": "o", "use_cpu": True}
PARTS = {"model": None, "language_model": "l", "vision_tower": "v"}
EVALUATED = {"eval_data_path": "e.json", "eval_strategy": "steps", "eval_steps": 2}
FIELDS = {
    entry.name: entry
    for group in (ModelArguments, DataArguments, DeltaLlavaTrainingArguments)
    for entry in dataclasses.fields(group)
}
HINTS = {
    name: hint
    for group in (ModelArguments, DataArguments, DeltaLlavaTrainingArguments)
    for name, hint in typing.get_type_hints(group).items()
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A YAML file that needs no more settings."""
    file = tmp_path_factory.mktemp("settings") / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return file


def value_of(run, name):
    return {**vars(run.model), **vars(run.data), **vars(run.training)}[name]


def refusal(settings):
    """What is said about settings, in one line that begins with where they stand."""
    with pytest.raises(UserError) as raised:
        build_arguments({**MINIMAL, **settings}, where="run.yaml")
    message = str(raised.value)
    assert message.startswith("run.yaml: ")
    assert "\n" not in message
    return message


def test_later_values_win(tmp_path):
    (tmp_path / "base.yaml").write_text("model: m\nlearning_rate: 1.0e-3\nseed: 1\nuse_cpu: true\nmax_steps: 7\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nseed: 2\noutput_dir: o\nmax_steps: null\n")
    run = load_arguments(str(tmp_path / "run.yaml"), ["--data_path", "d.json", "--seed=3", "--learning-rate", "2e-5"])
    assert (run.training.seed, run.training.learning_rate, run.data.data_path) == (3, 2e-5, "d.json")
    assert run.training.max_steps == -1


# Texts, and the values that they are; as flags and in a YAML file alike.
MEANT = {
    "leading zeros": ("output_dir", "001", "001"),
    "an octal number": ("model_revision", "0012345", "0012345"),
    "a commit of digits": ("model_revision", "1e10", "1e10"),
    "a trailing zero": ("run_name", "1.10", "1.10"),
    "a word that YAML takes for a flag": ("split", "on", "on"),
    "another": ("eval_split", "no", "no"),
    "a date": ("output_dir", "2024-01-05", "2024-01-05"),
    "no date": ("output_dir", "2024-13-45", "2024-13-45"),
    "a dash": ("run_name", "-x", "-x"),
    "a dash and a space": ("run_name", "-x y", "-x y"),
    "a colon": ("metric", "./scores.py:mean", "./scores.py:mean"),
    "a slice": ("split", "train[:80%]", "train[:80%]"),
    "a comma": ("split", "train,test", "train,test"),
    "no octal budget": ("num_visual_tokens", "0144", 144),
    "a rate without a point": ("learning_rate", "1e-3", 1e-3),
    "a share": ("warmup_steps", "0.03", 0.03),
    "a flag": ("bf16", "True", True),
    "a flag of YAML": ("bf16", "on", True),
    "a flag for a name": ("resume_from_checkpoint", "True", "true"),
    "another flag for a name": ("trackio_static_space_id", "false", False),
    "a flag of transformers": ("bf16", "no", False),
    "a word in place of a flag": ("report_to", "none", []),
    "several words": ("visual_token_budgets", "[16, 4, 1]", [16, 4, 1]),
    "one word of several": ("visual_token_budgets", "16", [16]),
    "a mapping": ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
}
MORE = {
    "metric": {"predict_with_generate": True, **EVALUATED},
    "eval_split": EVALUATED,
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
}


@pytest.mark.parametrize(("name", "text", "value"), MEANT.values(), ids=MEANT.keys())
def test_a_text_means_what_it_says(config, tmp_path, name, text, value):
    file = tmp_path / "run.yaml"
    more = MORE.get(name, {})
    file.write_text(yaml.safe_dump({**MINIMAL, **more, name: None}).replace(f"{name}: null", f"{name}: {text}"))
    words = [word for key, given in more.items() for word in (f"--{key}", str(given))]
    for run in (
        load_arguments(str(file), []),
        load_arguments(str(config), [*words, f"--{name}", text]),
        load_arguments(str(config), [*words, f"--{name.replace('_', '-')}={text}"]),
    ):
        assert value_of(run, name) == value
        assert type(value_of(run, name)) is type(value)


@hypothesis_settings(max_examples=40, deadline=None)
@example("--x").via("looks like a setting")
@example("~").via("YAML's null")
@example("012").via("YAML's octal number")
@example("12:30:00").via("YAML's sexagesimal number")
@example("%(default)s").via("argparse's own")
@example("@file").via("argparse's files")
@given(strategies.text(strategies.characters(exclude_categories=["C", "Z"], include_characters=" ")))
def test_any_text_comes_out_as_it_went_in(config, text):
    if text == "--" or any(token in text for token in tokens_in_use()):
        return
    file = config.with_name("text.yaml")
    file.write_text(yaml.safe_dump({**MINIMAL, "run_name": text}), encoding="utf-8")
    assert load_arguments(str(file), []).training.run_name == text
    assert load_arguments(str(config), [f"--run_name={text}"]).training.run_name == text
    if not text.startswith("--"):
        assert load_arguments(str(config), ["--run_name", text]).training.run_name == text


def test_flags_lists_and_mappings(config):
    def read(*words):
        return load_arguments(str(config), list(words))

    for words in (["--bf16"], ["--greater_is_better"], ["--gradient_checkpointing"], ["--activation-checkpointing"]):
        name = words[0][2:].replace("-", "_").replace("activation", "gradient")
        assert value_of(read(*words), name) is True
    assert read("--no_trial_save").training.trial_save is False
    assert read("--check-data").check_data is True
    assert read("--check_data", "false").check_data is False
    budgets = ["--visual_token_budgets", "16", "4", "--visual_token_budget_weights", "2", "0.5"]
    assert read(*budgets).training.visual_token_budget_weights == [2.0, 0.5]
    assert read("--report_to", "none", "--lora_rank=2", "--lora_target_modules", "q_proj,v_proj").model.lora_rank == 2
    for projector in ({"a": 1e-05, "b": [1, "no"]}, '{"a": 1e-05, "b": [1, "no"]}', "{a: 1.0e-05, b: [1, 'no']}"):
        run = build_arguments({**MINIMAL, **PARTS, "projector": projector})
        assert run.model.projector == {"a": 1e-05, "b": [1, "no"]}
    with pytest.raises(UserError, match="unexpected argument; overrides are written --key value"):
        read("learning_rate", "1")


def test_a_mapping_in_a_file_keeps_its_types(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "language_model: l\nvision_tower: v\ndata_path: d\noutput_dir: o\nuse_cpu: on\n"
        "projector:\n  delta_rank: 16\n  drop_path_rate: 1.0e-5\n  memory_feature_layers: [2, 4]\n"
    )
    projector = load_arguments(str(tmp_path / "run.yaml"), []).model.projector
    assert projector == {"delta_rank": 16, "drop_path_rate": 1e-05, "memory_feature_layers": [2, 4]}


def test_what_transformers_needs_is_filled_in():
    run = build_arguments({**MINIMAL, **EVALUATED, "save_strategy": "best"})
    assert (run.training.metric_for_best_model, run.training.greater_is_better) == ("loss", False)
    assert run.training.remove_unused_columns is False
    assert run.training.prediction_loss_only is False
    assert run.training.accelerator_config.dispatch_batches is False
    kept = build_arguments({**MINIMAL, "accelerator_config": {"non_blocking": True}}).training.accelerator_config
    assert (kept.non_blocking, kept.dispatch_batches) == (True, False)


BAD_SETTINGS = {
    "unknown key": ({"learning_rte": 1}, "unknown setting 'learning_rte'; did you mean learning_rate"),
    "unknown, nothing near": ({"qqqq": 1}, "--help"),
    "former name": ({"group_by_modality_length": True}, "set train_sampling_strategy: group_by_length"),
    "word for a number": ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'"),
    "fraction for a count": ({"seed": 1.5}, "seed: invalid int value: '1.5'"),
    "word for a flag": ({"bf16": "perhaps"}, "bf16: .*perhaps"),
    "no list": ({"visual_token_budgets": "many"}, "visual_token_budgets: invalid int value"),
    "two words for one": ({"run_name": ["a", "b"]}, "b: a value too many"),
    "a setting inside a list": ({"lora_target_modules": ["q", "--seed=3"]}, "lora_target_modules: .*begins with --"),
    "format": ({"format": "v7"}, "format: invalid choice: 'v7' .*template.*v1.*plain"),
    "quantization": ({"quantization": "2bit"}, "quantization: invalid choice"),
    "optimizer": ({"optim": "adamm"}, "optim: invalid choice"),
    "sampling": ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy: invalid choice"),
    "empty budgets": ({"visual_token_budgets": []}, "visual_token_budgets: expected at least one argument"),
    "budget twice": ({"visual_token_budgets": [4, 4]}, "visual_token_budgets must be different"),
    "too few weights": ({"visual_token_budgets": [4, 1], "visual_token_budget_weights": [1.0]}, "for each budget"),
    "zero weights": ({"visual_token_budgets": [4], "visual_token_budget_weights": [0]}, "not all 0"),
    "nothing trained": ({"train_projector": False}, "nothing is trained"),
    "grouped stream": (
        {"streaming": True, "max_steps": 3, "train_sampling_strategy": "group_by_length"},
        "cannot be grouped by length",
    ),
    "no start": ({"model": None}, "to start from"),
    "half a start": ({"model": None, "language_model": "l"}, "to start from"),
    "no data": ({"data_path": None}, "no data_path"),
    "no output": ({"output_dir": None}, "no output_dir"),
    "projector without fields": ({**PARTS, "projector": "3"}, "projector must be a mapping"),
    "unknown logger": ({"report_to": "foo"}, "foo is not supported"),
    "missing logger": ({"report_to": ["clearml"]}, "'clearml' to be installed"),
    "save and eval apart": (
        {**EVALUATED, "load_best_model_at_end": True, "save_strategy": "no"},
        "(?i)save and eval strategy",
    ),
    "best of nothing": ({"save_strategy": "best"}, "needs an eval_strategy"),
    "unmeasured metric": ({**EVALUATED, "metric_for_best_model": "exact_match"}, "must be one of loss"),
    "no function": (
        {**EVALUATED, "predict_with_generate": True, "metric": "bleu"},
        "metric must be exact_match, FILE.py:function",
    ),
    "unread by the optimizer": ({"optim_target_modules": "all-linear"}, "galore and apollo optimizers alone"),
    "sent batches": ({"accelerator_config": {"dispatch_batches": True}}, "every rank reads whole batches"),
    "cut batches": ({"accelerator_config": {"split_batches": True}}, "every rank reads whole batches"),
    "uneven batches": ({"accelerator_config": {"even_batches": False}}, "every rank reads whole batches"),
    "unknown in a mapping": ({"accelerator_config": {"batches": 1}}, "accelerator_config|AcceleratorConfig"),
    "no mapping": ({"lr_scheduler_kwargs": "fast"}, "lr_scheduler_kwargs must be a mapping"),
    "half a mapping": ({"lr_scheduler_kwargs": "{"}, "cannot be used"),
    "mapping of another schedule": ({"lr_scheduler_kwargs": {"num_cycles": 1}}, "num_cycles"),
    "schedule without its mapping": ({"lr_scheduler_type": "warmup_stable_decay"}, "cannot be used"),
    "optimizer that is not installed": ({"optim": "schedule_free_adamw"}, "schedulefree"),
    "optimizer settings": ({"optim_args": "fast"}, "cannot be used"),
    "compiler": ({"torch_compile": True, "torch_compile_backend": "gcc"}, "cannot be used .*gcc"),
    "mode of the compiler": ({"torch_compile": True, "torch_compile_mode": "fast"}, "cannot be used .*fast"),
    "sharding": ({"fsdp": "some"}, "cannot be used .*fsdp"),
    "start method": (
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "thread"},
        "invalid choice: 'thread'",
    ),
    "missing DeepSpeed config": ({"deepspeed": "none.json"}, "cannot be used"),
    "sharding in one process": ({"fsdp": "full_shard"}, "fsdp needs several processes with a GPU each"),
    "recomputation": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}},
        "checkpointing_kwargs cannot be used .*foo",
    ),
    "kind of recomputation": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": "maybe"}},
        "checkpointing_kwargs: use_reentrant must be true or false",
    ),
    "compiler that is not installed": ({"torch_compile_backend": "tvm"}, "torch_compile_backend .*apache-tvm"),
    "layers of recomputation": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 0}},
        "every_n_layers must be at least 1, found 0",
    ),
    "activations that are nowhere else": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}},
        "checkpointing_kwargs.*offload",
    ),
    "half precision without a GPU": ({"fp16": True}, "fp16 needs a GPU; set bf16"),
    "no metric": ({**EVALUATED, "metric_for_best_model": ""}, "metric_for_best_model must be one of loss"),
    "unread by sgd": (
        {"optim": "sgd", "optim_args": "momentum=0.9, foo=1"},
        "optim_args: foo=1 changes nothing of sgd; leave it out",
    ),
    "unread by adamw": ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "momentum=0.9 changes nothing"),
    "impossible for sgd": ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim_args cannot be used .*momentum"),
    "value of a schedule": (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "many"}},
        "lr_scheduler_kwargs cannot be used",
    ),
    "schedule that ends above its start": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.1}},
        "lr_scheduler_kwargs cannot be used .*lr_end",
    ),
    "mapping that a schedule leaves unread": (
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 1}},
        "lr_scheduler_kwargs: constant has no use for any",
    ),
}


@pytest.mark.parametrize(("changes", "words"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings(changes, words):
    message = refusal(changes)
    assert re.search(words, message), message


def test_a_refused_deepspeed_config_does_not_stay_known_to_transformers(tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "7')
    for config in ("none.json", str(tmp_path / "zero.json")):
        with pytest.raises(UserError, match="cannot be used") as caught:
            build_arguments({**MINIMAL, "deepspeed": config})
        assert caught.value.__cause__ is not None  # whose frames hold the half-made configuration
        assert deepspeed_config() is None
        assert not is_deepspeed_zero3_enabled()


NUMBERS = {name for _, names in LIMITS.values() for name in names.split()}
# Outside of each range, by what is said about it.
OUTSIDE = {
    "at least 1": (0, -1),
    "at least 0": (-1,),
    "more than 0": (0, -1),
    "at least 0 and less than 1": (-1, 1, 2),
    "between 0 and 4294967295": (-1, 2**32),
    "at least 1, or -1 where num_train_epochs decides": (0, -2),
    "at least -1": (-2,),
}


@pytest.mark.parametrize("words", LIMITS)
def test_numbers_that_no_run_can_use(words):
    for name in LIMITS[words][1].split():
        odd = ["nan", "inf", "-inf"] if "float" in str(HINTS[name]) else [10**30]
        for number in (*OUTSIDE[words], *odd):
            assert refusal({name: number}).startswith(f"run.yaml: {name} must be {words}, found ")


def test_every_number_has_its_range():
    """Also those that a later transformers adds."""
    numbers = {
        name
        for name, hint in HINTS.items()
        if name in FIELDS
        and {int, float} & {hint, *typing.get_args(hint), *typing.get_args(typing.get_args(hint)[0:1])}
    }
    assert "learning_rate" in numbers
    assert numbers <= NUMBERS


USELESS = {
    "liger_kernel_config": {"rope": True},
    "label_names": ["labels"],
    "include_for_metrics": ["loss"],
    "parallelism_config": {"tp_size": 2},
    "length_column_name": "n",
    "eval_do_concat_batches": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_do_nothing_or_the_wrong_thing_is_refused_with_the_reason(name):
    message = refusal({name: USELESS.get(name, True)})
    assert name in message
    assert message.endswith(REFUSED[name])
    if name in FIELDS and isinstance(FIELDS[name].default, bool):
        build_arguments({**MINIMAL, name: FIELDS[name].default})


def test_what_needs_another_setting():
    given = {"quantization": "4bit", "visual_token_budget_weights": [1], "eval_strategy": "steps", "metric": "a:b"}
    numbers = {"generation_max_new_tokens": 3, "early_stopping_patience": 1, "early_stopping_threshold": 0.1}
    texts = {"model_revision": "x", "eval_image_folder": "x", "eval_split": "x"}
    given |= numbers | texts | {"dataloader_multiprocessing_context": "fork"}
    for name, other in NEEDS.items():
        settings = PARTS if name == "model_revision" else {}
        assert f"{name} needs {other}; " in refusal({**settings, name: given.get(name, True)})
    enough = {
        **EVALUATED,
        "predict_with_generate": True,
        "metric": "a:b",
        "generation_max_new_tokens": 3,
        "eval_on_start": True,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 4,
        "early_stopping_patience": 1,
        "early_stopping_threshold": 0.1,
        "metric_for_best_model": "eval_b",
        "eval_split": "x",
    }
    assert build_arguments({**MINIMAL, **enough}).training.early_stopping_patience == 1


def test_what_excludes_another_setting():
    given = {"language_model": "l", "vision_tower": "v", "projector": {"a": 1}, "lora_rank": 8}
    more = {"prediction_loss_only": EVALUATED}
    for name, other, why in EXCLUSIVE:
        settings = {key: given.get(key, True) for key in (name, other) if key != "model"}
        message = refusal({**more.get(other, {}), **settings})
        assert f"{name} and {other} do not go together, {why}" in message


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
    bad = {
        "seed: 1\n  bad: [": "line 2",
        "- 1\n- 2\n": "key: value",
        "": "key: value",
        "seed: *nowhere\n": "undefined alias",
        "run_name: \x00\n": "cannot be read as YAML",
        "base: run.yaml\n": "back to itself",
        "base: none.yaml\n": r"none\.yaml: cannot be read",
        "base: .\n": "cannot be read",
        "base: [a, b]\n": "cannot be read",
        'base: "\\0"\n': "cannot be read",
        "[" * 100_000: "cannot be read as YAML",
    }
    for text, words in bad.items():
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match=words) as raised:
            read_settings(tmp_path / "run.yaml")
        assert "\n" not in str(raised.value)
    (tmp_path / "run.yaml").write_text("? [a]\n: b\n")
    with pytest.raises(UserError, match="unknown setting"):
        load_arguments(str(tmp_path / "run.yaml"), [])
    (tmp_path / "run.yaml").write_bytes(b"run_name: \xff\n")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        read_settings(tmp_path / "run.yaml")
    with pytest.raises(UserError, match=r"packaged recipes are .*vicuna-7b/stage1"):
        config_path("vicuna-8b/stage1")


def test_no_message_repeats_a_token(config):
    for words in (
        ["--hub_token", "my-own-secret-1", "--learning_rate", "my-own-secret-1"],
        ["--hub_token", "my-own-secret-2", "my-own-secret-3"],
        ["--hub_token", "my-own-secret-4", "--my-own-secret-4", "1"],
        ["--hub_token", "my-own-secret-5", "--seed", "x"],
    ):
        with pytest.raises(UserError) as raised:
            load_arguments(str(config), words)
        assert "own-secret" not in str(raised.value)
    assert "hub_token" not in load_arguments(str(config), ["--hub_token", "my-own-secret-6"]).settings


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
        assert settings["bf16"] == "true"
        assert run.data.max_length == 2048
        assert run.training.train_sampling_strategy == ("group_by_length" if stage == "stage2" else "random")
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
