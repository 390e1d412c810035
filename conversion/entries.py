"""Tensors under their names in the model, as pieces of stored bytes: renaming, splitting, merging, checking."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.keys import (
    LORA_FACTOR_RULES,
    LORA_PREFIX_RULES,
    Rule,
    describe_keys,
    matching_step,
    rename,
)
from modeling_delta_llava.conversion.streams import LowRankUpdate, MeanRows, Piece, Span
from modeling_delta_llava.conversion.tensors import FLOATING, StoredTensor

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: its pieces follow each other along the first axis."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def source(self) -> StoredTensor:
        """The stored tensor that the first piece comes from."""
        piece = self.pieces[0]
        return piece.base if isinstance(piece, LowRankUpdate) else piece.stored


Entries = dict[str, Entry]


def named_entries(
    tensors: Mapping[str, StoredTensor], tables: Sequence[Sequence[Rule]], where: str, steps: bool = True
) -> tuple[Entries, dict[str, str]]:
    """Stored tensors under model names.

    Args:
        tables: key tables, applied one after the other.
        where: what the tensors come from, for messages.
        steps: whether the tensors are a training checkpoint's, which the steps apply to.

    Returns:
        the entries, and for each dropped key the reason.

    Raises:
        UserError: a key that no rule matches, two keys of one name, or a tensor that a step cannot be applied to.
    """
    names = {key: key for key in tensors}
    dropped: dict[str, str] = {}
    for table in tables:
        renamed = rename(names.values(), table, where)
        dropped |= {key: renamed.dropped[name] for key, name in names.items() if name in renamed.dropped}
        names = {key: renamed.names[name] for key, name in names.items() if name in renamed.names}
    entries: Entries = {}
    for key, name in names.items():
        entries |= _stepped(name, tensors[key]) if steps else {name: _unchanged(tensors[key])}
    return entries, dropped


def _unchanged(stored: StoredTensor) -> Entry:
    return Entry(stored.dtype, stored.shape, (Span.whole(stored),))


def _stepped(name: str, stored: StoredTensor) -> Entries:
    step = matching_step(name)
    if step is None:
        return {name: _unchanged(stored)}
    match = re.fullmatch(step.pattern, name)
    shape, parts = stored.shape, len(step.targets)
    if step.squeeze and len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    elif step.squeeze and len(shape) != 2:
        raise UserError(
            f"tensor {stored.key!r} in {stored.file} has shape {stored.shape}, not that of a 1x1 convolution"
        )
    if not shape or shape[0] % parts:
        raise UserError(f"tensor {stored.key!r} in {stored.file} has shape {stored.shape}, not {parts} equal parts")
    part_shape = (shape[0] // parts, *shape[1:])
    size = math.prod(part_shape)
    return {
        match.expand(target): Entry(stored.dtype, part_shape, (Span(stored, index * size, size),))
        for index, target in enumerate(step.targets)
    }


# --- LoRA ------------------------------------------------------------------------------------------------------------

_PLAIN_LORA_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def check_adapter_config(config: dict, where: str) -> None:
    """Refuses adapters that are not `W + (alpha / r) B A` on the base as it is.

    Raises:
        UserError: names the feature.
    """
    problem = None
    if config.get("peft_type", "LORA") != "LORA":
        problem = f"peft_type {config['peft_type']!r}"
    elif config.get("use_dora"):
        problem = "use_dora (DoRA)"
    elif config.get("fan_in_fan_out"):
        problem = "fan_in_fan_out"
    elif config.get("use_qalora") or config.get("lora_bias"):
        problem = "use_qalora" if config.get("use_qalora") else "lora_bias"
    elif config.get("layer_replication") or config.get("target_parameters"):
        problem = "layer_replication" if config.get("layer_replication") else "target_parameters"
    elif config.get("init_lora_weights", True) not in _PLAIN_LORA_STARTS:
        problem = f"init_lora_weights {config['init_lora_weights']!r} (it changed the base model)"
    if problem:
        raise UserError(f"{where} uses {problem}: merge it with peft (merge_and_unload) and convert the merged model")


def lora_scale(config: dict, module: str, rank: int, where: str) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` with rslora; PEFT's own way to look up alpha and rank patterns.

    Args:
        module: name of the adapted module, without PEFT's prefix.
        rank: rows of `lora_A`.

    Raises:
        UserError: `adapter_config.json` has no usable alpha, or says another rank.
    """

    def lookup(name: str, default: object) -> object:
        patterns = config.get(name) or {}
        try:
            matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
            return next(matching, default)
        except (re.error, AttributeError) as error:
            raise UserError(
                f"the adapter_config.json of {where} has an unusable {name} ({error}): copy the one of training"
            ) from error

    alpha, stated = (
        lookup("alpha_pattern", config.get("lora_alpha")),
        lookup("rank_pattern", config.get("r")),
    )
    if not isinstance(alpha, (int, float)) or not isinstance(stated, int):
        raise UserError(f"{where} states no r and lora_alpha for {module}: copy the adapter_config.json of training")
    if stated != rank:
        raise UserError(f"{where} has a lora_A of rank {rank} for {module}, but adapter_config.json says {stated}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def split_adapter(tensors: Mapping[str, StoredTensor], where: str):
    """The tensors of an adapter file: `({weight key: (A, B)}, {other key: tensor})`, without PEFT's prefixes.

    Raises:
        UserError: a factor without its partner, DoRA magnitudes, LoRA on embeddings, or an unknown key.
    """
    factor_keys = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    way_on = "merge it with peft (merge_and_unload) and convert the merged model"
    for key in factor_keys:
        if "lora_magnitude_vector" in key:
            raise UserError(f"{where} is a DoRA adapter ({key}): {way_on}")
        if "lora_embedding_" in key:
            raise UserError(f"{where} adapts an embedding ({key}): {way_on}")
    names = rename(factor_keys, LORA_FACTOR_RULES, where).names
    factors: dict[str, dict[str, StoredTensor]] = {}
    for key, name in names.items():
        weight, _, letter = name.rpartition("#")
        factors.setdefault(weight, {})[letter] = tensors[key]
    alone = [weight for weight, pair in factors.items() if len(pair) != 2]
    if alone:
        raise UserError(f"{where} lacks lora_A or lora_B for {describe_keys(alone)}: save the adapter again")
    others = {key: tensor for key, tensor in tensors.items() if key not in factor_keys}
    renamed = rename(others, LORA_PREFIX_RULES, where)
    plain = {name: others[key] for key, name in renamed.names.items()}
    return {weight: (pair["A"], pair["B"]) for weight, pair in factors.items()}, plain


def merge_factors(
    entries: Entries,
    factors: Mapping[str, tuple[StoredTensor, StoredTensor]],
    names: Mapping[str, str],
    config: dict,
    where: str,
) -> Entries:
    """`entries` with every adapted weight replaced by its merge.

    Args:
        factors: weight key -> (A, B).
        names: weight key -> name in the model.

    Raises:
        UserError: the base has no such weight, or its shape does not fit the factors.
    """
    merged = dict(entries)
    for key, (factor_a, factor_b) in factors.items():
        name = names[key]
        entry = entries.get(name)
        if entry is None:
            raise UserError(
                f"{where} adapts {key}, which the base model does not have: is --base-model the right one?"
            )
        fitting = len(factor_a.shape) == len(factor_b.shape) == 2 and factor_a.shape[0] == factor_b.shape[1]
        shape = (factor_b.shape[0], factor_a.shape[1]) if fitting else None
        if shape != entry.shape or len(entry.pieces) != 1 or entry.source.shape != entry.shape:
            raise UserError(
                f"{where} adapts {key} with factors for shape {shape}, but the base model's is {entry.shape}: "
                "is --base-model the model that the adapter was trained on?"
            )
        module = key.removesuffix(".weight")
        scale = lora_scale(config, module, factor_a.shape[0], where)
        update = LowRankUpdate(entry.source, factor_a, factor_b, scale)
        merged[name] = replace(entry, pieces=(update,))
    return merged


# --- vocabulary and checks -------------------------------------------------------------------------------------------


def vocabulary_rows(entries: Entries) -> int:
    """Rows of the embedding in the checkpoint.

    Raises:
        UserError: no embedding, or one that is no matrix.
    """
    entry = entries.get(EMBEDDING)
    if entry is None or len(entry.shape) != 2:
        raise UserError(
            "the source has no word embeddings (model.embed_tokens.weight): pass the language model as --base-model"
        )
    return entry.shape[0]


def with_rows(entries: Entries, rows: int) -> Entries:
    """Embedding and head padded to `rows` rows by mean rows, which can never win."""
    padded = dict(entries)
    for name in (EMBEDDING, HEAD):
        entry = entries.get(name)
        if entry is not None and len(entry.shape) == 2 and entry.shape[0] < rows:
            new = MeanRows(entry.pieces, entry.shape[1], rows - entry.shape[0])
            padded[name] = Entry(entry.dtype, (rows, entry.shape[1]), (*entry.pieces, new))
    return padded


def check_entries(
    entries: Entries, needed: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compares names, shapes and dtypes with the model's own, before a byte is written.

    Raises:
        UserError: tensors missing, unknown, of another shape, or not floating point.
    """
    missing = [name for name in needed if name not in entries]
    surplus = [name for name in entries if name not in needed and name not in optional]
    if missing:
        raise UserError(
            f"{where} lacks {describe_keys(missing)} of the model that config.json describes{_hint(missing[0])}"
        )
    if surplus:
        keys = [entries[name].source.key for name in surplus]
        raise UserError(
            f"{where} holds {describe_keys(keys)} beyond the model that config.json describes{_hint(surplus[0])}"
        )
    for name, entry in entries.items():
        shape = needed.get(name) or optional.get(name)
        if entry.shape != shape:
            raise UserError(
                f"tensor {entry.source.key!r} in {entry.source.file} has shape {entry.source.shape}, "
                f"but config.json describes {shape} for {name}{_hint(name)}"
            )
        if entry.dtype not in FLOATING:
            raise UserError(
                f"tensor {entry.source.key!r} in {entry.source.file} is {entry.dtype}: quantised weights cannot be "
                "converted, save the model in 16 or 32 bit"
            )


def _hint(name: str) -> str:
    if name.startswith(TOWER):
        return ": the vision tower is another one; give the right one with --vision-tower"
    if name.startswith(PROJECTOR):
        return ": the projector was trained for another tower or language model than given"
    return ": the language model is another one than config.json says; give the two that belong together"


def json_bytes(value: dict) -> bytes:
    """How every JSON file here is written."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")
