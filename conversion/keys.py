"""Key tables: what each tensor of a training checkpoint is called in a Hub folder.

Pure data and pure functions, without torch. A table is an ordered tuple of [`Rule`]s. Exactly one rule of a table
matches each key (the whole key, not a part of it), and no two keys get the same new name; anything else is an error
that names the key. Changes to tensors themselves are a second table of [`Step`]s, applied to the new names. Both
directions come from these tables: `invert_rules` and `Step.fused_name` derive the way back, nothing is written twice.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from delta_llava.errors import UserError


class Rule(NamedTuple):
    """One row of a key table.

    Attributes:
        pattern: a regular expression for the whole key: literal text, capturing groups without nesting, and
            lookaheads, which narrow the match and do not take part in the inverse.
        replacement: the new key with back-references `\\1`..., each group used once; None drops the tensor.
        note: why a tensor is dropped.
    """

    pattern: str
    replacement: str | None
    note: str = ""


def _under(prefix: str, new_prefix: str, rows: Sequence[tuple[str, str]]) -> tuple[Rule, ...]:
    return tuple(Rule(prefix + pattern, new_prefix + replacement) for pattern, replacement in rows)


PROJECTOR_RULES = (
    *_under(
        r"model\.mm_projector\.",
        r"model.multi_modal_projector.",
        (
            (r"q_proj_1\.shared_weight\.weight", r"query_projection.base.weight"),
            (r"q_proj_1\.U", r"query_projection.delta_u"),
            (r"q_proj_1\.V", r"query_projection.delta_v"),
            (r"q_proj_1\.norm\.(weight|bias)", r"query_projection.norm.\1"),
            (r"k_proj_1\.shared_weight\.weight", r"key_projection.base.weight"),
            (r"k_proj_1\.U", r"key_projection.delta_u"),
            (r"k_proj_1\.V", r"key_projection.delta_v"),
            (r"k_proj_1\.norm\.(weight|bias)", r"key_projection.norm.\1"),
            (r"v_proj_1\.shared_weight\.weight", r"value_projection.base.weight"),
            (r"v_proj_1\.U", r"value_projection.delta_u"),
            (r"v_proj_1\.V", r"value_projection.delta_v"),
            (r"v_proj_1\.norm\.(weight|bias)", r"value_projection.norm.\1"),
            (r"clip_attn\.in_proj_(weight|bias)", r"cross_attention.qkv_proj.\1"),
            (r"clip_attn\.out_proj\.(weight|bias)", r"cross_attention.out_proj.\1"),
            (r"mlp\.0\.(weight|bias)", r"linear_1.\1"),
            (r"mlp\.2\.(weight|bias)", r"linear_2.\1"),
        ),
    ),
    *_under(
        r"model\.mm_projector\.combined_block\.ntb\.",
        r"model.multi_modal_projector.query_block.",
        (
            (r"patch_embed\.conv\.weight", r"input_proj.weight"),
            (r"norm_mhsa\.(weight|bias)", r"attention_norm.\1"),
            (r"e_mhsa\.norm\.(weight|bias)", r"attention.norm.\1"),
            (r"e_mhsa\.([qkv])\.(weight|bias)", r"attention.\1_proj.\2"),
            (r"e_mhsa\.proj\.(weight|bias)", r"attention.out_proj.\1"),
            (r"projection\.conv\.weight", r"local_proj.weight"),
            (r"mhca\.group_conv3x3\.weight", r"local_mixer.conv.weight"),
            (r"mhca\.norm\.(weight|bias)", r"local_mixer.norm.\1"),
            (r"mhca\.projection\.weight", r"local_mixer.out_proj.weight"),
            (r"mlp\.conv([12])\.(weight|bias)", r"mlp.fc\1.\2"),
        ),
    ),
    Rule(r"model\.mm_projector\.pos_embed", None, "the position table is computed from its formula"),
)

# LLaVA-1.5's own projector, `mlp2x_gelu`: Linear, GELU, Linear.
PLAIN_PROJECTOR_RULES = _under(
    r"model\.mm_projector\.",
    r"model.multi_modal_projector.",
    ((r"0\.(weight|bias)", r"linear_1.\1"), (r"2\.(weight|bias)", r"linear_2.\1")),
)

TEXT_RULES = (
    Rule(r"model\.embed_tokens\.weight", r"model.language_model.embed_tokens.weight"),
    Rule(r"model\.layers\.(\d+)\.(?!self_attn\.rotary_emb\.)(.+)", r"model.language_model.layers.\1.\2"),
    Rule(r"model\.norm\.(.+)", r"model.language_model.norm.\1"),
    Rule(r"lm_head\.(.+)", r"lm_head.\1"),
    Rule(
        r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        None,
        "rotary frequencies, as old transformers saved them, are computed from the config",
    ),
)

# The frozen tower inside a training checkpoint, as transformers before 5 names it and as newer ones do.
TOWER_OLD_RULES = (
    Rule(
        r"model\.vision_tower\.vision_tower\.vision_model\.(?!embeddings\.position_ids$)(.+)",
        r"model.vision_tower.\1",
    ),
    Rule(
        r"model\.vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids",
        None,
        "position ids are counted anew",
    ),
)
TOWER_FLAT_RULES = (
    Rule(
        r"model\.vision_tower\.vision_tower\.(?!vision_model\.|embeddings\.position_ids$)(.+)",
        r"model.vision_tower.\1",
    ),
    Rule(r"model\.vision_tower\.vision_tower\.embeddings\.position_ids", None, "position ids are counted anew"),
)

# A CLIP or SigLIP repository that the tower comes from, brought to the training checkpoint's names (old form).
TOWER_REPOSITORY_RULES = (
    Rule(r"(?:vision_model\.)?embeddings\.position_ids", None, "position ids are counted anew"),
    Rule(
        r"vision_model\.(?!embeddings\.position_ids$)(.+)",
        r"model.vision_tower.vision_tower.vision_model.\1",
    ),
    Rule(
        r"((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\.(?!position_ids$).+)",
        r"model.vision_tower.vision_tower.vision_model.\1",
    ),
    Rule(r"text_model\..+", None, "the text encoder of a CLIP or SigLIP repository is not used"),
    Rule(
        r"(?:visual_projection|text_projection)\..+|logit_scale|logit_bias",
        None,
        "the contrastive head of a CLIP or SigLIP repository is not used",
    ),
)

# `mm_projector.bin`: the name may or may not carry the prefixes of the wrapping model.
STAGE1_RULES = (
    Rule(r"model\.mm_projector\.(.+)", r"model.mm_projector.\1"),
    Rule(r"mm_projector\.(.+)", r"model.mm_projector.\1"),
    Rule(r"(?:base_model\.model\.|module\.)model\.mm_projector\.(.+)", r"model.mm_projector.\1"),
)

# `non_lora_trainables.bin` and the non-LoRA tensors of an adapter file: PEFT's wrapper is taken off.
LORA_PREFIX_RULES = (
    Rule(
        r"base_model\.model\.(?!.*\.(?:lora_|modules_to_save\.|original_module\.|base_layer\.))(.+)",
        r"\1",
    ),
    Rule(r"base_model\.model\.(.+)\.base_layer\.(weight|bias)", r"\1.\2"),
    Rule(r"base_model\.model\.(.+)\.modules_to_save\.(?:default\.)?(.+)", r"\1.\2"),
    Rule(r"base_model\.model\..+\.original_module\..+", None, "replaced by the trained copy in modules_to_save"),
    Rule(r"(?!base_model\.)(.+)", r"\1"),
)
# The factors themselves: name of the weight they change, followed by which factor it is.
LORA_FACTOR_RULES = (Rule(r"base_model\.model\.(.+)\.lora_([AB])\.(?:default\.)?weight", r"\1.weight#\2"),)

# A checkpoint of this project has the names already; finetuning may leave `module.` (DDP) in front.
HUB_RULES = (
    Rule(r"((?:model\.(?:language_model|vision_tower|multi_modal_projector)|lm_head)\..+)", r"\1"),
    Rule(r"module\.((?:model\.(?:language_model|vision_tower|multi_modal_projector)|lm_head)\..+)", r"\1"),
)

# Names on disk of a native `LlavaForConditionalGeneration` repository, from those of the built model.
NATIVE_LLAVA_RULES = (
    Rule(r"model\.language_model\.(.+)", r"language_model.model.\1"),
    Rule(r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    Rule(r"model\.vision_tower\.(.+)", r"vision_tower.vision_model.\1"),
    Rule(r"model\.multi_modal_projector\.(.+)", r"multi_modal_projector.\1"),
)

TRAINING_RULES = {
    "old": PROJECTOR_RULES + TEXT_RULES + TOWER_OLD_RULES,
    "flat": PROJECTOR_RULES + TEXT_RULES + TOWER_FLAT_RULES,
}
PLAIN_TRAINING_RULES = {
    "old": PLAIN_PROJECTOR_RULES + TEXT_RULES + TOWER_OLD_RULES,
    "flat": PLAIN_PROJECTOR_RULES + TEXT_RULES + TOWER_FLAT_RULES,
}
ALL_TABLES = {
    "projector": PROJECTOR_RULES,
    "plain projector": PLAIN_PROJECTOR_RULES,
    "language model": TEXT_RULES,
    "vision tower (old)": TOWER_OLD_RULES,
    "vision tower (flat)": TOWER_FLAT_RULES,
    "tower repository": TOWER_REPOSITORY_RULES,
    "stage 1": STAGE1_RULES,
    "LoRA prefixes": LORA_PREFIX_RULES,
    "LoRA factors": LORA_FACTOR_RULES,
    "Hub folder": HUB_RULES,
    "native LLaVA": NATIVE_LLAVA_RULES,
}


class Step(NamedTuple):
    """A change to a tensor itself, on the names that the key table gives.

    Attributes:
        pattern: the tensors it applies to (whole name).
        targets: names of the results, with back-references. Several targets split the rows into equal parts, in
            this order; one target keeps all rows.
        squeeze: drop the two trailing axes of size one (a 1x1 convolution becomes a Linear).
    """

    pattern: str
    targets: tuple[str, ...]
    squeeze: bool = False

    def inverse_pattern(self) -> tuple[str, ...]:
        """For each target a pattern that recognises it, and back-references to the fused name."""
        return tuple(invert_rule(Rule(self.pattern, target)).pattern for target in self.targets)

    def fused_name(self, part: int, name: str) -> str:
        """The name of the fused tensor whose part number `part` is `name`."""
        rule = invert_rule(Rule(self.pattern, self.targets[part]))
        return re.fullmatch(rule.pattern, name).expand(rule.replacement)


STEPS = (
    Step(  # in_proj holds q, k and v
        r"(model\.multi_modal_projector\.cross_attention)\.qkv_proj\.(weight|bias)",
        (r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2"),
    ),
    Step(  # 1x1 convolutions are Linears
        r"(model\.multi_modal_projector\.query_block\."
        r"(?:input_proj|local_proj|local_mixer\.out_proj|mlp\.fc1|mlp\.fc2)\.weight)",
        (r"\1",),
        squeeze=True,
    ),
)


# --- applying and inverting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renamed:
    """Result of [`rename`]: old key -> new key, and the dropped keys with the rule's note."""

    names: dict[str, str]
    dropped: dict[str, str]


def matching_rule(key: str, rules: Sequence[Rule]) -> Rule | None:
    """The one rule that matches the whole key, or None.

    Raises:
        ValueError: two rules match, a fault of the table.
    """
    matches = [rule for rule in rules if re.fullmatch(rule.pattern, key)]
    if len(matches) > 1:
        raise ValueError(f"key table is ambiguous: {key!r} matches {matches[0].pattern!r} and {matches[1].pattern!r}")
    return matches[0] if matches else None


def rename_key(key: str, rules: Sequence[Rule]) -> str | None:
    """New name of one key; None when the table drops it.

    Raises:
        UserError: no rule matches.
    """
    rule = matching_rule(key, rules)
    if rule is None:
        raise UserError(f"tensor {key!r} belongs to no known part of a Delta-LLaVA checkpoint")
    if rule.replacement is None:
        return None
    return re.fullmatch(rule.pattern, key).expand(rule.replacement)


def rename(keys: Iterable[str], rules: Sequence[Rule], where: str = "the checkpoint") -> Renamed:
    """Applies a table to all keys of a checkpoint.

    Raises:
        UserError: for keys that no rule matches, and for two keys that get one name. `where` says where they are.
    """
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for key in keys:
        rule = matching_rule(key, rules)
        if rule is None:
            unknown.append(key)
        elif rule.replacement is None:
            dropped[key] = rule.note
        else:
            name = re.fullmatch(rule.pattern, key).expand(rule.replacement)
            if name in origin:
                raise UserError(f"{where} holds one tensor under two names, {origin[name]!r} and {key!r}: remove one")
            origin[name] = key
            names[key] = name
    if unknown:
        raise UserError(
            f"{where} holds {describe_keys(unknown)} that belong to no known part of a Delta-LLaVA checkpoint: "
            "check that it was written by Delta-LLaVA training"
        )
    return Renamed(names, dropped)


def describe_keys(keys: Sequence[str], shown: int = 3) -> str:
    """`2 tensors ('a', 'b')`, with at most `shown` names spelled out."""
    listed = ", ".join(repr(key) for key in keys[:shown]) + (", ..." if len(keys) > shown else "")
    return f"{len(keys)} tensor{'s' * (len(keys) != 1)} ({listed})"


_TOKEN = re.compile(
    r"\(\?[!=](?:[^()]|\([^()]*\))*\)"  # lookahead, one level of groups inside
    r"|\(\?:(?:[^()])*\)\??"  # optional or alternative text that the inverse leaves out
    r"|(?P<group>\((?!\?)(?:[^()]|\((?:\?:|\?!)[^()]*\))*\))"  # capturing group
    r"|\\(?P<escaped>[^\w])"
    r"|(?P<literal>[\w#-]+)"
)


def invert_rule(rule: Rule) -> Rule:
    """The rule that takes the new name back to the old one; text in `(?:...)` and lookaheads are left out.

    Raises:
        ValueError: the rule drops its tensor or uses syntax beyond what [`Rule`] allows.
    """
    if rule.replacement is None:
        raise ValueError(f"a dropping rule has no inverse: {rule.pattern!r}")
    parts: list[tuple[str, str]] = []
    position = 0
    while position < len(rule.pattern):
        token = _TOKEN.match(rule.pattern, position)
        if token is None:
            raise ValueError(f"rule {rule.pattern!r} cannot be inverted at {rule.pattern[position:]!r}")
        position = token.end()
        if token["group"]:
            parts.append(("group", token["group"]))
        elif token["escaped"] or token["literal"]:
            parts.append(("text", token["escaped"] or token["literal"]))
    groups = [text for kind, text in parts if kind == "group"]
    references = [int(number) for number in re.findall(r"\\(\d)", rule.replacement)]
    if sorted(references) != list(range(1, len(groups) + 1)):
        raise ValueError(f"rule {rule.pattern!r} does not use each of its groups once in {rule.replacement!r}")
    pieces = re.split(r"\\(\d)", rule.replacement)
    pattern = "".join(groups[int(piece) - 1] if index % 2 else re.escape(piece) for index, piece in enumerate(pieces))
    numbers = iter(range(1, len(groups) + 1))
    replacement = "".join(
        text if kind == "text" else f"\\{references.index(next(numbers)) + 1}" for kind, text in parts
    )
    return Rule(pattern, replacement)


def invert_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The table for the way back: every rule that keeps its tensor, inverted, in the same order."""
    return tuple(invert_rule(rule) for rule in rules if rule.replacement is not None)


def matching_step(name: str) -> Step | None:
    """The step that changes a tensor of this (new) name, or None."""
    return next((step for step in STEPS if re.fullmatch(step.pattern, name)), None)


def step_of_target(name: str) -> tuple[Step, int] | None:
    """The step, and the number of its target, whose result has this name; None when no step makes it."""
    for step in STEPS:
        for part, pattern in enumerate(step.inverse_pattern()):
            if re.fullmatch(pattern, name):
                return step, part
    return None
