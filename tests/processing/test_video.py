"""Videos in chats: which frames of which files are shown, that they are pictures like any others, and their limits."""

import http.server
import re
import shutil
import socket
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.dynamic_module_utils import get_imports
from transformers.video_utils import load_video

from modeling_delta_llava import processing_delta_llava, video_delta_llava
from modeling_delta_llava.building import read_chat_template
from modeling_delta_llava.video_delta_llava import video_frames, video_parts
from tests import tiny
from tests.clips import frame, shown, write_clip, write_sound, write_timed_clip

ASKED = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
QUESTION = {"type": "text", "text": "What happens?"}
EIGHT_OF_TWENTY = [0, 2, 5, 7, 10, 12, 15, 17]
TIMES = "Images 1 to 8 are frames of a video, at 0.0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7 seconds."
FILES = {
    "h264.mp4": {"codec": "libx264"},
    "h264.mkv": {"codec": "libx264"},
    "h264.avi": {"codec": "libx264"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "wmv2.wmv": {"codec": "wmv2"},
    "flv1.flv": {"codec": "flv"},
    "animated.gif": {"codec": "gif"},
    "animated.apng": {"codec": "apng"},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def chat(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, QUESTION]}]


def video(source, key: str = "video") -> dict:
    return {"type": "video", key: source}


def of_message(messages: list[dict]) -> tuple[list, str]:
    """The images of a message, and its text."""
    parts = messages[0]["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    return images, "".join(part["text"] for part in parts if part["type"] == "text")


@pytest.mark.parametrize("name", FILES)
def test_frames_of_every_kind_of_file(name, tmp_path, processor):
    path = write_clip(tmp_path / name, **FILES[name])
    images, text = of_message(processor.videos_as_images(chat(video(str(path)))))
    assert [shown(image) for image in images] == EIGHT_OF_TWENTY
    assert {image.size for image in images} == {(64, 48)}
    assert text == f"\n{TIMES}\nWhat happens?"


@pytest.mark.parametrize("number", [1, 3, 8, 20])
def test_the_frames_are_those_of_transformers(number, clip):
    expected, _ = load_video(str(clip), num_frames=number)
    frames, _ = video_frames(clip, num_frames=number)
    np.testing.assert_array_equal(np.stack(frames), expected)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_a_turned_video_is_shown_upright(angle, tmp_path):
    corner = Image.new("RGB", (64, 48), "white")
    corner.paste("black", (0, 0, 32, 24))
    path = write_clip(tmp_path / "turned.mp4", [corner], turned=angle)
    (image,), _ = video_frames(path)
    expected = corner.rotate(angle, expand=True)
    assert image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 5


@pytest.fixture(scope="module")
def address(clip):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(clip.read_bytes())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/clip"
        server.shutdown()


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "plain"])
@pytest.mark.parametrize("key", ["video", "url", "path", "bytes"])
def test_a_video_is_its_frames_given_as_pictures(key, template, clip, address, processor):
    template = read_chat_template(template)
    sources = {"video": clip, "url": address, "path": str(clip), "bytes": clip.read_bytes()}
    messages = chat(video(sources[key], "video" if key == "bytes" else key))
    inputs = processor.apply_chat_template(messages, chat_template=template, **ASKED)
    frames, _ = video_frames(clip)
    pictures = [{"type": "image", "image": image} for image in frames]
    same = chat(*pictures, {"type": "text", "text": f"\n{TIMES}\n"})
    expected = processor.apply_chat_template(same, chat_template=template, **ASKED)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 8 * 4
    assert messages == chat(video(sources[key], "video" if key == "bytes" else key))  # as the user gave them


def test_given_frames_are_shown_as_they_are(tmp_path, processor):
    pictures = [frame(index) for index in range(3)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    array = np.stack(pictures)
    given = [pictures, tuple(pictures), list(map(str, paths)), paths, list(array), array, torch.tensor(array)]
    given += [array.transpose(0, 3, 1, 2), torch.tensor(array).permute(0, 3, 1, 2)]
    outputs = [processor.apply_chat_template(chat(video(frames)), **ASKED) for frames in given]
    text = processor.tokenizer.decode(outputs[0]["input_ids"][0])
    assert "Images 1 to 3 are frames of a video.\nWhat happens?" in text
    for output in outputs:
        assert torch.equal(output["input_ids"], outputs[0]["input_ids"])
        assert torch.equal(output["pixel_values"], outputs[0]["pixel_values"])


def test_given_frames_may_differ_in_size_and_be_sampled(processor):
    frames = [frame(index, (20 + index, 30)) for index in range(20)]
    images, text = of_message(processor.videos_as_images(chat(video(frames)), num_frames=8))
    assert images == [frames[index] for index in EIGHT_OF_TWENTY]
    assert text.startswith("\nImages 1 to 8 are frames of a video.\n")
    assert processor.apply_chat_template(chat(video(frames)), **ASKED)["pixel_values"].shape[0] == 20


def test_images_are_numbered_within_their_message(clip, processor):
    picture = {"type": "image", "image": frame(0)}
    content = chat(picture, video(clip), picture, video([frame(1)]))
    text = processor.apply_chat_template(content, add_generation_prompt=True, num_frames=2)
    lines = (
        "Images 2 to 3 are frames of a video, at 0.0, 1.0 seconds.\n\nImage 5 is a frame of a video.\nWhat happens?"
    )
    assert f"USER: {'<image>' * 5}\n{lines} ASSISTANT:" in text


def test_templates_that_keep_the_order_of_parts(clip, processor):
    template = "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}"
    messages = [{"role": "user", "content": [QUESTION, video(clip), QUESTION]}]
    text = processor.apply_chat_template(messages, chat_template=template, num_frames=2)
    frames = "<image><image>\nImages 1 to 2 are frames of a video, at 0.0, 1.0 seconds.\n"
    assert text == f"What happens?{frames}What happens?"


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 8),
        ({"num_frames": 3}, 3),
        ({"num_frames": 50}, 20),
        ({"fps": 2}, 4),
        ({"fps": 0.1}, 1),
        ({"processor_kwargs": {"num_frames": 3}}, 3),
        ({"processor_kwargs": {"videos_kwargs": {"fps": 1}}}, 2),
        ({"num_frames": 3, "processor_kwargs": {"num_visual_tokens": 4}}, 3),
    ],
    ids=str,
)
def test_the_number_of_frames(options, number, clip, processor):
    output = processor.apply_chat_template(chat(video(clip)), **ASKED, **options)
    assert output["pixel_values"].shape[0] == number


def test_budgets_for_all_frames_and_for_each(clip, processor):
    messages = chat({"type": "image", "image": frame(0)}, video(clip))

    def image_tokens(budgets):
        options = {"num_frames": 3, "processor_kwargs": {"num_visual_tokens": budgets}}
        return (processor.apply_chat_template(messages, **ASKED, **options)["input_ids"] == 448).sum()

    assert image_tokens(1) == 4
    assert image_tokens([16, 4, 1, 1]) == 22
    with pytest.raises(ValueError, match="for each of 4 image"):
        image_tokens([16, 4])


def test_batches_and_several_turns(clip, processor):
    turns = [*chat(video(clip)), {"role": "assistant", "content": "Grey."}, *chat(video(clip))]
    batch = [turns, chat(), chat(video(clip))]
    output = processor.apply_chat_template(batch, **ASKED, num_frames=2, processor_kwargs={"padding": True})
    assert (output["input_ids"] == processor.image_token_id).sum(-1).tolist() == [16, 0, 8]
    assert output["pixel_values"].shape[0] == 6


def test_an_answer_is_continued(clip, processor):
    messages = [*chat(video(clip)), {"role": "assistant", "content": [{"type": "text", "text": "It gets"}]}]
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("ASSISTANT: It gets")


def test_pipeline(clip, processor):
    pipe = pipeline("image-text-to-text", model=tiny.tiny_model(), processor=processor)
    messages = chat(video(str(clip), "path"))
    options = {"max_new_tokens": 4, "num_frames": 3, "processor_kwargs": {"num_visual_tokens": 1}}
    (answer,) = pipe(text=messages, **options)
    pictures = processor.videos_as_images(messages, num_frames=3)
    (same,) = pipe(text=pictures, max_new_tokens=4, processor_kwargs={"num_visual_tokens": 1})
    assert answer["generated_text"][-1] == same["generated_text"][-1]
    assert answer["generated_text"][:-1] == messages
    assert [row[0]["generated_text"][-1] for row in pipe(text=[messages, messages], **options)] == [
        same["generated_text"][-1]
    ] * 2
    started = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "It"}]}]
    assert pipe(text=started, **options)[0]["generated_text"][-1]["content"][0]["text"].startswith("It")


def test_of_a_long_video_only_key_frames_are_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mkv", 24, codec="libx264", g="4", keyint_min="4", sc_threshold="0")
    assert [shown(image) for image in video_frames(path, num_frames=5)[0]] == [0, 4, 9, 14, 19]
    monkeypatch.setattr(video_delta_llava, "MAX_DECODED_FRAMES", 20)
    frames, times = video_frames(path, num_frames=5)
    assert [shown(image) for image in frames] == [0, 4, 8, 12, 16]
    assert times == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    # With too few of them, all frames are decoded as in a short one.
    assert [shown(image) for image in video_frames(path, num_frames=8)[0]] == [0, 3, 6, 9, 12, 15, 18, 21]


def test_times_are_those_of_the_frames_whatever_the_distances(tmp_path):
    path = write_timed_clip(tmp_path / "screen.mkv", [0, 100, 200, 300, 400, 500, 600, 9000])
    frames, times = video_frames(path, num_frames=4)
    assert [shown(image) for image in frames] == [0, 2, 4, 6]
    assert times == pytest.approx([0, 0.2, 0.4, 0.6])
    assert len(video_frames(path, fps=0.5)[0]) == 5  # of 10.3 seconds, as 8 frames 9 seconds apart last so long


def test_what_an_edit_list_cuts_off_is_not_counted(tmp_path):
    path = write_timed_clip(tmp_path / "trimmed.mp4", [100 * index - 1200 for index in range(24)])
    frames, times = video_frames(path, num_frames=6)
    assert [shown(image) for image in frames] == [12, 14, 16, 18, 20, 22]
    assert times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_a_recording_that_begins_between_key_frames(tmp_path):
    whole = write_clip(tmp_path / "whole.ts", 24, codec="libx264", g="12", bf="0").read_bytes()
    packets = [whole[start : start + 188] for start in range(0, len(whole), 188)]
    path = tmp_path / "cut.ts"
    path.write_bytes(b"".join(packets[:2] + packets[6:]))  # the first two say what the file holds
    frames, times = video_frames(path, num_frames=8)
    numbers = [shown(image) for image in frames]
    assert len(numbers) == 8
    assert numbers[0] >= 12
    assert times == pytest.approx([(number - numbers[0]) / 10 for number in numbers])


def test_the_videos_of_a_conversation_share_the_limits(clip, processor, monkeypatch):
    twice = [*chat(video(clip)), {"role": "assistant", "content": "Grey."}, *chat(video(clip))]
    monkeypatch.setattr(video_delta_llava, "MAX_FRAMES", 15)
    assert processor.videos_as_images(twice, num_frames=7)
    with pytest.raises(ValueError, match=r"Message 3 has a video .* 8 frames cannot be shown"):
        processor.videos_as_images(twice)
    monkeypatch.setattr(video_delta_llava, "MAX_FRAME_PIXELS", 64 * 48 * 13)
    with pytest.raises(ValueError, match=r"Message 3 has a video .* more than 39,936 pixels in a conversation"):
        processor.videos_as_images(twice, num_frames=7)


OPTIONS = {
    "frames without a video": ([QUESTION], {"num_frames": 2}, "num_frames and fps are for videos"),
    "rate without a video": ([QUESTION], {"processor_kwargs": {"fps": 2}}, "num_frames and fps are for videos"),
    "frames of the part": ([{"type": "video", "path": "a.mp4", "num_frames": 2}], {}, "'num_frames'"),
    "all frames": ([{"type": "video", "path": "a.mp4"}], {"do_sample_frames": False}, "do_sample_frames"),
    "half a frame": (
        [{"type": "video", "path": "a.mp4"}],
        {"num_frames": 2.5},
        "2.5 frames cannot be shown",
    ),
    "a rate in words": ([{"type": "video", "path": "a.mp4"}], {"fps": "2"}, "fps='2' is no number above 0"),
    "an endless rate": ([{"type": "video", "path": "a.mp4"}], {"fps": float("inf")}, "fps=inf is no number above 0"),
}


@pytest.mark.parametrize(("content", "options", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_are_used_or_refused(content, options, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([{"role": "user", "content": content}], **options)


def test_none_stands_for_an_option_left_out_and_servers_parts_are_known(clip, processor):
    messages = chat({"type": "video_url", "video_url": {"url": str(clip)}})
    text = processor.apply_chat_template(messages, num_frames=None, processor_kwargs={"num_frames": 3})
    assert "Images 1 to 3 are frames" in text


def write_playlist(path):
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{path.parent / 'secret.ts'}\n#EXT-X-ENDLIST\n")
    write_clip(path.parent / "secret.ts", codec="mpeg2video")


def write_script(path):
    write_clip(path.parent / "secret.mp4")
    path.write_text("ffconcat version 1.0\nfile secret.mp4\n")


BROKEN = {
    "text": (lambda path: path.write_text("no video\n"), "damaged, or none of mov,"),
    "nothing": (lambda path: path.touch(), "damaged, or none of mov,"),
    "a picture": (lambda path: frame(1).save(path, "PNG"), "damaged, or none of mov,"),
    "a playlist": (write_playlist, "none of mov,"),
    "a script": (write_script, "none of mov,"),
    "sound": (lambda path: shutil.move(write_sound(path.with_suffix(".m4a")), path), "it has no pictures"),
    "no frames": (
        lambda path: shutil.move(write_clip(path.with_suffix(".avi"), 0), path),
        "it has no frames",
    ),
    "cut short": (lambda path: path.write_bytes(write_clip(path.with_suffix(".mp4")).read_bytes()[:600]), "damaged"),
    "missing": (lambda path: None, "it is no file, no http"),
    "a folder": (lambda path: path.mkdir(), "it is no file, no http"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_video(name, tmp_path, processor):
    path = tmp_path / "clip"
    write, message = BROKEN[name]
    write(path)
    with pytest.raises(
        ValueError, match=rf"Message 1 has a video \({path}\) that cannot be shown: .*({message})"
    ) as told:
        processor.apply_chat_template(chat(video(str(path))), **ASKED)
    assert "\n" not in str(told.value)


UNUSABLE = {
    "nothing": ({}, {}, r"\(NoneType\) that cannot be shown: it is no file"),
    "no frame": ({"video": []}, {}, "array that holds frames"),
    "an empty array": ({"video": np.zeros((0, 8, 8, 3), np.uint8)}, {}, "array that holds frames"),
    "one picture": ({"video": frame(1)}, {}, r"\(Image\) that cannot be shown: it is no file"),
    "one array": ({"video": np.zeros((8, 8, 3), np.uint8)}, {}, "4-dimensional"),
    "both": ({"path": "clip"}, {"num_frames": 2, "fps": 1}, "in place of num_frames"),
    "fps of frames": ({"video": [frame(1)]}, {"fps": 1}, "fps is for video files"),
    "no frames asked for": ({"video": [frame(1)]}, {"num_frames": 0}, "ask for 1 to 256"),
    "a negative rate": ({"path": "clip"}, {"fps": -1}, "fps=-1 is no number above 0"),
    "no number": ({"path": "clip"}, {"fps": float("nan")}, "fps=nan is no number above 0"),
    "too many frames": ({"path": "clip"}, {"num_frames": 257}, "257 frames cannot be shown: ask for 1 to 256"),
    "too many given": ({"video": [frame(1)] * 257}, {}, "257 frames cannot be shown: a conversation has 1 to 256"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_videos_that_cannot_be_shown(name, clip, processor):
    part, options, message = UNUSABLE[name]
    part = {key: str(clip) if value is not None and key == "path" else value for key, value in part.items()}
    with pytest.raises(ValueError, match=rf"Message 1 has a video .*{message}"):
        processor.apply_chat_template(chat({"type": "video", **part}), **ASKED, **options)


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("VIDEO_SECONDS", -1, "more than -1 seconds"),
        ("MAX_FRAME_PIXELS", 64 * 48 * 8 - 1, "8 frames of 64 x 48 are more than 24,575 pixels in a conversation"),
    ],
)
def test_time_and_pixels_are_bounded(name, limit, message, clip, monkeypatch):
    monkeypatch.setattr(video_delta_llava, name, limit)
    with pytest.raises((ValueError, TimeoutError), match=message):
        video_frames(clip)


def test_an_address_that_never_answers(processor, monkeypatch):
    monkeypatch.setattr(processing_delta_llava, "SILENT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/clip.mp4"
        with pytest.raises(
            ValueError, match=rf"has a video \({re.escape(address)}\) that cannot be shown: .*timed out"
        ):
            processor.apply_chat_template(chat(video(address, "url")), **ASKED)


def test_without_pyav(clip, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"PyAV is missing: `pip install av` \(the extra `video`\)"):
        processor.apply_chat_template(chat(video(clip)), **ASKED)
    assert processor.apply_chat_template(chat(video([frame(1)])), **ASKED)["pixel_values"].shape[0] == 1


def test_code_from_the_hub_loads_without_pyav():
    assert "av" not in get_imports(video_delta_llava.__file__)


def test_sound_is_refused(clip, processor):
    with pytest.raises(ValueError, match="hears no sound: leave load_audio_from_video out"):
        processor.apply_chat_template(chat(video(clip)), **ASKED, load_audio_from_video=True)


def test_only_users_show_videos(clip, processor):
    messages = [*chat(), {"role": "assistant", "content": [video(clip)]}]
    with pytest.raises(Exception, match="A part of type image cannot be shown here"):
        processor.apply_chat_template(messages)


def test_what_no_training_saw_is_said_once(caplog):
    video_delta_llava.logger.warning_once.cache_clear()
    for _ in range(2):
        video_parts([frame(1)])
    assert [record.message for record in caplog.records if "not trained on videos" in record.message] != []
    assert len(caplog.records) == 1
