"""Delta-LLaVA (Zamini and Shukla, WACV 2026, arXiv 2512.18910): LLaVA-1.5 with a token-reducing projector.

Vision tower -> Delta projector (`projector_delta_llava.py`) -> language model. Symbols: B images, N = H x W patches,
V visual tokens per image, C channels of the tower, M memory layers, D the language model's width.
"""

import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_delta_llava import DeltaLlavaConfig, image_budgets, require_transformers
from .projector_delta_llava import DeltaLlavaProjection, DeltaLlavaProjector, DeltaLlavaUniformLinear

logger = logging.get_logger(__name__)

# transformers 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs. Both names are taken here, and
# what is passed on has the running release's.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# Keyword arguments of `generate` with an entry per image.
IMAGE_INPUTS = ("pixel_values", "num_visual_tokens", "mm_encoder_outputs")


def cache_argument(past_key_values: Cache | None, cache: Cache | None) -> dict[str, Cache]:
    """A cache that was given under either name, under the running release's; an error if under both."""
    if past_key_values is not None and cache is not None:
        raise ValueError(f"past_key_values and cache name the same thing: give {CACHE_NAME} alone")
    given = past_key_values if cache is None else cache
    return {} if given is None else {CACHE_NAME: given}


@dataclass
class DeltaLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`DeltaLlavaModel`]; `image_hidden_states` are the visual tokens `(sum of V, D)` of all images."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class DeltaLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`DeltaLlavaForConditionalGeneration`]; `image_hidden_states` as in the base model's output."""

    image_hidden_states: torch.FloatTensor | None = None


class DeltaLlavaPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the capabilities that transformers asks a model about."""

    config: DeltaLlavaConfig
    config_class = DeltaLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    model_tags = ["delta-llava", "multimodal", "visual-token-compression", "arxiv:2512.18910"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltaLlavaProjector"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DeltaLlavaUniformLinear):
            init.uniform_(module.weight, -module.bound, module.bound)
            if module.bias is not None:
                init.uniform_(module.bias, -module.bias_bound, module.bias_bound)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, DeltaLlavaProjection):
            if module.rank > 0:
                init.xavier_uniform_(module.delta_u)
                init.xavier_uniform_(module.delta_v)
        else:
            super()._init_weights(module)

    def load_adapter(self, *args, **kwargs):
        """As `PreTrainedModel.load_adapter`; an error where transformers leaves out the projector that comes along."""
        loaded = super().load_adapter(*args, **kwargs)
        if any(".modules_to_save." in name for name in loaded.missing_keys):
            require_transformers("5.18", "An adapter with a trained projector")
        return loaded


class DeltaLlavaModel(DeltaLlavaPreTrainedModel):
    """Vision tower, Delta projector and language model, without a language-model head."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        # The tower is built as deep as it is read, around the config's own object, which transformers knows it by. A
        # checkpoint may hold the layers above, and SigLIP's pooling head.
        vision_config, depth = config.vision_config, config.vision_config.num_hidden_layers
        unread = "|".join(map(str, range(config.num_tower_layers, depth))) or "none"
        self._keys_to_ignore_on_load_unexpected = [rf"vision_tower\.(.*\blayers?\.({unread})|(vision_model\.)?head)\."]
        vision_config.num_hidden_layers = config.num_tower_layers
        try:
            self.vision_tower = AutoModel.from_config(vision_config)
        finally:
            vision_config.num_hidden_layers = depth
        self.multi_modal_projector = DeltaLlavaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def generate(self, *args, **kwargs):
        raise TypeError(
            "DeltaLlavaModel has no language-model head and cannot generate: load the checkpoint with "
            "AutoModelForImageTextToText.from_pretrained"
        )

    def check_budgets(self, num_visual_tokens, num_images: int) -> int | list[int]:
        """[`image_budgets`] of a call, by default the config's; warns of those the checkpoint was not trained at."""
        asked = self.config.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        budgets = image_budgets(asked, num_images, self.config.grid_size)
        trained = self.config.trained_num_visual_tokens
        for budget in dict.fromkeys(budgets if isinstance(budgets, list) else [budgets]):
            if trained and budget not in trained and not torch.compiler.is_compiling():
                logger.warning_once(
                    f"Running at {budget} visual tokens per image; this checkpoint was trained at {trained}. "
                    "The model computes at every legal budget, but quality is only known at trained ones."
                )
        return budgets

    def get_patch_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor, BaseModelOutputWithPooling]:
        """Query stream `(B, N, C)`, memory stream `(B, N, M * C)`, and the tower's output."""
        config = self.config
        outputs = self.vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        dtype = self.multi_modal_projector.query_projection.norm.weight.dtype
        # Layers of a tower that is spread over devices meet on the last one's.
        device = outputs.hidden_states[-1].device
        first_patch = 1 if config.vision_feature_select_strategy == "default" else 0

        def patches(layer: int) -> torch.Tensor:
            return outputs.hidden_states[config.hidden_state_index(layer)][:, first_patch:].to(device, dtype)

        query_features = patches(config.query_feature_layer)
        if query_features.shape[1] != config.num_patches:
            raise ValueError(
                f"The vision tower gave {query_features.shape[1]} patch tokens per image, but its config describes a "
                f"{config.grid_size} x {config.grid_size} grid of {config.num_patches}: check image_size, patch_size "
                f"and vision_feature_select_strategy={config.vision_feature_select_strategy!r}"
            )
        memory_features = torch.cat([patches(layer) for layer in config.memory_feature_layers], dim=-1)
        return query_features, memory_features, outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        num_visual_tokens: int | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Visual tokens of images, to be reused over turns and questions as `mm_encoder_outputs={"image": output}`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`).
            num_visual_tokens (`int`, `list[int]` or `torch.LongTensor` of shape `(images,)`, *optional*):
                Budget of all images or of each; defaults to the config's. `torch.compile(fullgraph=True)` takes
                integers: it does not know what a tensor holds.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` holds a `(V, D)` tensor for each image, as one tensor
            `(images, V, D)` where all have one budget and as a list otherwise; `last_hidden_state` is the query
            stream `(images, N, C)`; `hidden_states` and `attentions` are the tower's, when asked for.
        """
        if pixel_values.shape[0] == 0:
            return BaseModelOutputWithPooling(pooler_output=[])
        budgets = self.check_budgets(num_visual_tokens, pixel_values.shape[0])
        query_features, memory_features, outputs = self.get_patch_features(pixel_values, **kwargs)
        scale_factor = self.config.scale_factor
        scales = scale_factor(budgets) if isinstance(budgets, int) else [scale_factor(budget) for budget in budgets]
        return BaseModelOutputWithPooling(
            last_hidden_state=query_features,
            pooler_output=self.multi_modal_projector(query_features, memory_features, scales),
            hidden_states=outputs.hidden_states if kwargs.get("output_hidden_states") else None,
            attentions=outputs.attentions,
        )

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
        # Compiled code cannot look at values without falling apart into several graphs; `generate` has looked before.
        if image_features is not None and not torch.compiler.is_compiling():
            counts, num_image_tokens = [tokens.shape[0] for tokens in image_features], int(mask.sum())
            if num_image_tokens != sum(counts):
                raise ValueError(
                    f"Image tokens and image features do not match: the prompt holds {num_image_tokens} image tokens, "
                    f"but {len(counts)} image(s) gave {sum(counts)} visual tokens (budget "
                    f"{', '.join(map(str, dict.fromkeys(counts)))}; the config's is {self.config.num_visual_tokens}). "
                    "Give processor and model the same num_visual_tokens, one image for every placeholder, and do not "
                    "truncate prompts inside an image"
                )
        return mask

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
            mm_encoder_outputs (`dict`): `{"image": output of get_image_features}`, instead of `pixel_values`.
            past_key_values, cache (`Cache`): keys and values of the sequence so far, under either name.

        Raises:
            ValueError: if image tokens and visual tokens do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        cached = cache_argument(past_key_values, cache)

        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if images is not None:
                raise ValueError("Give images once: as pixel_values or as mm_encoder_outputs")
            images = self.get_image_features(pixel_values, num_visual_tokens, return_dict=True)
        visual_tokens = None
        if images is not None and len(images.pooler_output) > 0:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, images.pooler_output)
            visual_tokens = torch.cat([tokens.to(inputs_embeds) for tokens in images.pooler_output])  # [sum of V, D]
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), visual_tokens)
        elif input_ids is not None and not cached:
            self.get_placeholder_mask(input_ids, inputs_embeds, [])  # no image was forgotten

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **cached,
            **kwargs,
        )
        return DeltaLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


class DeltaLlavaForConditionalGeneration(DeltaLlavaPreTrainedModel, GenerationMixin):
    """Delta-LLaVA with a language-model head: image-text-to-text generation and training."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        self.model = DeltaLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        num_visual_tokens: int | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Visual tokens of images; see [`DeltaLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, num_visual_tokens, **kwargs)

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DeltaLlavaCausalLMOutputWithPast:
        """
        Args, besides those of [`DeltaLlavaModel.forward`]:
            labels (`torch.LongTensor` of shape `(batch, sequence)`): ids to predict, -100 where nothing is learned.
            logits_to_keep (`int` or `torch.Tensor`): logits of the last positions only (0: all), or of these.
            mm_token_type_ids (`torch.LongTensor`): accepted as the processor may give it, and not needed.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_visual_tokens=num_visual_tokens,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        text_config = self.config.text_config
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        # What some language models (Gemma 2, Granite, Cohere) do behind their head.
        if (softcap := getattr(text_config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(text_config, "logit_scale", None)) is not None:
            logits = logits * factor

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        return DeltaLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """As `GenerationMixin.generate`, with images as `pixel_values` (and `num_visual_tokens`), or encoded before as
        `mm_encoder_outputs={"image": features}`.

        Raises:
            ValueError: if the prompt fills the language model's context, images do not match the prompt, or this
                release of transformers would lose them.
        """
        prompts = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), inputs)
        prompt = next((given for given in prompts if given is not None), None)
        self._check_context(prompt)
        kwargs |= cache_argument(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        # A text-only call may say so with None.
        kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS or value is not None}
        if (features := kwargs.get("mm_encoder_outputs", {}).get("image")) is not None:
            # A copy: for beams, transformers repeats the features in the output it is given.
            kwargs["mm_encoder_outputs"] = {"image": copy.copy(features)}
        tokens_per_image = self._tokens_per_image(kwargs)
        if tokens_per_image and not isinstance(kwargs.get("num_visual_tokens", 0), (int, torch.Tensor)):
            kwargs["num_visual_tokens"] = torch.tensor(tokens_per_image)  # transformers repeats tensors for beams

        settings = (args[0] if args else kwargs.get("generation_config")) or self.generation_config

        def setting(name: str):
            return kwargs.get(name, getattr(settings, name, None))

        if prompt is not None and not (setting("is_assistant") and not tokens_per_image):  # drafts may see no image
            mask = self.model.get_placeholder_mask(None if prompt.is_floating_point() else prompt, prompt)
            # A continued turn may bring the new images alone.
            if CACHE_NAME not in kwargs or mask.sum() == sum(tokens_per_image):
                images_of_rows = self._images_of_rows(mask.sum(-1).tolist(), tokens_per_image)
                expanded = max(setting("num_beams") or 1, setting("num_return_sequences") or 1) > 1
                if expanded and any(images_of_rows) and ("mm_encoder_outputs" in kwargs or set(images_of_rows) != {1}):
                    require_transformers("5.19", "Several sequences from a prompt without exactly one image")
            if tokens_per_image and setting("prefill_chunk_size"):
                require_transformers("5.23", "prefill_chunk_size with images")
        return super().generate(inputs, *args, **kwargs)

    def _check_context(self, prompt: torch.Tensor | None):
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        rope = getattr(self.config.text_config, "rope_parameters", None) or {}
        scaled = rope.get("rope_type", "default") != "default"  # reaches further than the trained positions
        if prompt is not None and context is not None and not scaled and prompt.shape[1] >= context:
            raise ValueError(
                f"The prompt has {prompt.shape[1]} tokens, visual tokens included, but the language model's context "
                f"is {context}: shorten it, or give images a smaller num_visual_tokens"
            )

    def _tokens_per_image(self, model_kwargs: dict) -> list[int]:
        """Visual tokens of each image given to `generate`, in whichever form it came."""
        if (features := (model_kwargs.get("mm_encoder_outputs") or {}).get("image")) is not None:
            return [len(tokens) for tokens in features.pooler_output]
        if model_kwargs.get("pixel_values") is None:
            return []
        num_images = len(model_kwargs["pixel_values"])
        budgets = self.model.check_budgets(model_kwargs.get("num_visual_tokens"), num_images)
        return budgets if isinstance(budgets, list) else [budgets] * num_images

    @staticmethod
    def _images_of_rows(placeholders: list[int], tokens_per_image: list[int]) -> list[int]:
        """How many images each row of a batch holds, from the rows' numbers of image tokens.

        Raises:
            ValueError: if an image would straddle two rows, or images and image tokens do not add up.
        """
        image_ends, row_ends = list(accumulate(tokens_per_image, initial=0)), list(accumulate(placeholders, initial=0))
        if image_ends[-1] != row_ends[-1] or not set(row_ends) <= set(image_ends):
            raise ValueError(
                f"Image tokens and image features do not match: images of {tokens_per_image} visual tokens do not "
                f"fill the {placeholders} image tokens of the prompts row by row; give every placeholder its image"
            )
        images_until = [image_ends.index(end) for end in row_ends]
        return [end - start for start, end in pairwise(images_until)]

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS}
        elif next_sequence_length is not None and next_sequence_length < input_ids.shape[1]:
            self._drop_cached_images(input_ids, next_sequence_length, kwargs)
        kwargs |= {"next_sequence_length": next_sequence_length, "is_first_iteration": is_first_iteration}
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _drop_cached_images(self, input_ids: torch.LongTensor, next_sequence_length: int, kwargs: dict):
        """Takes out of `kwargs` the images of a continued conversation that are in the cache already.

        A second turn may come with all images of the conversation, or with the new ones only.
        """
        mask, tokens_per_image = input_ids == self.config.image_token_id, self._tokens_per_image(kwargs)
        if not tokens_per_image or sum(tokens_per_image) != mask.sum():
            return
        last_token = torch.tensor(tokens_per_image, device=mask.device).cumsum(0) - 1  # of each image, among all
        new = mask.nonzero()[last_token, 1] >= input_ids.shape[1] - next_sequence_length  # [images]
        new = new.nonzero().flatten().tolist()
        if features := (kwargs.get("mm_encoder_outputs") or {}).get("image"):
            kept = BaseModelOutputWithPooling(pooler_output=[features.pooler_output[image] for image in new])
            kwargs["mm_encoder_outputs"] = {"image": kept} if new else {}
        for name in ("pixel_values", "num_visual_tokens"):
            if isinstance(value := kwargs.get(name), torch.Tensor) and value.ndim:
                kwargs[name] = value[new] if new else None


DeltaLlavaModel.register_for_auto_class("AutoModel")
DeltaLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["DeltaLlavaForConditionalGeneration", "DeltaLlavaModel", "DeltaLlavaPreTrainedModel"]
