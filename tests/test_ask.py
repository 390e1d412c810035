"""`delta-llava ask`: answers, one-line errors, exit status 2."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava import asking, processing_delta_llava
from tests.clips import shown, write_clip
from tests.tiny import encoded, picture

SURROGATE = os.fsdecode(b"What \xff?")
CAT = Path(__file__).parents[1] / "assets" / "cat.jpg"


def test_answers_about_a_photograph(hub_folder, capsys):
    assert cli.main(["ask", str(hub_folder), str(CAT), "What is weird here?", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip()


def test_wrong_budget_is_one_line(hub_folder, capsys):
    assert cli.main(["ask", str(hub_folder), str(CAT), "What?", "--num-visual-tokens", "7"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "error: num_visual_tokens=7 is not possible on a 4 x 4 patch grid; choose one of [16, 4, 1]"
    ]


def test_answer_depends_on_picture_and_budget(hub_folder, tmp_path, capsys):
    white = tmp_path / "white.png"
    white.write_bytes(encoded(picture("white")))
    answers = set()
    for path in (white, CAT):
        for budget in ("4", "16"):
            asking.ask(str(hub_folder), "What is it?", [str(path)], budget, max_new_tokens=40)
            answers.add(capsys.readouterr().out)
    assert len(answers) == 4


def test_several_images_with_a_budget_each(hub_folder, capsys):
    asking.ask(str(hub_folder), "Compare.", [str(CAT), str(CAT)], "1,16", max_new_tokens=4)
    assert capsys.readouterr().out.strip()


def test_a_video_is_known_by_what_it_holds(hub_folder, tmp_path, capsys):
    clip, photograph = tmp_path / "clip", tmp_path / "photograph.mp4"
    write_clip(tmp_path / "clip.mp4").rename(clip)
    photograph.write_bytes(CAT.read_bytes())
    command = ["ask", str(hub_folder), str(photograph), str(clip), "What happens?", "--max-new-tokens", "4"]
    assert cli.main([*command, "--num-frames", "3", "--num-visual-tokens", "16,4,4,1"]) == 0
    assert capsys.readouterr().out.strip()
    parts = asking.open_parts([str(photograph), str(clip)], 2)
    assert [part["type"] for part in parts] == ["image", "image", "image", "text"]
    assert [shown(part["image"]) for part in parts[1:3]] == [0, 10]
    assert parts[-1]["text"] == "\nImages 2 to 3 are frames of a video, at 0.0, 1.0 seconds.\n"
    with server(lambda connection: connection.sendall(HEAD + b"\r\n" + clip.read_bytes())) as address:
        assert asking.open_parts([address], 2)[-1]["text"].startswith("\nImages 1 to 2 are frames of a video, at 0.0")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"no video", [], "is not an image, and no video that can be shown: it is damaged, or none of mov"),
        (b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", [], "no video that can be shown: it is damaged, or none of mov"),
        (None, ["--num-visual-tokens", "4,4"], "for each of 8 image"),
        (None, ["--num-frames", "300"], "300 frames cannot be shown: ask for 1 to 256"),
        (None, ["--num-frames", "0"], "--num-frames"),
        (encoded(picture()), ["--num-frames", "2"], "--num-frames is for videos, and there is none: leave it out"),
    ],
)
def test_videos_that_cannot_be_shown(content, options, message, hub_folder, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip.mp4")
    if content is not None:
        clip.write_bytes(content)
    assert cli.main(["ask", str(hub_folder), str(clip), "What happens?", *options]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err.strip().splitlines()[-1]


def test_a_video_without_pyav(hub_folder, tmp_path, capsys, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.main(["ask", str(hub_folder), str(clip), "What happens?"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {clip} is not an image")
    assert "`pip install av` (the extra `video`)" in line


def test_text_alone(hub_folder, capsys):
    asking.ask(str(hub_folder), "Hello?", max_new_tokens=4)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, r"no such image: .*picture"),
        (b"plain text", "not an image, and no video"),
        (encoded(picture((1, 2, 3), (64, 64)), "JPEG")[:400], "damaged"),
        ("folder", "is a folder"),
        ("pipe", "is a pipe, device or socket"),
        ("socket", "is a pipe, device or socket"),
    ],
    ids=["missing", "text", "truncated", "folder", "pipe", "socket"],
)
def test_bad_images(write, message, hub_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("picture.jpg")
    if write == "folder":
        path.mkdir()
    elif write == "pipe":
        os.mkfifo(path)
    elif write == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif write is not None:
        path.write_bytes(write)
    with pytest.raises(UserError, match=message):
        asking.ask(str(hub_folder), "What?", [str(path)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "MODEL /nowhere/at/all does not exist"),
        ("name", "MODEL name does not exist"),
        ("some/body", "MODEL some/body: it is no folder here, and downloading it failed: HF_HUB_OFFLINE is set"),
        ("{tmp}", "no config.json"),
        ("{tmp}/config.json", "is a file"),
    ],
)
def test_bad_models(model, message, tmp_path):
    model = model.format(tmp=tmp_path)
    if model.endswith("config.json"):
        Path(model).write_text("{}")
    with pytest.raises(UserError, match=message):
        asking.ask(model, "What?")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (json.dumps({"model_type": "llava_llama", "mm_vision_tower": "openai/x"}), "delta-llava convert"),
        ("{not json", "not valid JSON"),
        (json.dumps({"model_type": "bert"}), "no usable model"),
        (json.dumps({"model_type": "delta_llava", "num_visual_tokens": 5}), "no usable model.*num_visual_tokens=5"),
    ],
    ids=["training", "broken", "other", "impossible"],
)
def test_bad_configs(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        asking.ask(str(tmp_path), "What?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": str(CAT), "images": []}, "question is missing"),
        ({"num_visual_tokens": "many"}, "not a number"),
        ({"num_visual_tokens": "4,4"}, "for each of 1 image"),
        ({"dtype": "int8"}, "choose one of auto"),
        ({"device": "abacus"}, "abacus"),
        ({"question": "word " * 600}, "context is 512"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"images": ["/dev/zero"]}, "/dev/zero is a pipe, device or socket"),
        ({"question": SURROGATE}, "not UTF-8"),
        ({"question": SURROGATE[5:], "images": []}, "not UTF-8"),
        ({"question": "\ud800"}, "not UTF-8"),
    ],
)
def test_bad_settings(arguments, message, hub_folder):
    with pytest.raises(UserError, match=message):
        asking.ask(**{"model": str(hub_folder), "question": "What?", "images": [str(CAT)], **arguments})


@contextlib.contextmanager
def server(answer):
    """The address of a server whose connections `answer` serves, until it returns or the client goes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(4096)
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/picture.png"
        listening.shutdown(socket.SHUT_RDWR)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


def never_answers(connection):
    connection.recv(1)


def drips_headers(connection):
    connection.sendall(HEAD)
    while True:
        connection.sendall(b"X")
        time.sleep(0.05)


def drips_the_picture(connection):
    connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b"X")
        time.sleep(0.05)


def never_ends(connection):
    connection.sendall(HEAD + b"\r\n")
    while True:
        connection.sendall(bytes(2**16))


def is_cut_short(connection):
    connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\nX")


def redirects(target):
    return lambda connection: connection.sendall(
        b"HTTP/1.1 302 Found\r\nLocation: " + target + b"\r\nContent-Length: 0\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (never_answers, "not complete after 1 seconds"),
        (drips_headers, "not complete after 1 seconds"),
        (drips_the_picture, "not complete after 1 seconds"),
        (never_ends, "larger than 1,000,000 bytes"),
        (is_cut_short, "damaged|not an image"),
        (redirects(b"/again"), "redirect"),
        (redirects(b"file:///etc/passwd"), "cannot be fetched"),
        (redirects(b"ftp://127.0.0.1/picture.png"), "cannot be fetched .*ftp"),
        (lambda connection: connection.sendall(b"nonsense\r\n\r\n"), "cannot be fetched .*nonsense"),
    ],
)
def test_an_address_has_a_time_and_a_size(answer, message, monkeypatch):
    monkeypatch.setattr(processing_delta_llava, "DOWNLOAD_SECONDS", 1)
    monkeypatch.setattr(processing_delta_llava, "MAX_DOWNLOAD_BYTES", 1_000_000)
    begin = time.monotonic()
    with server(answer) as address, pytest.raises(UserError, match=message):
        asking.open_image(address)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (drips_the_picture, "not complete after 1 seconds"),
        (never_ends, "larger than 1,000,000 bytes"),
        (redirects(b"ftp://127.0.0.1/picture.png"), "ftp"),
    ],
)
def test_the_processor_keeps_to_these_limits(answer, message, monkeypatch):
    monkeypatch.setattr(processing_delta_llava, "DOWNLOAD_SECONDS", 1)
    monkeypatch.setattr(processing_delta_llava, "MAX_DOWNLOAD_BYTES", 1_000_000)
    begin = time.monotonic()
    with server(answer) as address, pytest.raises((OSError, ValueError), match=message):
        processing_delta_llava.open_picture(address)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"dtype": "evil"}),
        ("config.json", {"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}}),
        ("config.json", [1]),
        ("processor_config.json", 3),
        ("tokenizer_config.json", [1]),
        ("generation_config.json", [1]),
        ("chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        ("chat_template.jinja", "{{ 1 / 0 }}"),
        ("chat_template.jinja", "{{ raise_exception('no\\n\\x1b[31m' ~ 'a' * 5000) }}"),
        ("config.json", "loop"),
        ("processor_config.json", "loop"),
        ("tokenizer.json", "pipe"),
    ],
    ids=str,
)
def test_hostile_folders_are_refused_in_one_line(name, change, hub_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in hub_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / name).unlink()
    if change == "loop":
        (folder / name).symlink_to(name)
    elif change == "pipe":
        os.mkfifo(folder / name)
    elif name.endswith(".jinja"):
        (folder / name).write_text(change)
    else:
        before = json.loads((hub_folder / name).read_text())
        (folder / name).write_text(json.dumps(before | change if isinstance(change, dict) else change))
    assert cli.main(["ask", str(folder), "What?", "--max-new-tokens", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert error.isprintable()
    assert str(folder) in error
    assert len(error) < len(str(folder)) + 500
