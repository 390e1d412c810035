"""`delta-llava serve`: one model behind OpenAI's `/v1/chat/completions`.

`generate` does the model's work, one request after the other. transformers has a server too, in modules that are no
public interface and differ between its releases; of what clients send, it ignores `temperature` with a model whose
defaults are greedy, fails on `stop` with a processor, and calls an answer that ends at `max_tokens` cut. So requests
and answers are read and written here.
"""

import asyncio
import concurrent.futures
import contextlib
import hmac
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from delta_llava.errors import UserError, printable, reason, told
from delta_llava.threads import in_daemon_thread

try:
    import pydantic  # noqa: F401 - of `reading`
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise UserError(f"serving needs the `{error.name}` package: pip install 'delta-llava[serving]'") from None

import torch
from transformers import StoppingCriteriaList
from transformers.utils import logging

from .. import asking
from ..building import check_chat_template
from ..processing_delta_llava import DOWNLOAD_SECONDS, MAX_DOWNLOAD_BYTES
from .answering import Answer, Ended
from .pictures import FORMATS, Sockets, read_picture
from .reading import ChatRequest, RequestError, VideoPart, address_of, part_for_template, read_request

KEY_VARIABLE = "DELTA_LLAVA_API_KEY"
MAX_BODY_BYTES, BODY_SECONDS = 32 * 2**20, 60
# Pixels of the pictures of a request together; Pillow itself takes about as many in one.
MAX_PIXELS = 180_000_000
# Connections at a time; more are answered with 503.
MAX_CONNECTIONS = 128
# No tokenizer makes fewer tokens of a text than it has characters, divided by this.
CHARACTERS_PER_TOKEN = 32
# How long streams may go on when the server is stopped.
GOODBYE_SECONDS = 5


def refused(request: Request, error: Exception) -> Response:
    """An error as OpenAI's clients read it: `{"error": {"message", "type", "param", "code"}}`."""
    status, param, code, kind = 400, None, None, "invalid_request_error"
    message = str(error)
    if isinstance(error, RequestError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, HTTPException):
        status, message = error.status_code, f"{error.detail}: {request.method} {printable(request.url.path)}"
    elif not isinstance(error, UserError):
        status, kind, message = 500, "server_error", "the server failed; its log says why"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body, status, headers)


def gone(request: Request, error: Exception) -> Response:
    """For a client that hung up; nobody reads it."""
    return Response(status_code=499)


async def in_thread(function: Callable, *arguments):
    """As `asyncio.to_thread`, in a thread of its own that keeps nobody waiting, the end of the process included."""
    return await asyncio.wrap_future(in_daemon_thread(function, *arguments))


async def unless_gone(request: Request, work: Awaitable):
    """What `work` gives; it is cancelled when the client hangs up, which is all that comes from it behind the body."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()
    return working.result()


class Service:
    """
    The routes, around one model.

    Args:
        network: a `DeltaLlavaForConditionalGeneration` in evaluation mode.
        processor: its processor.
        name: how requests call the model.
        max_new_tokens: longest answer, in tokens.
        allowed: folder, resolved, whose pictures requests may name; None for none.
        key: what requests must bring as `Authorization: Bearer ...`; None for nothing.
    """

    def __init__(
        self, network, processor, name: str, max_new_tokens: int, allowed: Path | None = None, key: str | None = None
    ):
        self.network, self.processor, self.name = network, processor, name
        self.max_new_tokens, self.allowed, self.key = max_new_tokens, allowed, key
        self.context = network.config.get_text_config().max_position_embeddings
        ends = network.generation_config.eos_token_id
        self.end_ids = ends if isinstance(ends, list) else [ends]
        vocabulary = processor.tokenizer.get_vocab()
        self.byte_ids = {vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)}
        self.started = int(time.time())
        # One thread each: requests are read, prepared and answered in the order in which they came. Reading keeps the
        # interpreter to itself, so that more threads would be no faster, and would hold more of the memory it takes.
        self.reading = concurrent.futures.ThreadPoolExecutor(1, "reading")
        # Those with videos take long to read and wait for one another alone.
        self.preparing = concurrent.futures.ThreadPoolExecutor(1, "preparing")
        self.watching = concurrent.futures.ThreadPoolExecutor(1, "watching")
        self.answering = concurrent.futures.ThreadPoolExecutor(1, "answering")

    def app(self) -> Starlette:
        handlers = {UserError: refused, HTTPException: refused, ClientDisconnect: gone, Exception: refused}
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
        ]
        return Starlette(routes=routes, exception_handlers=handlers)

    def close(self) -> None:
        """Waits for the threads; what was not begun is dropped."""
        for executor in (self.reading, self.preparing, self.watching, self.answering):
            executor.shutdown(cancel_futures=True)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "delta-llava"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        self._check_key(request)
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self.reading, read_request, await self._body(request))
        if asked.model != self.name:
            message = f"no model {printable(asked.model)!r} here: this server has {self.name!r}"
            raise RequestError(message, 404, param="model", code="model_not_found")
        limit = self._limit(asked)
        files = await unless_gone(request, self._fetch([address_of(part) for part in asked.media]))
        executor = self.watching if any(isinstance(part, VideoPart) for part in asked.media) else self.preparing
        inputs = await unless_gone(request, loop.run_in_executor(executor, self._prepare, asked, files))
        prompt_tokens = inputs["input_ids"].shape[1]
        limit = self._room(prompt_tokens, asked, limit)
        answer = Answer(self._decode, asked.stop, self.end_ids, self.byte_ids)
        self.answering.submit(self._generate, answer, inputs, asked, limit)
        if asked.stream:
            return StreamingResponse(self._events(asked, answer, prompt_tokens), media_type="text/event-stream")
        text = await unless_gone(request, answer.whole())
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
        usage = self._usage(answer, prompt_tokens)
        return JSONResponse({**self._head("chat.completion"), "choices": [choice], "usage": usage})

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise RequestError("no valid API key: send it as `Authorization: Bearer KEY`", 401, code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """The body, within limits of size and time. One that is too large is read to its end, and forgotten."""
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    size += len(piece)
                    if size <= MAX_BODY_BYTES:
                        body += piece
        except TimeoutError:
            raise RequestError(f"the request was not complete after {BODY_SECONDS} seconds", 408) from None
        if size > MAX_BODY_BYTES:
            raise RequestError(f"the request has {size:,} bytes, and may have {MAX_BODY_BYTES:,}", 413)
        return bytes(body)

    def _limit(self, asked: ChatRequest) -> int | None:
        """The longest answer asked for, if one was. Refuses what is too long before anybody works on it."""
        limit = asked.max_tokens or asked.max_completion_tokens
        if limit is not None and limit > self.max_new_tokens:
            message = f"max_tokens is {limit}, and this server's answers have {self.max_new_tokens} tokens at most"
            raise RequestError(message, param="max_tokens")
        if asked.characters > CHARACTERS_PER_TOKEN * self.context:
            message = f"the text has {asked.characters:,} characters, and the model reads {self.context:,} tokens"
            raise RequestError(message, param="messages", code="context_length_exceeded")
        return limit

    def _room(self, prompt_tokens: int, asked: ChatRequest, limit: int | None) -> int:
        """The longest answer there is room for behind the prompt."""
        room = self.context - prompt_tokens
        if room < (limit or 1):
            answer = f", and {limit} for the answer" if limit else ""
            message = (
                f"the prompt has {prompt_tokens:,} tokens{answer}; the model has room for {self.context:,} in all: "
                "shorten the text, show fewer pictures, or give a smaller num_visual_tokens"
            )
            raise RequestError(message, param="messages", code="context_length_exceeded")
        return limit or min(room, self.max_new_tokens)

    async def _fetch(self, addresses: list[str]) -> list[bytes]:
        """The files of a request's pictures and videos, in order, within one limit of size and time."""
        files, size, sockets = [], 0, Sockets()
        try:
            async with asyncio.timeout(DOWNLOAD_SECONDS):
                for address in addresses:
                    files.append(await in_thread(read_picture, address, self.allowed, sockets))
                    size += len(files[-1])
                    if size > MAX_DOWNLOAD_BYTES:
                        raise RequestError(
                            f"the pictures and videos have more than {MAX_DOWNLOAD_BYTES:,} bytes together", 413
                        )
        except TimeoutError:
            address = printable(addresses[len(files)], 100)
            raise RequestError(f"{address} was not there after {DOWNLOAD_SECONDS} seconds", param="messages") from None
        finally:
            sockets.shut()
        return files

    def _prepare(self, asked: ChatRequest, files: list[bytes]):
        """The model's inputs.

        Raises:
            UserError: a picture or video cannot be read, a budget is illegal, or the template cannot show the
                conversation.
        """
        media, pixels = [], MAX_PIXELS
        for number, (part, file) in enumerate(zip(asked.media, files, strict=True), start=1):
            if isinstance(part, VideoPart):
                media.append(file)
            else:
                media.append(asking.decode_image(file, f"picture {number}", FORMATS, pixels))
                pixels -= media[-1].width * media[-1].height
        media = iter(media)
        conversation = [
            {"role": message.role, "content": [part_for_template(part, media) for part in message.content]}
            for message in asked.messages
        ]
        budgets = {} if asked.num_visual_tokens is None else {"num_visual_tokens": asked.num_visual_tokens}
        with told("the conversation cannot be shown to the model", "change it as that says"):
            try:
                return self.processor.apply_chat_template(
                    conversation,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs=budgets,
                    num_frames=asked.num_frames,
                )
            except ValueError as error:  # says what to mend
                raise UserError(reason(error)) from error

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    def _generate(self, answer: Answer, inputs, asked: ChatRequest, limit: int) -> None:
        """Generates an answer, for its readers. Errors are theirs."""
        if answer.abandoned:
            return
        sampling = {"do_sample": False}
        if asked.temperature > 0:
            # transformers would leave all but the 50 likeliest tokens out.
            top_k = self.network.generation_config.top_k or 0
            sampling = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": top_k}
        if asked.seed is None:
            torch.seed()
        else:
            torch.manual_seed(asked.seed)
        try:
            self.network.generate(
                **inputs.to(self.network.device),
                **sampling,
                num_beams=1,
                max_new_tokens=limit,
                streamer=answer,
                stopping_criteria=StoppingCriteriaList([Ended(answer)]),
            )
        except BaseException as error:  # also a panic of the tokenizer, which is no Exception
            answer.finish(error if isinstance(error, Exception) else RuntimeError(reason(error)))
        else:
            answer.finish()

    async def _events(self, asked: ChatRequest, answer: Answer, prompt_tokens: int) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self._head("chat.completion.chunk")

        def event(delta: dict, finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        pieces = answer.pieces()
        try:
            yield event({"role": "assistant", "content": ""})
            async for piece in pieces:
                yield event({"content": piece})
        except Exception as error:
            # The status has been sent: what is left is an event, which OpenAI's clients raise as an error.
            logging.get_logger(__name__).error("An answer failed", exc_info=error)
            message = "the server failed; its log says why"
            yield f"data: {json.dumps({'error': {'message': message, 'type': 'server_error'}})}\n\n"
            return
        finally:
            answer.abandoned = True
        yield event({}, answer.finish_reason)
        if asked.stream_options.include_usage:
            usage = self._usage(answer, prompt_tokens)
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    def _usage(self, answer: Answer, prompt_tokens: int) -> dict:
        written = len(answer.ids)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": written,
            "total_tokens": prompt_tokens + written,
        }


def read_key(file: Path | None) -> str | None:
    """The API key: the content of `file`, else of the environment variable; None if neither is given.

    Raises:
        UserError: the file cannot be read, or the key is empty or no single word of ASCII.
    """
    if file is not None:
        where = str(file)
        with told(f"no API key can be read from {file}", "give a file with the key alone"):
            key = file.read_text(encoding="utf-8").strip()
    else:
        where = KEY_VARIABLE
        key = os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
    if not key or not all("!" <= character <= "~" for character in key):
        raise UserError(f"{where} holds no API key: write letters, digits and signs without spaces into it")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before minutes are spent on loading a model.

    Raises:
        UserError: the port is in use, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with told(f"cannot listen at {host}:{port}", "choose another --port or --host"):
        return socket.create_server((host, port), family=family)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 1024,
    allow_local_media: Path | None = None,
    api_key_file: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Serves a model until it is interrupted.

    Args:
        model: folder or Hub id.
        port: 0 takes a free one.
        name: how requests call the model; by default as `model`.
        max_new_tokens: longest answer of a request, in tokens.
        allow_local_media: folder whose pictures requests may name by path.
        api_key_file: holds the key that requests must bring; by default the variable `DELTA_LLAVA_API_KEY` does.
        say: takes the lines about the address.

    Raises:
        UserError: for anything the user can mend: no such model or device, a port in use, a key that is none.
    """
    key = read_key(api_key_file)
    allowed = None
    if allow_local_media is not None:
        if not allow_local_media.is_dir():
            raise UserError(f"--allow-local-media {allow_local_media} is no folder: name one with pictures")
        allowed = allow_local_media.resolve()
    with listen(host, port) as listener:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        network, processor = asking.load(model, revision, device, dtype)
        if network.config.model_type != "delta_llava":
            raise UserError(f"{model} is of type {network.config.model_type}: give a Delta-LLaVA model")
        check_chat_template(processor, model)
        service = Service(network, processor, name or model, max_new_tokens, allowed, key)
        if key is None and host not in ("127.0.0.1", "::1", "localhost"):
            say(f"anybody who reaches {host} can use this server: set {KEY_VARIABLE} to ask for a key")
        shown = f"[{host}]" if ":" in host else host
        say(f"{service.name} at http://{shown}:{listener.getsockname()[1]}/v1; Ctrl-C stops it")
        config = uvicorn.Config(
            service.app(),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GOODBYE_SECONDS,
        )
        try:
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            service.close()
