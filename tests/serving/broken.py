"""A server in a process of its own, and requests that it must refuse."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tests.forked import REPOSITORY
from tests.tiny import encoded, picture

NAME, KEY = "shapes", "correct-horse-battery"
# Memory counts as flat if the last third of the time has at most so many times what the middle one has.
FLAT = 1.02


class Server(NamedTuple):
    url: str
    process: subprocess.Popen
    log: Path


@contextlib.contextmanager
def served(folder: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """`delta-llava serve FOLDER` on a free port of loopback, with an API key; interrupted in the end."""
    command = [sys.executable, "-m", "delta_llava", "serve", str(folder), "--port", "0", "--name", NAME, *options]
    environment = {**os.environ, "DELTA_LLAVA_API_KEY": KEY, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=log.parent)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Server(found[0], process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(30)


def as_address(content: bytes | Image.Image) -> str:
    content = content if isinstance(content, bytes) else encoded(content)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def shown(*addresses: str, text: str = "How many shapes are there?") -> list[dict]:
    """One user's message with pictures."""
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def shown_video(video: bytes | str, text: str = "What happens?") -> list[dict]:
    """A message with a video, of which the file or its address is given."""
    address = "data:video/mp4;base64," + base64.b64encode(video).decode() if isinstance(video, bytes) else video
    parts = [{"type": "video_url", "video_url": {"url": address}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def postscript() -> bytes:
    stream = io.BytesIO()
    picture().save(stream, "EPS")
    return stream.getvalue()


def thirds(sizes: Sequence[int]) -> tuple[str, bool]:
    """What a server's memory was, of its sizes in bytes: a line, and whether it stopped growing."""
    third = len(sizes) // 3
    parts = sizes[:third], sizes[third:-third], sizes[-third:]
    first, middle, last = (statistics.median(part) / 2**20 for part in parts)
    line = f"memory, MiB, medians of three thirds: {first:.0f}, {middle:.0f}, {last:.0f}"
    return line, last <= FLAT * middle


PNG = encoded(picture("red"))
SAID = {"role": "user", "content": "How many shapes are there?"}
# What is wrong, as fields of a request or as its whole body; the status; and what the message says.
BROKEN = {
    "cut JSON": (b'{"model": "shapes", "messages": [', 400, "Invalid JSON"),
    "no JSON": (b"\x89PNG", 400, "Invalid JSON"),
    "no object": (b"[]", 400, "object"),
    "endless nesting": (b"[" * 100_000, 400, "Invalid JSON"),
    "half a surrogate": (b'{"model": "shapes", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "JSON"),
    "no messages": ({"messages": []}, 400, "messages"),
    "messages null": ({"messages": None}, 400, "messages: Field required"),
    "a million messages": (b'{"model": "shapes", "messages": [' + b"1," * 10**6 + b"1]}", 400, "messages"),
    "a million parts": (
        b'{"model": "shapes", "messages": [{"role": "user", "content": [' + b"{}," * 10**6 + b"{}]}]}",
        400,
        "content",
    ),
    "a field of a million letters": ({"x" * 10**6: 1}, 400, "no such field"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "Hello"}]}, 400, "'system', 'user' or 'assistant'"),
    "empty message": ({"messages": [{"role": "user", "content": " "}]}, 400, "neither text nor picture"),
    "no content": ({"messages": [{"role": "user", "content": []}]}, 400, "neither text nor picture"),
    "assistant last": ({"messages": [SAID, {"role": "assistant", "content": "two"}]}, 400, "from the user"),
    "assistant shows": ({"messages": [{**shown(as_address(PNG))[0], "role": "assistant"}, SAID]}, 400, "only users"),
    "placeholder": ({"messages": [{"role": "user", "content": "What is <image>?"}]}, 400, "<image>"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, 400, "'smell'"),
    "unknown model": ({"model": "gpt-4o"}, 404, "'shapes'"),
    "unknown field": ({"best_of": 2}, 400, "best_of"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "two answers": ({"n": 2}, 400, "n: "),
    "hot": ({"temperature": 3}, 400, "temperature"),
    "temperature in words": ({"temperature": "0.5"}, 400, "temperature"),
    "no number": ({"temperature": float("nan")}, 400, "temperature"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "endless answer": ({"max_tokens": 10**9}, 400, "answers have"),
    "two limits": ({"max_tokens": 4, "max_completion_tokens": 5}, 400, "give one of them"),
    "stream in words": ({"stream": "yes"}, 400, "stream"),
    "illegal budget": ({"num_visual_tokens": 7}, 400, "choose one of ["),
    "budget in words": ({"num_visual_tokens": "all"}, 400, "num_visual_tokens"),
    "too many budgets": ({"messages": shown(as_address(PNG)), "num_visual_tokens": [1, 4]}, 400, "1 image(s)"),
    "long prompt": ({"messages": [{"role": "user", "content": "shape " * 900}]}, 400, "room for"),
    "endless prompt": ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, 400, "characters"),
    "broken picture": ({"messages": shown(as_address(b"no picture"))}, 400, "picture 1"),
    "cut picture": ({"messages": shown(as_address(PNG), as_address(PNG[:-30]))}, 400, "picture 2"),
    "postscript": ({"messages": shown(as_address(postscript()))}, 400, "EPS"),
    "damaged base64": ({"messages": shown("data:image/png;base64,AAAAA")}, 400, "base64"),
    "no base64": ({"messages": shown("data:image/svg+xml,<svg/>")}, 400, "base64"),
    "many pictures": ({"messages": shown(*[as_address(PNG)] * 33)}, 400, "33 pictures"),
    "no video": ({"messages": shown_video(b"no video")}, 400, "Message 1 has a video"),
    "frames without a video": ({"num_frames": 2}, 400, "num_frames is for videos"),
    "no frames": ({"messages": shown_video(b""), "num_frames": 0}, 400, "num_frames"),
    "playlist": ({"messages": shown_video(b"#EXTM3U\nfile:///etc/passwd\n")}, 400, "Message 1 has a video"),
    "video on loopback": ({"messages": shown_video("http://127.0.0.1:22/")}, 400, "public internet"),
    "file address": ({"messages": shown("file:///etc/passwd")}, 400, "file"),
    "path": ({"messages": shown("/etc/passwd")}, 400, "file"),
    "loopback": ({"messages": shown("http://127.0.0.1:22/")}, 400, "public internet"),
    "loopback as one number": ({"messages": shown("http://2130706433/")}, 400, "public internet"),
    "loopback, IPv6": ({"messages": shown("http://[::1]/")}, 400, "public internet"),
    "loopback, mapped": ({"messages": shown("http://[::ffff:127.0.0.1]/")}, 400, "public internet"),
    "a name of loopback": ({"messages": shown("http://localhost:8000/health")}, 400, "public internet"),
    "metadata of a cloud": ({"messages": shown("http://169.254.169.254/latest/meta-data")}, 400, "public internet"),
    "private": ({"messages": shown("https://10.0.0.1/")}, 400, "public internet"),
    "line break in an address": ({"messages": shown("http://example.com/\r\nHost: x")}, 400, "fetched"),
    "other scheme": ({"messages": shown("ftp://example.com/a.png")}, 400, "neither"),
}


def body_of(case: bytes | dict) -> bytes:
    if isinstance(case, bytes):
        return case
    return json.dumps({"model": NAME, "messages": [SAID], "max_tokens": 4, **case}).encode()
