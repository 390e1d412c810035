"""Videos for Delta-LLaVA, which sees pictures only: frames of a video and their times, as the parts of a message."""

import bisect
import io
import itertools
import math
import os
import time
from dataclasses import dataclass, field
from numbers import Integral, Real

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Frames of a video file without being asked.
NUM_FRAMES = 8
# What the videos of one conversation may have together: frames, pixels of them, and seconds in which they are read.
MAX_FRAMES, MAX_FRAME_PIXELS, VIDEO_SECONDS = 256, 100_000_000, 60
# Of a longer video only key frames are decoded, which need no other ones, if it has as many as are asked for.
MAX_DECODED_FRAMES = 5000
# What FFmpeg may open. It opens playlists too, and whatever files and addresses they name.
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf,gif,apng"


@dataclass
class VideoLimits:
    """What is left for the videos of one conversation."""

    frames: int = field(default_factory=lambda: MAX_FRAMES)
    pixels: int = field(default_factory=lambda: MAX_FRAME_PIXELS)
    end: float = field(default_factory=lambda: time.monotonic() + VIDEO_SECONDS)


def sampled(total: int, num_frames: int, limits: VideoLimits) -> list[int]:
    """
    Which of `total` frames to show: at most `num_frames`, evenly spaced from the first one.

    They are those of transformers' `default_sample_indices_fn`, whose oldest supported release leaves out the end.
    """
    count = min(num_frames, total)
    if not 0 < count <= limits.frames:
        raise ValueError(f"{count} frames cannot be shown: a conversation has 1 to {MAX_FRAMES}, of all its videos")
    limits.frames -= count
    return [index * total // count for index in range(count)]


def video_frames(
    source: str | os.PathLike | bytes,
    num_frames: int | None = None,
    fps: float | None = None,
    limits: VideoLimits | None = None,
):
    """
    Upright frames of a video file (a path, or its bytes), and the seconds at which they are shown, `None` if unknown.

    Raises:
        OSError, ValueError: it cannot be read within the limits.
    """
    try:
        import av
    except ImportError:
        raise ValueError(
            "PyAV is missing: `pip install av` (the extra `video`), or give the frames as pictures"
        ) from None
    limits = limits or VideoLimits()

    def opened(file):
        file.seek(0)
        try:
            # For the container alone: PyAV before 18 crashes when it hands options on to the streams of an FLV.
            return av.open(file, container_options={"format_whitelist": VIDEO_FORMATS})
        except av.FFmpegError as error:
            kinds = f"it is damaged, or none of {VIDEO_FORMATS} ({error.strerror})"
            raise ValueError(f"{kinds}: convert it, or give its frames") from error
        except UnicodeDecodeError as error:
            raise ValueError("its tags are not UTF-8 text: remove them (ffmpeg -map_metadata -1 -c copy)") from error

    def read(items):
        try:
            for item in items:
                if time.monotonic() > limits.end:
                    raise TimeoutError(f"reading it takes more than {VIDEO_SECONDS} seconds: give a part of it")
                yield item
        except av.FFmpegError as error:
            raise ValueError(f"it is damaged ({error.strerror}): convert it, or give its frames") from error

    frames = []
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        # A container need not say how many frames it holds, nor do all find a frame by its time: it is read twice.
        with opened(file) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise ValueError("it has no pictures, or none that FFmpeg can decode")
            packets = [
                (packet.is_keyframe, None if packet.pts is None else float(packet.pts * packet.time_base))
                for packet in read(container.demux(video=0))
                if packet.size and not packet.is_discard
            ]
            rate = container.streams.video[0].average_rate
        # Nothing before the first key frame can be decoded, where a file begins in the middle of a recording.
        packets = packets[next((number for number, (is_key, _) in enumerate(packets) if is_key), 0) :]
        if not packets:
            raise ValueError("it has no frames")
        # A file holds frames in the order of decoding.
        times = None if any(at is None for _, at in packets) else sorted(at for _, at in packets)
        if fps is not None:
            num_frames = max(1, math.floor(_duration(len(packets), times, rate) * fps + 1e-6))
        elif num_frames is None:
            num_frames = NUM_FRAMES
        wanted = sampled(len(packets), num_frames, limits)
        keys = sorted(at for is_key, at in packets if is_key) if times else []
        only_keys = len(packets) > MAX_DECODED_FRAMES and len(keys) >= num_frames
        if only_keys:
            # The last one before each frame; what lies close together has the same one.
            nearest = (bisect.bisect_right(keys, times[index]) - 1 for index in wanted)
            wanted = sorted({max(0, index) for index in nearest})

        def check_size(picture) -> None:
            if len(wanted) * picture.width * picture.height > limits.pixels:
                size = f"{len(wanted)} frames of {picture.width} x {picture.height}"
                raise ValueError(
                    f"{size} are more than {MAX_FRAME_PIXELS:,} pixels in a conversation: ask for fewer (num_frames)"
                )

        with opened(file) as container:
            stream = container.streams.video[0]
            check_size(stream.codec_context)
            stream.thread_type = "AUTO"
            stream.codec_context.skip_frame = "NONKEY" if only_keys else "DEFAULT"
            decoded = (frame for frame in read(container.decode(stream)) if frame.key_frame or not only_keys)
            for index, frame in enumerate(itertools.islice(decoded, wanted[-1] + 1)):
                if index in wanted:
                    check_size(frame)
                    frames.append(frame.to_image().rotate(frame.rotation, expand=True))
    if not frames:
        raise ValueError("none of its frames can be decoded")
    limits.pixels -= sum(frame.width * frame.height for frame in frames)
    shown_at = keys if only_keys else times
    return frames, [shown_at[index] - times[0] for index in wanted[: len(frames)]] if times else None


def _duration(frames: int, times: list[float] | None, rate) -> float:
    """Seconds of a video of so many frames: by their times, whose distances may vary, or else by the frame rate."""
    if times and frames > 1:
        return (times[-1] - times[0]) * frames / (frames - 1)
    if not rate:
        raise ValueError("its frame rate is unknown: ask for num_frames")
    return frames / rate


def video_parts(
    source,
    first: int = 1,
    num_frames: int | None = None,
    fps: float | None = None,
    limits: VideoLimits | None = None,
) -> list[dict]:
    """
    A video as parts of a message: its frames as images, and a text with their numbers, from `first` on, and times.

    `source` is a path or a file's bytes, or the frames: a list of images as the processor takes them, or an array or
    tensor of shape `(frames, height, width, 3)` or `(frames, 3, height, width)`. Of a file, 8 frames are shown, or at
    most `num_frames`, or `fps` of each second; of given frames all, or at most `num_frames`. `limits` are shared by
    the videos of a conversation.

    Raises:
        OSError, ValueError: it cannot be read within the limits, or a number cannot be used.
    """
    limits = limits or VideoLimits()
    if num_frames is not None and not (isinstance(num_frames, Integral) and 0 < num_frames <= MAX_FRAMES):
        raise ValueError(f"{num_frames!r} frames cannot be shown: ask for 1 to {MAX_FRAMES}")
    if fps is not None and not (isinstance(fps, Real) and math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps!r} is no number above 0: say how many frames to show of a second")
    if fps is not None and (num_frames is not None or not isinstance(source, (str, os.PathLike, bytes))):
        raise ValueError("fps is for video files, and in place of num_frames")
    if isinstance(source, bytes) or (isinstance(source, (str, os.PathLike)) and os.path.isfile(source)):
        frames, times = video_frames(source, num_frames, fps, limits)
    elif (isinstance(source, (list, tuple)) or getattr(source, "ndim", 0) == 4) and len(source) > 0:
        wanted = sampled(len(source), len(source) if num_frames is None else num_frames, limits)
        frames, times = [source[index] for index in wanted], None
    else:
        raise ValueError("it is no file, no http(s) address, and no list or 4-dimensional array that holds frames")
    logger.warning_once(
        "A video is shown as pictures of some of its frames. Delta-LLaVA was not trained on videos: check what it "
        "says about movement and order."
    )
    last = first + len(frames) - 1
    text = (
        f"Images {first} to {last} are frames of a video" if last > first else f"Image {first} is a frame of a video"
    )
    if times is not None:
        text += f", at {', '.join(f'{seconds:.1f}' for seconds in times)} seconds"
    return [*({"type": "image", "image": frame} for frame in frames), {"type": "text", "text": f"\n{text}.\n"}]
