"""Key tables: total, unambiguous, and inverses of each other."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import keys
from modeling_delta_llava.conversion.keys import (
    ALL_TABLES,
    PLAIN_TRAINING_RULES,
    STEPS,
    TRAINING_RULES,
    Rule,
    invert_rule,
    invert_rules,
    matching_rule,
    rename,
    rename_key,
    step_of_target,
)
from tests.training_layout import (
    TrainingLayout,
    plain_projector_shapes,
    projector_shapes,
    text_shapes,
    tower_shapes,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "seed_oss", "phi3", "gemma")
# Tables whose rules take off a prefix or drop text have many keys for one name, and no inverse is used.
INVERTED = {
    "projector": keys.PROJECTOR_RULES,
    "plain projector": keys.PLAIN_PROJECTOR_RULES,
    "language model": keys.TEXT_RULES,
    "vision tower (old)": keys.TOWER_OLD_RULES,
    "vision tower (flat)": keys.TOWER_FLAT_RULES,
    "native LLaVA": keys.NATIVE_LLAVA_RULES,
}
KEPT_RULES = [
    pytest.param(table, rule, id=f"{name}: {rule.pattern}")
    for name, table in INVERTED.items()
    for rule in table
    if rule.replacement is not None
]


def training_keys(family: str, tower: str, middle: str, plain: bool = False) -> list[str]:
    layout = TrainingLayout(text_model_type=family, tower_model_type=tower)
    shapes = plain_projector_shapes(layout) if plain else projector_shapes(layout)
    return [
        *text_shapes(layout),
        *(f"model.mm_projector.{name}" for name in shapes),
        *(f"model.vision_tower.vision_tower.{middle}{name}" for name in tower_shapes(layout)),
    ]


def all_training_keys() -> dict[str, list[str]]:
    """Keys of every kind of file, by the table that reads them."""
    clip, siglip = "clip_vision_model", "siglip_vision_model"
    complete = training_keys("llama", clip, "vision_model.")
    lora = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}" for letter in "AB"]
    return {
        "projector": [key for key in complete if "mm_projector" in key] + ["model.mm_projector.pos_embed"],
        "plain projector": [key for key in training_keys("llama", clip, "", plain=True) if "mm_projector" in key],
        "language model": [
            *(key for family in FAMILIES for key in text_shapes(TrainingLayout(text_model_type=family))),
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.rotary_emb.inv_freq",
        ],
        "vision tower (old)": [
            "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
            *(key for key in complete if "vision_tower" in key),
        ],
        "vision tower (flat)": [
            "model.vision_tower.vision_tower.embeddings.position_ids",
            *(key for key in training_keys("llama", siglip, "") if "vision_tower" in key),
        ],
        "tower repository": [
            "vision_model.encoder.layers.0.mlp.fc1.weight",
            "encoder.layers.0.mlp.fc1.weight",
            "vision_model.embeddings.position_ids",
            "text_model.embeddings.token_embedding.weight",
            "visual_projection.weight",
            "logit_scale",
        ],
        "stage 1": [
            "model.mm_projector.mlp.0.weight",
            "mm_projector.mlp.0.weight",
            "base_model.model.model.mm_projector.mlp.0.weight",
        ],
        "LoRA prefixes": [
            "base_model.model.model.mm_projector.mlp.0.weight",
            "base_model.model.lm_head.base_layer.weight",
            "base_model.model.model.mm_projector.modules_to_save.default.mlp.0.weight",
            "base_model.model.model.mm_projector.original_module.mlp.0.weight",
            "model.mm_projector.mlp.0.weight",
        ],
        "LoRA factors": [f"{name}.weight" for name in lora] + [f"{name}.default.weight" for name in lora],
        "Hub folder": ["lm_head.weight", "module.model.language_model.norm.weight"],
        "native LLaVA": [
            "lm_head.weight",
            "model.language_model.norm.weight",
            "model.vision_tower.pre_layrnorm.weight",
            "model.multi_modal_projector.linear_1.bias",
        ],
    }


@pytest.mark.parametrize("name", ALL_TABLES)
def test_every_rule_is_used_and_exactly_one_matches(name):
    table = ALL_TABLES[name]
    used = set()
    for key in all_training_keys()[name]:
        rule = matching_rule(key, table)
        assert rule is not None, key
        used.add(rule)
    assert used == set(table), [rule.pattern for rule in table if rule not in used]


def test_every_dropping_rule_says_why():
    for table in ALL_TABLES.values():
        for rule in table:
            assert bool(rule.note) == (rule.replacement is None), rule.pattern


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "middle"), [("old", "vision_model."), ("flat", "")])
@pytest.mark.parametrize("plain", [False, True])
def test_whole_checkpoints_there_and_back(family, form, middle, plain):
    table = (PLAIN_TRAINING_RULES if plain else TRAINING_RULES)[form]
    names = training_keys(family, "clip_vision_model", middle, plain)
    renamed = rename(names, table)
    assert renamed.dropped == {}
    assert len(set(renamed.names.values())) == len(names)
    back = invert_rules(table)
    assert {new: rename_key(new, back) for new in renamed.names.values()} == {v: k for k, v in renamed.names.items()}


@pytest.mark.parametrize(("table", "rule"), KEPT_RULES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_inverse_of_any_key_a_rule_matches(table, rule, data):
    key = data.draw(st.from_regex(rule.pattern, fullmatch=True).filter(lambda text: "\n" not in text))
    assert matching_rule(key, table) == rule
    inverse = invert_rules(table)
    assert rename_key(rename_key(key, table), inverse) == key


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"(model|lm_head|vision)\.[a-z_.0-9]{0,30}", fullmatch=True))
def test_any_key_is_renamed_or_refused_by_name(key):
    table = TRAINING_RULES["old"]
    if matching_rule(key, table) is None:
        with pytest.raises(UserError, match=re.escape(repr(key))):
            rename_key(key, table)
    else:
        name = rename_key(key, table)
        assert name is None or name.startswith(("model.", "lm_head."))


def test_two_keys_of_one_name_are_refused():
    with pytest.raises(UserError, match="under two names"):
        rename(["mm_projector.mlp.0.weight", "model.mm_projector.mlp.0.weight"], keys.STAGE1_RULES)


def test_two_matching_rules_are_a_fault_of_the_table():
    table = (Rule(r"a\.(.+)", r"b.\1"), Rule(r"(.+)\.w", r"c.\1"))
    with pytest.raises(ValueError, match="ambiguous"):
        matching_rule("a.w", table)


def test_unknown_keys_are_named():
    with pytest.raises(UserError, match=r"2 tensors \('model.extra', 'other'\)"):
        rename(["model.extra", "other", "lm_head.weight"], TRAINING_RULES["old"], "here")


@pytest.mark.parametrize("rule", [Rule(r"a", None, "why"), Rule(r"a(b)", r"c"), Rule(r"a[bc]", r"d")])
def test_rules_without_an_inverse_are_refused(rule):
    with pytest.raises(ValueError, match=r"no inverse|each of its groups|cannot be inverted"):
        invert_rule(rule)


def test_swapped_groups_invert():
    rule = Rule(r"x\.(\d+)\.(a|b)", r"\2.y.\1")
    inverse = invert_rule(rule)
    assert re.fullmatch(inverse.pattern, "a.y.7").expand(inverse.replacement) == "x.7.a"


@pytest.mark.parametrize("step", STEPS, ids=["split", "squeeze"])
def test_steps_know_their_way_back(step):
    names = rename(training_keys("llama", "clip_vision_model", ""), TRAINING_RULES["flat"]).names
    fused = [name for name in names.values() if re.fullmatch(step.pattern, name)]
    assert fused
    for name in fused:
        for part, target in enumerate(step.targets):
            result = re.fullmatch(step.pattern, name).expand(target)
            assert step_of_target(result) == (step, part)
            assert step.fused_name(part, result) == name
