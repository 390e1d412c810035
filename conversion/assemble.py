"""A source becomes the tensors and the configuration of a Hub folder, checked whole before a byte is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from delta_llava.errors import UserError, told
from modeling_delta_llava.building import MAX_APPENDED_ROWS, load_tokenizer
from modeling_delta_llava.conversion import configs, lora, tables
from modeling_delta_llava.conversion.source import (
    DELTA,
    FINETUNED,
    FORM_NAMES,
    LORA,
    NON_LORA_FILE,
    PLAIN,
    PROJECTOR_FILE,
    STAGE1,
    STAGE2,
    Checkpoint,
    Source,
    detect_projector,
    open_source,
    read_checkpoint,
    refuse_unused_features,
    single_file,
)
from modeling_delta_llava.conversion.tables import EMBEDDING, HEAD, PROJECTOR, TOWER, Table, describe_keys
from modeling_delta_llava.conversion.write import Weights, check_weights, same_values, stored_weight, with_parts_split
from modeling_delta_llava.json_files import check_files, read_json
from modeling_delta_llava.sources import file_inside, local_folder

DTYPES = {"keep": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What a LoRA run sets in the configuration of its base model.
BUDGET_FIELDS = ("num_visual_tokens", "trained_num_visual_tokens")


@dataclass
class Options:
    """What the user asked for, beside SOURCE."""

    form: str | None = None
    base_model: str | None = None
    vision_tower: str | None = None
    revision: str | None = None
    dtype: str = "keep"


@dataclass(frozen=True)
class Model:
    """The weights of a model under their names in it, with the configuration that they belong to.

    Attributes:
        projector: `DELTA`, `PLAIN`, or None where there is none.
        config, config_path: what training wrote, or a Hub folder's own, and where.
        tower_keys: how the training checkpoint names the tower that is in it ("old", "flat"); None for no tower.
    """

    weights: Weights
    projector: str | None
    config: dict
    config_path: Path
    tower_keys: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.config.get("model_type") == "delta_llava"

    @property
    def has_tower(self) -> bool:
        return any(name.startswith(TOWER) for name in self.weights)


@dataclass(kw_only=True)
class Found:
    """What was opened on the way, and what there is to say about it.

    Attributes:
        folders: every folder that is read, by role.
        checkpoints: every checkpoint whose files are mapped.
        dropped: source key -> why it is not written.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def opened(self, role: str, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.folders[role] = folder
        if checkpoint is not None:
            self.checkpoints.append(checkpoint)
            self.notes += checkpoint.notes

    def renamed(self, checkpoint: Checkpoint, keys: Mapping[str, str], table: Table, where: str, **dropped) -> Weights:
        """Weights under model names; `keys` gives the training key of each stored one."""
        names, left_out = tables.rename(keys.values(), table, where, **dropped)
        origin = {key: stored for stored, key in keys.items()}
        self.dropped |= {origin[key]: why for key, why in left_out.items()}
        return {name: stored_weight(checkpoint, origin[key]) for key, name in names.items()}

    def check_sources_unchanged(self) -> None:
        """Raises `UserError` if a file was changed since it was opened."""
        for checkpoint in self.checkpoints:
            checkpoint.check_unchanged()


@dataclass(kw_only=True)
class Assembly(Found):
    """A Hub folder, ready to be written, compared (`verify`) or shown (`--dry-run`).

    Attributes:
        config: the Hub folder's configuration object.
        weights: what to write, by name in the model.
        tokenizer_folder: where the tokenizer came from.
        processor: a whole processor that the source brings and that is taken over; None: one is built.
        preprocessor: the tower's own settings, for the one that is built.
        generation_file: the source's `generation_config.json`, if it has one.
        training: the source's configuration as written.
        source_rows: embedding rows before padding.
        record: what export needs to restore the training layout; None where there was none.
    """

    form: str
    projector: str
    config: object
    weights: Weights
    tokenizer: object
    image_token: str
    tokenizer_folder: Path
    processor: object | None
    preprocessor: dict | None
    generation_file: Path | None
    training: dict
    source_rows: int
    record: dict | None

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def added_rows(self) -> range:
        """Embedding rows that conversion adds; none of them may be generated."""
        return range(self.source_rows, self.config.text_config.vocab_size)


def assemble(source: str, options: Options) -> Assembly:
    """Opens a source and everything that it needs, and decides every tensor of the result.

    Raises:
        UserError: anything that would make the result wrong or incomplete.
    """
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    found = Found()
    opened = open_source(local_folder(source, "SOURCE", options.revision), options.form)
    found.opened("SOURCE", opened.folder, opened.weights)
    model = {STAGE1: _stage1_model, LORA: _adapted_model}.get(opened.form, _complete_model)(opened, options, found)
    model, vision, preprocessor = _with_tower(model, opened.folder, options, found)
    if model.is_ours:
        text = configs.own_part(model.config, "text_config", model.config_path)
    else:
        text = configs.text_config_fields(model.config, model.config_path)
    whole, model = model, _without_tied_head(model, text, found)
    source_rows = _vocabulary_rows(model.weights)
    tokenizer, image_token, tokenizer_folder, processor = _tokenizer(
        model, opened.folder, text["model_type"], source_rows, found
    )
    rows = _needed_rows(model.weights, source_rows, tokenizer, tokenizer_folder)
    config = configs.build_config(
        model.projector,
        model.config,
        text,
        vision,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        vocab_size=rows,
        where=model.config_path,
    )
    weights = _with_rows(model.weights, rows)
    where = " + ".join(str(path) for path in found.folders.values())
    check_weights(weights, *configs.expected_shapes(config, model.projector, model.config_path), where)
    wanted = DTYPES[options.dtype]
    if wanted is not None:
        weights = {name: replace(weight, dtype=wanted) for name, weight in weights.items()}
    config.dtype = weights[EMBEDDING].dtype
    record = None  # of a projector or an adapter on a Hub folder, which no training checkpoint belongs to
    if opened.form == FINETUNED:
        record = configs.read_record(opened.folder)
    elif not model.is_ours:
        record = configs.make_record(
            form=opened.form,
            projector=model.projector,
            training=model.config,
            vision_tower=options.vision_tower,
            vocabulary_rows=source_rows,
            tower_keys=model.tower_keys,
            tied_head_saved=HEAD in whole.weights and HEAD not in model.weights,
            tensors=opened.weights.tensors if opened.form == STAGE2 else {},
        )
    places = (folder / "generation_config.json" for folder in (opened.folder, tokenizer_folder))
    return Assembly(
        **vars(found),
        form=opened.form,
        projector=model.projector,
        config=config,
        # In the order in which they lie in the files, so that reading is sequential.
        weights=dict(sorted(weights.items(), key=lambda item: (str(item[1].file), item[1].stored.data_ptr()))),
        tokenizer=tokenizer,
        image_token=image_token,
        tokenizer_folder=tokenizer_folder,
        processor=processor,
        preprocessor=preprocessor,
        generation_file=next((path for path in places if path.is_file()), None),
        training=model.config,
        source_rows=source_rows,
        record=record,
    )


# --- the three kinds of source ---------------------------------------------------------------------------------------


def _complete_model(opened: Source, options: Options, found: Found) -> Model:
    model = _model_of(opened.weights, opened.folder, opened.config, found)
    if model.projector is None:
        raise UserError(f"SOURCE {opened.folder} has no projector tensors: --form {opened.form} does not fit it")
    return model


def _stage1_model(opened: Source, options: Options, found: Found) -> Model:
    path = opened.folder / PROJECTOR_FILE
    tensors = opened.weights.tensors
    extra = [key for key in tensors if "embed_tokens" in key or "embed_in" in key]
    if extra:
        raise UserError(f"{path} holds {describe_keys(extra)} (mm_use_im_start_end), which is not supported")
    kind = detect_projector(tensors, str(path))
    keys = {key: _stage1_key(key) for key in tensors}
    projector = found.renamed(opened.weights, keys, tables.training_table(kind == PLAIN), str(path))
    base = _base_model(opened, options, found)
    weights = {name: weight for name, weight in base.weights.items() if not name.startswith(PROJECTOR)}
    weights |= with_parts_split(projector)
    if base.is_ours:  # which knows its tower and its tokens
        return replace(base, weights=weights, projector=kind)
    return Model(weights, kind, opened.config, opened.folder / "config.json")


def _stage1_key(key: str) -> str:
    """`mm_projector.bin` may or may not carry the prefixes of the wrapping model."""
    return re.sub(r"^(base_model\.model\.|module\.)?(model\.)?(?=mm_projector\.)", "model.", key)


def _adapted_model(opened: Source, options: Options, found: Found) -> Model:
    settings_path = opened.folder / "adapter_config.json"
    settings = read_json(file_inside(opened.folder, settings_path.name, "SOURCE"))
    lora.check_adapter_config(settings, str(settings_path))
    where = str(next(iter(opened.weights.identities)))
    factors = lora.low_rank_factors(opened.weights, where)
    checkpoint = opened.weights
    if (opened.folder / NON_LORA_FILE).exists():
        others = single_file(opened.folder, (NON_LORA_FILE,))
        found.checkpoints.append(others)
        lora.low_rank_factors(others, str(opened.folder / NON_LORA_FILE), expected=False)
        # What this file says of a tensor counts.
        checkpoint = Checkpoint(checkpoint.tensors | others.tensors, checkpoint.files | others.files)
    by_name = {lora.without_peft(key): key for key in checkpoint.tensors if ".lora_" not in key}
    trained = {key: name for name, key in by_name.items() if name is not None}
    refuse_unused_features(opened.config, trained.values(), opened.folder)
    base = _base_model(opened, options, found)
    if base.is_ours:
        budgets = {name: opened.config[name] for name in BUDGET_FIELDS if name in opened.config}
        model = replace(base, config=base.config | budgets, tower_keys=None)
        table: Table = tables.HUB_ROWS
    else:
        if not opened.config:
            raise UserError(f"{opened.folder} lacks config.json: copy the one that training wrote there")
        has_projector = any("mm_projector." in key for key in trained.values())
        if not has_projector and base.projector is None:
            raise UserError(
                f"{opened.folder} has no projector ({NON_LORA_FILE} is missing or lacks it) and neither has "
                f"the base model: copy the {NON_LORA_FILE} of training there"
            )
        kind = detect_projector(trained.values(), where) if has_projector else base.projector
        model = Model(base.weights, kind, opened.config, opened.folder / "config.json")
        table = tables.training_table(kind == PLAIN, tower_form(trained.values()))
    overlay = found.renamed(checkpoint, trained, table, str(opened.folder))
    weights = base.weights | (overlay if base.is_ours else with_parts_split(overlay))
    found.notes.append(f"{len(factors)} weights get their LoRA update, merged in fp32 and rounded once")
    names, _ = tables.rename(factors, table, where, dropped={})
    for key, (factor_a, factor_b) in factors.items():
        name = names[key]
        if name not in weights:
            raise UserError(
                f"{where} adapts {key}, which the base model does not have: is --base-model the right one?"
            )
        weights[name] = lora.merged(weights[name], key, factor_a, factor_b, settings, where)
    return replace(model, weights=weights)


def _base_model(opened: Source, options: Options, found: Found) -> Model:
    if options.base_model is None:
        raise UserError(
            f"SOURCE {opened.folder} is a {FORM_NAMES[opened.form]}: pass the model it was trained on as "
            "--base-model (a folder or a Hub id)"
        )
    folder = local_folder(options.base_model, "--base-model")
    checkpoint = read_checkpoint(folder)
    found.opened("--base-model", folder, checkpoint)
    return _model_of(checkpoint, folder, read_json(folder / "config.json"), found)


def _model_of(checkpoint: Checkpoint, folder: Path, config: dict, found: Found) -> Model:
    """A whole model in the training layout (with or without a projector) or in this project's own."""
    keys = {key: key for key in checkpoint.tensors}
    path = folder / "config.json"
    if any(PROJECTOR in key for key in keys):
        return Model(found.renamed(checkpoint, keys, tables.HUB_ROWS, str(folder)), DELTA, config, path)
    kind = None
    if any(key.startswith(tables.TRAINED_PROJECTOR) for key in keys):
        kind = detect_projector(keys, str(folder))
    form = tower_form(keys)
    table = tables.training_table(kind == PLAIN, form)
    weights = with_parts_split(found.renamed(checkpoint, keys, table, str(folder)))
    return Model(weights, kind, config, path, form if any(name.startswith(TOWER) for name in weights) else None)


def tower_form(keys) -> str:
    """Whether tower keys carry `vision_model.` (`old`) or not (`flat`)."""
    return "old" if any(".vision_tower.vision_model." in key for key in keys) else "flat"


# --- tower, vocabulary, tokenizer ------------------------------------------------------------------------------------


def _with_tower(model: Model, source: Path, options: Options, found: Found) -> tuple[Model, dict, dict | None]:
    """The model with its tower; that one's config fields and preprocessor settings."""
    wanted = options.vision_tower
    if wanted is None and model.has_tower and model.is_ours:
        return model, configs.own_part(model.config, "vision_config", model.config_path), None
    name = wanted or model.config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise UserError(f"{model.config_path} names no vision tower and none is inside: pass --vision-tower")
    reads_weights = wanted is not None or not model.has_tower
    try:
        folder = _tower_folder(name, source, model.config_path, wanted is not None, reads_weights)
    except UserError:
        known = configs.KNOWN_TOWERS.get(Path(name).name)
        if known is None or reads_weights:
            raise
        found.notes.append(f"the tower {name} cannot be reached: its published configuration is used")
        return model, known, None
    settings_file = folder / "preprocessor_config.json"
    settings = read_json(settings_file) if settings_file.exists() else None
    fields = configs.tower_config_fields(folder)
    if not reads_weights:
        found.opened("--vision-tower", folder)
        return model, fields, settings
    if model.has_tower:
        found.notes.append(f"--vision-tower {name} replaces the tower inside")
    checkpoint = read_checkpoint(folder)
    found.opened("--vision-tower", folder, checkpoint)
    keys = {key: key for key in checkpoint.tensors}
    dropped = tables.TOWER_REPOSITORY_DROPPED
    tower = found.renamed(checkpoint, keys, tables.TOWER_REPOSITORY_ROWS, f"vision tower {folder}", dropped=dropped)
    rest = {key: weight for key, weight in model.weights.items() if not key.startswith(TOWER)}
    return replace(model, weights=rest | tower, tower_keys=None), fields, settings


def _tower_folder(name: str, source: Path, config_path: Path, given: bool, weights: bool) -> Path:
    """The tower's folder; a relative name in a config is also looked up beside and inside SOURCE."""
    if given:
        return local_folder(name, "--vision-tower", weights=weights)
    if not Path(name).is_absolute():
        for place in (source / name, source.parent / name):
            if place.is_dir():
                return local_folder(str(place), "vision tower", weights=weights)
    try:
        return local_folder(name, "vision tower", weights=weights)
    except UserError as error:
        raise UserError(f"{error} (mm_vision_tower in {config_path}); or pass --vision-tower") from error


def _without_tied_head(model: Model, text: dict, found: Found) -> Model:
    """The model without a head that is tied to the embedding."""
    head, embedding = model.weights.get(HEAD), model.weights.get(EMBEDDING)
    if head is None or embedding is None or not configs.ties_embeddings(text, model.config_path):
        return model
    same = head.update is None and embedding.update is None and same_values(head.stored, embedding.stored)
    if not same:
        raise UserError(
            f"{model.config_path} ties lm_head to the embedding, but the two differ in {head.file.parent}: set "
            "tie_word_embeddings to false there if the head was trained on its own"
        )
    found.dropped[head.key] = "the head is tied to the embedding"
    return replace(model, weights={name: weight for name, weight in model.weights.items() if name != HEAD})


def _vocabulary_rows(weights: Weights) -> int:
    """Rows of the embedding in the checkpoint.

    Raises:
        UserError: no embedding, or one that is no matrix.
    """
    weight = weights.get(EMBEDDING)
    if weight is None or len(weight.shape) != 2:
        raise UserError(
            "the source has no word embeddings (model.embed_tokens.weight): pass the language model as --base-model"
        )
    return weight.shape[0]


def _needed_rows(weights: Weights, source_rows: int, tokenizer, tokenizer_folder: Path) -> int:
    """Embedding rows of the result: for every token, and for every row of a head of its own."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= source_rows + MAX_APPENDED_ROWS:
        raise UserError(
            f"the tokenizer in {tokenizer_folder} has a token of id {largest:,}, the model {source_rows:,} embedding "
            "rows: copy the tokenizer of training"
        )
    head = weights[HEAD].shape if HEAD in weights else ()
    return max(source_rows, largest + 1, head[0] if len(head) == 2 else 0)


def _with_rows(weights: Weights, rows: int) -> Weights:
    """Embedding and head padded to `rows` rows by mean rows, which can never win."""
    padded = dict(weights)
    for name in (EMBEDDING, HEAD):
        weight = weights.get(name)
        if weight is not None and len(weight.shape) == 2 and weight.shape[0] < rows:
            padded[name] = replace(weight, mean_rows=rows - weight.shape[0])
    return padded


def _tokenizer(model: Model, source: Path, model_type: str, rows: int, found: Found):
    """The tokenizer, its image token, its folder, and the processor of our own that it belongs to, if any."""
    from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor

    folders = [source, *(path for role, path in found.folders.items() if role == "--base-model")]
    if model.is_ours:
        for folder in folders:
            if (folder / "processor_config.json").exists():
                check_files(folder)
                with told(f"the processor in {folder} cannot be used", "copy its JSON files and its tokenizer again"):
                    processor = DeltaLlavaProcessor.from_pretrained(folder, trust_remote_code=False)
                return processor.tokenizer, processor.image_token, folder, processor
    files = ("tokenizer.model", "tokenizer.json", "vocab.json")
    folder = next((path for path in folders if any((path / name).exists() for name in files)), source)
    length = model.config.get("tokenizer_model_max_length")
    return *load_tokenizer(folder, model_type, length if isinstance(length, int) else None, rows), folder, None
