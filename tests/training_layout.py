"""Writes tiny folders in the layout that Delta-LLaVA training leaves behind.

Tensor names and shapes of the projector are spelled out here by hand, from the published checkpoint layout, and not
taken from the conversion's key tables, so that a test which converts one of these folders checks the tables against
something else. Names of the language model and of the vision tower come from `transformers` itself.
"""

import functools
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

VICUNA_CORPUS = """A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions.
USER: What is weird here? ASSISTANT: A cat sits on a table and looks at a window.
USER: How many red circles are in the picture? ASSISTANT: There are three red circles, two blue squares and one star.
Describe the image in detail. The photo shows a street with cars, people and a small dog under a tree.
    indented text, "quotes", (brackets), numbers 0 1 2 3 4 5 6 7 8 9 and a few symbols: + - * / = % # @ & ? ! ; :
"""


@dataclass(frozen=True)
class TrainingLayout:
    """Sizes of a tiny checkpoint; the defaults keep the released proportions at an eighth of the width."""

    text_model_type: str = "llama"
    text_hidden_size: int = 64
    text_intermediate_size: int = 96
    text_layers: int = 2
    text_heads: int = 4
    text_key_value_heads: int = 4
    vocab_size: int | None = None  # rows of the embedding; None: the tokenizer's size
    tie_word_embeddings: bool = False
    tower_model_type: str = "clip_vision_model"
    tower_hidden_size: int = 128
    tower_intermediate_size: int = 64
    tower_layers: int = 8
    tower_heads: int = 2
    patch_size: int = 4
    image_size: int = 16
    memory_layers: int = 4
    projector_width: int = 128
    block_attention_width: int = 96
    block_head_dim: int = 32
    delta_rank: int = 16
    scale_factor: int = 2
    legacy_tokenizer: bool = False

    @property
    def block_conv_width(self) -> int:
        return self.projector_width - self.block_attention_width

    @classmethod
    def released_projector(cls, **sizes) -> "TrainingLayout":
        """Tower and projector at the released widths (1024, 24 x 24 grid), with a tiny language model."""
        return cls(
            **{
                "tower_hidden_size": 1024,
                "tower_layers": 24,
                "tower_heads": 16,
                "patch_size": 14,
                "image_size": 336,
                "projector_width": 1024,
                "block_attention_width": 768,
                **sizes,
            }
        )


def projector_shapes(layout: TrainingLayout) -> dict[str, tuple[int, ...]]:
    """Name (under `model.mm_projector.`) -> shape of every projector tensor as training saves it."""
    width, rank = layout.projector_width, layout.delta_rank
    attention, conv = layout.block_attention_width, layout.block_conv_width
    tower, memory = layout.tower_hidden_size, layout.memory_layers * layout.tower_hidden_size
    text = layout.text_hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inputs in (("q", width), ("k", memory), ("v", memory)):
        shapes[f"{name}_proj_1.shared_weight.weight"] = (width, inputs)
        shapes[f"{name}_proj_1.U"] = (inputs, rank)
        shapes[f"{name}_proj_1.V"] = (rank, width)
        shapes[f"{name}_proj_1.norm.weight"] = shapes[f"{name}_proj_1.norm.bias"] = (width,)
    shapes["clip_attn.in_proj_weight"], shapes["clip_attn.in_proj_bias"] = (3 * width, width), (3 * width,)
    shapes["clip_attn.out_proj.weight"], shapes["clip_attn.out_proj.bias"] = (width, width), (width,)
    shapes["mlp.0.weight"], shapes["mlp.0.bias"] = (text, width), (text,)
    shapes["mlp.2.weight"], shapes["mlp.2.bias"] = (text, text), (text,)
    block = "combined_block.ntb."
    shapes[block + "patch_embed.conv.weight"] = (attention, tower, 1, 1)
    for norm in ("norm_mhsa", "e_mhsa.norm"):
        shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (attention,)
    for name in ("q", "k", "v", "proj"):
        shapes[f"{block}e_mhsa.{name}.weight"] = (attention, attention)
        shapes[f"{block}e_mhsa.{name}.bias"] = (attention,)
    shapes[block + "projection.conv.weight"] = (conv, attention, 1, 1)
    shapes[block + "mhca.group_conv3x3.weight"] = (conv, layout.block_head_dim, 3, 3)
    shapes[block + "mhca.norm.weight"] = shapes[block + "mhca.norm.bias"] = (conv,)
    shapes[block + "mhca.projection.weight"] = (conv, conv, 1, 1)
    shapes[block + "mlp.conv1.weight"], shapes[block + "mlp.conv1.bias"] = (2 * width, width, 1, 1), (2 * width,)
    shapes[block + "mlp.conv2.weight"], shapes[block + "mlp.conv2.bias"] = (width, 2 * width, 1, 1), (width,)
    return shapes


def plain_projector_shapes(layout: TrainingLayout) -> dict[str, tuple[int, ...]]:
    """The same for the two-layer MLP of LLaVA-1.5 (`mlp2x_gelu`)."""
    text, tower = layout.text_hidden_size, layout.tower_hidden_size
    return {"0.weight": (text, tower), "0.bias": (text,), "2.weight": (text, text), "2.bias": (text,)}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values whose scale keeps activations near one: norms around 1, small biases, weights by fan-in."""
    generator = np.random.RandomState(seed)
    tensors = {}
    for name in sorted(shapes):
        values = generator.standard_normal(size=shapes[name]).astype(np.float32)
        if "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.05 * values
        elif values.ndim > 1:
            values = values / math.sqrt(math.prod(values.shape[1:]))
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    return tensors


# --- language model ------------------------------------------------------------------------------------------------


def text_config(layout: TrainingLayout) -> dict:
    """`config.json` of the plain language model."""
    family = layout.text_model_type
    config = {
        "model_type": family,
        "hidden_size": layout.text_hidden_size,
        "intermediate_size": layout.text_intermediate_size,
        "num_hidden_layers": layout.text_layers,
        "num_attention_heads": layout.text_heads,
        "num_key_value_heads": layout.text_key_value_heads,
        "vocab_size": layout.vocab_size or tokenizer_length(layout),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": layout.tie_word_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    if family in ("qwen3", "gemma", "seed_oss"):
        config["head_dim"] = layout.text_hidden_size // layout.text_heads
    if not uses_sentencepiece(layout):
        config["eos_token_id"], config["pad_token_id"], config["bos_token_id"] = 2, 0, None
    return config


def text_shapes(layout: TrainingLayout) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the language model's tensors, `lm_head.weight` included."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config(layout)))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if layout.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


# --- vision tower --------------------------------------------------------------------------------------------------


def tower_config(layout: TrainingLayout) -> dict:
    return {
        "model_type": layout.tower_model_type,
        "hidden_size": layout.tower_hidden_size,
        "intermediate_size": layout.tower_intermediate_size,
        "num_hidden_layers": layout.tower_layers,
        "num_attention_heads": layout.tower_heads,
        "patch_size": layout.patch_size,
        "image_size": layout.image_size,
    } | ({"projection_dim": 32, "hidden_act": "quick_gelu"} if layout.tower_model_type == "clip_vision_model" else {})


def tower_shapes(layout: TrainingLayout) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tower's tensors, without `vision_model.` in front."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**tower_config(layout)))
    return {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_tower(folder: Path, layout: TrainingLayout, seed: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """A tower repository: `config.json`, `preprocessor_config.json`, `model.safetensors` with `vision_model.` keys."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = layout.tower_model_type == "clip_vision_model"
    architecture = "CLIPVisionModel" if clip else "SiglipVisionModel"
    write_json(folder / "config.json", tower_config(layout) | {"architectures": [architecture]})
    size = layout.image_size
    processor = {
        "do_normalize": True,
        "do_resize": True,
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        "resample": 3 if clip else 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if clip else [0.5] * 3,
        "image_std": [0.26862954, 0.26130258, 0.27577711] if clip else [0.5] * 3,
        "size": {"shortest_edge": size} if clip else {"height": size, "width": size},
    }
    if clip:
        processor |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_convert_rgb": True}
    write_json(folder / "preprocessor_config.json", processor)
    tensors = {f"vision_model.{name}": t for name, t in random_tensors(tower_shapes(layout), seed, dtype).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# --- tokenizers ----------------------------------------------------------------------------------------------------


def uses_sentencepiece(layout: TrainingLayout) -> bool:
    return layout.text_model_type in ("llama", "mistral", "phi3", "gemma")


@functools.lru_cache(maxsize=1)
def sentencepiece_model() -> bytes:
    """A small Llama-like sentencepiece model: BPE, byte fallback, ids 0/1/2 = `<unk>`, `<s>`, `</s>`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(VICUNA_CORPUS.splitlines() * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=448,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@functools.lru_cache(maxsize=4)
def byte_level_tokenizer(family: str) -> str:
    """`tokenizer.json` of a small byte-level BPE as Qwen and SeedOss use, with their special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    if family == "seed_oss":
        special = ["<seed:pad>", "<seed:bos>", "<seed:eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(VICUNA_CORPUS.splitlines() * 4, trainer)
    return tokenizer.to_str()


def tokenizer_length(layout: TrainingLayout) -> int:
    if uses_sentencepiece(layout):
        return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).get_piece_size()
    vocabulary = json.loads(byte_level_tokenizer(layout.text_model_type))
    return 1 + max(*vocabulary["model"]["vocab"].values(), *(token["id"] for token in vocabulary["added_tokens"]))


CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADER_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, layout: TrainingLayout, added_tokens: tuple[str, ...] = ()) -> None:
    """Tokenizer files as training saves them; `added_tokens` get the ids after the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    length = tokenizer_length(layout)
    if uses_sentencepiece(layout):
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        decoder = {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(("<unk>", "<s>", "</s>"))
        }
        for offset, token in enumerate(added_tokens):
            decoder[str(length + offset)] = decoder["0"] | {"content": token}
        config = {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": decoder,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "legacy": layout.legacy_tokenizer,
            "model_max_length": 2048,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
        }
        if added_tokens:
            write_json(folder / "added_tokens.json", {t: length + i for i, t in enumerate(added_tokens)})
        write_json(
            folder / "special_tokens_map.json",
            {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")},
        )
    else:
        seed = layout.text_model_type == "seed_oss"
        data = json.loads(byte_level_tokenizer(layout.text_model_type))
        for offset, token in enumerate(added_tokens):
            data["added_tokens"].append(data["added_tokens"][0] | {"id": length + offset, "content": token})
        write_json(folder / "tokenizer.json", data)
        config = {
            "add_prefix_space": False,
            "bos_token": "<seed:bos>" if seed else None,
            "eos_token": "<|eot_id|>" if seed else "<|im_end|>",
            "pad_token": "<seed:pad>" if seed else "<|endoftext|>",
            "chat_template": HEADER_TEMPLATE if seed else CHATML_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "tokenizer_class": "PreTrainedTokenizerFast" if seed else "Qwen2Tokenizer",
        }
        if not seed:
            write_json(folder / "vocab.json", data["model"]["vocab"])
            merges = (m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"])
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)


# --- whole folders -------------------------------------------------------------------------------------------------


def training_config(layout: TrainingLayout, tower: Path | str, plain: bool = False) -> dict:
    """`config.json` as training writes it: the language model's fields with the multimodal ones among them."""
    family = "Phi3" if layout.text_model_type == "phi3" else layout.text_model_type
    architecture = {"seed_oss": "SeedOss", "phi3": "Phi3"}.get(layout.text_model_type, family.capitalize())
    return (
        text_config(layout)
        | {
            "architectures": [f"Llava{architecture}ForCausalLM"],
            "model_type": f"llava_{family}",
            "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "pad",
            "mm_hidden_size": layout.tower_hidden_size,
            "mm_patch_merge_type": "flat",
            "mm_projector_lr": None,
            "mm_projector_type": "mlp2x_gelu" if plain else "delatallava",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": str(tower),
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        }
        | ({} if plain else {"scale_factor": layout.scale_factor})
    )


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(
    folder: Path, tensors: dict[str, torch.Tensor], weights_format: str = "safetensors", shards: int = 1
) -> None:
    """`model.safetensors` / `pytorch_model.bin`, or that many shards with their index."""
    stem, suffix = ("model", "safetensors") if weights_format == "safetensors" else ("pytorch_model", "bin")
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        if suffix == "safetensors":
            save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_generation_config(folder: Path) -> None:
    """Vicuna's own: sampling temperatures without `do_sample`, which transformers refuses to save again."""
    sampling = {"temperature": 0.9, "top_p": 0.6}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "generation_config.json", {"max_length": 4096} | sampling | tokens)


def write_base_model(
    folder: Path, layout: TrainingLayout, seed: int = 1, dtype: torch.dtype = torch.float32, **weights
) -> dict[str, torch.Tensor]:
    """The plain language model that stage 1 and LoRA start from. Returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    family = {"seed_oss": "SeedOss", "phi3": "Phi3"}.get(layout.text_model_type, layout.text_model_type.capitalize())
    write_json(folder / "config.json", text_config(layout) | {"architectures": [f"{family}ForCausalLM"]})
    tensors = random_tensors(text_shapes(layout), seed, dtype)
    write_weights(folder, tensors, **weights)
    write_tokenizer(folder, layout)
    write_generation_config(folder)
    return tensors


def projector_tensors(
    layout: TrainingLayout, seed: int = 3, dtype: torch.dtype = torch.float32, plain: bool = False
) -> dict[str, torch.Tensor]:
    shapes = plain_projector_shapes(layout) if plain else projector_shapes(layout)
    return {f"model.mm_projector.{name}": t for name, t in random_tensors(shapes, seed, dtype).items()}


def write_stage2(
    folder: Path,
    layout: TrainingLayout = TrainingLayout(),
    *,
    tower: Path | None = None,
    tower_inside: str | None = "old",
    weights_format: str = "safetensors",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    plain: bool = False,
    added_tokens: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """A complete stage-2 checkpoint. Returns its tensors by training key.

    Args:
        folder: where to write; must not hold a checkpoint yet.
        tower: tower repository named in `mm_vision_tower`; None writes one beside `folder` (`<name>-tower`).
        tower_inside: "old" (`vision_model.` in the keys), "flat", or None to leave the tower out.
        weights_format: "safetensors" or "bin".
        plain: the MLP projector of LLaVA-1.5 in place of the Delta projector.
        added_tokens: tokens appended to the vocabulary, with an embedding row each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tower = tower or write_tower(folder.with_name(folder.name + "-tower"), layout, dtype=dtype)
    if added_tokens:
        layout = replace(layout, vocab_size=(layout.vocab_size or tokenizer_length(layout)) + len(added_tokens))
    write_json(folder / "config.json", training_config(layout, tower, plain))
    tensors = random_tensors(text_shapes(layout), seed, dtype) | projector_tensors(layout, seed + 2, dtype, plain)
    if tower_inside:
        middle = "vision_model." if tower_inside == "old" else ""
        tower_tensors = random_tensors(tower_shapes(layout), 2, dtype)
        tensors |= {f"model.vision_tower.vision_tower.{middle}{name}": t for name, t in tower_tensors.items()}
    write_weights(folder, tensors, weights_format, shards)
    write_tokenizer(folder, layout, added_tokens)
    write_generation_config(folder)
    return tensors


def write_stage1(
    folder: Path,
    layout: TrainingLayout = TrainingLayout(),
    *,
    tower: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    plain: bool = False,
) -> dict[str, torch.Tensor]:
    """A stage-1 result: `config.json` and `mm_projector.bin`. Returns the tensors by training key."""
    folder.mkdir(parents=True, exist_ok=True)
    config = training_config(layout, tower, plain) | {"image_aspect_ratio": "square", "tune_mm_mlp_adapter": True}
    write_json(folder / "config.json", config)
    tensors = projector_tensors(layout, seed, dtype, plain)
    torch.save(tensors, folder / "mm_projector.bin")
    return tensors


def write_lora(
    folder: Path,
    layout: TrainingLayout = TrainingLayout(),
    *,
    tower: Path,
    rank: int = 4,
    alpha: int = 8,
    adapter_format: str = "safetensors",
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    dtype: torch.dtype = torch.float32,
    seed: int = 4,
    **adapter_options,
) -> dict[str, torch.Tensor]:
    """A LoRA result of stage 2: adapter, `non_lora_trainables.bin`, `config.json`. Returns all tensors by file key.

    `adapter_options` go into `adapter_config.json` (`use_rslora`, `alpha_pattern`, `rank_pattern`, `use_dora`...);
    `rank_pattern` is followed when the factors are drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", training_config(layout, tower))
    adapter_config = {
        "base_model_name_or_path": "somewhere/vicuna",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(target_modules),
        "task_type": "CAUSAL_LM",
    }
    write_json(folder / "adapter_config.json", adapter_config | adapter_options)
    factors = {}
    for name, shape in text_shapes(layout).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rsplit(".", 1)[-1] in target_modules:
            patterns = adapter_options.get("rank_pattern") or {}
            r = next((value for key, value in patterns.items() if module == key or module.endswith("." + key)), rank)
            factors[f"base_model.model.{module}.lora_A.weight"] = (r, shape[1])
            factors[f"base_model.model.{module}.lora_B.weight"] = (shape[0], r)
    adapter = random_tensors(factors, seed, dtype)
    others = {f"base_model.model.{name}": t for name, t in projector_tensors(layout, seed + 1, dtype).items()}
    if adapter_format == "safetensors":
        save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    else:
        torch.save(adapter, folder / "adapter_model.bin")
    torch.save(others, folder / "non_lora_trainables.bin")
    return adapter | others
