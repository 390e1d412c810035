"""Delta-LLaVA (Zamini and Shukla, WACV 2026, arXiv 2512.18910): LLaVA-1.5 with a token-reducing projector.

The projector computes what the authors' released training code computes; where the paper's equations differ from
that code, the code decides. Symbols: B images, N = H x W patches, s the side of a window of patches, V = g x g visual
tokens with g = H / s, C projector channels, M memory layers, r the rank of a DeltaProjection, D the language model's
width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_delta_llava import DeltaLlavaConfig
from .fusion_delta_llava import FusedDeltaProjector, check_fusible, weight_versions
from .generation_delta_llava import DeltaLlavaGenerationMixin

logger = logging.get_logger(__name__)

# Towers whose layers can be run one by one, so that those above the highest layer in use are never computed.
LAYERWISE_TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass
class DeltaLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`DeltaLlavaModel`]; `image_hidden_states` are the visual tokens `(sum of V, D)` of all images."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class DeltaLlavaCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`DeltaLlavaForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): next-token cross-entropy, when `labels` are given.
        logits (`torch.FloatTensor` of shape `(batch, sequence, vocabulary)`).
        past_key_values (`Cache`): keys and values of the sequence so far.
        hidden_states, attentions (`tuple[torch.FloatTensor]`): per layer of the language model, when asked for.
        image_hidden_states (`torch.FloatTensor` of shape `(sum of V, D)`): the visual tokens of all images.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


class UniformLinear(nn.Linear):
    """A Linear whose weights start uniform in +-`bound`, its biases in +-`bias_bound`.

    It stands for the parts of the released projector that keep PyTorch's own initialisation: 1x1 convolutions and the
    packed input projection of `nn.MultiheadAttention`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, bound: float, bias_bound: float = 0.0):
        super().__init__(in_features, out_features, bias=bias)
        self.bound = bound
        self.bias_bound = bias_bound


def pointwise_convolution(in_channels: int, out_channels: int, bias: bool = False) -> UniformLinear:
    """A 1x1 convolution over channels-last tokens, with the default initialisation of `nn.Conv2d`."""
    bound = in_channels**-0.5
    return UniformLinear(in_channels, out_channels, bias, bound, bias_bound=bound)


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


class DeltaProjection(nn.Module):
    """`LayerNorm(GELU(W x + (U V)^T x))`: a base weight with a low-rank update (Section 4.2, Eq. 4)."""

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


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's residual branch is dropped with `rate` and scaled up otherwise."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * keep.to(branch.dtype) / (1.0 - self.rate)


class EfficientSelfAttention(nn.Module):
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
        queries = memory = self.norm(hidden_states)  # [B, V, C1]
        if 1 < self.window <= memory.shape[1]:
            memory = F.avg_pool1d(memory.transpose(1, 2), self.window).transpose(1, 2).contiguous()  # [B, V / r^2, C1]
        heads = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, V, head_dim]
            for projection, tokens in ((self.q_proj, queries), (self.k_proj, memory), (self.v_proj, memory))
        )
        attended = F.scaled_dot_product_attention(*heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # [B, V, C1]


class ConvolutionalMixer(nn.Module):
    """MHCA: grouped 3x3 convolution, LayerNorm over channels, ReLU and a channel mix (Section 4.1)."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // head_dim, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.out_proj = pointwise_convolution(channels, channels)

    def forward(self, hidden_states: torch.Tensor, grid_size: int) -> torch.Tensor:
        grid = hidden_states.transpose(1, 2).unflatten(2, (grid_size, grid_size))  # [B, C2, g, g]
        mixed = self.conv(grid).flatten(2).transpose(1, 2)  # [B, V, C2]
        return self.out_proj(F.relu(self.norm(mixed)))


class DeltaLlavaBlockMLP(nn.Module):
    """Two pointwise convolutions with a ReLU between them."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = pointwise_convolution(channels, hidden_channels, bias=True)
        self.fc2 = pointwise_convolution(hidden_channels, channels, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(hidden_states)))


class DeltaLlavaTransformerBlock(nn.Module):
    """The Next-ViT-style block that specialises the queries: EMHSA -> MHCA -> MLP (Section 4.3)."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        channels, attention_channels = config.projector_hidden_size, config.block_attention_size
        local_channels = channels - attention_channels
        rate = config.drop_path_rate
        self.use_emhsa = config.use_emhsa
        self.input_proj = pointwise_convolution(config.vision_config.hidden_size, attention_channels)
        if self.use_emhsa:
            self.attention_norm = nn.LayerNorm(attention_channels)
            self.attention = EfficientSelfAttention(
                attention_channels, config.block_head_dim, config.spatial_reduction
            )
            self.attention_drop_path = DropPath(rate * config.mix_ratio)
        self.local_proj = pointwise_convolution(attention_channels, local_channels)
        self.local_mixer = ConvolutionalMixer(local_channels, config.block_head_dim)
        self.local_drop_path = DropPath(rate * (1 - config.mix_ratio))
        self.mlp = DeltaLlavaBlockMLP(channels, config.block_mlp_ratio * channels)
        self.mlp_drop_path = DropPath(rate)

    def forward(self, hidden_states: torch.Tensor, grid_size: int) -> torch.Tensor:
        attended = self.input_proj(hidden_states)  # [B, V, C1]
        if self.use_emhsa:
            attended = attended + self.attention_drop_path(self.attention(self.attention_norm(attended)))
        local = self.local_proj(attended)  # [B, V, C2]
        local = local + self.local_drop_path(self.local_mixer(local, grid_size))
        mixed = torch.cat([attended, local], dim=-1)  # [B, V, C]
        return mixed + self.mlp_drop_path(self.mlp(mixed))


class WindowedCrossAttention(nn.Module):
    """Each query token attends to exactly the s x s patches of its own cell (Eq. 9-10)."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        packed_bound = (6 / (4 * channels)) ** 0.5  # Xavier bound of the (3C, C) matrix that the released code packs
        self.q_proj = UniformLinear(channels, channels, bias=True, bound=packed_bound)
        self.k_proj = UniformLinear(channels, channels, bias=True, bound=packed_bound)
        self.v_proj = UniformLinear(channels, channels, bias=True, bound=packed_bound)
        self.out_proj = nn.Linear(channels, channels)

    def windows(self, tokens: torch.Tensor, grid_size: int, scale: int) -> torch.Tensor:
        """Patch tokens `(B, g*s * g*s, C)` as `(B * g * g, heads, s * s, C / heads)`."""
        batch_size = tokens.shape[0]
        tokens = tokens.view(batch_size, grid_size, scale, grid_size, scale, self.num_heads, -1)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6)  # [B, g, g, heads, s, s, C / heads]
        return tokens.reshape(batch_size * grid_size**2, self.num_heads, scale**2, -1)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: int) -> torch.Tensor:
        batch_size, num_visual_tokens, channels = queries.shape
        grid_size = round(num_visual_tokens**0.5)
        attended = F.scaled_dot_product_attention(
            self.windows(self.q_proj(queries), grid_size, 1),
            self.windows(self.k_proj(keys), grid_size, scale),
            self.windows(self.v_proj(values), grid_size, scale),
        )  # [B * V, heads, 1, C / heads]
        return self.out_proj(attended.reshape(batch_size, num_visual_tokens, channels))


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
        self.query_channels = vision_channels
        self.query_projection = DeltaProjection(vision_channels, channels, config.delta_rank)
        self.key_projection = DeltaProjection(memory_channels, channels, config.delta_rank)
        self.value_projection = DeltaProjection(memory_channels, channels, config.delta_rank)
        self.cross_attention = WindowedCrossAttention(channels, config.projector_num_attention_heads)
        self.linear_1 = nn.Linear(channels, text_channels)
        self.linear_2 = nn.Linear(text_channels, text_channels)
        self.fused = None

    def fuse(self):
        """Fold copies of the weights for inference; see [`FusedDeltaProjector`] for what is folded and refused."""
        self.fused = FusedDeltaProjector(self)

    def unfuse(self):
        """Drop the folded copies."""
        self.fused = None

    def train(self, mode: bool = True):
        if mode:
            self.unfuse()
        return super().train(mode)

    def _fused_is_current(self) -> bool:
        """Whether folded weights can stand for the plain ones: no gradient is wanted and no weight has changed."""
        if self.fused is None or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or self.fused.versions == weight_versions(self):
            return True
        self.unfuse()
        return False

    def positions(self, grid_size: int, device: torch.device) -> torch.Tensor:
        """Position table `(V, C)` of the queries in fp32."""
        return position_table(grid_size, self.source_grid_size, self.query_channels, device)

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
        positions = self.positions(grid_size, query_features.device)
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
        if isinstance(scale, int):
            return self._project(query_features, memory_features, scale)
        visual_tokens = [None] * len(scale)
        for each in dict.fromkeys(scale):
            images = [image for image, other in enumerate(scale) if other == each]
            streams = (query_features, memory_features)
            if len(images) < len(scale):
                streams = (stream[images] for stream in streams)
            for image, tokens in zip(images, self._project(*streams, each), strict=True):
                visual_tokens[image] = tokens
        return visual_tokens

    def _project(self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int) -> torch.Tensor:
        if self._fused_is_current():
            hidden = self.fused(query_features, memory_features, scale)
        else:
            values = self.value_projection(memory_features)
            if scale == 1 and not self.training:
                # A window of one patch: the softmax is 1 and neither queries nor keys can change the result.
                attended = self.cross_attention.out_proj(self.cross_attention.v_proj(values))
            else:
                queries = self.queries(query_features, self.source_grid_size // scale)
                keys = self.key_projection(memory_features)
                attended = self.cross_attention(queries, keys, values, scale)
            hidden = self.linear_1(attended)
        visual_tokens = self.linear_2(F.gelu(hidden))
        return visual_tokens if self.visual_token_scale == 1 else visual_tokens * self.visual_token_scale


class DeltaLlavaPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the capabilities that transformers asks a model about."""

    config: DeltaLlavaConfig
    config_class = DeltaLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltaLlavaProjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses from the source; tower and language model dispatch, the projector always runs SDPA.
        return True

    def fuse_projector(self):
        """
        Fold the projector's weights for inference: the same results (to rounding) with fewer operations, at the price
        of a folded copy in memory.

        The plain weights stay: saving writes them, and the plain projector computes whenever gradients are enabled.
        `train()`, and any change to a weight that PyTorch counts, drop the folded copy. Changes through `.data` (as
        when an adapter is merged) are not counted: call `fuse_projector` again after them, and after loading.

        Raises:
            ValueError: if the projector is quantised, offloaded, spread over devices or wrapped by a PEFT adapter.
        """
        projector = self.base_model.multi_modal_projector
        check_fusible(projector)  # a PEFT wrapper would hand `fuse` on to the module inside
        projector.fuse()

    def unfuse_projector(self):
        """Undo [`fuse_projector`] and free the folded copy."""
        self.base_model.multi_modal_projector.unfuse()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, UniformLinear):
            init.uniform_(module.weight, -module.bound, module.bound)
            if module.bias is not None:
                init.uniform_(module.bias, -module.bias_bound, module.bias_bound)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, DeltaProjection):
            if module.rank > 0:
                init.xavier_uniform_(module.delta_u)
                init.xavier_uniform_(module.delta_v)
        else:
            super()._init_weights(module)


class DeltaLlavaModel(DeltaLlavaPreTrainedModel):
    """Vision tower, Delta projector and language model, without a language-model head."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = DeltaLlavaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def generate(self, *args, **kwargs):
        raise TypeError(
            "DeltaLlavaModel has no language-model head and cannot generate: load the checkpoint with "
            "AutoModelForImageTextToText.from_pretrained"
        )

    def _run_tower(
        self, pixel_values: torch.Tensor, indices: list[int], output_hidden_states: bool, output_attentions: bool
    ) -> tuple[dict[int, torch.Tensor] | tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
        """The tower's hidden states `(B, tokens, C)`, at least those at `indices`, and attentions if asked for.

        Unless all of them are asked for, no layer above the highest index is computed.
        """
        tower = self.vision_tower
        # Hooks on the tower's own call (offloading, dispatch, sharding, the user's own) have to see that call.
        hooked = any(
            hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks
            for module in (tower, getattr(tower, "encoder", tower))
        )
        layerwise = self.config.vision_config.model_type in LAYERWISE_TOWERS
        if hooked or not layerwise or output_hidden_states or output_attentions:
            outputs = tower(
                pixel_values, output_hidden_states=True, output_attentions=output_attentions, return_dict=True
            )
            return outputs.hidden_states, outputs.attentions
        hidden_state = tower.embeddings(pixel_values)
        if self.config.vision_config.model_type == "clip_vision_model":
            hidden_state = tower.pre_layrnorm(hidden_state)
        hidden_states = {0: hidden_state}
        for index, layer in enumerate(tower.encoder.layers[: max(indices)], start=1):
            hidden_state = layer(hidden_state, None)
            if index in indices:
                hidden_states[index] = hidden_state
        return hidden_states, None

    def _patch_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Query stream `(B, N, C)`, memory stream `(B, N, M * C)`, and what `kwargs` ask for of the tower."""
        config = self.config
        query_index = config.hidden_state_index(config.query_feature_layer)
        memory_indices = [config.hidden_state_index(layer) for layer in config.memory_feature_layers]
        asked = {}
        for name in ("output_hidden_states", "output_attentions"):
            value = kwargs.get(name)
            asked[name] = bool(getattr(config.vision_config, name, False) if value is None else value)
        hidden_states, attentions = self._run_tower(pixel_values, [query_index, *memory_indices], **asked)
        first_patch = 1 if config.vision_feature_select_strategy == "default" else 0
        query_features = hidden_states[query_index][:, first_patch:]
        if query_features.shape[1] != config.num_patches:
            raise ValueError(
                f"The vision tower gave {query_features.shape[1]} patch tokens per image, but its config describes a "
                f"{config.grid_size} x {config.grid_size} grid of {config.num_patches}: check image_size, patch_size "
                f"and vision_feature_select_strategy={config.vision_feature_select_strategy!r}"
            )
        memory_features = torch.cat([hidden_states[index][:, first_patch:] for index in memory_indices], dim=-1)
        dtype = self.multi_modal_projector.query_projection.norm.weight.dtype
        captured = {"attentions": attentions}
        if asked["output_hidden_states"]:
            captured["hidden_states"] = hidden_states
        return query_features.to(dtype), memory_features.to(dtype), captured

    def _budgets(self, num_visual_tokens: int | list[int] | torch.Tensor | None, num_images: int) -> list[int]:
        """One checked budget per image."""
        if num_visual_tokens is None:
            num_visual_tokens = self.config.num_visual_tokens
        if isinstance(num_visual_tokens, int):
            budgets = [num_visual_tokens] * num_images
        else:
            budgets = torch.as_tensor(num_visual_tokens).flatten().tolist()
        if len(budgets) != num_images:
            raise ValueError(
                f"num_visual_tokens has {len(budgets)} entries for {num_images} images: give one per image"
            )
        trained = self.config.trained_num_visual_tokens
        for budget in dict.fromkeys(budgets):
            self.config.scale_factor(budget)
            if trained and budget not in trained and not torch.compiler.is_compiling():
                logger.warning_once(
                    f"Running at {budget} visual tokens per image; this checkpoint was trained at {trained}. "
                    "The model computes at every legal budget, but quality is only known at trained ones."
                )
        return budgets

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        num_visual_tokens: int | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Visual tokens of images, to be reused over turns and questions as `image_features`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`).
            num_visual_tokens (`int`, `list[int]` or `torch.LongTensor` of shape `(images,)`, *optional*):
                Budget of all images or of each; defaults to the config's.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list with one `(V, D)` tensor per image,
            `last_hidden_state` the query stream `(images, N, C)`; `hidden_states` and `attentions` are the tower's,
            when asked for.
        """
        budgets = self._budgets(num_visual_tokens, pixel_values.shape[0])
        if not budgets:
            return BaseModelOutputWithPooling(pooler_output=[])
        query_features, memory_features, captured = self._patch_features(pixel_values, **kwargs)
        # One call, whatever the budgets: sharded training gathers the projector's weights once on every rank.
        scales = [self.config.scale_factor(budget) for budget in budgets]
        visual_tokens = self.multi_modal_projector(query_features, memory_features, scales)
        return BaseModelOutputWithPooling(last_hidden_state=query_features, pooler_output=visual_tokens, **captured)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: list[torch.Tensor] | None = None,
    ) -> torch.BoolTensor:
        """
        Where image tokens stand, `(batch, sequence)`; checked against `image_features`, one `(V, D)` tensor per image.

        Raises:
            ValueError: if the number of image tokens is not the number of visual tokens.
        """
        if input_ids is not None:
            mask = (input_ids == self.config.image_token_id).to(inputs_embeds.device)
        else:
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        if image_features is None:
            return mask
        counts = [len(tokens) for tokens in image_features]
        if torch.compiler.is_compiling():
            torch._assert_async(mask.sum() == sum(counts), "Image tokens and image features do not match")
        elif (num_image_tokens := int(mask.sum())) != sum(counts):
            raise ValueError(
                f"Image tokens and image features do not match: the prompt holds {num_image_tokens} image tokens, "
                f"but {len(counts)} image(s) gave {sum(counts)} visual tokens (budget "
                f"{', '.join(map(str, dict.fromkeys(counts)))}; the config's is {self.config.num_visual_tokens}). "
                "Give processor and model the same num_visual_tokens, one image for every placeholder, and do not "
                "truncate prompts inside an image"
            )
        return mask

    def _check_images_stand_together(self, mask: torch.BoolTensor, counts: list[int]):
        """Raises `ValueError` when right numbers hide a wrong order: an image's tokens have to be neighbours.

        `counts` are the visual tokens of each image, `mask` says where image tokens stand.
        """
        positions = mask.nonzero()  # [sum of V, (row, column)]
        ends = torch.tensor(counts, device=mask.device).cumsum(0)
        first, last = positions[ends - ends.new_tensor(counts)], positions[ends - 1]
        torn = (last[:, 0] != first[:, 0]) | (last[:, 1] - first[:, 1] != ends.new_tensor(counts) - 1)
        if torn.any():
            image = int(torn.nonzero()[0])
            raise ValueError(
                f"The {counts[image]} visual tokens of image {image} would be torn apart in the prompt: give images "
                f"and num_visual_tokens {counts} in the order of the prompt"
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        num_visual_tokens: int | list[int] | torch.LongTensor | None = None,
        image_features: list[torch.Tensor] | BaseModelOutputWithPooling | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DeltaLlavaModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`): ids with V image tokens per image.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): all images of the batch in
                the order of their placeholders.
            num_visual_tokens (`int`, `list[int]` or `torch.LongTensor` of shape `(images,)`): budgets, as given to the
                processor.
            image_features (`list[torch.Tensor]` or the output of `get_image_features`): visual tokens computed before,
                instead of `pixel_values`.
            mm_encoder_outputs (`dict`): the same, as `generate` passes it (`{"image": output}`).

        Raises:
            ValueError: if image tokens and visual tokens do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        # `generate` hands over encoded images, possibly in parts of a prompt; what a caller gives comes whole.
        features, visual_tokens, whole = (mm_encoder_outputs or {}).get("image"), None, False
        if sum(source is not None for source in (pixel_values, image_features, features)) > 1:
            raise ValueError("Give images once: as pixel_values, image_features or mm_encoder_outputs")
        if pixel_values is not None:
            features, whole = self.get_image_features(pixel_values, num_visual_tokens, return_dict=True), True
        elif image_features is not None:
            features, whole = image_features, True

        if features is not None:
            features = list(getattr(features, "pooler_output", features))
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, features)
            if whole and features and not torch.compiler.is_compiling():
                self._check_images_stand_together(mask, [len(tokens) for tokens in features])
        if features:
            visual_tokens = torch.cat([tokens.to(inputs_embeds) for tokens in features])  # [sum of V, D]
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), visual_tokens)
        elif self.training and past_key_values is None:
            inputs_embeds = inputs_embeds + self._touch_projector(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return DeltaLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
        )

    def _touch_projector(self, inputs_embeds: torch.Tensor) -> torch.Tensor | float:
        """Zero that depends on every projector weight, so that a text-only batch gives all of them a gradient.

        Distributed training waits for the gradient of every trained parameter on every rank, and for every rank to ask
        for its share of a sharded one, trained or not.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        trained = any(parameter.requires_grad for parameter in self.multi_modal_projector.parameters())
        if not distributed and not trained:
            return 0.0
        vision = self.config.vision_config
        blank = inputs_embeds.new_zeros(1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        visual_tokens = self.get_image_features(blank, return_dict=True).pooler_output[0]
        return (visual_tokens * 0.0).sum().to(inputs_embeds)


class DeltaLlavaForConditionalGeneration(DeltaLlavaPreTrainedModel, DeltaLlavaGenerationMixin):
    """Delta-LLaVA with a language-model head: image-text-to-text generation and training."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        self.model = DeltaLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        num_visual_tokens: int | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Visual tokens of images; see [`DeltaLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, num_visual_tokens, **kwargs)

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits, with the scaling that some language models (Gemma 2, Granite, Cohere) put behind their head."""
        text_config = self.config.text_config
        logits = self.lm_head(hidden_states)
        if (softcap := getattr(text_config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(text_config, "logit_scale", None)) is not None:
            logits = logits * factor
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_visual_tokens: int | list[int] | torch.LongTensor | None = None,
        image_features: list[torch.Tensor] | BaseModelOutputWithPooling | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DeltaLlavaCausalLMOutputWithPast:
        """
        Arguments as in [`DeltaLlavaModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`): ids to predict, -100 where nothing is learned.
            logits_to_keep (`int` or `torch.Tensor`): logits of the last positions only (0: all), or of these.
            mm_token_type_ids (`torch.LongTensor`): accepted as the processor may give it, and not needed.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        >>> content = [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "What is it?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     add_generation_prompt=True,
        ...     tokenize=True,
        ...     return_dict=True,
        ...     return_tensors="pt",
        ... )
        >>> output = model.generate(**inputs, max_new_tokens=30)
        >>> processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_visual_tokens=num_visual_tokens,
            image_features=image_features,
            mm_encoder_outputs=mm_encoder_outputs,
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return DeltaLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


DeltaLlavaModel.register_for_auto_class("AutoModel")
DeltaLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["DeltaLlavaForConditionalGeneration", "DeltaLlavaModel", "DeltaLlavaPreTrainedModel"]
