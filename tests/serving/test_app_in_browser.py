"""The page of `delta-llava app` in a real browser.

Opt-in: `make test-app`, which makes an environment with Gradio and selenium. Chromium and its driver come from the
system (Debian: `apt-get install chromium chromium-driver`).
"""

import contextlib
import json
import re
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
pytest.importorskip("gradio")
pytest.importorskip("selenium")

from modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor  # noqa: E402
from tests import tiny  # noqa: E402
from tests.serving.browser import NARROW, WIDE, Page, served  # noqa: E402

CAT = Path(__file__).parents[2] / "assets" / "cat.jpg"
LONGEST = 32  # tokens of most answers
NOTE = r"(\d+) visual tokens? · \d+\.\d\d s to first token · \d+\.\d tokens/s"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that never ends an answer by itself, and takes about ten seconds for the longest one."""
    folder = tiny.write_hub_folder(tmp_path_factory.mktemp("hub") / "tiny", text={"num_hidden_layers": 16})
    settings = json.loads((folder / "generation_config.json").read_text())
    del settings["eos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with served(folder, tmp_path_factory.mktemp("server") / "log") as (address, process):
        yield address, psutil.Process(process.pid)


@pytest.fixture
def open_page(server):
    pages = []

    def opened(size=WIDE) -> Page:
        pages.append(Page(server[0], size))
        pages[-1].set_longest(LONGEST)
        return pages[-1]

    yield opened
    for page in pages:
        page.close()


@pytest.fixture
def page(open_page) -> Page:
    return open_page()


@pytest.fixture(scope="module")
def generated(folder):
    """`generate`'s own answer to a question about pictures."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = DeltaLlavaProcessor.from_pretrained(folder)

    def answer(question: str, *pictures: Path, budget: int = 4) -> str:
        content = [{"type": "image", "image": Image.open(path)} for path in pictures]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": budget},
        )
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)
        return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        tiny.picture(path.stem).save(path)
    return paths


def parts(message: str) -> tuple[str, int]:
    """A message as text without its white space, and the visual tokens that its note counts."""
    note = re.search(NOTE, message)
    return "".join(message[: note.start()].split()), int(note[1])


def test_answers_as_generate_does_and_asks_no_other_host(page, generated, pictures, server):
    answer, visual_tokens = parts(page.ask("What is it?", CAT))
    assert answer == "".join(generated("What is it?", CAT).split())
    assert visual_tokens == 4
    assert page.hosts() == {server[0].removeprefix("http://")}
    page.choose(16)
    again, visual_tokens = parts(page.ask("And these?", *pictures))
    assert visual_tokens == 3 * 16
    assert again != answer
    assert page.hosts() == {server[0].removeprefix("http://")}


def test_asking_again_takes_another_budget(page, generated):
    page.ask("What is it?", CAT)
    page.choose(1)
    page.find("#chat [aria-label=Retry]")[-1].click()
    page.until(lambda: page.is_ready() and "1 visual token ·" in page.answers()[-1])
    answer, visual_tokens = parts(page.answers()[-1])
    assert answer == "".join(generated("What is it?", CAT, budget=1).split())
    assert visual_tokens == 1
    assert len(page.find("#chat .user.message")) == 1


def test_errors_are_readable_and_the_page_goes_on(page, generated, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(tiny.encoded(tiny.picture("red", (64, 64)))[:60])
    assert "broken.png is damaged" in page.ask("What is it?", broken)
    assert "context is 512" in page.ask("What? " * 400)
    assert "the question is empty" in page.ask("", CAT)
    assert parts(page.ask("What is it?", CAT))[0] == "".join(generated("What is it?", CAT).split())


def test_explain_draws_a_picture_or_says_why_not(page, server):
    page.find("#look")[0].click()
    page.until(lambda: "there is no picture yet" in page.find(".toast-body")[0].text)
    page.ask("What is it?", CAT)
    page.find("#look")[0].click()
    (sheet,) = page.until(lambda: page.find("#sheet img"))
    page.until(lambda: int(sheet.get_property("naturalWidth")) > 500)
    assert page.hosts() == {server[0].removeprefix("http://")}


def test_no_window_scrolls_sideways(page):
    for size in (WIDE, NARROW):
        page.resize(size)
        assert not page.scrolls_sideways()
    page.ask("What is it? " * 10, CAT)
    page.find("#look")[0].click()
    page.until(lambda: page.find("#sheet img"))
    for size in (WIDE, NARROW):
        page.resize(size)
        assert not page.scrolls_sideways()


def test_clearing_starts_a_new_conversation(page):
    page.ask("What is it?", CAT)
    page.find("#chat [aria-label=Clear]")[0].click()
    page.until(lambda: not page.find("#chat .message"))
    assert parts(page.ask("And this?", CAT))[1] == 4


def works(process: psutil.Process) -> bool:
    """Whether a process computes during half a second."""
    before = process.cpu_times().user
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(0.5)
    return process.cpu_times().user - before > 0.2


def start_a_long_answer(page: Page):
    page.set_longest(1024)
    page.send("What is it?", CAT)
    page.until(lambda: page.answers() and len(page.answers()[-1]) > 20)


def test_the_stop_button_stops_the_model(page, server, generated):
    start_a_long_answer(page)
    assert works(server[1])
    page.find("#question .stop-button")[0].click()
    page.until(page.is_ready)
    page.until(lambda: not works(server[1]), 5)
    assert "tokens/s" not in page.answers()[-1]
    page.set_longest(LONGEST)
    assert parts(page.ask("And this?"))[1] == 4


def test_closing_the_window_stops_the_model(open_page, server):
    page = open_page()
    start_a_long_answer(page)
    assert works(server[1])
    page.driver.get("about:blank")
    page.until(lambda: not works(server[1]), 5)


def test_two_users_get_their_own_answers(open_page, generated, pictures):
    users = [open_page(), open_page()]
    for user, picture in zip(users, pictures, strict=True):
        user.send("What is it?", picture)
    for user, picture in zip(users, pictures, strict=True):
        user.until(lambda user=user: user.is_ready() and "tokens/s" in user.answers()[-1])
        assert parts(user.answers()[-1])[0] == "".join(generated("What is it?", picture).split())
