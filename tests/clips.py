"""Small videos, made on the spot with PyAV: frame `i` is grey of value `10 * i`."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

RATE = 10


def frame(index: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (10 * index,) * 3)


def shown(image: Image.Image) -> int:
    """Which frame of a clip, after encoding with loss, a picture is."""
    return round(np.asarray(image).mean() / 10)


def write_clip(
    path: Path, frames: list[Image.Image] | int = 20, codec: str = "mpeg4", turned: int = 0, **options
) -> Path:
    """A video of the given frames, or of so many grey ones, to be turned when shown; `options` are the encoder's."""
    frames = [frame(index) for index in range(frames)] if isinstance(frames, int) else frames
    pixels = {"gif": "rgb8", "apng": "rgb24"}.get(codec, "yuv420p")
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = (*frames[0].size, pixels) if frames else (64, 48, pixels)
        stream.set_display_rotation(turned)
        container.start_encoding()
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def write_timed_clip(path: Path, times: list[int], codec: str = "libx264") -> Path:
    """A video of one grey frame at each of the given milliseconds."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, at in enumerate(times):
            picture = av.VideoFrame.from_image(frame(index))
            picture.pts, picture.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path
