"""Opening the pictures of a sample, with one clear reason for each one that cannot be used."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from delta_llava.errors import reason

from ..processing_delta_llava import UNREADABLE, rgb_picture


class BrokenImageError(ValueError):
    """A picture that cannot be used; the message names it and says why."""


def resolve_image(image: Any, folder: Path | None) -> Any:
    """The file that a name stands for, `folder / name` where there is a folder. Image data passes through."""
    if isinstance(image, str):
        return folder / image if folder is not None else Path(image)
    if isinstance(image, dict) and not image.get("bytes") and isinstance(image.get("path"), str):
        return folder / image["path"] if folder is not None else Path(image["path"])
    return image


def image_name(image: Any) -> str:
    """How a message names a picture."""
    if isinstance(image, (str, Path)):
        return str(image)
    if isinstance(image, dict) and image.get("path"):
        return str(image["path"])
    return "an embedded image"


def open_image(image: Any, folder: Path | None = None, max_pixels: int | None = None) -> Image.Image:
    """Opens and fully decodes one picture, in the processor's view of it (see `rgb_picture`).

    Args:
        image: a file name, a path, encoded bytes, a `{"bytes", "path"}` pair or a `PIL.Image.Image`.
        folder: where file names are looked up.
        max_pixels: width x height above which a picture is refused before it is decoded.
    Raises:
        BrokenImageError: the file is missing, is no picture, is cut short, is larger than `max_pixels`, or of a mode
            without a defined white.
    """
    source = resolve_image(image, folder)
    name = image_name(source)
    encoded = source.get("bytes") if isinstance(source, dict) else source
    if not isinstance(encoded, (bytes, bytearray, Path, Image.Image)):
        raise BrokenImageError(f"{name}: neither a file name nor image data ({type(image).__name__})")
    if isinstance(encoded, Path) and encoded.exists() and not encoded.is_file():
        raise BrokenImageError(f"{name}: a folder, pipe, device or socket, no picture")
    try:
        if isinstance(encoded, Image.Image):
            picture = encoded
        else:
            picture = Image.open(encoded if isinstance(encoded, Path) else io.BytesIO(encoded))
        if max_pixels is not None and picture.width * picture.height > max_pixels:
            raise BrokenImageError(
                f"{name}: {picture.width} x {picture.height} is over the limit of {max_pixels:,} pixels"
            )
        return rgb_picture(picture)
    except BrokenImageError:
        raise
    except FileNotFoundError:
        raise BrokenImageError(f"{name}: missing") from None
    except UnidentifiedImageError:
        raise BrokenImageError(f"{name}: not a picture") from None
    except Image.DecompressionBombError:
        raise BrokenImageError(f"{name}: too many pixels to decode safely") from None
    except UNREADABLE as error:
        raise BrokenImageError(f"{name}: cannot be decoded ({reason(error)})") from None
