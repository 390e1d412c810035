"""Processor of Delta-LLaVA: chat template, placeholder expansion, pixels, and each image's visual-token budget."""

import base64
import io
import itertools
import os
import time
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import is_valid_image, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging

from .configuration_delta_llava import AUTO_MAP, image_budgets, require_transformers
from .video_delta_llava import VideoLimits, video_parts

logger = logging.get_logger(__name__)

# A larger picture is shrunk to this side before transformers pads it to a square, which then takes 200 MB.
MAX_PADDED_SIDE = 8192
# Of a longer picture that is not padded, only the middle is resized: the centre crop keeps no more.
MAX_ASPECT_RATIO = 200
# Parts of a message that show a video, and their keys that hold it.
VIDEO_PARTS, VIDEO_SOURCES = ("video", "video_url"), ("video", "url", "path", "video_url")
# Limits of a picture at an address: of all of it, and of silence.
DOWNLOAD_SECONDS, SILENT_SECONDS, MAX_DOWNLOAD_BYTES = 60, 20, 100_000_000
# All that fetching takes: a redirection to anything but http(s) finds no handler, and the eleventh one is an error.
DOWNLOAD_HANDLERS = (
    *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
    *(urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler),
    urllib.request.UnknownHandler,
)


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):
    """`num_visual_tokens`: one budget for all images, or one for each in the order of their placeholders."""

    num_visual_tokens: Any  # int, or list[int], array or tensor of shape (images,)


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DeltaLlavaImagesKwargs
    _defaults = {"text_kwargs": {"padding": False}}


def download_picture(address: str, handlers: tuple = DOWNLOAD_HANDLERS) -> bytes:
    """What an http(s) address holds, fetched by classes of `urllib.request` handlers.

    Raises:
        OSError, ValueError: it cannot be fetched, or not within [`DOWNLOAD_SECONDS`] and [`MAX_DOWNLOAD_BYTES`].
    """
    opener = urllib.request.OpenerDirector()
    for handler in handlers:
        opener.add_handler(handler())
    content, end = bytearray(), time.monotonic() + DOWNLOAD_SECONDS
    request = urllib.request.Request(address, headers={"User-Agent": "delta-llava"})
    with opener.open(request, timeout=SILENT_SECONDS) as answer:
        while piece := answer.read1(2**16):
            content += piece
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"{address} is larger than {MAX_DOWNLOAD_BYTES:,} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"{address} is not complete after {DOWNLOAD_SECONDS} seconds")
    return bytes(content)


def open_picture(source: str | os.PathLike | bytes) -> Image.Image:
    """A picture, not yet decoded, from a path, an http(s) address, a base64 string (bare or `data:...`) or file bytes.

    Raises:
        OSError, ValueError: nothing is there, or no picture.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = download_picture(source)
    elif isinstance(source, os.PathLike) and not os.path.isfile(source):
        raise ValueError(f"{source} is no file")  # a pipe or device might never end
    elif isinstance(source, str) and not os.path.isfile(source):
        try:
            return Image.open(io.BytesIO(base64.b64decode(source.rpartition(",")[2])))
        except (OSError, ValueError):
            raise ValueError(f"{source[:200]!r} is no file, no http(s) address and no picture in base64") from None
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Whole numbers as uint8: 16-bit values without their lower byte, and so wider ones if any is above 255."""
    low, high = values.min(initial=0), values.max(initial=0)
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"it has values from {low} to {high}, outside 0 to 65535: convert it to 8 bits first")
    if high > 255 or (values.dtype.kind == "u" and values.dtype.itemsize == 2):
        values = values // 256
    return values.astype(np.uint8)


def rgb_picture(image: Image.Image) -> Image.Image:
    """
    The one view of a picture that training and inference share, whatever brought it: upright (EXIF), 8-bit RGB.

    Transparency is dropped and not pasted on a colour, as the released code does. 16-bit grey is divided by 256, which
    Pillow itself would clip to white; mode `I` with values up to 255 holds 8 bits already.

    Raises:
        ValueError: for modes without a defined white (`F`, integers outside 0 to 65535) and pictures without pixels.
        OSError, SyntaxError, EOFError: if the picture cannot be decoded.
    """
    if min(image.size) == 0:
        raise ValueError(f"it is {image.width} x {image.height} pixels")
    if getattr(image, "is_animated", False):  # counting the frames would read the whole file
        logger.warning_once("An animated image was given: its current frame is used.")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("PIL mode 'F' has no defined white: convert it to 8 bits first")
    if image.mode.startswith("I"):
        image = Image.fromarray(eight_bits(np.asarray(image)))
    image = image.convert("RGB")
    image.info.clear()  # a transparent colour that is still named there would be pasted on white after all
    return image


def rgb_array(image: np.ndarray | torch.Tensor, layout: str | None = None) -> Image.Image | np.ndarray:
    """
    The same view of an array or tensor of shape `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1 to 4 channels.

    Whole numbers become a picture. Floats, whose range only the caller knows, become an array of shape `(3, H, W)`.
    `layout` is transformers' `input_data_format`; without it, a doubtful shape is `(C, H, W)` if it is a tensor's.
    """
    axes = (0, -1) if isinstance(image, torch.Tensor) else (-1, 0)
    if isinstance(image, torch.Tensor):
        image = (image.float() if image.is_floating_point() else image).numpy(force=True)
    if image.dtype.kind not in "uif":
        raise ValueError(f"its dtype is {image.dtype}: give integers or floats")
    if image.ndim == 2:
        image, layout = image[..., None], "channels_last"
    if image.ndim == 3:
        if layout is not None:
            axes = (0,) if layout == "channels_first" else (-1,)
        axis = next((axis for few in ((3, 4), (1, 2)) for axis in axes if image.shape[axis] in few), None)
    if image.ndim != 3 or axis is None:
        raise ValueError(f"its shape is {image.shape}: give (height, width), with 1 to 4 channels before or behind")
    image = np.moveaxis(image, axis, -1)
    image = image[..., :3] if image.shape[-1] > 2 else image[..., :1].repeat(3, axis=-1)
    return np.moveaxis(image, -1, 0) if image.dtype.kind == "f" else rgb_picture(Image.fromarray(eight_bits(image)))


def bounded(image: Image.Image, padded: bool, cropped: bool) -> Image.Image:
    """A picture whose padding or resizing would take gigabytes, shrunk or cropped first; any other one as it is."""
    long, short = max(image.size), min(image.size)
    if padded and long > MAX_PADDED_SIDE:
        sides = [max(1, round(side * MAX_PADDED_SIDE / long)) for side in image.size]
        return image.resize(sides, Image.Resampling.BICUBIC)
    if cropped and not padded and long > MAX_ASPECT_RATIO * short:
        # The cuts at both ends are equal, so that the centre stays where it is.
        left, top = (max(0, side - MAX_ASPECT_RATIO * short) // 2 for side in image.size)
        return image.crop((left, top, image.width - left, image.height - top))
    return image


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Turns text with image placeholders, and images, into model inputs.

    Every placeholder becomes as many image tokens as its image has visual tokens. A call may ask for a budget of all
    images, or for one of each: `processor(images=[thumbnail, page], text=..., num_visual_tokens=[16, 576])`, in
    templates within `processor_kwargs`; the output then holds `num_visual_tokens`, int64 of shape `(images,)`, for the
    model. `pixel_values` are of shape `(images, 3, height, width)`.

    Images are PIL images, arrays, tensors, paths, http(s) addresses, base64 strings or file bytes, in a list, or in
    one list per prompt. All give the pixels of [`rgb_picture`], at any size; but `pipeline(images=...)` decodes files
    itself and clips 16-bit grey. Prompts that start with BOS, as rendered templates do, get no second one.

    Args:
        image_processor: transformers' LLaVA image processor (or CLIP's, or SigLIP's).
        tokenizer: the language model's tokenizer, with the image token in its vocabulary.
        num_visual_tokens (`int`, defaults to 144): budget when a call does not ask for one.
        grid_size (`int`, defaults to 24): patches along one side of an image.
        chat_template (`str`, *optional*): Jinja template of conversations.
        image_token (`str`, defaults to `"<image>"`): the placeholder.

    Raises:
        ValueError: for impossible budgets, unreadable images, numbers of images and placeholders that differ, prompts
            that are empty or no strings, and `videos` or `audio`.
        TypeError: for images of an unknown type.
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
        self.num_visual_tokens = image_budgets(num_visual_tokens, 1, grid_size)
        self.grid_size = grid_size
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer has no token {image_token!r}: add it, or name the image token it has")
        # Loading drops the entry and saving adds it: a processor is the same before and after.
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    # vLLM reads a call's options off the annotation; what it does not find there, it gives to `from_pretrained`.
    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs: Unpack[DeltaLlavaProcessorKwargs]):
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        for name, given in (("videos", videos), ("audio", audio)):
            if given is not None:
                raise ValueError(
                    f"Delta-LLaVA sees images and text only: call the processor without {name} (chats may show videos)"
                )
        if text is not None:
            text = self._prompts(text, _option(kwargs, "text_kwargs", "add_special_tokens"))
        if images is not None:
            positions = itertools.count()

            def view(images):
                if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
                    return [view(image) for image in images]
                return self._view(images, next(positions), kwargs)

            images = view(images)
            images = images if isinstance(images, list) else [images]
            if any(isinstance(row, list) for row in images):
                images = [row if isinstance(row, list) else [row] for row in images]
            if next(positions) == 0:
                images = None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def _prompts(self, text, add_special_tokens: bool | None) -> list[str]:
        """The prompts as a list, without a written BOS where the tokenizer is about to put one."""
        text = [text] if isinstance(text, str) else text
        if not isinstance(text, (list, tuple)) or not all(isinstance(prompt, str) for prompt in text):
            raise ValueError("text must be a string or a list of strings")
        if not all(prompt.strip() for prompt in text):
            raise ValueError("The prompt is empty: give it a question, or an image placeholder")
        bos, adds_special_tokens = self.tokenizer.bos_token, add_special_tokens is not False
        if bos and adds_special_tokens and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            return [prompt.removeprefix(bos) for prompt in text]
        return list(text)

    def _view(self, image, position: int, kwargs: dict) -> Image.Image | np.ndarray:
        """One image as [`rgb_picture`] or [`rgb_array`] gives it, of bounded size; errors name its position."""
        if not isinstance(image, (str, os.PathLike, bytes)) and not is_valid_image(image):
            raise TypeError(
                f"Image {position} is a {type(image).__name__}: give a PIL image, an array, a path or an address"
            )
        try:
            if isinstance(image, (str, os.PathLike, bytes)):
                image = open_picture(image)
            if isinstance(image, Image.Image):
                image = rgb_picture(image)
            else:
                image = rgb_array(image, _option(kwargs, "images_kwargs", "input_data_format"))
        except Exception as error:  # Pillow's decoders have no common class of error
            raise ValueError(f"Image {position} cannot be read: {error}") from error
        defaults = {name: getattr(self.image_processor, name, False) for name in ("do_pad", "do_center_crop")}
        padded, cropped = (_option(kwargs, "images_kwargs", name, default) for name, default in defaults.items())
        return bounded(image, padded, cropped) if isinstance(image, Image.Image) else image

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images = images or []
        in_rows = any(isinstance(row, list) for row in images)
        given = [len(row) for row in images] if in_rows else [len(images)]
        if text is not None:
            asked = [prompt.count(self.image_token) for prompt in text]
            if (asked if in_rows else [sum(asked)]) != given:
                raise ValueError(
                    f"The prompts hold {asked} {self.image_token} placeholders, but {given} images were given: the "
                    f"number of {self.image_token} tokens in the prompts should be the same as the number of images"
                )
        if (budgets := _option(kwargs, "images_kwargs", "num_visual_tokens")) is not None:
            image_budgets(budgets, sum(given), self.grid_size)
        super().validate_inputs(images=images or None, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images, num_visual_tokens=None, input_data_format=None, **kwargs):
        # `input_data_format` is used up: what comes here are pictures, and arrays of shape (3, height, width).
        images = make_flat_list_of_images(images)
        processed = self.image_processor(images, **kwargs)
        if num_visual_tokens is not None:
            processed["num_visual_tokens"] = self._budgets(num_visual_tokens, len(images))
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def _budgets(self, num_visual_tokens, num_images: int) -> list[int]:
        budgets = self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        return np.broadcast_to(image_budgets(budgets, num_images, self.grid_size), num_images).tolist()

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one processed image: its placeholder, once per visual token."""
        budgets = image_inputs.get("num_visual_tokens")
        budget = self.num_visual_tokens if budgets is None else int(budgets[image_idx])
        return self.image_token * budget

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As `ProcessorMixin.apply_chat_template`, which sees each video as [`videos_as_images`] shows it.

        Raises:
            ValueError: for an empty conversation, messages and text parts without text, videos that cannot be shown,
                options for videos where there are none, and the image placeholder written out where it is not a
                picture's place: beside image parts, and in what users did not say.
        """
        batched = conversation and (isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages"))
        given = {name: value for name, value in kwargs.items() if value is not None}
        given = {**(kwargs.get("processor_kwargs") or {}), **given}
        if given.get("load_audio_from_video"):
            raise ValueError("Delta-LLaVA hears no sound: leave load_audio_from_video out")
        if _option(given, "videos_kwargs", "do_sample_frames") is not None:
            raise ValueError("do_sample_frames is not for Delta-LLaVA: ask for num_frames, or fps")
        sampling = {name: _option(given, "videos_kwargs", name) for name in ("num_frames", "fps")}
        kwargs = {name: value for name, value in kwargs.items() if name not in sampling}
        rows = [getattr(row, "messages", row) for row in (conversation if batched else [conversation])]
        if any(value is not None for value in sampling.values()) and not any(map(_has_video, rows)):
            raise ValueError("num_frames and fps are for videos, and there is none: leave them out")
        rows = [self.videos_as_images(row, **sampling) for row in rows]
        for messages in rows:
            self._check_messages(messages, kwargs.get("sanitize_control_tokens", False))
        conversation = rows if batched else rows[0]
        output = super().apply_chat_template(conversation, chat_template, **kwargs)
        if kwargs.get("return_assistant_tokens_mask") and "pixel_values" in output:
            require_transformers("5.23", "return_assistant_tokens_mask beside images")
        return output

    @staticmethod
    def videos_as_images(messages: list, num_frames: int | None = None, fps: float | None = None) -> list:
        """
        Messages in which [`video_parts`] stand in place of every part `{"type": "video"}`, whose video is its `video`,
        `url` or `path`, or `{"type": "video_url", "video_url": {"url": ...}}`. Servers that know images only can be
        given them.

        Raises:
            ValueError: for a video that cannot be shown, which it names.
        """
        messages, limits = list(messages or []), VideoLimits()
        for number, message in enumerate(messages):
            if not _has_video([message]):
                continue
            parts = []
            for part in message["content"]:
                if part.get("type") in VIDEO_PARTS:
                    images = sum(part.get("type") in ("image", "image_url") for part in parts)
                    parts += _shown_video(part, f"Message {number + 1}", images + 1, num_frames, fps, limits)
                else:
                    parts.append(part)
            messages[number] = {**message, "content": parts}
        return messages

    def _check_messages(self, messages, sanitized: bool):
        if not messages:
            raise ValueError("The conversation is empty: give it a message")
        messages = [message for message in messages if isinstance(message, dict)]
        kinds = {part.get("type") for message in messages for part in _parts(message)}
        for number, message in enumerate(messages, start=1):
            where, content = f"Message {number} (from {message.get('role')})", message.get("content")
            if content is None and not message.get("tool_calls"):
                raise ValueError(f"{where} has no content: give it a text, or a list of parts")
            # A user's plain string marks images that are given apart from the conversation.
            marks = isinstance(content, str) and message.get("role") == "user" and not kinds & {"image", "image_url"}
            texts = [part.get("text") for part in _parts(message) if part.get("type") == "text"]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{where} has a text part without text: give it a string, or leave it out")
            if any(self.image_token in text for text in texts) and not (marks or sanitized):
                raise ValueError(
                    f"{where} has {self.image_token} in its text, which stands for an image: show images as parts "
                    'such as {"type": "image", "image": ...}, and write the word in another way'
                )

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, num_visual_tokens=None, **kwargs):
        """Image tokens and patches (pixel tensors) of images of the given sizes, as inference servers ask for them."""
        if image_sizes is None:
            return MultiModalData()
        budgets = self._budgets(num_visual_tokens, len(image_sizes))
        return MultiModalData(num_image_tokens=budgets, num_image_patches=[1] * len(budgets))


def _option(kwargs: dict, modality: str, name: str, default=None):
    """A keyword of a call, given flat or inside of the modality's dictionary."""
    given = kwargs.get(name, (kwargs.get(modality) or {}).get(name))
    return default if given is None else given


def _has_video(messages) -> bool:
    return any(
        part.get("type") in VIDEO_PARTS
        for message in messages or []
        if isinstance(message, dict)
        for part in _parts(message)
    )


def _shown_video(part: dict, where: str, *options) -> list[dict]:
    """The parts of a message in place of its part with a video, which is downloaded first; errors name it."""
    unknown = sorted(part.keys() - {"type", *VIDEO_SOURCES})
    if unknown:
        raise ValueError(f"{where} has a video part with {unknown[0]!r}: give num_frames and fps with the call")
    source = next((part[key] for key in VIDEO_SOURCES if part.get(key) is not None), None)
    if isinstance(source, dict):
        source = source.get("url")
    name = os.fspath(source)[:200] if isinstance(source, (str, os.PathLike)) else type(source).__name__
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = download_picture(source)
        return video_parts(source, *options)
    except Exception as error:  # FFmpeg's and Pillow's have no common class
        raise ValueError(f"{where} has a video ({name}) that cannot be shown: {error}") from error


def _parts(message: dict) -> list[dict]:
    """The parts of a message; a string is one text part."""
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


DeltaLlavaProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["DeltaLlavaProcessor"]
