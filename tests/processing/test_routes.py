"""One view of a picture: every kind of picture gives the same pixels, whichever way it takes into the model.

The expected pixels are written out with NumPy alone: EXIF orientation, alpha, 16 bits, palettes and inks.
"""

import base64
import http.server
import io
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_delta_llava import asking
from modeling_delta_llava.finetuning.pictures import open_image
from modeling_delta_llava.processing_delta_llava import open_picture
from tests import tiny

RANDOM = np.random.RandomState(0)
COLOURS = RANDOM.randint(0, 256, (30, 41, 3), dtype=np.uint8)
GREY = RANDOM.randint(0, 256, (30, 41), dtype=np.uint8)
ALPHA = RANDOM.randint(0, 256, (30, 41), dtype=np.uint8)
SIXTEEN = RANDOM.randint(0, 65536, (30, 41), dtype=np.uint16)
INKS = RANDOM.randint(0, 256, (30, 41, 4), dtype=np.uint8)
TALL = RANDOM.randint(0, 256, (3000, 1, 3), dtype=np.uint8)
PALETTE = RANDOM.randint(0, 256, (256, 3), dtype=np.uint8)
ORIENTED = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: np.rot90(COLOURS, -1),
    7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(COLOURS),
}


def file_of(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def three(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(Image.fromarray(COLOURS), exif=exif)


def with_palette() -> bytes:
    image = Image.fromarray(GREY, "L").convert("P")
    image.putpalette(PALETTE.tobytes())
    return file_of(image, transparency=int(GREY[0, 0]))


def rgb_of_inks() -> np.ndarray:
    light = 255 - INKS[..., 3:].astype(int)
    product = INKS[..., :3] * light + 128
    return (light - ((product >> 8) + product >> 8)).astype(np.uint8)


# Name -> file, and the expected picture.
KINDS = {
    "RGB": (file_of(Image.fromarray(COLOURS)), COLOURS),
    "L": (file_of(Image.fromarray(GREY)), three(GREY)),
    "RGBA": (file_of(Image.fromarray(np.dstack([COLOURS, ALPHA]))), COLOURS),
    "LA": (file_of(Image.fromarray(np.dstack([GREY, ALPHA]))), three(GREY)),
    "palette with transparency": (with_palette(), PALETTE[GREY]),
    "16 bits": (file_of(Image.fromarray(SIXTEEN)), three((SIXTEEN >> 8).astype(np.uint8))),
    "mode I up to 255": (file_of(Image.fromarray(GREY.astype(np.int32)), "TIFF"), three(GREY)),
    "mode I beyond 255": (
        file_of(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"),
        three((SIXTEEN >> 8).astype(np.uint8)),
    ),
    "CMYK": (file_of(Image.fromarray(INKS, "CMYK"), "TIFF"), rgb_of_inks()),
    "1 x 3000": (file_of(Image.fromarray(TALL)), TALL),
    "3000 x 1": (file_of(Image.fromarray(TALL.transpose(1, 0, 2))), TALL.transpose(1, 0, 2)),
    **{f"EXIF {number}": (turned(number), expected) for number, expected in ORIENTED.items()},
}


class Routes:
    """Ways from a picture's file to pixel values; each takes the encoded file and gives `(1, 3, H, W)`."""

    def __init__(self, processor, folder, address):
        self.processor, self.folder, self.address = processor, folder, address

    def file(self, data: bytes):
        path = self.folder / "picture"
        path.write_bytes(data)
        return path

    def call(self, image):
        return self.processor(images=image, text="<image> ?", return_tensors="pt")["pixel_values"]

    def direct(self, image):
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    def chat(self, part):
        messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "?"}]}]
        return self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    def pipeline(self, **inputs):
        """What the pipeline hands to `generate`."""
        model, given = tiny.tiny_model(), {}
        model.generate = lambda **kwargs: given.update(kwargs) or kwargs["input_ids"]
        pipeline("image-text-to-text", model=model, processor=self.processor)(**inputs)
        return given["pixel_values"]

    def pipeline_chat(self, part):
        return self.pipeline(text=[{"role": "user", "content": [{"type": "image", **part}]}])


ROUTES = {
    "PIL": lambda r, data: r.call(Image.open(io.BytesIO(data))),
    "PIL, nested": lambda r, data: r.call([[Image.open(io.BytesIO(data))]]),
    "PIL, without text": lambda r, data: r.processor(images=Image.open(io.BytesIO(data)), return_tensors="pt")[
        "pixel_values"
    ],
    "array": lambda r, data: r.call(np.asarray(Image.open(io.BytesIO(data)))),
    "tensor": lambda r, data: r.call(channels_first(Image.open(io.BytesIO(data)))),
    "path": lambda r, data: r.call(str(r.file(data))),
    "Path": lambda r, data: r.call([r.file(data)]),
    "bytes": lambda r, data: r.call(data),
    "base64": lambda r, data: r.call(base64.b64encode(data).decode()),
    "data address": lambda r, data: r.call("data:image/png;base64," + base64.b64encode(data).decode()),
    "http": lambda r, data: r.file(data) and r.call(r.address),
    "chat, PIL": lambda r, data: r.chat({"image": Image.open(io.BytesIO(data))})["pixel_values"],
    "chat, path": lambda r, data: r.chat({"path": str(r.file(data))})["pixel_values"],
    "chat, http": lambda r, data: r.file(data) and r.chat({"url": r.address})["pixel_values"],
    "chat, base64": lambda r, data: r.chat({"base64": base64.b64encode(data).decode()})["pixel_values"],
    "pipeline, chat": lambda r, data: r.pipeline_chat({"image": Image.open(io.BytesIO(data))}),
    "pipeline, chat, path": lambda r, data: r.pipeline_chat({"path": str(r.file(data))}),
    "pipeline, images": lambda r, data: r.pipeline(images=[str(r.file(data))], text="<image> ?"),
    "ask": lambda r, data: r.direct(asking.open_image(str(r.file(data)))),
    "ask, http": lambda r, data: r.file(data) and r.direct(asking.open_image(r.address)),
    "finetuning, file": lambda r, data: r.direct(open_image(r.file(data).name, r.folder)),
    "finetuning, bytes": lambda r, data: r.direct(open_image(data)),
    "finetuning, stream": lambda r, data: r.direct(open_image({"bytes": data, "path": None})),
    "finetuning, PIL": lambda r, data: r.direct(open_image(Image.open(io.BytesIO(data)))),
}
# An array does not say that it holds indices or inks, nor how to turn it.
NOT_IN_ARRAYS = {"palette with transparency", "CMYK", *(f"EXIF {number}" for number in range(2, 9))}
# `pipeline(images=...)` decodes pictures before the processor sees them, and clips what has more than 8 bits.
CLIPPED_BY_PIPELINES = {"16 bits", "mode I beyond 255"}


def channels_first(image: Image.Image) -> torch.Tensor:
    values = torch.from_numpy(np.array(image))
    return values if values.ndim == 2 else values.permute(2, 0, 1)


@pytest.fixture(scope="module")
def routes(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write((folder / "picture").read_bytes())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Routes(processor, folder, f"http://127.0.0.1:{server.server_port}/picture")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_pixels(route, routes):
    differing = {}
    for kind, (data, expected) in KINDS.items():
        if route in ("array", "tensor") and kind in NOT_IN_ARRAYS:
            continue
        pixels = ROUTES[route](routes, data)
        reference = routes.direct(Image.fromarray(np.ascontiguousarray(expected)))
        if not torch.equal(pixels, reference):
            differing[kind] = (pixels - reference).abs().max().item()
    assert set(differing) == (CLIPPED_BY_PIPELINES if route == "pipeline, images" else set()), differing


def test_a_pipe_is_no_picture(tmp_path):
    """Opening it would wait for a writer that never comes."""
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", str(tmp_path / "pipe")):
        with pytest.raises(ValueError, match="pipe"):
            open_picture(source)
