"""Tiny random models, processors and Hub folders: real code paths in milliseconds."""

import io
from pathlib import Path

import torch
from PIL import Image

from modeling_delta_llava.building import build_processor, load_tokenizer
from modeling_delta_llava.configuration_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor
from tests.training_layout import TrainingLayout, write_tokenizer

TOWERS = {
    "clip": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 36,
        "patch_size": 6,
    },
}
DECODERS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral"},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 16},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16},
    "phi3": {"model_type": "phi3"},
}
DECODER_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_TOKEN_ID = 448  # behind the 448 pieces of the sentencepiece model of `training_layout`


def tiny_config(tower: str = "clip", decoder: str = "llama", text: dict | None = None, **fields) -> DeltaLlavaConfig:
    """Tower of width 32 on a 4 x 4 grid (SigLIP: 6 x 6), two decoder layers, 4 visual tokens by default."""
    text_config = {**DECODER_SIZES, **DECODERS[decoder], "vocab_size": IMAGE_TOKEN_ID + 1, **(text or {})}
    defaults = {"image_token_id": IMAGE_TOKEN_ID, "num_visual_tokens": 4}
    return DeltaLlavaConfig(vision_config=dict(TOWERS[tower]), text_config=text_config, **{**defaults, **fields})


def tiny_model(config: DeltaLlavaConfig | None = None, seed: int = 0, **fields) -> DeltaLlavaForConditionalGeneration:
    """A random model in evaluation mode, with weights so large that activations stay near one throughout."""
    torch.manual_seed(seed)
    model = DeltaLlavaForConditionalGeneration(config or tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "delta_" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def tiny_processor(
    folder: Path, config: DeltaLlavaConfig, legacy: bool = False, image_aspect_ratio: str = "pad"
) -> DeltaLlavaProcessor:
    """A processor around a small Llama-like sentencepiece tokenizer, whose files it leaves in `folder`."""
    write_tokenizer(folder, TrainingLayout(legacy_tokenizer=legacy))
    tokenizer, image_token = load_tokenizer(folder, "llama", model_max_length=512)
    return build_processor(config, tokenizer, image_token, image_aspect_ratio=image_aspect_ratio)


def write_hub_folder(folder: Path, **fields) -> Path:
    """A complete Hub folder: weights, code, processor, tokenizer and generation settings."""
    config = tiny_config(**fields)
    model = tiny_model(config)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN_ID])
    model.save_pretrained(folder)
    tiny_processor(folder / "tokenizer_source", config).save_pretrained(folder)
    for file in (folder / "tokenizer_source").iterdir():
        file.unlink()
    (folder / "tokenizer_source").rmdir()
    return folder


def picture(colour: str | tuple[int, int, int] = "white", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format)
    return stream.getvalue()
