"""Key tables: the name of a tensor in a training checkpoint, and its name in the model.

A row is two templates. `{}` stands for one part of a dotted name, `{*}` for all the rest; both sides hold the same
placeholders in the same order, so a table is read backwards by swapping its columns. A key must match exactly one row.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from delta_llava.errors import UserError

Row = tuple[str, str]
Table = Sequence[Row]

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
TRAINED_TOWER = "model.vision_tower.vision_tower."
TRAINED_PROJECTOR = "model.mm_projector."


def _under(old_prefix: str, new_prefix: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple((old_prefix + old, new_prefix + new) for old, new in rows)


def _delta_projection(old: str, new: str) -> tuple[Row, ...]:
    return (
        (f"{old}.shared_weight.weight", f"{new}.base.weight"),
        (f"{old}.U", f"{new}.delta_u"),
        (f"{old}.V", f"{new}.delta_v"),
        (f"{old}.norm.{{}}", f"{new}.norm.{{}}"),
    )


DELTA_ROWS = _under(
    TRAINED_PROJECTOR,
    PROJECTOR,
    (
        *_delta_projection("q_proj_1", "query_projection"),
        *_delta_projection("k_proj_1", "key_projection"),
        *_delta_projection("v_proj_1", "value_projection"),
        ("clip_attn.in_proj_weight", "cross_attention.qkv_proj.weight"),
        ("clip_attn.in_proj_bias", "cross_attention.qkv_proj.bias"),
        ("clip_attn.out_proj.{}", "cross_attention.out_proj.{}"),
        ("mlp.0.{}", "linear_1.{}"),
        ("mlp.2.{}", "linear_2.{}"),
        ("combined_block.ntb.patch_embed.conv.weight", "query_block.input_proj.weight"),
        ("combined_block.ntb.norm_mhsa.{}", "query_block.attention_norm.{}"),
        ("combined_block.ntb.e_mhsa.norm.{}", "query_block.attention.norm.{}"),
        ("combined_block.ntb.e_mhsa.q.{}", "query_block.attention.q_proj.{}"),
        ("combined_block.ntb.e_mhsa.k.{}", "query_block.attention.k_proj.{}"),
        ("combined_block.ntb.e_mhsa.v.{}", "query_block.attention.v_proj.{}"),
        ("combined_block.ntb.e_mhsa.proj.{}", "query_block.attention.out_proj.{}"),
        ("combined_block.ntb.projection.conv.weight", "query_block.local_proj.weight"),
        ("combined_block.ntb.mhca.group_conv3x3.weight", "query_block.local_mixer.conv.weight"),
        ("combined_block.ntb.mhca.norm.{}", "query_block.local_mixer.norm.{}"),
        ("combined_block.ntb.mhca.projection.weight", "query_block.local_mixer.out_proj.weight"),
        ("combined_block.ntb.mlp.conv1.{}", "query_block.mlp.fc1.{}"),
        ("combined_block.ntb.mlp.conv2.{}", "query_block.mlp.fc2.{}"),
    ),
)
# LLaVA-1.5's own projector, `mlp2x_gelu`: Linear, GELU, Linear.
PLAIN_ROWS = _under(TRAINED_PROJECTOR, PROJECTOR, (("0.{}", "linear_1.{}"), ("2.{}", "linear_2.{}")))
TEXT_ROWS = (
    ("model.embed_tokens.weight", EMBEDDING),
    ("model.layers.{*}", "model.language_model.layers.{*}"),
    ("model.norm.{*}", "model.language_model.norm.{*}"),
    ("lm_head.{*}", "lm_head.{*}"),
)
_TOWER_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")
# The frozen tower inside a training checkpoint, as transformers before 5 names it ("old") and as later ones do.
TOWER_ROWS = {
    "old": ((f"{TRAINED_TOWER}vision_model.{{*}}", f"{TOWER}{{*}}"),),
    "flat": tuple((f"{TRAINED_TOWER}{part}.{{*}}", f"{TOWER}{part}.{{*}}") for part in _TOWER_PARTS),
}
# A CLIP or SigLIP repository that the tower comes from: the whole model, its vision part, or that part alone.
TOWER_REPOSITORY_ROWS = (
    ("vision_model.{*}", f"{TOWER}{{*}}"),
    *((f"{part}.{{*}}", f"{TOWER}{part}.{{*}}") for part in _TOWER_PARTS),
)
# A checkpoint of this project has the names already; finetuning may leave `module.` (DDP) in front.
HUB_ROWS = tuple(
    (f"{wrapper}{part}.{{*}}", f"{part}.{{*}}")
    for wrapper in ("", "module.")
    for part in ("model.language_model", "model.vision_tower", "model.multi_modal_projector", "lm_head")
)
# Names on disk of a native `LlavaForConditionalGeneration` repository.
NATIVE_LLAVA_ROWS = (
    ("language_model.model.{*}", "model.language_model.{*}"),
    ("language_model.lm_head.{*}", "lm_head.{*}"),
    ("vision_tower.vision_model.{*}", f"{TOWER}{{*}}"),
    ("multi_modal_projector.{*}", f"{PROJECTOR}{{*}}"),
)

# Tensors that are left out wherever they stand, with the reason.
DROPPED = {
    "model.mm_projector.pos_embed": "the position table is computed from its formula",
    "model.layers.{}.self_attn.rotary_emb.inv_freq": "rotary frequencies are computed from the config",
    "model.rotary_emb.inv_freq": "rotary frequencies are computed from the config",
    f"{TRAINED_TOWER}vision_model.embeddings.position_ids": "position ids are counted anew",
    f"{TRAINED_TOWER}embeddings.position_ids": "position ids are counted anew",
}
TOWER_REPOSITORY_DROPPED = {
    "vision_model.embeddings.position_ids": "position ids are counted anew",
    "embeddings.position_ids": "position ids are counted anew",
    "text_model.{*}": "the text encoder of a CLIP or SigLIP repository is not used",
    **dict.fromkeys(
        ("visual_projection.{*}", "text_projection.{*}", "logit_scale", "logit_bias"),
        "the contrastive head of a CLIP or SigLIP repository is not used",
    ),
}


def training_table(plain: bool, tower_keys: str = "old") -> Table:
    """The table of a whole training checkpoint.

    Args:
        plain: LLaVA-1.5's projector in place of the Delta projector.
        tower_keys: "old" or "flat".
    """
    return (*(PLAIN_ROWS if plain else DELTA_ROWS), *TEXT_ROWS, *TOWER_ROWS[tower_keys])


def backwards(table: Table) -> Table:
    """The table that takes the names of the right column to those of the left."""
    return tuple((new, old) for old, new in table)


@lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)")
    return re.compile(text, re.DOTALL)


def is_dropped(key: str, dropped: Mapping[str, str] = DROPPED) -> str | None:
    """Why a tensor of this name is left out; None when it is not."""
    return next((why for template, why in dropped.items() if _pattern(template).fullmatch(key)), None)


def new_name(key: str, table: Table) -> str | None:
    """The name that a table gives to one key; None when no row matches.

    Raises:
        ValueError: two rows match, a fault of the table.
    """
    found = [(match, new) for old, new in table if (match := _pattern(old).fullmatch(key))]
    if len(found) > 1:
        raise ValueError(f"the key table is ambiguous: {key!r} becomes {found[0][1]!r} and {found[1][1]!r}")
    if not found:
        return None
    match, template = found[0]
    return re.sub(r"\{\*?\}", "{}", template).format(*match.groups())


def rename(
    keys: Iterable[str], table: Table, where: str, dropped: Mapping[str, str] = DROPPED
) -> tuple[dict[str, str], dict[str, str]]:
    """Applies a table to all keys of a checkpoint.

    Args:
        where: what holds the keys, for messages.
        dropped: templates of what is left out, with the reason.

    Returns:
        (key -> name, key -> why it is left out).

    Raises:
        UserError: for keys that no row matches, and for two keys that get one name.
    """
    names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for key in keys:
        why = is_dropped(key, dropped)
        name = None if why else new_name(key, table)
        if why:
            left_out[key] = why
        elif name is None:
            unknown.append(key)
        elif name in origin:
            raise UserError(f"{where} holds one tensor under two names, {origin[name]!r} and {key!r}: remove one")
        else:
            origin[name] = key
            names[key] = name
    if unknown:
        raise UserError(
            f"{where} holds {describe_keys(unknown)} that belong to no known part of a Delta-LLaVA checkpoint: "
            "check that it was written by Delta-LLaVA training"
        )
    return names, left_out


def describe_keys(keys: Sequence[str], shown: int = 3) -> str:
    """`2 tensors ('a', 'b')`, with at most `shown` names spelled out."""
    listed = ", ".join(repr(key[:120]) for key in keys[:shown]) + (", ..." if len(keys) > shown else "")
    return f"{len(keys)} tensor{'s' * (len(keys) != 1)} ({listed})"
