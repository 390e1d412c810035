"""Delta-LLaVA (Zamini and Shukla, WACV 2026, arXiv 2512.18910): LLaVA-1.5 with a token-reducing projector.

Vision tower -> Delta projector (`projector_delta_llava.py`) -> language model. Symbols: B images, N = H x W patches,
V visual tokens per image, C channels of the tower, M memory layers, D the language model's width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .card_delta_llava import HubCardMixin
from .configuration_delta_llava import DeltaLlavaConfig
from .fusion_delta_llava import check_fusible
from .generation_delta_llava import CACHE_NAME, DeltaLlavaGenerationMixin, cache_argument
from .projector_delta_llava import DeltaLlavaProjector, DeltaProjection, UniformLinear

logger = logging.get_logger(__name__)

# Towers whose layers can be run one by one, so that those above the highest layer in use are never computed.
LAYERWISE_TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass
class DeltaLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`DeltaLlavaModel`]; `image_hidden_states` are the visual tokens `(sum of V, D)` of all images."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class DeltaLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`DeltaLlavaForConditionalGeneration`]; `image_hidden_states` are the visual tokens of all images,
    `(sum of V, D)`.
    """

    image_hidden_states: torch.FloatTensor | None = None


class DeltaLlavaPreTrainedModel(HubCardMixin, PreTrainedModel):
    """Weight initialisation and the capabilities that transformers asks a model about."""

    config: DeltaLlavaConfig
    config_class = DeltaLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltaLlavaProjector"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
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
        `train()`, a move to another device or dtype, and any change to a weight that PyTorch counts, drop the folded
        copy. Changes through `.data` (as when an adapter is merged) are not counted, nor are changes in place once the
        model is compiled: call `fuse_projector` again after them, and after loading.

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
        elif isinstance(num_visual_tokens, list) and all(isinstance(budget, int) for budget in num_visual_tokens):
            budgets = num_visual_tokens
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
                Budget of all images or of each; defaults to the config's. `torch.compile(fullgraph=True)` takes
                integers: what a tensor holds, and with it the number of tokens, is unknown to it.

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
        lengths = torch.tensor(counts, dtype=torch.long, device=mask.device)
        ends = lengths.cumsum(0)
        first, last = positions[ends - lengths], positions[ends - 1]
        torn = (last[:, 0] != first[:, 0]) | (last[:, 1] - first[:, 1] != lengths - 1)
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
        cache: Cache | None = None,
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
            past_key_values, cache (`Cache`): keys and values of the sequence so far, under either name.

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
        elif self.training and past_key_values is None and cache is None:
            inputs_embeds = inputs_embeds + self._touch_projector(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **cache_argument(past_key_values, cache),
            **kwargs,
        )
        return DeltaLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _touch_projector(self, inputs_embeds: torch.Tensor) -> torch.Tensor | float:
        """Zeros `(B, S, D)` that depend on every projector weight: a text-only batch gives all of them a gradient.

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
        # Zeroed before the gradient is summed over all positions: that sum may overflow in fp16.
        return 0.0 * visual_tokens[0].to(inputs_embeds).expand_as(inputs_embeds)


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
        cache: Cache | None = None,
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
            cache=cache,
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


DeltaLlavaModel.register_for_auto_class("AutoModel")
DeltaLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["DeltaLlavaForConditionalGeneration", "DeltaLlavaModel", "DeltaLlavaPreTrainedModel"]
