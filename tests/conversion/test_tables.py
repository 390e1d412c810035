"""Key tables: total, unambiguous, and inverses of each other."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import tables
from modeling_delta_llava.conversion.tables import backwards, is_dropped, new_name, rename, training_table
from modeling_delta_llava.conversion.write import QKV, SQUEEZED, Weight, with_parts_joined, with_parts_split
from tests.training_layout import (
    TrainingLayout,
    plain_projector_shapes,
    projector_shapes,
    text_shapes,
    tower_shapes,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "seed_oss", "phi3", "gemma")
TABLES = {
    "Delta, old tower": training_table(plain=False),
    "Delta, flat tower": training_table(plain=False, tower_keys="flat"),
    "plain, old tower": training_table(plain=True),
    "plain, flat tower": training_table(plain=True, tower_keys="flat"),
    "native LLaVA": tables.NATIVE_LLAVA_ROWS,
}
ROWS = [pytest.param(table, row, id=f"{name}: {row[0]}") for name, table in TABLES.items() for row in table]
# Parts of names, and rests of them, without what tables drop.
part = st.from_regex(r"[a-z_0-9]{1,8}", fullmatch=True)
rest = st.from_regex(r"[a-z_0-9]{1,8}(\.[a-z_0-9]{1,8}){0,4}", fullmatch=True)


def training_keys(family: str, tower: str, middle: str, plain: bool = False) -> list[str]:
    layout = TrainingLayout(text_model_type=family, tower_model_type=tower)
    shapes = plain_projector_shapes(layout) if plain else projector_shapes(layout)
    return [
        *text_shapes(layout),
        *(f"model.mm_projector.{name}" for name in shapes),
        *(f"model.vision_tower.vision_tower.{middle}{name}" for name in tower_shapes(layout)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "middle"), [("old", "vision_model."), ("flat", "")])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("plain", [False, True])
def test_whole_checkpoints_there_and_back(family, form, middle, tower, plain):
    table = training_table(plain, form)
    keys = training_keys(family, tower, middle, plain)
    names, dropped = rename(keys, table, "here")
    assert dropped == {}
    assert len(set(names.values())) == len(keys)
    assert {name: new_name(name, backwards(table)) for name in names.values()} == {v: k for k, v in names.items()}


@pytest.mark.parametrize(("table", "row"), ROWS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_key_of_a_row_goes_there_and_back(table, row, data):
    """No other row matches it in either direction, whatever stands for the placeholders."""
    old, new = row
    values = [data.draw(rest if mark == "{*}" else part) for mark in re.findall(r"\{\*?\}", old)]
    assert re.findall(r"\{\*?\}", new) == re.findall(r"\{\*?\}", old)
    key, name = (re.sub(r"\{\*\}", "{}", side).format(*values) for side in row)
    assert new_name(key, table) == name
    assert new_name(name, backwards(table)) == key


def test_every_row_of_the_projector_is_needed():
    keys = training_keys("llama", "clip_vision_model", "vision_model.")
    for row in (*tables.DELTA_ROWS, *tables.TEXT_ROWS):
        rest = [other for other in training_table(plain=False) if other != row]
        assert any(new_name(key, rest) is None for key in keys), row


@pytest.mark.parametrize(
    ("key", "dropped"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", tables.DROPPED),
        ("model.rotary_emb.inv_freq", tables.DROPPED),
        ("model.mm_projector.pos_embed", tables.DROPPED),
        ("model.vision_tower.vision_tower.vision_model.embeddings.position_ids", tables.DROPPED),
        ("model.vision_tower.vision_tower.embeddings.position_ids", tables.DROPPED),
        ("vision_model.embeddings.position_ids", tables.TOWER_REPOSITORY_DROPPED),
        ("text_model.encoder.layers.0.mlp.fc1.weight", tables.TOWER_REPOSITORY_DROPPED),
        ("logit_scale", tables.TOWER_REPOSITORY_DROPPED),
    ],
)
def test_what_is_left_out_has_a_reason(key, dropped):
    assert is_dropped(key, dropped)
    assert rename([key], tables.TEXT_ROWS, "here", dropped) == ({}, {key: is_dropped(key, dropped)})


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"(model|lm_head|vision)\.[a-z_.0-9]{0,30}", fullmatch=True))
def test_any_key_is_renamed_left_out_or_refused_by_name(key):
    table = training_table(plain=False)
    if is_dropped(key) is None and new_name(key, table) is None:
        with pytest.raises(UserError, match=re.escape(repr(key))):
            rename([key], table, "here")
    else:
        names, dropped = rename([key], table, "here")
        assert names.keys() | dropped.keys() == {key}
        assert all(name.startswith(("model.", "lm_head.")) for name in names.values())


def test_two_keys_of_one_name_are_refused():
    keys = ["lm_head.weight", "module.lm_head.weight"]
    with pytest.raises(UserError, match="under two names"):
        rename(keys, tables.HUB_ROWS, "here")


def test_two_matching_rows_are_a_fault_of_the_table():
    with pytest.raises(ValueError, match="ambiguous"):
        new_name("a.w", (("a.{*}", "b.{*}"), ("{}.w", "c.{}")))


def test_unknown_keys_are_named():
    with pytest.raises(UserError, match=r"here holds 2 tensors \('model.extra', 'other'\)"):
        rename(["model.extra", "other", "lm_head.weight"], training_table(plain=False), "here")


def test_parts_are_split_and_joined_again(tmp_path):
    table = training_table(plain=False)
    shapes = {f"model.mm_projector.{name}": shape for name, shape in projector_shapes(TrainingLayout()).items()}
    trained = {key: torch.randn(shape) for key, shape in shapes.items()}
    weights = {new_name(key, table): Weight(tensor, key, tmp_path, tensor.dtype) for key, tensor in trained.items()}
    split = with_parts_split(weights)
    assert {*SQUEEZED, *(f"{part}.weight" for part in QKV)} <= split.keys()
    assert all(len(split[name].shape) == 2 for name in SQUEEZED)
    assert all(weight.is_copy for weight in split.values()), "views of the stored bytes"
    joined = with_parts_joined({name: weight.stored for name, weight in split.items()})
    back = {new_name(name, backwards(table)): tensor for name, tensor in joined.items()}
    assert back.keys() == trained.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in trained.items())
