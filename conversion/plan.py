"""Everything a conversion will write, decided and checked before the first byte."""

from dataclasses import dataclass, field
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion import configs, forms
from modeling_delta_llava.conversion.checkpoints import (
    Checkpoint,
    file_inside,
    read_checkpoint,
    read_weight_file,
    refuse_empty,
)
from modeling_delta_llava.conversion.entries import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    TOWER,
    Entries,
    check_adapter_config,
    check_entries,
    merge_factors,
    named_entries,
    split_adapter,
    vocabulary_rows,
    with_rows,
)
from modeling_delta_llava.conversion.keys import (
    HUB_RULES,
    NATIVE_LLAVA_RULES,
    PLAIN_TRAINING_RULES,
    STAGE1_RULES,
    TOWER_OLD_RULES,
    TOWER_REPOSITORY_RULES,
    TRAINING_RULES,
    Rule,
    describe_keys,
    rename_key,
)
from modeling_delta_llava.conversion.record import dropped_tensor
from modeling_delta_llava.conversion.sources import is_hub_id, local_folder
from modeling_delta_llava.conversion.streams import LowRankUpdate, OutputTensor, Span, TensorStream, target_dtype
from modeling_delta_llava.conversion.tensors import StoredTensor
from modeling_delta_llava.json_files import read_json

DTYPES = {"keep": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Dropped tensors up to this size (rotary frequencies, position ids) go into the record, so that export restores them.
RECORDED_BYTES = 64_000
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


@dataclass
class Plan:
    """One conversion, ready to be written, compared (`verify`) or shown (`--dry-run`).

    Attributes:
        config: the Hub folder's configuration object.
        tensors: what to write, under the names of the files.
        names: model name of each written tensor.
        counts: (part, number of tensors, bytes) rows for the accounting.
        dropped: source key -> why it is not written.
        folders: every folder that is read, by role.
        tokenizer_folder: where the tokenizer came from.
        generation_file: the source's `generation_config.json`, if it has one.
        processor: a whole processor that the source brings and that is taken over; None: one is built.
        source_rows: embedding rows before padding.
        record: what export needs to restore the training layout.
    """

    form: str
    projector: str
    config: object
    tensors: list[OutputTensor]
    names: dict[str, str]
    counts: list[tuple[str, int, int]]
    dropped: dict[str, str]
    folders: dict[str, Path]
    tokenizer: object
    image_token: str
    tokenizer_folder: Path
    processor: object | None
    preprocessor: dict | None
    generation_file: Path | None
    training: dict
    source_rows: int
    record: dict
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def suppressed_rows(self) -> range:
        """Embedding rows that conversion adds; none of them may be generated."""
        return range(self.source_rows, self.config.text_config.vocab_size)


def make_plan(source: str, options: Options) -> Plan:
    """Reads headers, configs and tokenizer of a source and decides every output tensor.

    Raises:
        UserError: anything that would make the result wrong or incomplete.
    """
    if options.form not in (None, *forms.FORMS):
        raise UserError(f"--form {options.form!r} is unknown: choose one of {', '.join(forms.FORMS)}")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    folder = local_folder(source, "SOURCE", options.revision)
    return _Planner(folder, options).plan()


class _Planner:
    def __init__(self, folder: Path, options: Options):
        self.folder = folder
        self.options = options
        self.form = options.form or forms.detect_form(folder)
        self.folders = {"SOURCE": folder}
        self.notes: list[str] = []
        self.dropped: dict[str, str] = {}
        self.restorable: dict[str, StoredTensor] = {}
        self.tower_keys: str | None = None
        self.tied_head_saved = False
        self.projector = forms.DELTA
        self.config_path = folder / "config.json"
        if self.form == forms.LORA and not self.config_path.exists():
            self.training: dict = {}
        else:
            self.training = forms.read_training_config(folder)

    @property
    def has_own_config(self) -> bool:
        """Whether the configuration is a Hub folder's and not one of training."""
        return self.training.get("model_type") == "delta_llava"

    def _own_part(self, name: str) -> dict:
        """`text_config` or `vision_config` of a Hub folder's configuration."""
        fields = self.training.get(name)
        if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
            raise UserError(f"{self.config_path} has no {name} with a model_type: copy the whole file again")
        return dict(fields)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def source_model(self) -> Entries:
        checkpoint = read_checkpoint(self.folder)
        self.notes += checkpoint.notes
        forms.refuse_unused_features(self.training, checkpoint.tensors, self.folder)
        entries, projector, dropped = _whole_model(checkpoint, self.folder)
        if projector is None:
            raise UserError(f"SOURCE {self.folder} has no projector tensors: --form {self.form} does not fit it")
        self.projector = projector
        self.dropped |= dropped
        self.restorable = {
            key: tensor
            for key in dropped
            if (tensor := checkpoint.tensors[key]).nbytes <= RECORDED_BYTES and tensor.is_contiguous
        }
        if not self.has_own_config and any(name.startswith(TOWER) for name in entries):
            self.tower_keys = _tower_form(checkpoint.tensors)
        return entries

    def base_model(self) -> tuple[Entries, str | None]:
        """Entries of `--base-model`, and which projector it has, if any."""
        if self.options.base_model is None:
            raise UserError(
                f"SOURCE {self.folder} is a {forms.FORM_NAMES[self.form]}: pass the model it was trained on as "
                "--base-model (a folder or a Hub id)"
            )
        folder = local_folder(self.options.base_model, "--base-model")
        self.folders["--base-model"] = folder
        checkpoint = read_checkpoint(folder)
        self.notes += checkpoint.notes
        entries, projector, dropped = _whole_model(checkpoint, folder)
        self.dropped |= dropped
        base_config = read_json(folder / "config.json")
        if base_config.get("model_type") == "delta_llava":
            self.training, self.config_path = base_config, folder / "config.json"
        return entries, projector

    def stage1(self) -> Entries:
        path = file_inside(self.folder, forms.PROJECTOR_FILE, "SOURCE")
        tensors = read_weight_file(path)
        refuse_empty(path, tensors)
        extra = [key for key in tensors if "embed_tokens" in key or "embed_in" in key]
        if extra:
            raise UserError(f"{path} holds {describe_keys(extra)} (mm_use_im_start_end), which is not supported")
        forms.refuse_unused_features(self.training, tensors, self.folder)
        self.projector = forms.detect_projector(tensors, str(path))
        table = _training_table(self.projector, tensors)
        projector, dropped = named_entries(tensors, [STAGE1_RULES, table], str(path))
        self.dropped |= dropped
        entries, _ = self.base_model()
        return {name: entry for name, entry in entries.items() if not name.startswith(PROJECTOR)} | projector

    def lora(self) -> Entries:
        adapter_config = read_json(self.folder / "adapter_config.json")
        check_adapter_config(adapter_config, str(self.folder / "adapter_config.json"))
        adapter = next((name for name in forms.ADAPTER_FILES if (self.folder / name).exists()), None)
        if adapter is None:
            raise UserError(
                f"{self.folder} lacks {' or '.join(forms.ADAPTER_FILES)}: copy the adapter's weights there"
            )
        path = file_inside(self.folder, adapter, "SOURCE")
        tensors = read_weight_file(path)
        refuse_empty(path, tensors)
        factors, trained = split_adapter(tensors, str(path))
        if (self.folder / forms.NON_LORA_FILE).exists():
            others_path = file_inside(self.folder, forms.NON_LORA_FILE, "SOURCE")
            others = read_weight_file(others_path)
            refuse_empty(others_path, others)
            trained |= split_adapter(others, str(others_path))[1]
        forms.refuse_unused_features(self.training, trained, self.folder)
        budgets = {name: self.training[name] for name in BUDGET_FIELDS if name in self.training}
        entries, base_projector = self.base_model()
        if self.has_own_config:
            self.training |= budgets
            table: tuple[Rule, ...] = HUB_RULES
        else:
            if not self.training:
                raise UserError(f"{self.folder} lacks config.json: copy the one that training wrote there")
            has_projector = any("mm_projector." in key for key in trained)
            if not has_projector and base_projector is None:
                raise UserError(
                    f"{self.folder} has no projector ({forms.NON_LORA_FILE} is missing or lacks it) and neither has "
                    f"the base model: copy the {forms.NON_LORA_FILE} of training there"
                )
            self.projector = forms.detect_projector(trained, str(path)) if has_projector else base_projector
            table = _training_table(self.projector, trained)
        overlay, dropped = named_entries(trained, [table], str(self.folder), steps=not self.has_own_config)
        self.dropped |= dropped
        names = {key: rename_key(key, table) for key in factors}
        self.notes.append(f"{len(factors)} weights get their LoRA update, merged in fp32 and rounded once")
        return merge_factors(entries | overlay, factors, names, adapter_config, str(path))

    # --- tower -------------------------------------------------------------------------------------------------------

    def tower(self, entries: Entries) -> tuple[Entries, dict, dict | None]:
        """Entries with the tower's tensors, its config fields and its preprocessor settings."""
        inside = any(name.startswith(TOWER) for name in entries)
        wanted = self.options.vision_tower
        if wanted is None and inside and self.has_own_config:
            return entries, self._own_part("vision_config"), None
        name = wanted or self.training.get("mm_vision_tower")
        if not isinstance(name, str) or not name:
            raise UserError(f"{self.config_path} names no vision tower and none is inside: pass --vision-tower")
        try:
            folder = self._tower_folder(name, given=wanted is not None, weights=wanted is not None or not inside)
        except UserError:
            known = configs.KNOWN_TOWERS.get(Path(name).name)
            if known is None or wanted is not None or not inside:
                raise
            self.notes.append(f"the tower {name} cannot be reached: its published configuration is used")
            return entries, known, None
        self.folders["--vision-tower"] = folder
        settings_file = folder / "preprocessor_config.json"
        settings = read_json(settings_file) if settings_file.exists() else None
        fields = configs.tower_config_fields(folder)
        if inside and wanted is None:
            return entries, fields, settings
        if inside:
            self.notes.append(f"--vision-tower {name} replaces the tower inside")
            self.tower_keys = None
        tables = [TOWER_REPOSITORY_RULES, TOWER_OLD_RULES]
        found, dropped = named_entries(read_checkpoint(folder).tensors, tables, f"vision tower {folder}")
        self.dropped |= dropped
        return {key: e for key, e in entries.items() if not key.startswith(TOWER)} | found, fields, settings

    def _tower_folder(self, name: str, given: bool, weights: bool) -> Path:
        """The tower's folder; a relative name in a config is also looked up beside and inside SOURCE."""
        if given:
            return local_folder(name, "--vision-tower", weights=weights)
        if not Path(name).is_absolute():
            for place in (self.folder / name, self.folder.parent / name):
                if place.is_dir():
                    return local_folder(str(place), "vision tower", weights=weights)
        try:
            return local_folder(name, "vision tower", weights=weights)
        except UserError as error:
            raise UserError(f"{error} (mm_vision_tower in {self.config_path}); or pass --vision-tower") from error

    # --- the whole ---------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        readers = {forms.STAGE1: self.stage1, forms.LORA: self.lora}
        entries, vision, preprocessor = self.tower(readers.get(self.form, self.source_model)())
        if self.has_own_config:
            text = self._own_part("text_config")
        else:
            text = configs.text_config_fields(self.training, self.config_path)
        entries = self._without_tied_head(entries, text)
        source_rows = vocabulary_rows(entries)
        tokenizer, image_token, tokenizer_folder, processor = self._tokenizer(text["model_type"])
        rows = max(source_rows, 1 + max(tokenizer.get_vocab().values()))
        if HEAD in entries:
            rows = max(rows, entries[HEAD].shape[0])
        config = configs.build_config(
            self.projector,
            self.training,
            text,
            vision,
            image_token_id=tokenizer.convert_tokens_to_ids(image_token),
            vocab_size=rows,
            where=self.config_path,
        )
        entries = with_rows(entries, rows)
        where = " + ".join(str(path) for path in self.folders.values())
        check_entries(entries, *configs.expected_shapes(config, self.projector, self.config_path), where)
        tensors, names = self._outputs(entries)
        embedding = next(tensor for tensor in tensors if names[tensor.name] == EMBEDDING)
        configs.set_dtype(config, embedding.dtype)
        return Plan(
            form=self.form,
            projector=self.projector,
            config=config,
            tensors=tensors,
            names=names,
            counts=_counts(tensors, names),
            dropped=self.dropped,
            folders=self.folders,
            tokenizer=tokenizer,
            image_token=image_token,
            tokenizer_folder=tokenizer_folder,
            processor=processor,
            preprocessor=preprocessor,
            generation_file=self._generation_file(tokenizer_folder),
            training=self.training,
            source_rows=source_rows,
            record=self._record(source_rows),
            notes=self.notes,
        )

    def _without_tied_head(self, entries: Entries, text: dict) -> Entries:
        if HEAD not in entries or not configs.ties_embeddings(text, self.config_path):
            return entries
        if not _same_bytes(entries, HEAD, EMBEDDING):
            raise UserError(
                f"{self.config_path} ties lm_head to the embedding, but the two differ in {self.folder}: set "
                "tie_word_embeddings to false there if the head was trained on its own"
            )
        self.tied_head_saved = True
        self.dropped[entries[HEAD].source.key] = "the head is tied to the embedding"
        return {name: entry for name, entry in entries.items() if name != HEAD}

    def _tokenizer(self, model_type: str):
        """The tokenizer, its image token, its folder, and the processor of our own that it belongs to, if any."""
        from modeling_delta_llava.building import load_tokenizer
        from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor

        folders = [self.folder, *(path for role, path in self.folders.items() if role == "--base-model")]
        if self.has_own_config:
            for folder in folders:
                if (folder / "processor_config.json").exists():
                    try:
                        processor = DeltaLlavaProcessor.from_pretrained(folder, trust_remote_code=False)
                    # Its many parts fail in many ways, the tokenizers library with a plain Exception.
                    except Exception as error:
                        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                        raise UserError(
                            f"the processor in {folder} cannot be used ({reason}): copy its JSON files and "
                            "its tokenizer again"
                        ) from error
                    return processor.tokenizer, processor.image_token, folder, processor
        files = ("tokenizer.model", "tokenizer.json", "vocab.json")
        folder = next((path for path in folders if any((path / name).exists() for name in files)), self.folder)
        length = self.training.get("tokenizer_model_max_length")
        return *load_tokenizer(folder, model_type, length if isinstance(length, int) else None), folder, None

    def _generation_file(self, tokenizer_folder: Path) -> Path | None:
        places = (folder / "generation_config.json" for folder in (self.folder, tokenizer_folder))
        return next((path for path in places if path.is_file()), None)

    def _outputs(self, entries: Entries) -> tuple[list[OutputTensor], dict[str, str]]:
        """Output tensors in the order in which their bytes lie in the sources, so that reading is sequential."""
        wanted = DTYPES[self.options.dtype]
        tensors, names = [], {}
        for name in sorted(entries, key=lambda name: (str(entries[name].source.file), _offset(entries[name]))):
            entry = entries[name]
            written = rename_key(name, NATIVE_LLAVA_RULES) if self.projector == forms.PLAIN else name
            tensors.append(OutputTensor(written, target_dtype(entry.dtype, wanted), entry.shape, entry.pieces))
            names[written] = name
        return tensors, names

    def _record(self, rows: int) -> dict:
        dropped = {}
        with TensorStream(scan=False) as stream:
            for key, stored in self.restorable.items():
                output = OutputTensor(key, stored.dtype, stored.shape, (Span.whole(stored),))
                data = b"".join(bytes(chunk) for chunk in stream.chunks(output))
                dropped[key] = dropped_tensor(stored.dtype, stored.shape, data)
        training = dict(self.training)
        tower = self.options.vision_tower or training.get("mm_vision_tower")
        if isinstance(tower, str):
            training["mm_vision_tower"] = tower
        if isinstance(tower, str) and not is_hub_id(tower):
            # A path of the training machine means nothing elsewhere, and may name people.
            training["mm_vision_tower"] = Path(tower).name
        training.pop("_name_or_path", None)
        return {
            "form": self.form,
            "projector": self.projector,
            "training_config": training,
            "vocabulary_rows": rows,
            "tower_keys": self.tower_keys,
            "tied_head_saved": self.tied_head_saved,
            "dropped_tensors": dropped,
        }


def _tower_form(keys) -> str:
    """Whether tower keys carry `vision_model.` (`old`) or not (`flat`)."""
    return "old" if any(".vision_tower.vision_model." in key for key in keys) else "flat"


def _training_table(projector: str, keys) -> tuple[Rule, ...]:
    return (PLAIN_TRAINING_RULES if projector == forms.PLAIN else TRAINING_RULES)[_tower_form(keys)]


def _whole_model(checkpoint: Checkpoint, folder: Path) -> tuple[Entries, str | None, dict[str, str]]:
    """Entries of a whole model in the training layout (with or without a projector) or in this project's own."""
    keys = checkpoint.tensors
    if any(PROJECTOR in key for key in keys):
        entries, dropped = named_entries(keys, [HUB_RULES], str(folder), steps=False)
        return entries, forms.DELTA, dropped
    projector = None
    if any(key.startswith("model.mm_projector.") for key in keys):
        projector = forms.detect_projector(keys, str(folder))
    entries, dropped = named_entries(keys, [_training_table(projector or forms.DELTA, keys)], str(folder))
    return entries, projector, dropped


def _offset(entry) -> int:
    piece = entry.pieces[0]
    return piece.stored.offset + piece.start if isinstance(piece, Span) else piece.base.offset


def _same_bytes(entries: Entries, first: str, second: str) -> bool:
    left, right = entries[first], entries[second]
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    places = [(entry.source.file, entry.source.offset, entry.source.strides) for entry in (left, right)]
    if places[0] == places[1]:
        return not isinstance(left.pieces[0], LowRankUpdate) and not isinstance(right.pieces[0], LowRankUpdate)
    with TensorStream(scan=False) as one, TensorStream(scan=False) as other:
        others = other.chunks(OutputTensor(second, right.dtype, right.shape, right.pieces))
        rest = memoryview(b"")
        for chunk in one.chunks(OutputTensor(first, left.dtype, left.shape, left.pieces)):
            while chunk:
                rest = rest or next(others)
                count = min(len(chunk), len(rest))
                if chunk[:count] != rest[:count]:
                    return False
                chunk, rest = chunk[count:], rest[count:]
    return True


def _counts(tensors: list[OutputTensor], names: dict[str, str]) -> list[tuple[str, int, int]]:
    parts = {"vision tower": TOWER, "projector": PROJECTOR, "language model": ""}
    rows = dict.fromkeys(parts, (0, 0))
    for tensor in tensors:
        part = next(part for part, prefix in parts.items() if names[tensor.name].startswith(prefix))
        count, size = rows[part]
        rows[part] = (count + 1, size + tensor.nbytes)
    return [(part, count, size) for part, (count, size) in rows.items()]
