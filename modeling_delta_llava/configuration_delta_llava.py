"""Configuration of Delta-LLaVA (arXiv 2512.18910): a vision tower, the Delta projector and a language model."""

import copy
import math
import operator
import reprlib
from typing import Literal

import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import AutoConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Every release of transformers from the first up to, and without, the second is tested. A test compares pyproject.toml
# and the README; cards and errors say what stands here.
OLDEST_TRANSFORMERS, UNTESTED_TRANSFORMERS = "5.16.1", "5.25"
TRANSFORMERS_RANGE = f">={OLDEST_TRANSFORMERS},<{UNTESTED_TRANSFORMERS}"

# Every class that the files of this repository define, in the form the Hub expects in `config.json`.
AUTO_MAP = {
    "AutoConfig": "configuration_delta_llava.DeltaLlavaConfig",
    "AutoModel": "modeling_delta_llava.DeltaLlavaModel",
    "AutoModelForImageTextToText": "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
    "AutoProcessor": "processing_delta_llava.DeltaLlavaProcessor",
}

# CLIP-ViT-L/14-336, the tower of the released code.
DEFAULT_VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# Vicuna-7B v1.5 with one row appended for the image token.
DEFAULT_TEXT_CONFIG = {"model_type": "llama", "vocab_size": 32001}

# Towers that emit patch tokens only. Every other tower is expected to put one class token first.
TOWERS_WITHOUT_CLASS_TOKEN = ("siglip", "siglip_vision_model", "siglip2_vision_model")
# Language models whose output head has a bias, which this model's head has not.
DECODERS_WITH_HEAD_BIAS = ("phi", "gptj", "codegen")


def require_transformers(release: str, purpose: str, error: type[Exception] = ValueError):
    """Raises an error when the running transformers is older than the `release` that brought what `purpose` needs."""
    if Version(transformers.__version__) < Version(release):
        raise error(
            f"{purpose} needs transformers {release} or newer, and this is {transformers.__version__}: "
            f'pip install "transformers{TRANSFORMERS_RANGE.replace(OLDEST_TRANSFORMERS, release)}"'
        )


def check_transformers():
    """Refuses releases of transformers below the tested range with an ImportError, and warns once of those above."""
    require_transformers(OLDEST_TRANSFORMERS, "Delta-LLaVA", ImportError)
    if Version(transformers.__version__) >= Version(UNTESTED_TRANSFORMERS):
        logger.warning_once(
            f"Delta-LLaVA is tested with transformers{TRANSFORMERS_RANGE}, and this is {transformers.__version__}: "
            f'should anything fail, pip install "transformers{TRANSFORMERS_RANGE}"'
        )


check_transformers()


def legal_visual_tokens(grid_size: int) -> list[int]:
    """The visual-token budgets `(grid_size / s)**2` over all divisors `s` of the patch grid, largest first (Eq. 5)."""
    return [(grid_size // scale) ** 2 for scale in range(1, grid_size + 1) if grid_size % scale == 0]


def image_budgets(num_visual_tokens, num_images: int, grid_size: int) -> int | list[int]:
    """The visual-token budget of all images, or a list with one for each where they differ.

    Args:
        num_visual_tokens (`int`, or `list[int]`, array or tensor of shape `(num_images,)`): what was asked for.

    Raises:
        ValueError: for anything else, with the budgets that the patch grid allows.
    """
    legal = legal_visual_tokens(grid_size)
    asked = num_visual_tokens.tolist() if hasattr(num_visual_tokens, "tolist") else num_visual_tokens
    one_each = isinstance(asked, (list, tuple))
    try:
        # True is no number of tokens.
        budgets = [
            0 if isinstance(value, bool) else operator.index(value) for value in (asked if one_each else [asked])
        ]
    except TypeError:
        budgets = [0]
    if any(budget not in legal for budget in budgets) or (one_each and len(budgets) != num_images):
        each = f", or a list with one of them for each of {num_images} image(s)" if one_each else ""
        raise ValueError(
            f"num_visual_tokens={reprlib.repr(asked)} is not possible on a {grid_size} x {grid_size} patch grid; "
            f"choose one of {legal}{each}"
        )
    return budgets[0] if len(set(budgets)) == 1 else budgets


@strict
class DeltaLlavaConfig(transformers.PreTrainedConfig):
    r"""
    Configuration of a [`DeltaLlavaModel`]. Fields left at `None` follow the vision tower; with the default tower
    (CLIP-ViT-L/14-336) they reproduce the released architecture.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, defaults to CLIP-ViT-L/14-336):
            The vision tower: any vision encoder of transformers with square images and patches.
        text_config (`PreTrainedConfig` or `dict`, defaults to Llama-2-7B geometry, 32001 tokens):
            The language model: any decoder of transformers.
        image_token_id (`int`, defaults to 32000):
            Id of the placeholder that stands for one visual token in `input_ids`.
        num_visual_tokens (`int`, defaults to the largest legal budget up to 144):
            Visual tokens per image when a call asks for no other budget: `(grid / s)**2`, `s` a divisor of the grid.
        trained_num_visual_tokens (`list[int]`, *optional*):
            The budgets the checkpoint was trained at; the model warns once when it runs at another one.
        vision_feature_select_strategy (`"default"` or `"full"`, defaults to what the tower needs):
            `"default"` drops the tower's class token, `"full"` keeps every token.
        query_feature_layer (`int`, defaults to -2):
            Index into the tower's hidden states (0 is the embedding output) of the query stream.
        memory_feature_layers (`list[int]`, defaults to 1/2 and 2/3 of the depth, the last but two, the last but one):
            Indices of the hidden states that are concatenated into the memory stream, in this order.
        projector_hidden_size (`int`, defaults to the tower's width):
            Width C of the projector.
        projector_num_attention_heads (`int`, defaults to C / 128):
            Heads of the windowed cross-attention.
        block_head_dim (`int`, defaults to 32, or C / 4 when C is below 128):
            Channels per head of EMHSA and per group of MHCA.
        block_mlp_ratio (`int`, defaults to 2):
            Hidden width of the transformer block's MLP over C.
        mix_ratio (`float`, defaults to 0.75):
            Share of the transformer block's channels that EMHSA computes; MHCA computes the rest.
        spatial_reduction (`int`, defaults to 1):
            EMHSA averages keys and values over runs of `spatial_reduction**2` tokens.
        drop_path_rate (`float`, defaults to 0.1):
            Stochastic depth of the transformer block in training.
        delta_rank (`int`, defaults to 16):
            Rank of the DeltaProjection update. 0 leaves the base weights alone ("No DeltaProj" of Table 3).
        use_emhsa, use_transformer_block (`bool`, defaults to `True`):
            `False` removes the attention branch ("No EMHSA" of Table 3), or the whole transformer block ("No TB").
        visual_token_scale (`float`, defaults to 1.0):
            Factor on the visual tokens. Gemma language models trained under transformers 4 scaled the whole spliced
            sequence by the root of their width; transformers 5 scales text embeddings alone.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of freshly initialised projector matrices.
        tie_word_embeddings (`bool`, defaults to the language model's setting):
            Whether the output head shares the input embedding matrix.

    Raises:
        ValueError: for an impossible budget, grid, layer index or width; the message names the legal values.

    Example:

    ```python
    >>> from modeling_delta_llava import DeltaLlavaConfig

    >>> DeltaLlavaConfig().legal_num_visual_tokens
    [576, 144, 64, 36, 16, 9, 4, 1]
    ```
    """

    model_type = "delta_llava"
    attribute_map = {"image_token_index": "image_token_id"}
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | transformers.PreTrainedConfig | None = None
    text_config: dict | transformers.PreTrainedConfig | None = None
    image_token_id: int = 32000
    num_visual_tokens: int | None = None
    trained_num_visual_tokens: list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    query_feature_layer: int = -2
    memory_feature_layers: list[int] | None = None
    projector_hidden_size: int | None = None
    projector_num_attention_heads: int | None = None
    block_head_dim: int | None = None
    block_mlp_ratio: int = 2
    mix_ratio: float = 0.75
    spatial_reduction: int = 1
    drop_path_rate: float | int = 0.1
    delta_rank: int = 16
    use_emhsa: bool = True
    use_transformer_block: bool = True
    visual_token_scale: float | int = 1.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = self._sub_config(self.vision_config, DEFAULT_VISION_CONFIG)
        self.text_config = self._sub_config(self.text_config, DEFAULT_TEXT_CONFIG)
        self._check_sub_configs()
        self._follow_tower()
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @staticmethod
    def _sub_config(value, default: dict) -> transformers.PreTrainedConfig:
        if isinstance(value, transformers.PreTrainedConfig):
            return copy.deepcopy(value)
        fields = dict(default if value is None else value)
        return AutoConfig.for_model(fields.pop("model_type", default["model_type"]), **fields)

    def _check_sub_configs(self):
        vision, text = self.vision_config, self.text_config
        for field in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
            if not isinstance(getattr(vision, field, None), int):
                raise ValueError(
                    f"vision_config of type {vision.model_type!r} has no integer `{field}`: "
                    "Delta-LLaVA needs a vision encoder with square images and square patches"
                )
        image_size, patch_size = vision.image_size, vision.patch_size
        if not 0 < patch_size <= image_size:
            raise ValueError(f"vision_config has {image_size=} and {patch_size=}: the patch grid would be empty")
        if text.is_encoder_decoder or not isinstance(getattr(text, "hidden_size", None), int):
            raise ValueError(f"text_config of type {text.model_type!r} is not a decoder-only language model")
        if text.model_type in DECODERS_WITH_HEAD_BIAS:
            raise ValueError(f"text_config of type {text.model_type!r} has a biased output head: it is not supported")

    def _follow_tower(self):
        """Fill what was left open from the tower's geometry."""
        depth = self.vision_config.num_hidden_layers
        if hasattr(self.vision_config, "vision_use_head"):
            self.vision_config.vision_use_head = False  # nothing reads SigLIP's pooling head
        if self.vision_feature_select_strategy is None:
            without_class_token = self.vision_config.model_type in TOWERS_WITHOUT_CLASS_TOKEN
            self.vision_feature_select_strategy = "full" if without_class_token else "default"
        if self.memory_feature_layers is None:
            self.memory_feature_layers = sorted({depth // 2, 2 * depth // 3, max(depth - 2, 0), depth - 1})
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.vision_config.hidden_size
        if self.projector_num_attention_heads is None:
            self.projector_num_attention_heads = max(1, self.projector_hidden_size // 128)
        if self.block_head_dim is None:
            self.block_head_dim = 32 if self.projector_hidden_size >= 128 else max(1, self.projector_hidden_size // 4)
        if self.num_visual_tokens is None:
            self.num_visual_tokens = next(count for count in self.legal_num_visual_tokens if count <= 144)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the projector fits the tower."""
        depth, channels = self.vision_config.num_hidden_layers, self.projector_hidden_size
        heads, head_dim = self.projector_num_attention_heads, self.block_head_dim
        for count in [self.num_visual_tokens, *(self.trained_num_visual_tokens or [])]:
            image_budgets(count, 1, self.grid_size)
        for name in ("query_feature_layer", "memory_feature_layers"):
            value = getattr(self, name)
            layers = [value] if isinstance(value, int) else value
            if not layers or any(not -depth - 1 <= layer <= depth for layer in layers):
                raise ValueError(
                    f"{name}={value} does not fit a vision tower of {depth} layers: "
                    f"hidden states are numbered 0 (embeddings) to {depth}, or -{depth + 1} to -1"
                )
        whole_heads = head_dim > 0 and channels % head_dim == 0 and 0 < self.block_attention_size < channels
        width = f"projector_hidden_size={channels}"
        for possible, rule in (
            (channels > 0 and channels % 4 == 0, f"{width} is not a multiple of 4, as the position table requires"),
            (heads > 0 and channels % heads == 0, f"{width} does not split into {heads} heads of the cross-attention"),
            (
                whole_heads,
                f"{width}, block_head_dim={head_dim} and mix_ratio={self.mix_ratio} give EMHSA or MHCA no whole heads",
            ),
            (self.delta_rank >= 0, f"delta_rank={self.delta_rank} is negative"),
            (self.spatial_reduction > 0, f"spatial_reduction={self.spatial_reduction} is below 1"),
            (self.block_mlp_ratio > 0, f"block_mlp_ratio={self.block_mlp_ratio} is below 1"),
            (0 <= self.drop_path_rate < 1, f"drop_path_rate={self.drop_path_rate} is outside [0, 1)"),
        ):
            if not possible:
                raise ValueError(rule)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """Patch tokens the tower computes for one image."""
        return self.grid_size**2

    @property
    def legal_num_visual_tokens(self) -> list[int]:
        """Every budget the projector can run at, largest first."""
        return legal_visual_tokens(self.grid_size)

    @property
    def block_attention_size(self) -> int:
        """Channels of EMHSA: `mix_ratio` of the projector's width, rounded to whole heads."""
        return max(1, round(self.projector_hidden_size * self.mix_ratio / self.block_head_dim)) * self.block_head_dim

    def scale_factor(self, num_visual_tokens: int | None = None) -> int:
        """Side `s` of the patch window of one visual token at a budget (by default the config's own)."""
        budget = self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        return self.grid_size // math.isqrt(image_budgets(budget, 1, self.grid_size))

    @property
    def num_tower_layers(self) -> int:
        """Layers of the tower up to the highest one that is read."""
        return max(map(self.hidden_state_index, [self.query_feature_layer, *self.memory_feature_layers]))

    def hidden_state_index(self, layer: int) -> int:
        """A possibly negative layer index as a position among the tower's `num_hidden_layers + 1` hidden states."""
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        # Loading from a remote repository prefixes the entries with its name; what is saved stands on its own.
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


DeltaLlavaConfig.register_for_auto_class()

__all__ = ["DeltaLlavaConfig"]
