"""Processor of Delta-LLaVA: chat template, placeholder expansion, pixels, and each image's visual-token budget."""

import numpy as np
from PIL import Image
from transformers.image_utils import ImageInput, is_valid_image, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .configuration_delta_llava import require_transformers, scale_factor

logger = logging.get_logger(__name__)

# Beyond this ratio of its sides, resizing the shorter side of an unpadded image costs gigabytes.
MAX_ASPECT_RATIO = 200
# A square of this many pixels takes half a gigabyte while it is prepared. It is also Pillow's own limit for a file.
MAX_PIXELS = 89_478_485


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):
    """`num_visual_tokens`: one budget for all images, or one for each in the order of their placeholders."""

    num_visual_tokens: int | list[int] | None


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DeltaLlavaImagesKwargs
    _defaults = {"text_kwargs": {"padding": False}}


def to_eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 16-bit grey values (PIL modes `I;16` and `I`) scaled to 8 bits; PIL itself clips them to white.

    Raises:
        ValueError: for floating-point pictures, and for integers outside 0 to 65535.
    """
    if image.mode == "F":
        raise ValueError("PIL mode 'F' has no defined white: convert it to 8 bits first")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 0xFFFF:
        raise ValueError(f"PIL mode {image.mode!r} with values outside 0 to 65535: convert it to 8 bits first")
    return Image.fromarray((pixels // 256).astype(np.uint8))


def leaves(images) -> list:
    """The single images of a possibly nested list."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [leaf for nested in images for leaf in leaves(nested)]


def checked_image(image: ImageInput, position: int, padded: bool) -> ImageInput:
    """The image, decoded and in at most 8 bits per channel.

    Raises:
        ValueError: names the image by its position when it is truncated, too elongated or not convertible.
    """
    if isinstance(image, Image.Image):
        try:
            image.load()
            if getattr(image, "n_frames", 1) > 1:
                logger.warning_once("An animated image was given: its current frame is used.")
            image = to_eight_bits(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"Image {position} cannot be read: {error}") from error
        sides = image.size
    else:
        sides = sorted(image.shape)[-2:]  # channels come first or last, and are the smallest axis
    long, short = max(sides), min(sides)
    if padded and long**2 > MAX_PIXELS:
        raise ValueError(
            f"Image {position} is {sides[0]} x {sides[1]}: padded to a square it would have {long**2:,} pixels, more "
            f"than {MAX_PIXELS:,}; crop or shrink it"
        )
    if not padded and long > MAX_ASPECT_RATIO * short:
        raise ValueError(
            f"Image {position} is {sides[0]} x {sides[1]}: without padding, sides may differ by a factor of "
            f"{MAX_ASPECT_RATIO} at most; crop it, or process it with do_pad=True"
        )
    return image


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Turns text with image placeholders, and images, into model inputs.

    Every placeholder becomes as many image tokens as its image has visual tokens. A budget can be asked for per call,
    for all images or for each: `processor(images=[thumbnail, page], text=..., num_visual_tokens=[16, 576])`, or
    `apply_chat_template(..., processor_kwargs={"num_visual_tokens": 36})`; the output then holds `num_visual_tokens`
    of shape `(images,)` for the model.

    Args:
        image_processor: transformers' LLaVA image processor (or CLIP's, or SigLIP's).
        tokenizer: the language model's tokenizer, with the image token in its vocabulary.
        num_visual_tokens (`int`, *optional*, defaults to 144): budget when a call does not ask for one.
        grid_size (`int`, *optional*, defaults to 24): patches along one side of an image.
        chat_template (`str`, *optional*): Jinja template of conversations.
        image_token (`str`, *optional*, defaults to `"<image>"`): the placeholder.
    """

    valid_processor_kwargs = DeltaLlavaProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_visual_tokens: int = 144,
        grid_size: int = 24,
        chat_template: str | None = None,
        image_token: str = "<image>",
        **kwargs,
    ):
        scale_factor(num_visual_tokens, grid_size)
        self.num_visual_tokens = num_visual_tokens
        self.grid_size = grid_size
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer has no token {image_token!r}: add it, or name the image token it has")
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def _budgets(self, num_visual_tokens: int | list[int] | None, num_images: int) -> list[int]:
        """One checked budget per image."""
        if num_visual_tokens is None:
            num_visual_tokens = self.num_visual_tokens
        budgets = [num_visual_tokens] * num_images if isinstance(num_visual_tokens, int) else list(num_visual_tokens)
        if len(budgets) != num_images:
            raise ValueError(
                f"num_visual_tokens has {len(budgets)} entries for {num_images} images: give one per image"
            )
        for budget in dict.fromkeys([*budgets, num_visual_tokens] if isinstance(num_visual_tokens, int) else budgets):
            scale_factor(budget, self.grid_size)
        return budgets

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As `ProcessorMixin.__call__`; prompts that start with BOS, as rendered templates do, get no second one."""
        samples = [text] if isinstance(text, str) else text
        if isinstance(samples, (list, tuple)) and samples and self._adds_bos(kwargs):
            written = [isinstance(sample, str) and sample.startswith(self.tokenizer.bos_token) for sample in samples]
            if any(written):
                if not all(written):
                    raise ValueError(
                        f"Some prompts start with {self.tokenizer.bos_token} and some do not: use one form"
                    )
                kwargs["add_special_tokens"] = False
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _adds_bos(self, kwargs: dict) -> bool:
        """Whether the tokenizer is about to put BOS in front of a prompt."""
        if self.tokenizer.bos_token is None or not self._asks_for(kwargs, "text_kwargs", "add_special_tokens", True):
            return False
        return self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None and not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text must be a string or a list of strings, not {type(text).__name__}")
        for position, image in enumerate(leaves(images) if images is not None else ()):
            if not isinstance(image, str) and not is_valid_image(image):
                raise TypeError(
                    f"Image {position} is a {type(image).__name__}: give a PIL image, an array, a path or an address"
                )
        if (
            text is not None
            and isinstance(images, (list, tuple))
            and any(isinstance(row, (list, tuple)) for row in images)
        ):
            self._check_rows([text] if isinstance(text, str) else text, images)
        images, text, videos, audio = super().prepare_inputs_layout(
            images=images, text=text, videos=videos, audio=audio, **kwargs
        )
        if images is not None:
            padded = self._asks_for(kwargs, "images_kwargs", "do_pad", getattr(self.image_processor, "do_pad", False))
            flat = make_flat_list_of_images(images) if leaves(images) else []
            images = [checked_image(image, position, padded) for position, image in enumerate(flat)] or None
        return images, text, videos, audio

    def _check_rows(self, samples: list[str], images: list):
        """Raises `ValueError` when nested images do not belong to the prompts they are given with."""
        if len(images) != len(samples):
            raise ValueError(
                f"There are {len(samples)} prompts but {len(images)} lists of images: give one per prompt"
            )
        for row, (sample, given) in enumerate(zip(samples, images, strict=True)):
            placeholders = sample.count(self.image_token) if isinstance(sample, str) else 0
            if placeholders != len(leaves(given)):
                raise ValueError(
                    f"Prompt {row} holds {placeholders} {self.image_token} placeholders but {len(leaves(given))} "
                    f"images were given with it: the number of {self.image_token} tokens in the prompts should be the "
                    "same as the number of images"
                )

    @staticmethod
    def _asks_for(kwargs: dict, modality: str, name: str, default):
        """A keyword of this call, given flat or inside the modality's dictionary."""
        return kwargs.get(name, (kwargs.get(modality) or {}).get(name, default))

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None:
            samples = [text] if isinstance(text, str) else text
            if not all(isinstance(sample, str) for sample in samples):
                raise ValueError("text must be a string or a list of strings")
            if any(not sample.strip() for sample in samples):
                raise ValueError("The prompt is empty: give it a question, or an image placeholder")
            placeholders = [sample.count(self.image_token) for sample in samples]
            num_images = 0 if images is None else len(images)
            if sum(placeholders) != num_images:
                raise ValueError(
                    f"The prompts hold {sum(placeholders)} {self.image_token} placeholders ({placeholders} per "
                    f"prompt), but {num_images} images were given: the number of {self.image_token} tokens in the "
                    "prompts should be the same as the number of images"
                )
        if (budget := self._asks_for(kwargs, "images_kwargs", "num_visual_tokens", None)) is not None:
            self._budgets(budget, 0 if images is None else len(images))
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images: ImageInput, num_visual_tokens: int | list[int] | None = None, **kwargs):
        budgets = self._budgets(num_visual_tokens, len(images))
        processed = self.image_processor(images, **kwargs)
        replacements = [self.image_token * budget for budget in budgets]
        if num_visual_tokens is not None:
            processed["num_visual_tokens"] = budgets
        return processed, replacements

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        output = super().apply_chat_template(conversation, chat_template, **kwargs)
        if kwargs.get("return_assistant_tokens_mask") and "pixel_values" in output:
            require_transformers("5.23", "return_assistant_tokens_mask beside images")
        return output

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one processed image: its placeholder, once per visual token."""
        budgets = image_inputs.get("num_visual_tokens")
        budget = self.num_visual_tokens if budgets is None else int(budgets[image_idx])
        return self.image_token * budget

    def _get_num_multimodal_tokens(
        self, image_sizes: list | None = None, num_visual_tokens: int | list[int] | None = None, **kwargs
    ) -> MultiModalData:
        """Image tokens and patches (pixel tensors) of images of the given sizes, as inference servers ask for them."""
        if image_sizes is None:
            return MultiModalData()
        budgets = self._budgets(num_visual_tokens, len(image_sizes))
        return MultiModalData(num_image_tokens=budgets, num_image_patches=[1] * len(budgets))


DeltaLlavaProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["DeltaLlavaProcessor"]
