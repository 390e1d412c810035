"""`delta-llava app`: a page to show a model pictures, ask about them, and see what each visual-token budget costs.

A conversation lives on the server, as `Turn`s in the state of its browser session: a browser sends the next question
alone. Questions of all users wait in one queue, since one model answers them one after the other.
"""

import contextlib
import html
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from delta_llava.errors import UserError, printable, reason, told

from ..asking import check_question, decode_image, load, located
from ..building import check_chat_template

# Limits of what one conversation may hold, and of what waits for the model.
MAX_FILE_SIZE = "20mb"
MAX_PICTURES = 16
# Of the pictures of a conversation together; Pillow itself takes about as many in one.
MAX_PIXELS = 180_000_000
MAX_QUESTION = 20_000  # characters
MAX_TURNS = 100
MAX_WAITING = 64
MAX_SESSIONS = 256
MAX_REQUEST, MAX_UPLOAD = 1_000_000, 330_000_000  # bytes, of any request and of one that uploads pictures
UPLOAD_PATH = "/gradio_api/upload"
# Of the disk that uploads lie on, which stays free; in bytes.
MIN_FREE = 1_000_000_000
# Uploaded pictures and sheets are looked through this often, and deleted at this age; both in seconds.
CACHE = (600, 7200)


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: what was asked.
        pictures: paths of the pictures that came with it.
        answer: what the model said so far.
        note: counts and speed, shown under the answer.
        problem: why there is no answer. Such a turn is shown, and is no part of what the model reads.
    """

    question: str
    pictures: tuple[str, ...] = ()
    answer: str = ""
    note: str = ""
    problem: str = ""

    @property
    def waits(self) -> bool:
        return not (self.answer or self.note or self.problem)


def taken_up(turns: list[Turn], question: str, pictures: list[str]) -> list[Turn]:
    """The conversation with a question at its end, of a size that a server can keep for many.

    Of what is too long or too many, one more is kept than `check_turns` lets pass; the oldest turns are forgotten.
    """
    return [*turns, Turn(question[: MAX_QUESTION + 1], tuple(pictures[: MAX_PICTURES + 1]))][-MAX_TURNS:]


def answered(turns: list[Turn]) -> list[Turn]:
    """The turns that the model reads again with the next question."""
    return [turn for turn in turns if turn.answer and not turn.problem]


def messages(turns: list[Turn]) -> list[dict]:
    """The conversation for a chat template; pictures are paths. The last turn is the question to answer."""
    conversation = []
    for turn in turns:
        pictures = [{"type": "image", "image": path} for path in turn.pictures]
        conversation.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return conversation[:-1]


def shown(turns: list[Turn]) -> list[dict]:
    """The conversation for Gradio's chat."""
    import gradio as gr

    conversation = []
    for turn in turns:
        pictures = [{"path": path} for path in turn.pictures]
        conversation.append({"role": "user", "content": [*pictures, *filter(None, [turn.question])]})
        if turn.answer:
            conversation.append({"role": "assistant", "content": turn.answer})
        if turn.problem:
            conversation.append({"role": "assistant", "content": f"⚠️ {turn.problem}"})
        if turn.note:
            conversation.append({"role": "assistant", "content": gr.HTML(f"<span class=note>{turn.note}</span>")})
    return conversation


def check_turns(turns: list[Turn]):
    """Raises `UserError` for a question that cannot be asked: it is empty or long, or its pictures are too many."""
    check_question(turns[-1].question)
    if len(turns[-1].question) > MAX_QUESTION:
        raise UserError(f"the question has more than {MAX_QUESTION:,} characters: shorten it")
    count = sum(len(turn.pictures) for turn in turns)
    if count > MAX_PICTURES:
        raise UserError(
            f"the conversation has {count} pictures, more than {MAX_PICTURES}: start a new one, or send fewer"
        )


def opened(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An uploaded picture; errors name it as its user does, and not where the server keeps it."""
    try:
        return decode_image(located(path), path, max_pixels=max_pixels)
    except UserError as error:
        name = printable(Path(path).name, 60)
        if not os.path.exists(path):
            raise UserError(f"{name} is no longer here: start a new conversation, and send it again") from None
        raise UserError(str(error).replace(path, name)) from error


def describe(visual_tokens: int, first: float, tokens: int, seconds: float) -> str:
    """The line under an answer.

    Args:
        visual_tokens: of all pictures of the conversation.
        first: seconds from the question to the answer's first token.
        tokens: of the answer.
        seconds: from its first token to its last.
    """
    parts = [f"{visual_tokens} visual token{'s' * (visual_tokens != 1)}", f"{first:.2f} s to first token"]
    if tokens > 1 and seconds > 0:
        parts.append(f"{(tokens - 1) / seconds:.1f} tokens/s")
    return " · ".join(parts)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Tells what the processor or the model raises as a `UserError`."""
    with told("the model cannot answer", "ask in another way, or start a new conversation"):
        try:
            yield
        except ValueError as error:  # says what to mend in the question, the pictures or the budget
            raise UserError(reason(error)) from error


class Pace(StoppingCriteria):
    """Stops `generate` when told to, and takes the time of its first and its last token."""

    def __init__(self):
        self.stopped = threading.Event()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)


def stream(network, processor, turns: list[Turn], num_visual_tokens: int, max_new_tokens: int) -> Iterator[Turn]:
    """Answers the last turn of a conversation: the turn again and again, with more of its answer, at last with a note.

    Closing the iterator stops the generation.

    Args:
        network: a Delta-LLaVA in evaluation mode.
        processor: its processor.
        turns: what was said before, and the question.
        num_visual_tokens: budget of every picture in the conversation.
        max_new_tokens: longest answer.

    Raises:
        UserError: the question or a picture cannot be used, the budget is not legal, or the prompt is too long.
    """
    start = time.perf_counter()
    check_turns(turns)
    conversation, pixels = messages(turns), MAX_PIXELS
    for message in conversation:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = opened(part["image"], pixels)
                pixels -= part["image"].width * part["image"].height
    has_pictures = any(turn.pictures for turn in turns)
    with explained():
        inputs = processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": num_visual_tokens} if has_pictures else {},
        ).to(network.device)
    pace = Pace()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = ""
    with ThreadPoolExecutor(1) as pool:
        generated = pool.submit(
            network.generate,
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=[pace],
        )
        generated.add_done_callback(lambda _: streamer.end())  # after an error too
        try:
            for piece in streamer:
                answer += piece
                yield replace(turns[-1], answer=answer.strip())
        finally:
            pace.stopped.set()
        with explained():
            output = generated.result()
    prompt = inputs["input_ids"]
    # Whole: the streamer decodes in pieces, which can part the bytes of a letter.
    answer = processor.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    visual_tokens = int((prompt == network.config.image_token_id).sum())
    note = describe(visual_tokens, pace.times[0] - start, len(pace.times), pace.times[-1] - pace.times[0])
    yield replace(turns[-1], answer=answer.strip() or "(no answer)", note=note)


def names_an_address(body: bytes) -> bool:
    """Whether a request's JSON gives an address as a file, which Gradio would download whole.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    found = []
    json.loads(body, object_hook=lambda entry: found.append(str(entry.get("path")).startswith(("http:", "https:"))))
    return any(found)


class Bounded:
    """ASGI middleware: refuses requests that are large, fill the disk, or have files fetched.

    `max_file_size` bounds each file of an upload.

    Args:
        app: what is behind it.
        uploads: folder that uploads lie in.
    """

    def __init__(self, app: Callable, uploads: str):
        self.app, self.uploads = app, uploads
        self.expected = 0  # bytes of the uploads under way

    async def __call__(self, scope: dict, receive: Callable, send: Callable):
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].endswith(UPLOAD_PATH):
            length = Request(scope).headers.get("content-length", "")
            if not length.isascii() or not length.isdigit() or int(length) > MAX_UPLOAD:
                return await PlainTextResponse("the upload is too large, or of no stated size", 413)(
                    scope, receive, send
                )
            if shutil.disk_usage(self.uploads).free - self.expected - int(length) < MIN_FREE:
                return await PlainTextResponse("the disk for uploads is full: try again later", 507)(
                    scope, receive, send
                )
            self.expected += int(length)
            try:
                return await self.app(scope, receive, send)
            finally:
                self.expected -= int(length)
        body = bytearray()
        async for chunk in Request(scope, receive).stream():
            body += chunk
            if len(body) > MAX_REQUEST:
                return await PlainTextResponse("the request is too large", 413)(scope, receive, send)
        try:
            if body and names_an_address(body):
                return await PlainTextResponse("send the picture, not its address", 400)(scope, receive, send)
        except (ValueError, RecursionError):
            return await PlainTextResponse("the request is no JSON", 400)(scope, receive, send)
        waiting = [{"type": "http.request", "body": bytes(body)}]

        async def again() -> dict:
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, again, send)


CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#title p, #chat .note { color: var(--body-text-color-subdued); }
#title p { margin-top: 0; }
#chat { height: calc(100vh - 230px) !important; min-height: 380px; }
#chat .note { font-size: var(--text-sm); }
#chat .placeholder { text-align: center; padding: 1rem; }
#chat [aria-label="Share"], footer { display: none !important; }
@media (max-width: 640px) { .gradio-container .main.fillable { padding: 12px !important; } }
"""
EMPTY = "### Show a picture and ask about it\nDrop pictures into the line below, or click the paper clip."


def build_page(network, processor, name: str, explain: Callable | None = None):
    """The page, as Gradio's `Blocks`.

    Args:
        network: a Delta-LLaVA in evaluation mode.
        processor: its processor.
        name: of the model, for the page's head.
        explain: draws where the model looked, called as
            `explain(network, processor, picture, question, output, [budget])`; without it there is no button.
    """
    import gradio as gr

    budgets = network.config.legal_num_visual_tokens
    trained = network.config.trained_num_visual_tokens
    model_queue = {"concurrency_id": "model", "concurrency_limit": 1}

    def busy():
        return gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)

    def ready():
        return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False)

    def take(message: dict, turns: list[Turn]):
        turns = taken_up(turns, message["text"], message["files"])
        return busy(), turns, shown(turns)

    def take_again(turns: list[Turn]):
        turns = [*turns[:-1], *(Turn(turn.question, turn.pictures) for turn in turns[-1:])]
        return busy(), turns, shown(turns)

    def answer(turns: list[Turn], budget: int, longest: int):
        if not turns or not turns[-1].waits:
            return
        *earlier, question = turns
        turn = question
        try:
            for turn in stream(network, processor, [*answered(earlier), question], budget, longest):
                yield [*earlier, turn], shown([*earlier, turn])
        except UserError as error:
            turn = replace(turn, problem=str(error))
            yield [*earlier, turn], shown([*earlier, turn])

    def explain_last(turns: list[Turn], budget: int):
        pictures = [path for turn in turns for path in turn.pictures]
        try:
            if not pictures:
                raise UserError("there is no picture yet: send one with a question")
            picture = opened(pictures[-1])
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "sheet.png"
                explain(network, processor, picture, turns[-1].question, output, [budget])
                with Image.open(output) as sheet:
                    return gr.Image(sheet.copy(), visible=True)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    def forget():
        return [], [], gr.Image(None, visible=False)

    with gr.Blocks(
        title=f"{name} · Delta-LLaVA", fill_height=True, fill_width=True, analytics_enabled=False, delete_cache=CACHE
    ) as page:
        turns = gr.State([])
        gr.Markdown(
            f"# Delta-LLaVA\n{name} on {network.device.type}, {network.dtype}".replace("torch.", ""), elem_id="title"
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                # Plain text: an answer that is rendered could make the browser fetch what it names.
                chat = gr.Chatbot(
                    show_label=False,
                    render_markdown=False,
                    placeholder=EMPTY,
                    feedback_options=None,
                    buttons=["copy"],
                    elem_id="chat",
                )
                box = gr.MultimodalTextbox(
                    show_label=False,
                    placeholder="Ask about the picture",
                    file_types=["image"],
                    file_count="multiple",
                    autofocus=True,
                    stop_btn=False,
                    elem_id="question",
                )
            with gr.Column(scale=1, min_width=320):
                budget = gr.Radio(
                    budgets,
                    value=network.config.num_visual_tokens,
                    label="Visual tokens per picture",
                    info=f"Trained at {', '.join(map(str, trained))}." if trained else "Fewer are faster.",
                    elem_id="budget",
                )
                longest = gr.Slider(
                    1, 1024, value=256, step=1, label="Longest answer", info="In tokens.", elem_id="longest"
                )
                if explain is not None:
                    look = gr.Button("Where did it look?", elem_id="look")
                    sheet = gr.Image(
                        visible=False,
                        format="png",
                        interactive=False,
                        show_label=False,
                        buttons=["fullscreen", "download"],
                        elem_id="sheet",
                    )
        asking = (answer, [turns, budget, longest], [turns, chat])
        taken = {"queue": False, "show_progress": "hidden"}
        asked = box.submit(take, [box, turns], [box, turns, chat], **taken).then(*asking, **model_queue)
        again = chat.retry(take_again, [turns], [box, turns, chat], **taken).then(*asking, **model_queue)
        for event in (asked, again):
            event.then(ready, None, box, **taken)
        box.stop(ready, None, box, cancels=[asked, again], **taken)
        if explain is not None:
            look.click(explain_last, [turns, budget], sheet, **model_queue)
            chat.clear(forget, None, [turns, chat, sheet], cancels=[asked, again], **taken)
        else:
            chat.clear(lambda: ([], []), None, [turns, chat], cancels=[asked, again], **taken)
    return page.queue(max_size=MAX_WAITING)


def check_address(host: str, port: int):
    """Raises `UserError` if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with told(f"nothing can listen at {printable(host)}, port {port}", "give another --port, or stop what is there"):
        socket.create_server((host, port), family=family).close()


def run_app(
    model: str,
    explain: Callable | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    host: str = "127.0.0.1",
    port: int = 7860,
):
    """`delta-llava app`: serves the page until it is interrupted.

    Args:
        model: folder or Hub id of a Delta-LLaVA.
        explain: as `build_page` takes it.
        revision: branch, tag or commit on the Hub.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (as saved), bfloat16, float16 or float32.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: its port.

    Raises:
        UserError: Gradio is not installed, there is no such model, it is no Delta-LLaVA, or nothing can listen there.
    """
    from transformers.utils import logging

    if find_spec("gradio") is None:
        raise UserError("the app needs Gradio: pip install 'delta-llava[app]'")
    check_address(host, port)
    logging.disable_progress_bar()
    network, processor = load(model, revision, device, dtype)
    if network.config.model_type != "delta_llava":
        raise UserError(f"{model} is of type {network.config.model_type}: only a Delta-LLaVA has budgets to choose")
    check_chat_template(processor, model, messages([Turn("A question?", ("",), "An answer."), Turn("Another?")]))
    # As Ctrl-C does: the page is closed, and what was uploaded deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Read when Gradio is imported: it reports nothing, summarises its last events alone (after each of them anew), and
    # keeps what is uploaded in a folder that goes with the app.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
    with tempfile.TemporaryDirectory(prefix="delta-llava-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import gradio as gr
        from starlette.middleware import Middleware

        theme = gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
        print(f"serving {model} at http://{host}:{port} (stop with Ctrl-C)", flush=True)
        with told(f"{model} cannot be served at port {port}", "give another --port"):
            build_page(network, processor, Path(model).name, explain).launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                footer_links=[],
                max_file_size=MAX_FILE_SIZE,
                state_session_capacity=MAX_SESSIONS,
                enable_monitoring=False,
                run_history=False,
                ssr_mode=False,
                app_kwargs={"middleware": [Middleware(Bounded, uploads=uploads)]},
                theme=theme,
                css=CSS,
            )
