"""Opening the pictures of a sample, with one clear reason for each one that cannot be used."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from delta_llava.errors import printable, reason

from ..processing_delta_llava import open_picture, rgb_picture

ADDRESSES = ("http://", "https://", "data:")


class BrokenImageError(ValueError):
    """A picture that cannot be used; the message names it and says why."""


class MissingImageError(BrokenImageError):
    """A picture file that does not exist."""


def picture_file(image: Any, folder: Path | None) -> Path | None:
    """The file that a picture's name stands for, `folder / name` where there is a folder; None for other pictures."""
    if isinstance(image, Path):
        return image
    if not isinstance(image, str) or image.startswith(ADDRESSES):
        return None
    return folder / image if folder is not None else Path(image)


def is_missing(file: Path) -> bool:
    """Whether there is no such file; a name that no file system takes is missing too."""
    try:
        return not file.is_file()
    except (OSError, ValueError):
        return True


def image_name(image: Any) -> str:
    """How a message names a picture."""
    if isinstance(image, dict):
        image = image.get("path")
    return printable(str(image), 120) if isinstance(image, str | Path) else "an embedded image"


def open_image(image: Any, folder: Path | None = None, max_pixels: int | None = None) -> Image.Image:
    """Opens and fully decodes one picture, in the one view of it that inference has too (see `rgb_picture`).

    Args:
        image: a file name, a path, an address (http, https or `data:`), encoded bytes, a `{"bytes", "path"}` pair or a
            `PIL.Image.Image`.
        folder: where file names are looked up.
        max_pixels: width x height above which a picture is refused before it is decoded.
    Raises:
        BrokenImageError: the file is missing, is no picture, is cut short, is larger than `max_pixels`, or cannot be
            shown in 8-bit RGB.
    """
    file = picture_file(image, folder)
    name = image_name(file or image)
    if file is not None and is_missing(file):
        raise MissingImageError(f"{name}: missing, or no file")
    encoded = image.get("bytes") if isinstance(image, dict) else (file or image)
    try:
        if isinstance(encoded, bytes):
            picture = Image.open(io.BytesIO(encoded))
        else:
            picture = encoded if isinstance(encoded, Image.Image) else open_picture(encoded)
        if max_pixels is None or picture.width * picture.height <= max_pixels:
            return rgb_picture(picture)
        problem = f"{picture.width} x {picture.height} is over the limit of {max_pixels:,} pixels"
    except UnidentifiedImageError:
        problem = "not a picture"
    except Image.DecompressionBombError:
        problem = "too many pixels to decode safely"
    except Exception as error:  # Pillow's decoders have no common class of error
        problem = f"cannot be decoded ({reason(error)})"
    raise BrokenImageError(f"{name}: {problem}")
