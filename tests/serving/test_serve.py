"""`delta-llava serve`: asked by OpenAI's own client, in one process for all tests, and called as an ASGI app."""

import asyncio
import concurrent.futures
import contextlib
import http.server
import json
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor, processing_delta_llava
from modeling_delta_llava.serving import pictures, server
from modeling_delta_llava.serving.answering import Answer
from modeling_delta_llava.serving.reading import ChatRequest, RequestError, read_request
from tests.clips import write_clip
from tests.serving.broken import BROKEN, KEY, NAME, SAID, as_address, body_of, served, shown, shown_video
from tests.tiny import encoded, picture

RED, BLUE = picture("red"), picture("blue", (64, 20))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "shown").mkdir()
    RED.save(folder / "shown" / "red.png")
    BLUE.save(folder / "secret.png")
    (folder / "shown" / "link.png").symlink_to(folder / "secret.png")
    (folder / "shown" / "same.png").symlink_to(folder / "shown" / "red.png")
    return folder / "shown"


@pytest.fixture(scope="module")
def running(hub_folder, tmp_path_factory, media):
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--device", "cpu", "--max-new-tokens", "400", "--allow-local-media", str(media)]
    with served(hub_folder, log, options) as process:
        yield process
        # An interrupt ends it in silence, with a stream that is still open; the log holds the address, a warning
        # about videos if there were any, and no key.
        with openai.OpenAI(base_url=process.url, api_key=KEY, max_retries=0, timeout=60) as client:
            stream = client.chat.completions.create(
                model=NAME, messages=[SAID], max_tokens=400, temperature=2, stream=True
            )
            next(iter(stream))
            process.process.send_signal(signal.SIGINT)
            assert process.process.wait(20) == 0
    address, *warned = log.read_text().strip().splitlines()
    assert KEY not in address
    assert [line.partition(" is shown as")[0] for line in warned] in ([], ["A video"])


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(hub_folder):
    model = DeltaLlavaForConditionalGeneration.from_pretrained(hub_folder).eval()
    return model, DeltaLlavaProcessor.from_pretrained(hub_folder)


def expected(loaded, messages, new_tokens, **processor_kwargs) -> tuple[str, int, int]:
    """The answer of `generate`, and how many tokens prompt and answer have."""
    model, processor = loaded
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options, processor_kwargs=processor_kwargs)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[1], len(ids)


def for_processor(messages: list[dict], images) -> list[dict]:
    images = iter(images)
    converted = []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str):
            parts = [part if part["type"] == "text" else {"type": "image", "image": next(images)} for part in parts]
        converted.append({**message, "content": parts})
    return converted


def streamed(client, **request) -> tuple[str, str, object]:
    """Text, finish reason and usage of a streamed answer."""
    text, finish_reason, usage = "", None, None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(model=NAME, **options, **request):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish_reason = choice.finish_reason or finish_reason
    return text, finish_reason, usage


CONVERSATIONS = {
    "text": ([SAID], []),
    "a picture": (shown(as_address(RED)), [RED]),
    "two pictures": (shown(as_address(RED), as_address(BLUE)), [RED, BLUE]),
    "the other way round": (shown(as_address(BLUE), as_address(RED)), [BLUE, RED]),
    "only a picture": (shown(as_address(BLUE), text=""), [BLUE]),
    "turns": (
        [*shown(as_address(RED)), {"role": "assistant", "content": "One."}, *shown(as_address(BLUE), text="And now?")],
        [RED, BLUE],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_those_of_generate(name, client, loaded):
    messages, images = CONVERSATIONS[name]
    text, prompt_tokens, written = expected(loaded, for_processor(messages, images), 24)
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=24, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (text, "assistant")
    assert choice.finish_reason == ("length" if written == 24 else "stop")
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (prompt_tokens, written, prompt_tokens + written)
    assert streamed(client, messages=messages, max_tokens=24) == (text, choice.finish_reason, answer.usage)


def test_videos(client, loaded, tmp_path):
    clip = write_clip(tmp_path / "clip.mkv").read_bytes()
    part = {"type": "video", "video": clip}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]
    for frames in (1, 3, None):
        as_images = loaded[1].videos_as_images(messages, num_frames=frames)
        text, prompt_tokens, _ = expected(loaded, as_images, 8, num_visual_tokens=1)
        given = {"num_visual_tokens": 1} | ({} if frames is None else {"num_frames": frames})
        answer = client.chat.completions.create(model=NAME, messages=shown_video(clip), max_tokens=8, extra_body=given)
        assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt_tokens), frames


def test_budgets_change_the_prompt_and_the_answer(client, loaded):
    messages, images = CONVERSATIONS["two pictures"]
    told = set()
    for budget in (None, 1, 4, 16, [16, 1], [1, 16]):
        given = {} if budget is None else {"num_visual_tokens": budget}
        text, prompt_tokens, _ = expected(loaded, for_processor(messages, images), 8, **given)
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, extra_body=given)
        assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt_tokens), budget
        told.add((text, prompt_tokens))
    assert {prompt for _, prompt in told} == {base + min(n for _, n in told) - 2 for base in (2, 8, 32, 17)}
    assert len(told) == 5  # without a budget it is 4


def test_stop_strings_end_the_answer_and_are_no_part_of_it(client, loaded):
    text, *_ = expected(loaded, [SAID], 24)
    stop = text[5:8]
    answer = client.chat.completions.create(model=NAME, messages=[SAID], max_tokens=24, stop=[stop, "never said"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24
    assert streamed(client, messages=[SAID], max_tokens=24, stop=stop)[0] == text[: text.index(stop)]


def test_sampling_follows_temperature_and_seed(client, loaded):
    def asked(**sampling) -> str:
        answer = client.chat.completions.create(model=NAME, messages=[SAID], max_tokens=24, **sampling)
        return answer.choices[0].message.content

    greedy, *_ = expected(loaded, [SAID], 24)
    hot = [asked(temperature=1.5, seed=seed) for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1]
    assert len({greedy, *hot}) > 2
    assert asked(temperature=1.5, top_p=1e-6, seed=5) == greedy


def test_many_at_once_one_of_them_bad(client, loaded):
    names = [*CONVERSATIONS][:3]
    answers = {name: expected(loaded, for_processor(*CONVERSATIONS[name]), 16)[0] for name in names}

    def ask(number: int) -> str:
        if number == 7:
            with pytest.raises(openai.BadRequestError, match="picture 1"):
                client.chat.completions.create(model=NAME, messages=shown(as_address(b"broken")), stream=True)
            return "refused"
        messages = CONVERSATIONS[names[number % 3]][0]
        if number % 2:
            return streamed(client, messages=messages, max_tokens=16)[0]
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=16)
        return answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        told = list(pool.map(ask, range(16)))
    assert told == ["refused" if number == 7 else answers[names[number % 3]] for number in range(16)]


def post(url: str, body: bytes, key: str | None = KEY, path: str = "/chat/completions") -> tuple[int, str]:
    """Status and text of an answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("name", BROKEN)
def test_bad_requests_are_refused_with_the_reason(name, running):
    case, status, said = BROKEN[name]
    if "file" in name or name in ("path", "other scheme"):
        said = "no file that may be read"  # this server reads some
    got, text = post(running.url, body_of(case))
    error = json.loads(text)["error"]
    assert (got, error["type"]) == (status, "invalid_request_error")
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500


def test_requests_of_a_broken_size_or_place_are_refused(running):
    assert post(running.url, b" " * (server.MAX_BODY_BYTES + 1))[0] == 413
    assert post(running.url, b"{}", path="/completions")[0] == 404
    assert post(running.url, None)[0] == 405
    for key in (None, "", KEY[:-1], KEY + "x", "\xe9"):
        assert post(running.url, body_of({}), key=key)[0] == 401
    assert json.loads(post(running.url, body_of({}), key="wrong")[1])["error"]["code"] == "invalid_api_key"


def test_the_model_is_listed_and_a_stream_says_that_it_is_done(client, running):
    assert [model.id for model in client.models.list()] == [NAME]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    _, text = post(running.url, body_of({"stream": True}))
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_files_are_read_inside_the_folder_only(client, media, loaded):
    text, *_ = expected(loaded, for_processor(*CONVERSATIONS["a picture"]), 8)
    for address in ("red.png", str(media / "red.png"), (media / "red.png").as_uri(), "same.png", "./../shown/red.png"):
        answer = client.chat.completions.create(model=NAME, messages=shown(address), max_tokens=8)
        assert answer.choices[0].message.content == text, address
    outside = [
        "../secret.png",
        str(media.parent / "secret.png"),
        "link.png",
        "missing.png",
        "",
        ".",
        "\0",
        "/dev/zero",
    ]
    said = set()
    for address in [*outside, "x" * 5000, (media.parent / "secret.png").as_uri()]:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=NAME, messages=shown(address))
        said.add(refused.value.body["message"].partition(" is no file")[2])
    assert said == {" that may be read in the folder that this server shows"}


def test_a_client_that_hangs_up_is_not_waited_for(client, loaded):
    for _ in range(4):
        stream = client.chat.completions.create(
            model=NAME, messages=[SAID], max_tokens=400, temperature=2, stream=True
        )
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).chat.completions.create(
                model=NAME, messages=[SAID], max_tokens=400, temperature=2
            )
    text, *_ = expected(loaded, [SAID], 8)
    answer = client.chat.completions.create(model=NAME, messages=[SAID], max_tokens=8)
    assert answer.choices[0].message.content == text


# The app, called in this process.


def called(app, body: bytes, pause: float = 0, leave_after: int | None = None) -> tuple[int | None, str]:
    """Status and text of what an ASGI app answers to a request for a completion.

    Args:
        pause: seconds until the body comes.
        leave_after: pieces of the answer behind which the client hangs up; 0: without waiting for one.
    """
    sent, left = [], None

    async def call() -> None:
        nonlocal left
        left = asyncio.Event()
        bodies = [{"type": "http.request", "body": body, "more_body": False}]
        if leave_after == 0:
            left.set()

        async def receive() -> dict:
            await asyncio.sleep(pause)
            if bodies:
                return bodies.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)
            if leave_after and len(sent) > leave_after:
                left.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        await app(scope, receive, send)

    with contextlib.suppress(RuntimeError):  # Starlette raises an unknown error again, for the log
        asyncio.run(asyncio.wait_for(call(), 60))
    text = b"".join(message.get("body", b"") for message in sent).decode()
    return (sent[0]["status"] if sent else None), text


@pytest.fixture
def service(loaded):
    service = server.Service(*loaded, NAME, 400)
    yield service
    service.close()


def test_an_answer_that_ends_at_the_limit_is_whole(loaded, monkeypatch):
    """An answer that ended itself is not called cut, also when its end is the last token it could have."""
    model, _ = loaded
    answers = []
    monkeypatch.setattr(server, "Answer", lambda *arguments: answers.append(Answer(*arguments)) or answers[-1])
    with contextlib.closing(server.Service(*loaded, NAME, 400)) as service:
        called(service.app(), body_of({"max_tokens": 12}))
    ids = answers[-1].ids
    monkeypatch.setattr(model.generation_config, "eos_token_id", ids[9])
    length = ids.index(ids[9]) + 1
    with contextlib.closing(server.Service(*loaded, NAME, 400)) as service:
        for limit, reason in ((length, "stop"), (length + 1, "stop"), (length - 1, "length")):
            answer = json.loads(called(service.app(), body_of({"max_tokens": limit}))[1])
            assert answer["choices"][0]["finish_reason"] == reason
            assert answer["usage"]["completion_tokens"] == min(limit, length)


def test_nobody_works_for_those_who_left(service, monkeypatch):
    generate, answers = service.network.generate, []

    def watched(**inputs):
        answers.append(inputs["streamer"])
        return generate(**inputs)

    monkeypatch.setattr(service.network, "generate", watched)
    body = {"max_tokens": 400, "temperature": 2.0, "seed": 0}
    called(service.app(), body_of(body), leave_after=0)
    called(service.app(), body_of({**body, "stream": True}), leave_after=3)
    service.close()
    assert answers, "no answer was begun"
    assert all(len(answer.ids) < 200 for answer in answers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_told_without_its_text(service, monkeypatch, stream):
    def fail(**inputs):
        raise RuntimeError("secret of the machine")

    monkeypatch.setattr(service.network, "generate", fail)
    status, text = called(service.app(), body_of({"stream": stream}))
    assert status == (200 if stream else 500)
    assert '"type": "server_error"' in text or '"type":"server_error"' in text
    assert "secret" not in text
    assert "[DONE]" not in text


def test_what_never_comes_is_not_waited_for(service, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    status, text = called(service.app(), body_of({}), pause=5)
    assert (status, "not complete" in text) == (408, True)
    monkeypatch.setattr(pictures, "is_public", lambda address: True)
    monkeypatch.setattr(server, "DOWNLOAD_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        start = time.monotonic()
        status, text = called(service.app(), body_of({"messages": shown(address)}))
        assert (status, "was not there" in text) == (400, True)
        assert time.monotonic() - start < 5
        # The connection is closed, so that the thread behind it ends too.
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(10)
            while connection.recv(4096):
                pass


def test_what_is_prepared_for_those_who_left_keeps_nobody_waiting(service, monkeypatch):
    prepare, begun = service._prepare, []

    def slow(asked, files):
        begun.append(asked)
        time.sleep(0.5)
        return prepare(asked, files)

    monkeypatch.setattr(service, "_prepare", slow)
    app, start = service.app(), time.monotonic()
    for _ in range(8):
        called(app, body_of({}), leave_after=0)
    assert called(app, body_of({}))[0] == 200
    assert len(begun) < 8
    assert time.monotonic() - start < 3


def test_a_video_keeps_no_other_request_waiting(service, monkeypatch):
    prepare, released = service._prepare, threading.Event()

    def watched(asked, files):
        if files:
            assert released.wait(30)
            raise RequestError("seen")
        return prepare(asked, files)

    monkeypatch.setattr(service, "_prepare", watched)
    app = service.app()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        video = pool.submit(called, app, body_of({"messages": shown_video(b"a video")}))
        assert called(app, body_of({}))[0] == 200
        released.set()
        assert video.result()[0] == 400


def test_pictures_are_bounded_together_before_they_are_decoded(service, monkeypatch):
    monkeypatch.setattr(server, "MAX_PIXELS", RED.width * RED.height + 10)
    assert called(service.app(), body_of({"messages": shown(as_address(RED))}))[0] == 200
    status, text = called(service.app(), body_of({"messages": shown(as_address(RED), as_address(RED))}))
    assert (status, "picture 2 has" in text) == (400, True)


def test_a_seed_is_for_one_request(service):
    def asked(**fields) -> str:
        text = called(service.app(), body_of({"max_tokens": 24, "temperature": 1.5, **fields}))[1]
        return json.loads(text)["choices"][0]["message"]["content"]

    free = {asked(seed=1) and asked() for _ in range(4)}
    assert len(free) > 1


def test_a_panic_of_the_tokenizer_ends_the_request(service, monkeypatch):
    class Panic(BaseException):
        pass

    def fail(**inputs):
        raise Panic

    monkeypatch.setattr(service.network, "generate", fail)
    assert called(service.app(), body_of({}))[0] == 500


# Addresses.


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822")),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "::", "::1")),
        *(
            (address, False)
            for address in (
                "fe80::1",
                "fe80::1%1",
                "fd00::1",
                "fec0::1",
                "64:ff9b:1::7f00:1",
                "::127.0.0.1",
                "ff02::1",
                "::ffff:10.0.0.1",
            )
        ),
        *((address, False) for address in ("2002:7f00:1::", "64:ff9b::7f00:1", "::ffff:127.0.0.1")),
    ],
)
def test_public_addresses(address, public):
    assert pictures.is_public(address) is public


class Redirecting(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/red.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(RED))
        else:
            self.send_response(302)
            self.send_header("Location", {"/file": "file:///etc/passwd"}.get(self.path, "http://127.0.0.2:9/"))
            self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_address[1]}"
        site.shutdown()


def test_redirections_are_looked_at_too(site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nothing goes through
    monkeypatch.setattr(pictures, "is_public", lambda address: address == "127.0.0.1")
    assert pictures.read_picture(f"{site}/red.png", None) == encoded(RED)
    for path, said in (("/away", "127.0.0.2 is no host of the public internet"), ("/file", "file")):
        with pytest.raises(UserError, match=said):
            pictures.read_picture(site + path, None)


def test_a_name_is_as_private_as_any_of_its_addresses(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
    for scheme in ("http", "https"):
        with pytest.raises(UserError, match=r"rebinding\.test is no host of the public internet"):
            pictures.read_picture(f"{scheme}://rebinding.test/x.png", None)


def test_downloads_are_bounded(site, monkeypatch):
    monkeypatch.setattr(pictures, "is_public", lambda address: True)
    monkeypatch.setattr(processing_delta_llava, "MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(UserError, match="larger than 10 bytes"):
        pictures.read_picture(f"{site}/red.png", None)


# Requests, without a server.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "surprise"]), JSON, max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64) | FIELDS.map(body_of) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_read_or_refused_in_one_line(body):
    try:
        asked, refused = read_request(body), None
    except RequestError as error:
        asked, refused = None, error
    if refused is None:
        assert asked.messages[-1].role == "user"
        assert 0 <= asked.temperature <= 2
    else:
        assert str(refused).isprintable()
        assert len(str(refused)) <= 300
        assert refused.status == 400


def test_values_are_bounded_before_they_are_read():
    with pytest.raises(RequestError, match="more than 500,000 commas and brackets"):
        read_request(b"[" + b"{}," * 250_001 + b"{}]")


def test_null_and_neutral_values_are_those_left_out():
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "user": "me"}
    nothing = {"tools": None, "seed": None, "temperature": None, "stop": None, "response_format": None}
    asked = read_request(body_of({**neutral, **nothing}))
    assert (asked.temperature, asked.stop, asked.seed) == (0, [], None)


# The command.


def error_of(capsys, *arguments) -> str:
    assert cli.main(["serve", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert captured.out == ""
    return line


def test_what_cannot_be_served_is_one_line(hub_folder, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = error_of(capsys, hub_folder, "--port", taken.getsockname()[1])
    assert "Address already in use" in line
    assert "cannot listen at 203.0.113.7" in error_of(capsys, hub_folder, "--host", "203.0.113.7")
    assert "MODEL" in error_of(capsys, tmp_path / "missing", "--port", 0)
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    for file in hub_folder.iterdir():
        if file.suffix in (".json", ".jinja"):
            (weightless / file.name).write_bytes(file.read_bytes())
    assert "no usable model" in error_of(capsys, weightless, "--port", 0)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "no usable model" in error_of(capsys, other, "--port", 0)
    if not torch.cuda.is_available():
        assert "device 'cuda' cannot be used" in error_of(capsys, hub_folder, "--port", 0, "--device", "cuda")
    assert "--allow-local-media" in error_of(capsys, hub_folder, "--allow-local-media", tmp_path / "missing")
    assert "no API key" in error_of(capsys, hub_folder, "--api-key-file", tmp_path / "missing")
    for key in ("", "two words", "k\xe9y"):
        monkeypatch.setenv(server.KEY_VARIABLE, key)
        line = error_of(capsys, hub_folder)
        assert "DELTA_LLAVA_API_KEY holds no API key" in line
        assert not key or key not in line


def test_key_of_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.setenv(server.KEY_VARIABLE, "of-the-environment")
    (tmp_path / "key").write_text("of-the-file\n")
    assert server.read_key(tmp_path / "key") == "of-the-file"
    assert server.read_key(None) == "of-the-environment"


def test_a_missing_package_is_named(hub_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "modeling_delta_llava.serving.server")
    assert "pip install 'delta-llava[serving]'" in error_of(capsys, hub_folder)
