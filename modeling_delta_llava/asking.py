"""`delta-llava ask`: one question about pictures and videos, answered as a stream of text."""

import os
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from delta_llava.errors import UserError, printable, reason, told
from delta_llava.threads import in_daemon_thread

from .json_files import ADAPTER_CONFIG, check_files, check_sizes, read_json
from .sources import local_folder

DTYPES = ("auto", "bfloat16", "float16", "float32")


def parse_budgets(text: str | None) -> list[int] | None:
    """`--num-visual-tokens`: one number, or several separated by commas."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--num-visual-tokens {printable(text)!r} is not a number: give one (36), or several (16,576)"
        ) from None


def download(address: str) -> bytes:
    """What an http(s) address holds, within limits of time, size and redirections.

    Raises:
        UserError: it cannot be fetched, or not within the limits.
    """
    from . import processing_delta_llava as processing

    # Looking up a name and reading slow headers have no time limit of their own.
    content = in_daemon_thread(processing.download_picture, address)
    with told(f"{printable(address)} cannot be fetched", "save it, and give its path"):
        try:
            return content.result(timeout=processing.DOWNLOAD_SECONDS)
        except FutureTimeoutError:
            raise TimeoutError(f"not complete after {processing.DOWNLOAD_SECONDS} seconds") from None


def check_question(question: str) -> None:
    """Raises `UserError` for a question that is empty, no text, or a picture in the question's place."""
    if not question.strip():
        raise UserError("the question is empty")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError("the question is not UTF-8 text: set the terminal to UTF-8 and type it again") from error
    if len(question.split()) == 1 and (question.startswith(("http://", "https://")) or os.path.isfile(question)):
        raise UserError(f"the question is missing: put it last, in quotes, behind {question}")


def located(source: str) -> str | bytes:
    """The path of a regular file, or what an http(s) address holds. Raises `UserError` if there is none."""
    if source.startswith(("http://", "https://")):
        return download(source)
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        raise UserError(f"{source} is a folder, not an image: name a picture in it")
    if os.path.exists(source):
        raise UserError(f"{source} is a pipe, device or socket, not an image: save the picture in a file")
    raise UserError(f"no such image: {source}")


def decoded(content: str | bytes, name: str, formats: Sequence[str] | None = None, max_pixels: int | None = None):
    """A picture from a path or the bytes of a file, in the processor's view of it.

    Args:
        name: how messages call it.
        formats: names of the file formats that may be decoded, as Pillow has them; by default all.
        max_pixels: most pixels, where there is a limit below Pillow's own.

    Raises:
        PIL.UnidentifiedImageError: it is no picture.
        UserError: it is one that cannot be used: damaged, too large, or of another format.
    """
    from PIL import UnidentifiedImageError

    from .processing_delta_llava import open_picture, rgb_picture

    try:
        image = open_picture(content)
        if formats is not None and image.format not in formats:
            raise UserError(f"{name} is a file of format {image.format}: send one of {', '.join(formats)}")
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise UserError(
                f"{name} has {image.width} x {image.height} pixels, and {max_pixels:,} are left: shrink it"
            )
        return rgb_picture(image)
    except (UnidentifiedImageError, UserError):
        raise
    except Exception as error:  # Pillow's decoders have no common class of error
        raise UserError(f"{name} is damaged or too large ({reason(error)})") from error


def open_image(source: str):
    """A picture from a file or an http(s) address, in the processor's view of it.

    Raises:
        UserError: there is none, or it is no regular file.
    """
    return decode_image(located(source), source)


def decode_image(content: str | bytes, name: str, formats: Sequence[str] | None = None, max_pixels: int | None = None):
    """As [`decoded`], for what must be a picture.

    Raises:
        UserError: it is no picture, or one that cannot be used.
    """
    from PIL import UnidentifiedImageError

    try:
        return decoded(content, name, formats, max_pixels)
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that Pillow can read") from None


def open_parts(sources: Sequence[str], num_frames: int | None = None) -> list[dict]:
    """Pictures and videos, told apart by what they hold, as parts of a message; of a video, its frames.

    Raises:
        UserError: there is none, it cannot be used, or `num_frames` is given without a video.
    """
    from PIL import UnidentifiedImageError

    from .video_delta_llava import video_parts

    parts: list[dict] = []
    for source in sources:
        content = located(source)
        try:
            parts.append({"type": "image", "image": decoded(content, source)})
        except UnidentifiedImageError:
            first = 1 + sum(part["type"] == "image" for part in parts)
            try:
                parts += video_parts(content, first, num_frames)
            except Exception as error:  # FFmpeg's have no common class either
                raise UserError(
                    f"{source} is not an image, and no video that can be shown: {reason(error)}"
                ) from error
    if num_frames is not None and all(part["type"] == "image" for part in parts):
        raise UserError("--num-frames is for videos, and there is none: leave it out")
    return parts


def model_folder(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model: the path itself, or a download from the Hub; its small files are bounded.

    Args:
        model: folder or Hub id (NAMESPACE/NAME).
        revision: branch, tag or commit on the Hub.
        weights: whether a download includes the weights.

    Raises:
        UserError: there is none, or its files are damaged or describe a model without end.
    """
    folder = local_folder(model, "MODEL", revision, weights)
    check_files(folder)
    settings = folder / "config.json"
    if not settings.is_file() and not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{model} has no config.json: give the folder that `delta-llava convert` wrote")
    config = read_json(settings)
    if "mm_vision_tower" in config:
        raise UserError(f"{model} is a training checkpoint: run `delta-llava convert {model} OUTPUT` and give OUTPUT")
    check_sizes(config, settings)
    return folder


def check_device(name: str | None):
    """The torch device to run on: the named one; for None and "auto" the CUDA device when there is one.

    Raises:
        UserError: if it cannot be used here.
    """
    import torch

    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with told(f"device {name!r} cannot be used", "give --device cpu, or leave it out"):
        device = torch.device(name)
        # A device without memory has no values to read back.
        torch.zeros(1, device=device).item()
    return device


def load(model: str, revision: str | None = None, device: str = "auto", dtype: str = "auto"):
    """Model and processor of a folder or Hub id, with this package's code: code in the folder is not run.

    Raises:
        UserError: if there is no such model, or it is not one that answers questions about images.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known: choose one of {', '.join(DTYPES)}")
    folder = model_folder(model, revision)
    place = check_device(device)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with told(f"no usable model at {model}", "check it with `delta-llava verify`"):
        network = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=dtype, device_map=place, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    return network.eval(), processor


def ask(
    model: str,
    question: str,
    images: Sequence[str] = (),
    num_visual_tokens: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    device: str = "auto",
    dtype: str = "auto",
    num_frames: int | None = None,
) -> None:
    """Prints the answer to standard output while it is generated.

    Raises:
        UserError: for anything the user can mend: no such file, no image or video, no such model, a wrong budget.
    """
    from transformers import TextStreamer
    from transformers.utils import logging

    from .building import check_chat_template

    check_question(question)
    budgets = parse_budgets(num_visual_tokens)
    content = [*open_parts(images, num_frames), {"type": "text", "text": question}]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    network, processor = load(model, revision, device, dtype)
    if budgets is not None and network.config.model_type != "delta_llava":
        raise UserError(f"{model} is of type {network.config.model_type}, which has no --num-visual-tokens")

    tried = [{**part, "image": ""} if part["type"] == "image" else part for part in content]
    check_chat_template(processor, model, [{"role": "user", "content": tried}])
    if budgets is not None and len(budgets) == 1:
        (budgets,) = budgets  # one for all pictures
    with told(f"{model} cannot answer", "check it with `delta-llava verify`"):
        try:
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={} if budgets is None else {"num_visual_tokens": budgets},
            ).to(network.device)
            sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
            network.generate(
                **inputs,
                **sampling,
                max_new_tokens=max_new_tokens,
                streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        except ValueError as error:  # says what to mend in the question, the pictures or the budgets
            raise UserError(reason(error)) from error
