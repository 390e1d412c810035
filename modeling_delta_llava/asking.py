"""`delta-llava ask`: one question about pictures, answered as a stream of text."""

import os
from collections.abc import Sequence
from pathlib import Path

from delta_llava.errors import UserError

from .json_files import read_json

DTYPES = ("auto", "bfloat16", "float16", "float32")


def parse_budgets(text: str | None) -> int | list[int] | None:
    """`--num-visual-tokens`: one number for all images, or one for each, separated by commas."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--num-visual-tokens {text!r} is not a number: give one (36), or one per image (16,576)"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def open_image(source: str):
    """A picture from a path or an http(s) address, in the processor's view of it."""
    from PIL import UnidentifiedImageError

    from .processing_delta_llava import UNREADABLE, open_picture, rgb_picture

    if not source.startswith(("http://", "https://")):
        if not os.path.exists(source):
            raise UserError(f"no such image: {source}")
        if os.path.isdir(source):
            raise UserError(f"{source} is a folder, not an image: name a picture in it")
    try:
        return rgb_picture(open_picture(source))
    except UnidentifiedImageError:
        raise UserError(f"{source} is not an image that Pillow can read") from None
    except UNREADABLE as error:
        raise UserError(f"{source} cannot be fetched, is damaged or too large ({error})") from error


def _check_folder(model: str) -> None:
    """Raises `UserError` for what is neither a folder with a model that transformers can load nor a Hub id."""
    folder = Path(model)
    if folder.is_file():
        raise UserError(f"{model} is a file: give the folder that `delta-llava convert` wrote, or a Hub id")
    if not folder.is_dir():
        if model.count("/") != 1 or model.startswith(("/", ".", "~")):
            raise UserError(f"no such model: {model} is neither a folder nor a Hub id (NAMESPACE/NAME)")
        return
    settings = folder / "config.json"
    if not settings.is_file():
        raise UserError(f"{model} has no config.json: give the folder that `delta-llava convert` wrote")
    if "mm_vision_tower" in read_json(settings):
        raise UserError(f"{model} is a training checkpoint: run `delta-llava convert {model} OUTPUT` and ask OUTPUT")


def load(model: str, revision: str | None = None, device: str = "auto", dtype: str = "auto"):
    """Model and processor of a folder or Hub id, with this package's code: code in the folder is not run.

    Raises:
        UserError: if there is no such model, or it is not one that answers questions about images.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known: choose one of {', '.join(DTYPES)}")
    _check_folder(model)
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network = AutoModelForImageTextToText.from_pretrained(
            model, revision=revision, dtype=dtype, device_map=device, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    except StrictDataclassError as error:  # its last line says what is wrong with which value
        raise UserError(f"no usable model at {model}: {str(error).strip().splitlines()[-1].strip()}") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"no usable model at {model}: {reason}") from error
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
) -> None:
    """Prints the answer to standard output while it is generated.

    Raises:
        UserError: for anything the user can mend: no such file, not an image, no such model, a wrong budget.
    """
    from transformers import TextStreamer
    from transformers.utils import logging

    if not question.strip():
        raise UserError("the question is empty")
    if len(question.split()) == 1 and (question.startswith(("http://", "https://")) or os.path.isfile(question)):
        raise UserError(f"the question is missing: put it last, in quotes, behind {question}")
    budgets = parse_budgets(num_visual_tokens)
    pictures = [open_image(image) for image in images]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    network, processor = load(model, revision, device, dtype)
    if budgets is not None and network.config.model_type != "delta_llava":
        raise UserError(f"{model} is of type {network.config.model_type}, which has no --num-visual-tokens")

    content = [{"type": "image", "image": picture} for picture in pictures]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
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
    except ValueError as error:
        raise UserError(str(error)) from error
