"""Images in `generate`: any number per row, and turns that continue from a cache."""

from itertools import accumulate, pairwise

import torch
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from .configuration_delta_llava import require_transformers

# transformers 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs. Both names are taken here, and
# what is passed on has the running release's.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# Keyword arguments with an entry per image.
IMAGE_INPUTS = ("pixel_values", "num_visual_tokens", "mm_encoder_outputs")


def cache_argument(past_key_values: Cache | None, cache: Cache | None) -> dict[str, Cache]:
    """A cache that was given under either name, under the running release's; nothing where none was given.

    Raises:
        ValueError: if it was given under both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(f"past_key_values and cache name the same thing: give {CACHE_NAME} alone")
    given = past_key_values if cache is None else cache
    return {} if given is None else {CACHE_NAME: given}


class DeltaLlavaGenerationMixin(GenerationMixin):
    """`generate` for models whose images belong to rows in groups, each with its own number of visual tokens."""

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """As `GenerationMixin.generate`, with images as `pixel_values` (and `num_visual_tokens`) or `image_features`.

        Raises:
            ValueError: if the prompt fills the language model's context, images do not match the prompt, or this
                release of transformers would lose them.
        """
        prompt = next(
            (kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), inputs
        )
        self._check_context(prompt)
        kwargs |= cache_argument(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if (features := kwargs.pop("image_features", None)) is not None:
            # A new output around them: for beams, transformers repeats the features in the output it is given.
            features = list(getattr(features, "pooler_output", features))
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        if isinstance(kwargs.get("num_visual_tokens"), list):
            kwargs["num_visual_tokens"] = torch.tensor(kwargs["num_visual_tokens"])
        # A text-only call may say so with None.
        kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS or value is not None}

        images = self._pop_images(dict(kwargs))
        tokens_per_image = self._tokens_per_image(images)
        if tokens_per_image and prompt is not None:
            settings = (args[0] if args else kwargs.get("generation_config")) or self.generation_config

            def setting(name: str):
                return kwargs.get(name, getattr(settings, name, None))

            mask = self._image_token_mask(prompt)
            # A continued turn may bring the new images alone.
            if CACHE_NAME not in kwargs or mask.sum() == sum(tokens_per_image):
                rows = self._images_of_rows(mask.sum(-1).tolist(), tokens_per_image)
                self.model._check_images_stand_together(mask, tokens_per_image)
                expanded = max(setting("num_beams") or 1, setting("num_return_sequences") or 1) > 1
                if expanded and ("mm_encoder_outputs" in images or any(len(row) != 1 for row in rows)):
                    require_transformers("5.19", "Several sequences from a prompt without exactly one image")
            if setting("prefill_chunk_size"):
                require_transformers("5.23", "prefill_chunk_size with images")
        return super().generate(inputs, *args, **kwargs)

    def _check_context(self, prompt: torch.Tensor | None):
        text_config = self.config.text_config
        context = getattr(text_config, "max_position_embeddings", None)
        rope = getattr(text_config, "rope_parameters", None) or {}
        scaled = rope.get("rope_type", "default") != "default"  # reaches further than the trained positions
        if prompt is not None and context is not None and not scaled and prompt.shape[1] >= context:
            raise ValueError(
                f"The prompt has {prompt.shape[1]} tokens, visual tokens included, but the language model's context "
                f"is {context}: shorten it, or give images a smaller num_visual_tokens"
            )

    def _image_token_mask(self, prompt: torch.Tensor) -> torch.BoolTensor:
        """Where image tokens stand `(batch, sequence)` in a prompt of ids or embeddings."""
        if prompt.is_floating_point():
            return self.model.get_placeholder_mask(None, prompt)
        return prompt == self.config.image_token_id

    @staticmethod
    def _pop_images(model_kwargs: dict) -> dict:
        """Take everything that has an entry per image out of `generate`'s keyword arguments."""
        images = {name: model_kwargs.pop(name, None) for name in IMAGE_INPUTS}
        if not (images["mm_encoder_outputs"] or {}).get("image"):
            del images["mm_encoder_outputs"]
        return {name: value for name, value in images.items() if value is not None}

    def _tokens_per_image(self, images: dict) -> list[int]:
        """Visual tokens of each image given to `generate`, in whichever form it came."""
        if "mm_encoder_outputs" in images:
            return [len(tokens) for tokens in images["mm_encoder_outputs"]["image"].pooler_output]
        if "pixel_values" not in images:
            return []
        return self.model._budgets(images.get("num_visual_tokens"), len(images["pixel_values"]))

    @staticmethod
    def _images_of_rows(placeholders: list[int], tokens_per_image: list[int]) -> list[list[int]]:
        """Which images each row of a batch holds, from the rows' numbers of image tokens.

        Raises:
            ValueError: if an image would straddle two rows, or images and image tokens do not add up.
        """
        image_ends, row_ends = list(accumulate(tokens_per_image, initial=0)), list(accumulate(placeholders))
        if image_ends[-1] != row_ends[-1] or not set(row_ends) <= set(image_ends):
            raise ValueError(
                f"Image tokens and image features do not match: images of {tokens_per_image} visual tokens do not "
                f"fill the {placeholders} image tokens of the prompts row by row; give every placeholder its image"
            )
        return [list(range(start, end)) for start, end in pairwise([0, *(image_ends.index(end) for end in row_ends)])]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ):
        if not is_first_iteration and kwargs.get("use_cache", True):
            self._pop_images(kwargs)
        elif next_sequence_length is not None and next_sequence_length < input_ids.shape[1]:
            kwargs.update(self._images_behind_cache(input_ids, next_sequence_length, self._pop_images(kwargs)))
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _images_behind_cache(self, input_ids: torch.LongTensor, next_sequence_length: int, images: dict) -> dict:
        """The images that a continued conversation has not cached yet.

        A second turn may come with all images of the conversation, or with the new ones only.
        """
        mask = self._image_token_mask(input_ids)
        tokens_per_image = self._tokens_per_image(images)
        if not images or sum(tokens_per_image) != mask.sum():
            return images
        placeholders, cached = mask.sum(-1).tolist(), mask[:, :-next_sequence_length].sum(-1).tolist()
        new = []
        for row, cached_tokens in zip(self._images_of_rows(placeholders, tokens_per_image), cached, strict=True):
            ends = accumulate(tokens_per_image[image] for image in row)
            new += [image for image, end in zip(row, ends, strict=True) if end > cached_tokens]
        if not new:
            return {}
        if "mm_encoder_outputs" in images:
            features = images["mm_encoder_outputs"]["image"].pooler_output
            features = BaseModelOutputWithPooling(pooler_output=[features[image] for image in new])
            return {"mm_encoder_outputs": {"image": features}}
        return {name: value if isinstance(value, int) else value[new] for name, value in images.items()}
