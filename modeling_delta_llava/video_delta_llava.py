"""Videos for Delta-LLaVA, which sees pictures only: frames of a video and their times, as the parts of a message."""

import io
import itertools
import math
import os
import time

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Frames of a video file without being asked, and at most; most pixels of all of them; and time to read it.
NUM_FRAMES, MAX_FRAMES, MAX_FRAME_PIXELS, VIDEO_SECONDS = 8, 256, 300_000_000, 60
# Of a video with more frames than this only key frames are looked at, which decode alone.
MAX_DECODED_FRAMES = 5000
# What FFmpeg may open. It opens playlists too, and whatever files and addresses they name.
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf,gif,apng"


def sampled(total: int, num_frames: int) -> list[int]:
    """
    Which of `total` frames to show: at most `num_frames`, evenly spaced from the first one.

    They are those of transformers' `default_sample_indices_fn`, whose oldest supported release leaves out the end.
    """
    if not 0 < num_frames <= MAX_FRAMES:
        raise ValueError(f"{num_frames} frames cannot be shown: ask for 1 to {MAX_FRAMES}")
    count = min(num_frames, total)
    return [index * total // count for index in range(count)]


def video_frames(source: str | os.PathLike | bytes, num_frames: int | None = None, fps: float | None = None):
    """
    Upright frames of a video file (a path, or its bytes), and the seconds at which they are shown, `None` if unknown.

    Raises:
        OSError, ValueError: it cannot be read within the limits above.
    """
    try:
        import av
    except ImportError:
        raise ValueError(
            "PyAV is missing: `pip install av` (the extra `video`), or give the frames as pictures"
        ) from None
    end = time.monotonic() + VIDEO_SECONDS

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
                if time.monotonic() > end:
                    raise TimeoutError(f"reading it takes more than {VIDEO_SECONDS} seconds: give a part of it")
                yield item
        except av.FFmpegError as error:
            raise ValueError(f"it is damaged ({error.strerror}): convert it, or give its frames") from error

    def check_size(picture) -> None:
        if len(wanted) * picture.width * picture.height > MAX_FRAME_PIXELS:
            size = f"{len(wanted)} frames of {picture.width} x {picture.height}"
            raise ValueError(f"{size} are more than {MAX_FRAME_PIXELS:,} pixels: ask for fewer (num_frames)")

    frames = []
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        # A container need not say how many frames it holds, nor do all find a frame by its time: it is read twice.
        with opened(file) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise ValueError("it has no pictures, or none that FFmpeg can decode")
            packets = [
                (packet.is_keyframe, None if packet.pts is None else float(packet.pts * packet.time_base))
                for packet in read(container.demux(video=0))
                if packet.size
            ]
            rate = container.streams.video[0].average_rate
        if not packets:
            raise ValueError("it has no frames")
        if fps is not None:
            if not rate:
                raise ValueError("its frame rate is unknown: ask for num_frames")
            num_frames = math.ceil(len(packets) / rate * fps)
        elif num_frames is None:
            num_frames = NUM_FRAMES
        keys = [packet for packet in packets if packet[0]]
        only_keys = len(packets) > MAX_DECODED_FRAMES and len(keys) >= num_frames
        packets = keys if only_keys else packets
        wanted = sampled(len(packets), num_frames)
        with opened(file) as container:
            stream = container.streams.video[0]
            check_size(stream.codec_context)
            stream.thread_type = "AUTO"
            stream.codec_context.skip_frame = "NONKEY" if only_keys else "DEFAULT"
            shown = (frame for frame in read(container.decode(stream)) if frame.key_frame or not only_keys)
            for index, frame in enumerate(itertools.islice(shown, wanted[-1] + 1)):
                check_size(frame)
                if index in wanted:
                    frames.append(frame.to_image().rotate(frame.rotation, expand=True))
    if not frames:
        raise ValueError("none of its frames can be decoded")
    if any(seconds is None for _, seconds in packets):
        return frames, None
    times = sorted(seconds for _, seconds in packets)  # a file holds its frames in the order of decoding
    return frames, [times[index] - times[0] for index in wanted[: len(frames)]]


def video_parts(source, first: int = 1, num_frames: int | None = None, fps: float | None = None) -> list[dict]:
    """
    A video as parts of a message: its frames as images, and a text with their numbers, from `first` on, and times.

    `source` is a path or a file's bytes, or the frames: a list of images as the processor takes them, or an array or
    tensor of shape `(frames, height, width, 3)` or `(frames, 3, height, width)`. Of a file, 8 frames are shown, or at
    most `num_frames`, or `fps` of each second; of given frames all, or at most `num_frames`.

    Raises:
        OSError, ValueError: it cannot be read within the limits above.
    """
    if fps is not None and (num_frames is not None or not isinstance(source, (str, os.PathLike, bytes))):
        raise ValueError("fps is for video files, and in place of num_frames")
    if isinstance(source, bytes) or (isinstance(source, (str, os.PathLike)) and os.path.isfile(source)):
        frames, times = video_frames(source, num_frames, fps)
    elif (isinstance(source, (list, tuple)) or getattr(source, "ndim", 0) == 4) and len(source) > 0:
        wanted = sampled(len(source), len(source) if num_frames is None else num_frames)
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
