"""The Delta projector rearranged for inference: the same function with fewer operations.

Symbols as in `projector_delta_llava.py`; A channels of EMHSA, L of MHCA.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .linear_delta_llava import is_emulated, linear


def weight_versions(projector: nn.Module) -> tuple:
    """Identity, place, dtype and version of every weight: different after any change that PyTorch counts."""
    return tuple(
        (id(weight), weight.device, weight.dtype, 0 if weight.is_inference() else weight._version)
        for weight in projector.parameters()
    )


def fold_dtype(weight: torch.Tensor) -> torch.dtype:
    """What folded weights are kept and used in: fp32 where half precision is emulated, which is far slower."""
    return torch.float32 if is_emulated(weight.dtype, weight.device) else weight.dtype


def check_fusible(projector: nn.Module):
    """Raises `ValueError` with the reason when the weights are not plain tensors that can be folded."""
    reason = None
    if any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in projector.modules()):
        reason = "it is wrapped by a PEFT adapter: merge the adapter first (merge_and_unload)"
    elif any(weight.is_meta for weight in projector.parameters()):
        reason = "some of its weights are offloaded: load the model with the whole projector on one device"
    elif any(not weight.is_floating_point() for weight in projector.parameters()):
        reason = "its weights are quantised: keep the projector in 16 bit (llm_int8_skip_modules)"
    elif any(type(weight.data) is not torch.Tensor for weight in projector.parameters()):
        reason = "its weights are quantised or sharded: keep the projector out of both"
    elif len({weight.device for weight in projector.parameters()}) > 1:
        reason = "its weights lie on several devices: load the model with the whole projector on one device"
    if reason is not None:
        raise ValueError(f"The projector cannot be fused, {reason}. The unfused projector computes the same")


class FusedDeltaProjector(nn.Module):
    """What [`DeltaLlavaProjector`] computes, from folded copies of its weights.

    * The low-rank updates are added to their base weights; keys and values share one product over the memory stream.
    * The affine part of a LayerNorm is folded into the linear map behind it, the value bias (whose attention weights
      sum to one) into the next bias; the key bias, which no softmax depends on, is left out.
    * Keys keep their normalised form: each head's query is carried through the transposed key projection instead, V
      tokens in place of N. Values are averaged first and projected afterwards.
    * Attention output and `linear_1` become one map; on the full grid, where each window is one patch, the value
      projection joins them. The transformer block's last linear maps join the query's base weight.
    * Bilinear resizing by a whole factor is the mean of the patches at the centre of a window.

    `linear_2` is used as it is, or from a copy where folded weights have another dtype (see [`fold_dtype`]). All
    folded tensors are non-persistent buffers: they never enter a state dict.

    Args:
        projector: the projector, whose weights are read and not changed. Folding is done in fp64.
    """

    def __init__(self, projector: nn.Module):
        super().__init__()
        check_fusible(projector)
        weights = {name: weight.detach().to("cpu", torch.float64) for name, weight in projector.named_parameters()}
        self.device, self.dtype = projector.linear_1.weight.device, fold_dtype(projector.linear_1.weight)
        self.versions = weight_versions(projector)
        self.grid_size = projector.source_grid_size
        self.num_heads = projector.cross_attention.num_heads
        self.channels = projector.linear_1.in_features
        self.eps = projector.query_projection.norm.eps
        self.copies_last_linear = self.dtype != projector.linear_2.weight.dtype
        if self.copies_last_linear:
            self._fold("last_weight", weights["linear_2.weight"])
            self._fold("last_bias", weights["linear_2.bias"])
        query_weight = self._delta_weight(weights, "query_projection")
        constant = self._fold_block(projector.query_block, weights, query_weight)
        self._fold_attention(weights)
        for grid_size in (self.grid_size // s for s in range(2, self.grid_size + 1) if self.grid_size % s == 0):
            positions = projector.positions(grid_size, torch.device("cpu")).double()
            self._fold(f"positions_{grid_size}", (positions + constant) @ query_weight.T, torch.float32)

    def _fold(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None):
        self.register_buffer(name, tensor.to(self.device, dtype or self.dtype).contiguous(), persistent=False)

    @staticmethod
    def _delta_weight(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        weight = weights[f"{name}.base.weight"]
        if f"{name}.delta_u" in weights:
            weight = weight + (weights[f"{name}.delta_u"] @ weights[f"{name}.delta_v"]).T
        return weight

    def _fold_attention(self, weights: dict[str, torch.Tensor]):
        def projection(name: str, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
            """Input projection of the cross-attention with the affine part of the LayerNorm before it."""
            weight, bias = (weights[f"cross_attention.{name}.{part}"] for part in ("weight", "bias"))
            scale, shift = (weights[f"{norm}.norm.{part}"] for part in ("weight", "bias"))
            return weight * scale, bias + weight @ shift

        query_weight, query_bias = projection("q_proj", "query_projection")
        key_weight, _ = projection("k_proj", "key_projection")
        value_weight, value_bias = projection("v_proj", "value_projection")
        output_weight = weights["linear_1.weight"] @ weights["cross_attention.out_proj.weight"]  # [D, C]
        output_bias = weights["linear_1.weight"] @ weights["cross_attention.out_proj.bias"] + weights["linear_1.bias"]
        temperature = (self.channels // self.num_heads) ** -0.5
        memory = [self._delta_weight(weights, name) for name in ("key_projection", "value_projection")]
        self._fold("memory_weight", torch.cat(memory))  # [2C, M * C]
        self._fold("query_head_weight", query_weight * temperature)
        self._fold("query_head_bias", query_bias * temperature)
        self._fold("key_weight", key_weight.unflatten(0, (self.num_heads, -1)))  # [heads, C / heads, C]
        self._fold("value_weight", value_weight.unflatten(0, (self.num_heads, -1)).transpose(1, 2))
        self._fold("output_weight", output_weight)
        self._fold("full_grid_weight", output_weight @ value_weight)
        self._fold("output_bias", output_bias + output_weight @ value_bias)

    def _fold_block(self, block: nn.Module | None, weights: dict, query_weight: torch.Tensor) -> torch.Tensor | float:
        """Folds the transformer block; returns what it adds to every query before the query's base weight."""
        self.use_block, self.use_emhsa = block is not None, block is not None and block.use_emhsa
        if not self.use_block:
            self._fold("query_weight", query_weight)
            return 0.0
        weights = {name.removeprefix("query_block."): weight for name, weight in weights.items()}
        self.head_dim = block.local_mixer.conv.weight.shape[1]
        self.block_eps = block.local_mixer.norm.eps
        self._fold("input_weight", weights["input_proj.weight"])
        if self.use_emhsa:
            self.window = block.attention.window
            scale, shift = weights["attention.norm.weight"], weights["attention.norm.bias"]
            q, k, v, out = (weights[f"attention.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
            value_bias = weights["attention.v_proj.bias"] + v @ shift
            self._fold("emhsa_norm_weight", weights["attention_norm.weight"])
            self._fold("emhsa_norm_bias", weights["attention_norm.bias"])
            self._fold("emhsa_query_weight", q * scale)
            self._fold("emhsa_query_bias", weights["attention.q_proj.bias"] + q @ shift)
            self._fold("emhsa_memory_weight", torch.cat([k, v]) * scale)
            self._fold("emhsa_output_weight", out)
            self._fold("emhsa_output_bias", weights["attention.out_proj.bias"] + out @ value_bias)
        local, mixer = weights["local_proj.weight"], weights["local_mixer.out_proj.weight"]
        self._fold("local_weight", local)
        self._fold("conv_weight", weights["local_mixer.conv.weight"])
        self.conv_weight = self.conv_weight.to(memory_format=torch.channels_last)
        self._fold("mixer_norm_weight", weights["local_mixer.norm.weight"])
        self._fold("mixer_norm_bias", weights["local_mixer.norm.bias"])

        def of_branches(weight: torch.Tensor) -> torch.Tensor:
            """A map of [attended, local + mixed] as a map of [attended, mixer activations]."""
            attended, convolved = weight.split([local.shape[1], local.shape[0]], dim=1)
            return torch.cat([attended + convolved @ local, convolved @ mixer], dim=1)

        self._fold("mlp_weight", of_branches(weights["mlp.fc1.weight"]))
        self._fold("mlp_bias", weights["mlp.fc1.bias"])
        self._fold("query_weight", torch.cat([of_branches(query_weight), query_weight @ weights["mlp.fc2.weight"]], 1))
        return weights["mlp.fc2.bias"]

    def _resize(self, features: torch.Tensor, scale: int) -> torch.Tensor:
        """Bilinear resizing of `(B, N, C)` by 1 / `scale`: the centre patch of a window, or the mean of its four."""
        grid = features.unflatten(1, (self.grid_size // scale, scale, self.grid_size // scale, scale))
        first, last = (scale - 1) // 2, scale // 2
        if first == last:
            return grid[:, :, first, :, first].flatten(1, 2)
        rows = grid[:, :, first].float() + grid[:, :, last]  # [B, g, g, s, C]
        centres = (rows[:, :, :, first] + rows[:, :, :, last]) / 4
        return centres.flatten(1, 2).to(features.dtype)  # [B, V, C]

    def _emhsa(self, tokens: torch.Tensor) -> torch.Tensor:
        width = tokens.shape[-1:]
        normed = F.layer_norm(tokens, width, self.emhsa_norm_weight, self.emhsa_norm_bias, self.block_eps)
        queries = memory = F.layer_norm(normed, width, eps=self.block_eps)
        if 1 < self.window <= memory.shape[1]:
            memory = F.avg_pool1d(memory.transpose(1, 2), self.window).transpose(1, 2)
        queries = linear(queries, self.emhsa_query_weight, self.emhsa_query_bias)
        keys, values = linear(memory, self.emhsa_memory_weight).chunk(2, dim=-1)
        heads = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (queries, keys, values))
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # [B, V, A]
        return linear(attended, self.emhsa_output_weight, self.emhsa_output_bias)

    def _queries(self, features: torch.Tensor, scale: int) -> torch.Tensor:
        """Query tokens `(B * V, heads, C)`, carried to the space of the normalised keys."""
        grid_size = self.grid_size // scale
        tokens = self._resize(features, scale)
        if self.use_block:
            tokens = linear(tokens, self.input_weight)
            if self.use_emhsa:
                tokens = tokens + self._emhsa(tokens)
            local = linear(tokens, self.local_weight).unflatten(1, (grid_size, grid_size)).permute(0, 3, 1, 2)
            mixed = F.conv2d(local, self.conv_weight, padding=1, groups=local.shape[1] // self.head_dim)
            mixed = mixed.permute(0, 2, 3, 1).flatten(1, 2)  # [B, V, L]
            mixed = F.layer_norm(
                mixed, mixed.shape[-1:], self.mixer_norm_weight, self.mixer_norm_bias, self.block_eps
            ).relu()
            tokens = torch.cat([tokens, mixed], dim=-1)
            tokens = torch.cat([tokens, linear(tokens, self.mlp_weight, self.mlp_bias).relu()], dim=-1)
        queries = linear(tokens, self.query_weight) + self.get_buffer(f"positions_{grid_size}")
        queries = F.layer_norm(F.gelu(queries), (self.channels,), eps=self.eps).to(self.query_head_weight.dtype)
        queries = linear(queries, self.query_head_weight, self.query_head_bias).view(-1, *self.key_weight.shape[:2])
        return torch.bmm(queries.transpose(0, 1), self.key_weight).transpose(0, 1)

    def forward(
        self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int, last_linear: nn.Linear
    ) -> torch.Tensor:
        """Visual tokens `(B, V, D)`; arguments as [`DeltaLlavaProjector.forward`], and its `linear_2`."""
        hidden = self._hidden(query_features.to(self.dtype), memory_features.to(self.dtype), scale)
        last = (
            (self.last_weight, self.last_bias) if self.copies_last_linear else (last_linear.weight, last_linear.bias)
        )
        return linear(F.gelu(hidden), *last).to(query_features.dtype)

    def _hidden(self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int) -> torch.Tensor:
        """The output of `linear_1`, `(B, V, D)`."""
        batch_size, C, side = memory_features.shape[0], self.channels, self.grid_size // scale
        if scale == 1:
            values = F.gelu(linear(memory_features, self.memory_weight[C:]))
            return linear(F.layer_norm(values, (C,), eps=self.eps), self.full_grid_weight, self.output_bias)
        memory = F.gelu(linear(memory_features, self.memory_weight)).unflatten(-1, (2, C))
        memory = F.layer_norm(memory, (C,), eps=self.eps)
        memory = memory.view(batch_size, side, scale, side, scale, 2, C).permute(5, 0, 1, 3, 2, 4, 6)
        keys, values = memory.reshape(2, batch_size * side**2, 1, scale**2, C)
        queries = self._queries(query_features, scale).unsqueeze(1)  # [B * V, 1, heads, C]
        pooled = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[:, 0]  # [B * V, heads, C]
        attended = torch.bmm(pooled.transpose(0, 1), self.value_weight).transpose(0, 1)
        return linear(attended.reshape(batch_size, side**2, C), self.output_weight, self.output_bias)
