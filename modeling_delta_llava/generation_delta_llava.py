"""Images in `generate`: any number per row, over beams, returned sequences and turns that continue from a cache."""

from itertools import accumulate, pairwise

import torch
from transformers import GenerationMixin
from transformers.generation import utils
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

# Keyword arguments with an entry per image.
IMAGE_INPUTS = ("pixel_values", "num_visual_tokens", "image_features", "mm_encoder_outputs")

# Releases without it leave images out of a prefill in chunks.
CHUNKS_ENCODED_IMAGES = hasattr(utils, "_slice_mm_encoder_output")


class DeltaLlavaGenerationMixin(GenerationMixin):
    """`generate` for models whose images belong to rows in groups, each with its own number of visual tokens."""

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """As `GenerationMixin.generate`, with images as `pixel_values` (and `num_visual_tokens`) or `image_features`.

        Raises:
            ValueError: if the prompt fills the language model's context, images are not in the prompt's order, or a
                chunked prefill would lose them.
        """
        prompt = next(
            (kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), inputs
        )
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        rope = getattr(self.config.text_config, "rope_parameters", None) or {}
        scaled = rope.get("rope_type", "default") != "default"  # reaches further than the trained positions
        if prompt is not None and context is not None and not scaled and prompt.shape[1] >= context:
            raise ValueError(
                f"The prompt has {prompt.shape[1]} tokens, visual tokens included, but the language model's context "
                f"is {context}: shorten it, or give images a smaller num_visual_tokens"
            )
        # A text-only call may say so with None.
        kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS or value is not None}
        images = self._pop_images(dict(kwargs))
        if prompt is not None:
            mask = self._image_token_mask(prompt)
            tokens_per_image = self._tokens_per_image(images)
            if sum(tokens_per_image) == mask.sum():
                self.model._check_images_stand_together(mask, tokens_per_image)
        settings = (args[0] if args else kwargs.get("generation_config")) or self.generation_config
        chunked = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if chunked and images and (not CHUNKS_ENCODED_IMAGES or "image_features" in images):
            reason = "given as image_features" if CHUNKS_ENCODED_IMAGES else "in this release of transformers"
            raise ValueError(f"prefill_chunk_size cannot be combined with images {reason}: leave it out")
        return super().generate(inputs, *args, **kwargs)

    def _image_token_mask(self, prompt: torch.Tensor) -> torch.BoolTensor:
        """Where image tokens stand `(batch, sequence)` in a prompt of ids or embeddings."""
        if prompt.is_floating_point():
            return self.model.get_placeholder_mask(None, prompt)
        return prompt == self.config.image_token_id

    @staticmethod
    def _pop_images(model_kwargs: dict) -> dict:
        """Take everything that has an entry per image out of `generate`'s keyword arguments."""
        images = {}
        for name in IMAGE_INPUTS:
            value = model_kwargs.pop(name, None)
            if value is not None and not (name == "mm_encoder_outputs" and value.get("image") is None):
                images[name] = value
        return images

    def _tokens_per_image(self, images: dict) -> list[int]:
        """Visual tokens of each image given to `generate`, in whichever form it came."""
        features = images.get("image_features", images.get("mm_encoder_outputs", {}).get("image"))
        if features is not None:
            return [len(tokens) for tokens in getattr(features, "pooler_output", features)]
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

    @staticmethod
    def _select_images(images: dict, order: list[int]) -> dict:
        """The same images in another order, some repeated or left out; None where no image is left."""

        def select(value):
            if isinstance(value, ModelOutput):
                return BaseModelOutputWithPooling(pooler_output=[value.pooler_output[image] for image in order])
            return value[order] if isinstance(value, torch.Tensor) else [value[image] for image in order]

        selected = {}
        for name, value in images.items():
            if isinstance(value, int):
                selected[name] = value
            elif name == "mm_encoder_outputs":
                selected[name] = {"image": select(value["image"])} if order else {}
            else:
                selected[name] = select(value) if order else None
        return selected

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        # Beams and returned sequences repeat rows (a, a, b, b). Images belong to rows, any number to each, so they are
        # repeated in groups: the stock expansion repeats them one by one, which shuffles several images per row.
        images = self._pop_images(model_kwargs)
        if expand_size > 1 and images:
            embeds = model_kwargs.get("inputs_embeds")
            mask = self._image_token_mask(input_ids if embeds is None else embeds)
            rows = self._images_of_rows(mask.sum(-1).tolist(), self._tokens_per_image(images))
            images = self._select_images(images, [image for row in rows for _ in range(expand_size) for image in row])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ):
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("num_visual_tokens", "image_features"):
                kwargs.pop(name, None)
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
        new_images = []
        for row, cached_tokens in zip(self._images_of_rows(placeholders, tokens_per_image), cached, strict=True):
            ends = accumulate(tokens_per_image[image] for image in row)
            new_images += [image for image, end in zip(row, ends, strict=True) if end > cached_tokens]
        return self._select_images(images, new_images)
