"""Operations, parameters and cache bytes of a Delta-LLaVA, from its config alone.

Two independent ways to the same figures:

* closed forms, the terms of the paper's Eq. 12-16 written out (`closed_form`), and the paper's own reading of them
  (`paper_convention`), which counts two of the language model's three MLP matrices and every attention as if it had as
  many key heads as query heads;
* torch's `FlopCounterMode` over the real modules on the meta device (`counted`), where no tensor has any data.

One multiplication with its addition is two FLOPs. Only matrix products, convolutions and attention are counted.
"""

from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.modeling_delta_llava import CACHE_NAME

PAPER_TEXT_TOKENS = 68
"""Text tokens of the paper's Figure 3: with them its prefill counts follow at every budget."""
PAPER_NEW_TOKENS = 30
"""Generated tokens of the paper's Section 6.5 ("averaging ~30 new tokens")."""

GATED_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "seed_oss", "phi3", "gemma", "gemma2")
"""Model types of decoders with three matrices per MLP and full attention in every layer."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of answering one question about one image, by component (Eq. 16)."""

    vision_tower: int
    projector: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.vision_tower + self.projector + self.prefill + self.decode

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class TextGeometry:
    """What the closed forms need to know of a decoder: d, d_ff, layers, heads."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "TextGeometry":
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
        )

    def prefill_flops(self, sequence: int) -> int:
        """Eq. 14: all layers over `sequence` tokens, and the head for the last one."""
        d, width = self.hidden_size, self.num_heads * self.head_dim
        key_value_width = self.num_key_value_heads * self.head_dim
        projections = 2 * sequence * d * (2 * width + 2 * key_value_width)
        mlp = 2 * sequence * 3 * d * self.intermediate_size
        attention = 4 * sequence**2 * width
        return self.num_layers * (projections + mlp + attention) + 2 * d * self.vocab_size

    def decode_flops(self, sequence: int, new_tokens: int) -> int:
        """Eq. 15: `new_tokens` steps with a cache, the first of which sees `sequence + 1` tokens."""
        d, width = self.hidden_size, self.num_heads * self.head_dim
        key_value_width = self.num_key_value_heads * self.head_dim
        weights = 2 * d * (2 * width + 2 * key_value_width) + 6 * d * self.intermediate_size
        seen = new_tokens * sequence + new_tokens * (new_tokens + 1) // 2
        return self.num_layers * (new_tokens * weights + 4 * seen * width) + new_tokens * 2 * d * self.vocab_size

    def key_value_bytes(self, sequence: int, bytes_per_value: int = 2) -> int:
        """Bytes of the keys and values that the cache holds for `sequence` tokens."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * sequence * bytes_per_value


def has_closed_form(config: PreTrainedConfig) -> bool:
    """Whether a decoder is one that the closed forms describe: gated MLPs of one width, attention in every layer."""
    return config.model_type in GATED_DECODERS


def tower_flops(config: DeltaLlavaConfig, num_layers: int | None = None) -> int:
    """Patch embedding and the layers up to the highest one that is used (or `num_layers` of them)."""
    vision = config.vision_config
    d, patches = vision.hidden_size, config.num_patches
    tokens = patches + (config.vision_feature_select_strategy == "default")
    if num_layers is None:
        num_layers = config.num_tower_layers
    embedding = 2 * patches * d * getattr(vision, "num_channels", 3) * vision.patch_size**2
    layer = 2 * tokens * (4 * d**2 + 2 * d * vision.intermediate_size) + 4 * tokens**2 * d
    return embedding + num_layers * layer


def projector_flops(config: DeltaLlavaConfig, num_visual_tokens: int) -> int:
    """Eq. 12-13 written out for the released projector at one budget, in inference.

    Args:
        config: geometry.
        num_visual_tokens: V, a legal budget.
    """
    N, V = config.num_patches, num_visual_tokens
    C, D, rank = config.projector_hidden_size, config.text_config.hidden_size, config.delta_rank
    streams = config.vision_config.hidden_size * len(config.memory_feature_layers)
    memory_projection = 2 * N * (streams * C + rank * (streams + C))
    if V == N:
        return memory_projection + 2 * N * (2 * C**2 + C * D + D**2)
    query = _query_flops(config, V)
    attention = 2 * C**2 * (2 * V + 2 * N) + 4 * N * C
    return 2 * memory_projection + query + attention + 2 * V * (C * D + D**2)


def _query_flops(config: DeltaLlavaConfig, num_visual_tokens: int) -> int:
    """The transformer block (EMHSA, MHCA, MLP) and the query's DeltaProjection."""
    V, C, rank = num_visual_tokens, config.projector_hidden_size, config.delta_rank
    query_width = config.vision_config.hidden_size
    width = C if config.use_transformer_block else query_width
    projection = 2 * V * (width * C + rank * (width + C))
    if not config.use_transformer_block:
        return projection
    A, hidden = config.block_attention_size, config.block_mlp_ratio * C
    L = C - A
    block = query_width * A + A * L + 9 * L * config.block_head_dim + L**2 + 2 * C * hidden
    flops = projection + 2 * V * block
    if config.use_emhsa:
        window = config.spatial_reduction**2
        pooled = V // window if window <= V else V
        flops += 2 * A**2 * (2 * V + 2 * pooled) + 4 * V * pooled * A
    return flops


def closed_form(
    config: DeltaLlavaConfig,
    num_visual_tokens: int,
    text_tokens: int = PAPER_TEXT_TOKENS,
    new_tokens: int = PAPER_NEW_TOKENS,
) -> Flops:
    """Exact counts of one question about one image, answered with `new_tokens` tokens (Eq. 16).

    The first new token comes out of the prefill, so the decoder runs `new_tokens - 1` more steps.

    Args:
        config: a language model with gated MLPs (Llama, Qwen, Mistral, SeedOss, ...) and a ViT tower.
        num_visual_tokens: V.
        text_tokens: T.
        new_tokens: G.
    """
    text = TextGeometry.of(config.text_config)
    sequence = text_tokens + num_visual_tokens
    return Flops(
        vision_tower=tower_flops(config),
        projector=projector_flops(config, num_visual_tokens),
        prefill=text.prefill_flops(sequence),
        decode=text.decode_flops(sequence, max(new_tokens - 1, 0)),
    )


def paper_convention(
    config: DeltaLlavaConfig,
    num_visual_tokens: int,
    text_tokens: int = PAPER_TEXT_TOKENS,
    new_tokens: int = PAPER_NEW_TOKENS,
) -> Flops:
    """Counts as the paper's Figure 3 makes them.

    Per layer 8·S·d² + 4·S·d·d_ff + 4·S²·d for a prefill of S = T + K tokens, the same terms for one token per decoding
    step, no output head, all layers of the tower. At 576 tokens the paper's model is LLaVA-1.5 itself, whose MLP
    projector has 2·576·(C·D + D²) operations; the paper prints at most 0.002 TFLOPs for the Delta projector at the
    other budgets without saying which terms it keeps, so its exact count stands there.
    """
    text = TextGeometry.of(config.text_config)
    d, sequence = text.hidden_size, text_tokens + num_visual_tokens
    per_token = 8 * d**2 + 4 * d * text.intermediate_size
    if num_visual_tokens == config.num_patches:
        projector = 2 * num_visual_tokens * (config.vision_config.hidden_size * d + d**2)
    else:
        projector = projector_flops(config, num_visual_tokens)
    seen = new_tokens * sequence + new_tokens * (new_tokens + 1) // 2
    return Flops(
        vision_tower=tower_flops(config, config.vision_config.num_hidden_layers),
        projector=projector,
        prefill=text.num_layers * (sequence * per_token + 4 * sequence**2 * d),
        decode=text.num_layers * (new_tokens * per_token + 4 * seen * d),
    )


def meta_model(config: DeltaLlavaConfig) -> DeltaLlavaForConditionalGeneration:
    """The whole model without any data, in evaluation mode."""
    with torch.device("meta"):
        return DeltaLlavaForConditionalGeneration(config).eval()


def parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of a model by component; shared tensors count once."""
    components = {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
    }
    result = {name: _size(module) for name, module in components.items()}
    total = _size(model)
    return {**result, "output_head": total - sum(result.values()), "total": total}


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counted(
    model: DeltaLlavaForConditionalGeneration,
    num_visual_tokens: int,
    text_tokens: int = PAPER_TEXT_TOKENS,
    new_tokens: int = PAPER_NEW_TOKENS,
) -> Flops:
    """What torch's FLOP counter sees when the (meta) model answers one question about one image.

    Args:
        model: from `meta_model`.
        num_visual_tokens: V.
        text_tokens: T.
        new_tokens: G; the first comes out of the prefill.
    """
    config = model.config
    size = config.vision_config.image_size
    device, dtype = model.device, model.dtype
    pixels = torch.empty(1, 3, size, size, device=device, dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_image_features(pixels, num_visual_tokens=num_visual_tokens)
    by_module = counter.get_flop_counts()
    encoding = counter.get_total_flops()
    projector = sum(by_module["DeltaLlavaProjector"].values())

    sequence = text_tokens + num_visual_tokens

    def step(tokens: int, cache=None) -> tuple[int, object]:
        embeddings = torch.empty(1, tokens, config.text_config.hidden_size, device=device, dtype=dtype)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = model.model.language_model(inputs_embeds=embeddings, use_cache=True, **{CACHE_NAME: cache})
            model.lm_head(outputs.last_hidden_state[:, -1:])
        return counter.get_total_flops(), outputs[CACHE_NAME]

    prefill, cache = step(sequence)
    decode, steps = 0, max(new_tokens - 1, 0)
    if steps > 0:
        # A step's operations are linear in the length of the cache: two steps give all of them.
        first, cache = step(1, cache)
        second, _ = step(1, cache)
        decode = steps * first + (second - first) * steps * (steps - 1) // 2
    return Flops(vision_tower=encoding - projector, projector=projector, prefill=prefill, decode=decode)
