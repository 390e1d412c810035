"""The Delta projector (Section 4 of arXiv 2512.18910), in the order in which its parts are used.

It computes what the authors' released training code computes; where the paper's equations differ from that code, the
code decides. Symbols: B images, N = H x W patches, s the side of a window of patches, V = g x g visual tokens with
g = H / s, C projector channels (A of EMHSA, L of MHCA), M memory layers, r the rank of a DeltaProjection, D the
language model's width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_delta_llava import DeltaLlavaConfig


class DeltaLlavaUniformLinear(nn.Linear):
    """A Linear whose weights start uniform in +-`bound`, its biases in +-`bias_bound`.

    It stands for the parts of the released projector that keep PyTorch's own initialisation: 1x1 convolutions (without
    `bound`) and the packed input projection of `nn.MultiheadAttention`, whose biases start at zero.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, bound: float | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.bound = in_features**-0.5 if bound is None else bound
        self.bias_bound = self.bound if bound is None else 0.0


def position_table(grid_size: int, source_grid_size: int, channels: int, device: torch.device) -> torch.Tensor:
    """The 2-D sin-cos position table `(grid_size**2, channels)` in fp32 (Pos2D of Eq. 3).

    The released code builds it for the patch grid and resizes it bicubically. The first half of the channels depends
    on the column alone and the second half, with the same values, on the row alone: one axis is resized for both.
    """
    exponents = torch.arange(channels // 4, dtype=torch.float32, device=device) / (channels // 4)
    angles = torch.arange(source_grid_size, dtype=torch.float32, device=device)[:, None] * 10000.0**-exponents
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [H, C / 2]
    if grid_size != source_grid_size:
        axis = F.interpolate(axis.T[None, :, None], size=(1, grid_size), mode="bicubic", align_corners=False)
        axis = axis[0, :, 0].T  # [g, C / 2]
    columns = axis[None].expand(grid_size, -1, -1)
    rows = axis[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)  # [g * g, C]


class DeltaLlavaProjection(nn.Module):
    """DeltaProjection: `LayerNorm(GELU(W x + (U V)^T x))`, a base weight with a low-rank update (Section 4.2)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.base = nn.Linear(in_features, out_features, bias=False)
        self.rank = rank
        if rank > 0:
            self.delta_u = nn.Parameter(torch.empty(in_features, rank))
            self.delta_v = nn.Parameter(torch.empty(rank, out_features))
        self.norm = nn.LayerNorm(out_features, eps=1e-6)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.base(hidden_states)
        if self.rank > 0:
            projected = projected + hidden_states @ self.delta_u @ self.delta_v
        return self.norm(F.gelu(projected))


class DeltaLlavaDropPath(nn.Module):
    """Stochastic depth: in training, a sample's residual branch is dropped with `rate` and scaled up otherwise."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * keep.to(branch.dtype) / (1.0 - self.rate)


class DeltaLlavaSelfAttention(nn.Module):
    """EMHSA: pre-normalised self-attention whose keys and values may be average-pooled (Section 4.1, Eq. 2)."""

    def __init__(self, channels: int, head_dim: int, spatial_reduction: int):
        super().__init__()
        self.head_dim = head_dim
        self.window = spatial_reduction**2
        self.norm = nn.LayerNorm(channels)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        queries = memory = self.norm(hidden_states)  # [B, V, A]
        if 1 < self.window <= memory.shape[1]:
            memory = F.avg_pool1d(memory.transpose(1, 2), self.window).transpose(1, 2).contiguous()  # [B, V / r^2, A]
        heads = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, V, head_dim]
            for projection, tokens in ((self.q_proj, queries), (self.k_proj, memory), (self.v_proj, memory))
        )
        attended = F.scaled_dot_product_attention(*heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # [B, V, A]


class DeltaLlavaMixer(nn.Module):
    """MHCA: grouped 3x3 convolution, LayerNorm over channels, ReLU and a channel mix (Section 4.1)."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // head_dim, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.out_proj = DeltaLlavaUniformLinear(channels, channels)

    def forward(self, hidden_states: torch.Tensor, grid_size: int) -> torch.Tensor:
        grid = hidden_states.transpose(1, 2).unflatten(2, (grid_size, grid_size))  # [B, L, g, g]
        mixed = self.conv(grid).flatten(2).transpose(1, 2)  # [B, V, L]
        return self.out_proj(F.relu(self.norm(mixed)))


class DeltaLlavaMLP(nn.Module):
    """Two pointwise convolutions with a ReLU between them."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = DeltaLlavaUniformLinear(channels, hidden_channels, bias=True)
        self.fc2 = DeltaLlavaUniformLinear(hidden_channels, channels, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(hidden_states)))


class DeltaLlavaTransformerBlock(nn.Module):
    """The Next-ViT-style block that specialises the queries: EMHSA -> MHCA -> MLP (Section 4.3)."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        channels, attention_channels = config.projector_hidden_size, config.block_attention_size
        local_channels = channels - attention_channels
        head_dim, rate = config.block_head_dim, config.drop_path_rate
        self.use_emhsa = config.use_emhsa
        self.input_proj = DeltaLlavaUniformLinear(config.vision_config.hidden_size, attention_channels)
        if self.use_emhsa:
            self.attention_norm = nn.LayerNorm(attention_channels)
            self.attention = DeltaLlavaSelfAttention(attention_channels, head_dim, config.spatial_reduction)
            self.attention_drop_path = DeltaLlavaDropPath(rate * config.mix_ratio)
        self.local_proj = DeltaLlavaUniformLinear(attention_channels, local_channels)
        self.local_mixer = DeltaLlavaMixer(local_channels, head_dim)
        self.local_drop_path = DeltaLlavaDropPath(rate * (1 - config.mix_ratio))
        self.mlp = DeltaLlavaMLP(channels, config.block_mlp_ratio * channels)
        self.mlp_drop_path = DeltaLlavaDropPath(rate)

    def forward(self, hidden_states: torch.Tensor, grid_size: int) -> torch.Tensor:
        attended = self.input_proj(hidden_states)  # [B, V, A]
        if self.use_emhsa:
            attended = attended + self.attention_drop_path(self.attention(self.attention_norm(attended)))
        local = self.local_proj(attended)  # [B, V, L]
        local = local + self.local_drop_path(self.local_mixer(local, grid_size))
        mixed = torch.cat([attended, local], dim=-1)  # [B, V, C]
        return mixed + self.mlp_drop_path(self.mlp(mixed))


class DeltaLlavaCrossAttention(nn.Module):
    """Each query token attends to exactly the s x s patches of its own cell (Eq. 9-10)."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        bound = (6 / (4 * channels)) ** 0.5  # Xavier bound of the (3C, C) matrix that the released code packs
        self.q_proj = DeltaLlavaUniformLinear(channels, channels, bias=True, bound=bound)
        self.k_proj = DeltaLlavaUniformLinear(channels, channels, bias=True, bound=bound)
        self.v_proj = DeltaLlavaUniformLinear(channels, channels, bias=True, bound=bound)
        self.out_proj = nn.Linear(channels, channels)

    def windows(self, tokens: torch.Tensor, grid_size: int, scale: int) -> torch.Tensor:
        """Patch tokens `(B, g*s * g*s, C)` as `(B * g * g, heads, s * s, C / heads)`."""
        batch_size = tokens.shape[0]
        tokens = tokens.view(batch_size, grid_size, scale, grid_size, scale, self.num_heads, -1)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6)  # [B, g, g, heads, s, s, C / heads]
        return tokens.reshape(batch_size * grid_size**2, self.num_heads, scale**2, -1)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, grid_size: int, scale: int
    ) -> torch.Tensor:
        """Attended tokens `(B, V, C)` of queries `(B, V, C)` and of keys and values `(B, N, C)`."""
        attended = F.scaled_dot_product_attention(
            self.windows(self.q_proj(queries), grid_size, 1),
            self.windows(self.k_proj(keys), grid_size, scale),
            self.windows(self.v_proj(values), grid_size, scale),
        )  # [B * V, heads, 1, C / heads]
        return self.out_proj(attended.reshape(queries.shape))


class DeltaLlavaProjector(nn.Module):
    """The Delta projector: N patch tokens in two streams to V visual tokens in the language model's space (Section 4).

    No weight depends on the budget: the same projector runs at every `s` that divides the patch grid.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        channels, text_channels = config.projector_hidden_size, config.text_config.hidden_size
        vision_channels = config.vision_config.hidden_size
        memory_channels = vision_channels * len(config.memory_feature_layers)
        self.source_grid_size = config.grid_size
        self.visual_token_scale = config.visual_token_scale
        if config.use_transformer_block:
            self.query_block = DeltaLlavaTransformerBlock(config)
            vision_channels = channels
        else:
            self.query_block = None
        self.query_projection = DeltaLlavaProjection(vision_channels, channels, config.delta_rank)
        self.key_projection = DeltaLlavaProjection(memory_channels, channels, config.delta_rank)
        self.value_projection = DeltaLlavaProjection(memory_channels, channels, config.delta_rank)
        self.cross_attention = DeltaLlavaCrossAttention(channels, config.projector_num_attention_heads)
        self.linear_1 = nn.Linear(channels, text_channels)
        self.linear_2 = nn.Linear(text_channels, text_channels)

    def queries(self, query_features: torch.Tensor, grid_size: int) -> torch.Tensor:
        """Query tokens `(B, V, C)` from the query stream `(B, N, C)` (Section 4.1 and Eq. 3, 4 and 6)."""
        source = self.source_grid_size
        if grid_size != source:
            grid = query_features.transpose(1, 2).unflatten(2, (source, source))  # [B, C, H, W]
            grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bilinear", align_corners=False)
            # Contiguous: the linear layers that inference servers put in demand it.
            query_features = grid.flatten(2).transpose(1, 2).contiguous()  # [B, V, C]
        if self.query_block is not None:
            query_features = self.query_block(query_features, grid_size)
        positions = position_table(grid_size, source, query_features.shape[-1], query_features.device)
        return self.query_projection((query_features + positions).to(query_features.dtype))

    def forward(
        self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int | list[int]
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            query_features (`torch.Tensor` of shape `(B, N, C)`): patch tokens of the query layer.
            memory_features (`torch.Tensor` of shape `(B, N, M * C)`): patch tokens of the memory layers.
            scale (`int` or `list[int]`): side s of the window of patches that one visual token reads, for all images
                or for each of the B.

        Returns:
            `torch.Tensor` of shape `(B, (H / s)**2, D)`: visual tokens in row-major order; for a list of scales a
            list of one `((H / s)**2, D)` tensor per image.
        """
        if isinstance(scale, list):
            visual_tokens = [None] * len(scale)
            for each in dict.fromkeys(scale):
                images = [image for image, other in enumerate(scale) if other == each]
                tokens_of_images = self(query_features[images], memory_features[images], each)
                for image, tokens in zip(images, tokens_of_images, strict=True):
                    visual_tokens[image] = tokens
            return visual_tokens
        values = self.value_projection(memory_features)
        if scale == 1 and not self.training:
            # A window of one patch is its value, whatever the query. Training runs the queries for their gradients.
            attended = self.cross_attention.out_proj(self.cross_attention.v_proj(values))
        else:
            grid_size = self.source_grid_size // scale
            queries, keys = self.queries(query_features, grid_size), self.key_projection(memory_features)
            attended = self.cross_attention(queries, keys, values, grid_size, scale)
        return self.linear_2(F.gelu(self.linear_1(attended))) * self.visual_token_scale
