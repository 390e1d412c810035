"""Geometry of the published backbones, so that counts need neither weights nor a network.

The figures are those of the `config.json` files on the Hub; rotary and other settings without effect on a count are
left at transformers' defaults.
"""

from delta_llava.errors import UserError
from modeling_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.configuration_delta_llava import DEFAULT_VISION_CONFIG

LANGUAGE_MODELS = {
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "lmsys/vicuna-13b-v1.5": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "NousResearch/Hermes-4.3-36B": {
        "model_type": "seed_oss",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 155136,
    },
}
"""Text configs by Hub id."""

VISION_TOWERS = {
    "openai/clip-vit-large-patch14-336": DEFAULT_VISION_CONFIG,
    "openai/clip-vit-large-patch14": {**DEFAULT_VISION_CONFIG, "image_size": 224},
    "openai/clip-vit-base-patch32": {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
"""Vision configs by Hub id."""


def known_config(
    language_model: str, vision_tower: str = "openai/clip-vit-large-patch14-336", num_visual_tokens: int | None = None
) -> DeltaLlavaConfig:
    """Config of a Delta-LLaVA on published backbones.

    Args:
        language_model: a Hub id of `LANGUAGE_MODELS`.
        vision_tower: a Hub id of `VISION_TOWERS`.
        num_visual_tokens: the default budget.

    Raises:
        UserError: for a backbone whose geometry is not listed here.
    """
    for kind, name, table in (
        ("language model", language_model, LANGUAGE_MODELS),
        ("vision tower", vision_tower, VISION_TOWERS),
    ):
        if name not in table:
            raise UserError(f"the geometry of the {kind} {name!r} is not known; known are {', '.join(sorted(table))}")
    text = dict(LANGUAGE_MODELS[language_model])
    return DeltaLlavaConfig(
        vision_config=dict(VISION_TOWERS[vision_tower]),
        text_config=text,
        image_token_id=text["vocab_size"] - 1,
        num_visual_tokens=num_visual_tokens,
    )
