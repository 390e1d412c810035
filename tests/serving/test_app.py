"""The conversation behind the page of `delta-llava app`, without Gradio (test_app_in_browser.py has the page)."""

import asyncio
import importlib.util
import itertools
import json
import shutil
import socket
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava.serving import app
from modeling_delta_llava.serving.app import Turn
from tests import tiny


@pytest.fixture(scope="module")
def network():
    model = tiny.tiny_model()
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Paths of a red and a blue picture."""
    for colour in ("red", "blue"):
        tiny.picture(colour).save(tmp_path / f"{colour}.png")
    return [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]


def test_messages_hold_every_turn(pictures):
    turns = [Turn("One?", (pictures[0],), "first"), Turn("Two?", tuple(pictures))]
    assert app.messages(turns) == [
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "first"}]},
        {
            "role": "user",
            "content": [*({"type": "image", "image": path} for path in pictures), {"type": "text", "text": "Two?"}],
        },
    ]


def test_a_turn_without_answer_is_not_read_again():
    good = Turn("One?", answer="first", note="note")
    assert app.answered([good, Turn("Two?"), Turn("Three?", answer="half", problem="broken")]) == [good]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn(" ")], "empty"),
        ([Turn("a" * 20_001)], "more than 20,000 characters"),
        ([Turn("One?", ("a.png",) * 9, "first"), Turn("Two?", ("a.png",) * 8)], "17 pictures, more than 16"),
    ],
)
def test_questions_that_cannot_be_asked(turns, message):
    with pytest.raises(UserError, match=message):
        app.check_turns(turns)


def test_a_conversation_is_of_bounded_size():
    turns = app.taken_up(
        [Turn(str(number), answer="an answer") for number in range(200)], "a" * 30_000, ["a.png"] * 40
    )
    assert len(turns) == app.MAX_TURNS
    assert [turn.question for turn in turns[:-1]] == [str(number) for number in range(101, 200)]
    assert (len(turns[-1].question), len(turns[-1].pictures)) == (20_001, 17)
    with pytest.raises(UserError, match="more than 20,000 characters"):
        app.check_turns(turns)
    assert app.taken_up([], "What?", ["a.png"]) == [Turn("What?", ("a.png",))]


def test_note_counts_and_times():
    assert app.describe(36, 0.123, 11, 2.0) == "36 visual tokens · 0.12 s to first token · 5.0 tokens/s"
    assert app.describe(1, 0.5, 1, 0.0) == "1 visual token · 0.50 s to first token"


def generated(network, processor, conversation, budget: int, max_new_tokens: int) -> str:
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": budget},
    )
    output = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("budget", [16, 4, 1])
def test_stream_ends_with_the_answer_of_generate(network, processor, pictures, budget):
    turns = [Turn("One?", (pictures[0],), "first"), Turn("Two?", tuple(pictures))]
    streamed = [*app.stream(network, processor, turns, budget, 80)]
    assert streamed[-1].answer == generated(network, processor, app.messages(turns), budget, 80)
    assert streamed[-1].note.startswith(f"{3 * budget} visual tokens · ")
    assert "tokens/s" in streamed[-1].note
    assert all(later.answer.startswith(turn.answer) for turn, later in itertools.pairwise(streamed[:-1]))
    assert len({turn.answer for turn in streamed}) > 3


def test_text_alone_is_answered(network, processor):
    assert [*app.stream(network, processor, [Turn("Hello?")], 4, 3)][-1].note.startswith("0 visual tokens · ")


def test_bad_input_is_a_line(network, processor, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    for turn, budget, message in (
        (Turn("What?", (pictures[0],)), 7, r"num_visual_tokens=7 is not possible.*\[16, 4, 1\]"),
        (Turn("What?", (str(broken),)), 4, "^broken.png is not an image"),
        (Turn("What?", (str(tmp_path / "gone.png"),)), 4, "^gone.png is no longer here"),
        (Turn("What? " * 400, (pictures[0],)), 4, "context is 512"),
        (Turn("What is <image>?", (pictures[0],)), 4, "stands for an image"),
    ):
        with pytest.raises(UserError, match=message):
            [*app.stream(network, processor, [turn], budget, 3)]


def test_pictures_are_bounded_together_before_they_are_decoded(network, processor, pictures, monkeypatch):
    monkeypatch.setattr(app, "MAX_PIXELS", Image.open(pictures[0]).width * Image.open(pictures[0]).height + 10)
    assert [*app.stream(network, processor, [Turn("What?", (pictures[0],))], 4, 3)]
    with pytest.raises(UserError, match=r"^blue.png has .* pixels, and 10 are left"):
        [*app.stream(network, processor, [Turn("What?", tuple(pictures))], 4, 3)]


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/gradio_api/queue/join", {"content-type": "multipart/form-data"}, b"x" * 1_000_001, 413),
        ("/gradio_api/queue/join", {}, b'{"path": "https://example.com/a.png"}', 400),
        ("/gradio_api/queue/join", {}, b"[[[", 400),
        ("/gradio_api/upload", {"content-length": "330000001"}, b"", 413),
        ("/gradio_api/upload", {}, b"", 413),
        ("/gradio_api/upload", {"content-length": "5"}, b"12345", 200),
        ("/gradio_api/queue/join", {}, b"{}", 200),
    ],
)
def test_requests_are_bounded(path, headers, body, status, tmp_path):
    assert answer_of(path, headers, body, tmp_path) == status


def test_uploads_do_not_fill_the_disk(tmp_path, monkeypatch):
    free = app.MIN_FREE + 5
    monkeypatch.setattr(app.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    for content, status in ((b"12345", 200), (b"123456", 507)):
        assert answer_of("/gradio_api/upload", {"content-length": str(len(content))}, content, tmp_path) == status


def answer_of(path: str, headers: dict, body: bytes, uploads) -> int:
    """The status of what the middleware answers, with a page behind it that reads the body."""
    pytest.importorskip("starlette")
    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        assert (await receive())["body"] == body

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": pairs, "query_string": b""}
    asyncio.run(app.Bounded(page, uploads)(scope, receive, send))
    return sent[0]["status"]


def test_an_error_inside_of_generate_ends_the_stream(network, processor, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(network, "generate", fail)
    with pytest.raises(UserError, match=r"the model cannot answer \(out of memory\)"):
        [*app.stream(network, processor, [Turn("What?")], 4, 3)]


def test_closing_the_stream_stops_the_generation(network, processor, pictures):
    settings = network.generation_config.eos_token_id
    network.generation_config.eos_token_id = None
    try:
        threads = threading.active_count()
        stream = app.stream(network, processor, [Turn("What?", (pictures[0],))], 4, 400)
        next(stream)
        steps = []
        hook = network.register_forward_hook(lambda *_: steps.append(1))
        stream.close()
        hook.remove()
        assert threading.active_count() == threads
        assert len(steps) < 200
    finally:
        network.generation_config.eos_token_id = settings


def test_what_cannot_be_served_is_one_line(hub_folder, tmp_path, monkeypatch, capsys):
    def refused(*arguments) -> str:
        assert cli.main(["app", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    found = importlib.util.find_spec
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert refused(hub_folder) == "error: the app needs Gradio: pip install 'delta-llava[app]'"
    monkeypatch.setattr(app, "find_spec", lambda name: found("json"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "nothing can listen at 127.0.0.1, port" in refused(hub_folder, "--port", taken.getsockname()[1])
        free = taken.getsockname()[1]
    port = ("--port", free)
    assert "no config.json" in refused(tmp_path, *port)
    without_weights = shutil.copytree(hub_folder, tmp_path / "without", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no usable model" in refused(without_weights, *port)
    if not torch.cuda.is_available():
        assert "device 'cuda' cannot be used" in refused(hub_folder, "--device", "cuda", *port)
    other = shutil.copytree(hub_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "no usable model" in refused(other, *port)
