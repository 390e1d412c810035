"""What a training checkpoint computes, step by step as the released code does, from its own keys.

A second, plain path through the released computation, without the key tables: if one swapped two tensors of one shape,
the model would load and this would disagree. `benchmarks/projector.py` takes `delta_projector` as its baseline: the
low-rank update is added to the base weight in every call, feature maps are channels-first, the cross-attention runs
over (window, batch, channel) sequences, and keys, queries and values are always all computed.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_delta_llava.conversion.assemble import tower_form
from modeling_delta_llava.conversion.export import read_hub_config
from modeling_delta_llava.conversion.source import PLAIN, read_checkpoint


def delta_projection(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """`LayerNorm(GELU((W + (U V)^T) x))`."""
    weight = weights[f"{name}.shared_weight.weight"] + (weights[f"{name}.U"] @ weights[f"{name}.V"]).T
    x = F.gelu(F.linear(x, weight))
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"], 1e-6)


def sincos_table(channels: int, grid: int) -> Tensor:
    """Position table of a grid, (grid², channels): columns in the first half of the channels, rows in the second."""
    omega = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([columns, rows], -1).reshape(grid * grid, channels).float()


def transformer_block(weights: Mapping[str, Tensor], x: Tensor, head_dim: int) -> Tensor:
    """The Next Transformer Block on a (B, C, g, g) query grid."""
    w = {name.removeprefix("combined_block.ntb."): value for name, value in weights.items()}
    x = F.conv2d(x, w["patch_embed.conv.weight"])
    batch, channels, side, _ = x.shape
    tokens = x.flatten(2).transpose(1, 2)  # [B, g * g, C]
    for norm in ("norm_mhsa", "e_mhsa.norm"):
        tokens = F.layer_norm(tokens, (channels,), w[f"{norm}.weight"], w[f"{norm}.bias"])
    q, k, v = (
        F.linear(tokens, w[f"e_mhsa.{name}.weight"], w[f"e_mhsa.{name}.bias"])
        .view(batch, -1, channels // head_dim, head_dim)
        .transpose(1, 2)
        for name in "qkv"
    )
    scores = q @ k.transpose(-1, -2) * head_dim**-0.5
    if not scores.isfinite().all():
        scores = scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    attention = (scores - scores.amax(-1, keepdim=True)).softmax(-1)
    tokens = (attention @ v).transpose(1, 2).reshape(batch, -1, channels)
    tokens = F.linear(tokens, w["e_mhsa.proj.weight"], w["e_mhsa.proj.bias"])
    x = x + tokens.transpose(1, 2).view(batch, channels, side, side)
    local = F.conv2d(x, w["projection.conv.weight"])
    width = local.shape[1]
    mixed = F.conv2d(local, w["mhca.group_conv3x3.weight"], padding=1, groups=width // head_dim)
    mixed = F.layer_norm(mixed.permute(0, 2, 3, 1), (width,), w["mhca.norm.weight"], w["mhca.norm.bias"])
    local = local + F.conv2d(mixed.permute(0, 3, 1, 2).relu(), w["mhca.projection.weight"])
    x = torch.cat([x, local], 1)
    hidden = F.conv2d(x, w["mlp.conv1.weight"], w["mlp.conv1.bias"]).relu()
    return x + F.conv2d(hidden, w["mlp.conv2.weight"], w["mlp.conv2.bias"])


def delta_projector(
    weights: Mapping[str, Tensor],
    query: Tensor,
    memory: Tensor,
    scale: int,
    heads: int,
    head_dim: int,
    positions: Tensor,
) -> Tensor:
    """Visual tokens of the Delta projector.

    Args:
        weights: tensors by key without `model.mm_projector.`.
        query: (B, N, C) patch tokens of the query layer.
        memory: (B, N, M * C) patch tokens of the memory layers.
        scale: side of the window of patches that one visual token reads.
        heads: of the cross-attention.
        head_dim: of the transformer block.
        positions: (N, D'), see [`sincos_table`]; D' is the width of the transformer block's output.

    Returns:
        (B, (sqrt(N) / scale)², D).
    """
    batch, patches, channels = query.shape
    grid = math.isqrt(patches)
    side = grid // scale
    x = query.transpose(1, 2).reshape(batch, channels, grid, grid)
    x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    x = transformer_block(weights, x, head_dim).flatten(2).transpose(1, 2)  # [B, V, C]
    width = x.shape[-1]
    table = positions.float().view(1, grid, grid, width).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False).to(x.dtype)
    x = delta_projection(weights, "q_proj_1", x + table.flatten(2).transpose(1, 2))

    def windows(tokens: Tensor) -> Tensor:
        """(B, N, C) -> (s * s, B * V, C), window by window."""
        tokens = tokens.view(batch, side, scale, side, scale, width)
        return tokens.permute(2, 4, 0, 1, 3, 5).reshape(scale * scale, batch * side * side, width)

    key, value = (windows(delta_projection(weights, name, memory)) for name in ("k_proj_1", "v_proj_1"))
    attended, _ = F.multi_head_attention_forward(
        x.reshape(1, batch * side * side, width),
        key,
        value,
        width,
        heads,
        weights["clip_attn.in_proj_weight"],
        weights["clip_attn.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        weights["clip_attn.out_proj.weight"],
        weights["clip_attn.out_proj.bias"],
        training=False,
    )
    hidden = F.gelu(F.linear(attended.view(batch, side * side, width), weights["mlp.0.weight"], weights["mlp.0.bias"]))
    return F.linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"])


def plain_projector(weights: Mapping[str, Tensor], query: Tensor) -> Tensor:
    """Visual tokens of LLaVA-1.5's MLP, (B, N, C) -> (B, N, D)."""
    hidden = F.gelu(F.linear(query, weights["0.weight"], weights["0.bias"]))
    return F.linear(hidden, weights["2.weight"], weights["2.bias"])


@torch.no_grad()
def reference_stages(
    tensors: Mapping[str, Tensor], config, projector: str, pixel_values: Tensor, before: Tensor, after: Tensor
) -> dict[str, Tensor]:
    """Every stage of a checkpoint on one picture and prompt.

    Args:
        tensors: fp32 tensors by training key, tower in the old form.
        config: the converted configuration (sizes and layer indices).
        projector: `DELTA` or `PLAIN`.
        pixel_values: (1, 3, height, width).
        before, after: token ids (1, T) around the picture.

    Returns:
        the tower's hidden states by name, `projector` (1, V, D) and `logits` (1, T + V + T', vocabulary).
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Weights that nothing has written to take no memory until they are replaced.
    with no_init_weights():
        tower = AutoModel.from_config(config.vision_config, attn_implementation="eager").eval()
    prefix = "model.vision_tower.vision_tower.vision_model."
    weights = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    if projector != PLAIN:
        # What nothing reads may be missing, or there without a place: nothing depends on it.
        names = tower.state_dict().keys()
        unread = tuple(name for name in names if ".layers." in name and name not in weights)
        _load(tower, {name: t for name, t in weights.items() if name in names}, missing_allowed=unread)
    else:
        _load(tower, weights)
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    weights = {
        key.removeprefix("model.mm_projector."): t
        for key, t in tensors.items()
        if key.startswith("model.mm_projector.")
    }
    stages = {}
    if projector == PLAIN:
        layers = [config.vision_feature_layer]
        visual = plain_projector(weights, states[layers[0]][:, first:])
    else:
        layers = config.memory_feature_layers
        width = weights["q_proj_1.shared_weight.weight"].shape[1]
        visual = delta_projector(
            weights,
            states[config.query_feature_layer][:, first:],
            torch.cat([states[layer][:, first:] for layer in layers], -1),
            config.scale_factor(),
            config.projector_num_attention_heads,
            config.block_head_dim,
            sincos_table(width, math.isqrt(config.num_patches)),
        )
    stages |= {f"tower layer {layer}": states[layer] for layer in layers}
    stages["projector"] = visual * getattr(config, "visual_token_scale", 1.0)
    del tower, states

    rows = tensors["model.embed_tokens.weight"].shape[0]
    text_config = type(config.text_config).from_dict({**config.text_config.to_dict(), "vocab_size": rows})
    with no_init_weights():
        language_model = AutoModelForCausalLM.from_config(text_config, attn_implementation="eager").eval()
    _load(
        language_model,
        {key: t for key, t in tensors.items() if not key.startswith(("model.mm_projector.", "model.vision_tower."))},
        missing_allowed=("lm_head.weight",) if config.tie_word_embeddings else (),
    )
    embeddings = language_model.get_input_embeddings().weight
    embeds = torch.cat([F.embedding(before, embeddings), visual, F.embedding(after, embeddings)], 1)
    if config.text_config.model_type == "gemma":
        # Training's transformers scaled Gemma's embeddings inside the model, pictures included.
        embeds = embeds * config.text_config.hidden_size**0.5
    stages["logits"] = language_model(inputs_embeds=embeds).logits
    return stages


def _load(model: torch.nn.Module, tensors: dict[str, Tensor], missing_allowed: tuple[str, ...] = ()) -> None:
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(("inv_freq", "position_ids"))}
    result = model.load_state_dict(tensors, strict=False, assign=True)
    wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if key not in missing_allowed)]
    if wrong:
        raise ValueError(f"reference model does not take {wrong[:3]}")
    model.tie_weights()


def model_stages(folder: Path, config, projector: str, pixel_values: Tensor, before: Tensor, after: Tensor) -> dict:
    """The same stages as [`reference_stages`], from a Hub folder loaded in fp32."""
    from transformers import LlavaForConditionalGeneration

    from modeling_delta_llava import DeltaLlavaForConditionalGeneration

    model_class = LlavaForConditionalGeneration if projector == PLAIN else DeltaLlavaForConditionalGeneration
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        if projector == PLAIN:
            stages = {f"tower layer {config.vision_feature_layer}": states[config.vision_feature_layer]}
        else:
            layers = config.memory_feature_layers
            stages = {f"tower layer {layer}": states[config.hidden_state_index(layer)] for layer in layers}
        visual = model.get_image_features(pixel_values, return_dict=True).pooler_output
        visual = torch.stack([tokens.reshape(-1, tokens.shape[-1]) for tokens in visual])
        placeholders = torch.full((1, visual.shape[1]), config.image_token_id)
        logits = model(input_ids=torch.cat([before, placeholders, after], 1), pixel_values=pixel_values).logits
    return stages | {"projector": visual, "logits": logits}


def assert_same_numbers(folder: Path, source: Path) -> None:
    """A Hub folder computes what its source, a stage-2 checkpoint with its tower inside, does: within 1e-4 in fp32."""
    config, projector = read_hub_config(folder)
    tensors = {key: tensor.float() for key, tensor in read_checkpoint(source).tensors.items()}
    start = "model.vision_tower.vision_tower."
    if tower_form(tensors) == "flat":
        tensors = {
            f"{start}vision_model.{key.removeprefix(start)}" if key.startswith(start) else key: tensor
            for key, tensor in tensors.items()
        }
    generator = torch.Generator().manual_seed(0)
    side, rows = config.vision_config.image_size, tensors["model.embed_tokens.weight"].shape[0]
    pixel_values = torch.randn(1, 3, side, side, generator=generator)
    before, after = (torch.randint(0, rows, (1, count), generator=generator) for count in (5, 9))
    for ids in (before, after):
        ids[ids == config.image_token_id] = 0
    found = model_stages(folder, config, projector, pixel_values, before, after)
    wanted = reference_stages(tensors, config, projector, pixel_values, before, after)
    new, found["logits"] = found["logits"][..., rows:], found["logits"][..., :rows]
    for name, expected in wanted.items():
        difference = float((found[name] - expected).abs().max() / expected.abs().max())
        assert difference <= 1e-4, (name, difference)
    assert torch.equal(found["logits"].argmax(-1), wanted["logits"].argmax(-1))
    assert not new.numel() or (new.amax(-1) <= found["logits"].amax(-1)).all()
