"""The released projector's computation in plain eager PyTorch: the baseline of `projector.py`.

Our own rendering of what the released code does step by step, with the same weights as a `DeltaLlavaProjector`: the
low-rank update is added to the base weight in every call, feature maps are channels-first, the cross-attention is
`nn.MultiheadAttention` over (window, batch, channel) sequences, and keys, queries and values are always all computed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_delta_llava.projector_delta_llava import (
    DeltaLlavaProjection,
    DeltaLlavaProjector,
    DeltaLlavaTransformerBlock,
    position_table,
)


def delta_projection(module: DeltaLlavaProjection, features: torch.Tensor) -> torch.Tensor:
    update = (module.delta_u @ module.delta_v).T
    return module.norm(F.gelu(F.linear(features, module.base.weight + update)))


def pointwise(linear: nn.Linear, feature_map: torch.Tensor) -> torch.Tensor:
    """A Linear applied as the 1x1 convolution that it stands for."""
    return F.conv2d(feature_map, linear.weight[:, :, None, None], linear.bias)


def channels_last(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.permute(0, 2, 3, 1)


def self_attention(block: DeltaLlavaTransformerBlock, tokens: torch.Tensor) -> torch.Tensor:
    attention = block.attention
    normed = attention.norm(tokens)
    queries, keys, values = (
        linear(normed).unflatten(-1, (-1, attention.head_dim)).permute(0, 2, 1, 3)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = queries @ keys.transpose(-2, -1) * attention.head_dim**-0.5
    if not scores.isfinite().all():
        scores = scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).softmax(dim=-1)
    return attention.out_proj((weights @ values).transpose(1, 2).flatten(2))


def transformer_block(block: DeltaLlavaTransformerBlock, feature_map: torch.Tensor) -> torch.Tensor:
    attended = pointwise(block.input_proj, feature_map)  # [B, A, g, g]
    side = attended.shape[-1]
    tokens = channels_last(attended).flatten(1, 2)
    branch = block.attention_drop_path(self_attention(block, block.attention_norm(tokens)))
    attended = attended + branch.transpose(1, 2).unflatten(2, (side, side))
    local = pointwise(block.local_proj, attended)
    mixer = block.local_mixer
    mixed = channels_last(mixer.conv(local.contiguous()))
    mixed = F.relu(mixer.norm(mixed).permute(0, 3, 1, 2))
    local = local + block.local_drop_path(pointwise(mixer.out_proj, mixed))
    local = F.interpolate(local, size=(side, side), mode="nearest")
    joined = torch.cat([attended, local], dim=1)
    hidden = F.relu(pointwise(block.mlp.fc1, joined))
    return joined + block.mlp_drop_path(pointwise(block.mlp.fc2, hidden))


class ReleasedProjector(nn.Module):
    """The released computation with copies of a projector's weights.

    Args:
        projector: source of the weights; its geometry must be the released one (transformer block, EMHSA, rank > 0).
    """

    def __init__(self, projector: DeltaLlavaProjector):
        super().__init__()
        self.side = projector.source_grid_size
        for name in ("query_block", "query_projection", "key_projection", "value_projection", "linear_1", "linear_2"):
            setattr(self, name, getattr(projector, name))
        ours = projector.cross_attention
        device, dtype = ours.out_proj.weight.device, ours.out_proj.weight.dtype
        channels = ours.out_proj.in_features
        self.attention = nn.MultiheadAttention(channels, ours.num_heads, device=device, dtype=dtype)
        parts = (ours.q_proj, ours.k_proj, ours.v_proj)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            self.attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            self.attention.out_proj.weight.copy_(ours.out_proj.weight)
            self.attention.out_proj.bias.copy_(ours.out_proj.bias)
        table = position_table(self.side, self.side, projector.query_projection.base.in_features, device).to(dtype)
        self.register_buffer("position_table", table, persistent=False)

    def resized_positions(self, side: int) -> torch.Tensor:
        table = self.position_table.float().unflatten(0, (self.side, self.side)).permute(2, 0, 1)[None]
        table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        return channels_last(table).flatten(0, 2).to(self.position_table.dtype)

    def windows(self, sequence: torch.Tensor, scale: int) -> torch.Tensor:
        """`(patches, B, C)` as `(scale**2, windows * B, C)`."""
        side = round(sequence.shape[0] ** 0.5) // scale
        grid = sequence.unflatten(0, (side, scale, side, scale)).permute(1, 3, 0, 2, 4, 5)
        return grid.reshape(scale**2, -1, sequence.shape[-1])

    def forward(self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int) -> torch.Tensor:
        """Arguments and result as those of `DeltaLlavaProjector.forward`."""
        batch_size, side = query_features.shape[0], self.side // scale
        keys = delta_projection(self.key_projection, memory_features).transpose(0, 1)
        values = delta_projection(self.value_projection, memory_features).transpose(0, 1)
        feature_map = query_features.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        feature_map = F.interpolate(feature_map, size=(side, side), mode="bilinear")
        queries = channels_last(transformer_block(self.query_block, feature_map)).flatten(1, 2)
        queries = queries + self.resized_positions(side)
        queries = delta_projection(self.query_projection, queries).transpose(0, 1)
        attended = self.attention(self.windows(queries, 1), self.windows(keys, scale), self.windows(values, scale))[0]
        attended = attended.reshape(side**2, batch_size, -1).transpose(0, 1)
        return self.linear_2(F.gelu(self.linear_1(attended)))
