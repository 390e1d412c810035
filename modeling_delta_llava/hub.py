"""The Hub: requests that end in bounded time, trouble that passes outlasted, everything else told in one line."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, parse_ratelimit_headers

from delta_llava.errors import UserError, reason
from delta_llava.redaction import scrub
from delta_llava.threads import in_daemon_thread

SILENCE = 60.0
"""Seconds without a byte, in either direction, after which a request has failed."""
SLOWEST = 1000.0
"""Bytes per second that an answer must bring on average, [`SILENCE`] seconds set aside."""
LARGEST_ANSWER = 100_000_000
"""Bytes of an answer that is held in memory; files are written to the disk as they come."""
LONGEST_WAIT = 60.0
"""Longest pause in seconds that the Hub can ask for."""
ATTEMPTS = 4
FIRST_WAIT = 2.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
# What huggingface_hub raises: answers, connections, a failed upload of a large file, an answer that is no JSON.
HUB_ERRORS = (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError)

Result = TypeVar("Result")


class LongWaitError(RuntimeError):
    """The Hub asks for a longer pause than [`LONGEST_WAIT`]."""


def hub_api() -> HfApi:
    """huggingface_hub's client.

    From now on, this process's requests end after [`SILENCE`] seconds without a byte, when the answer drips
    ([`SLOWEST`]), and when it has no end ([`LARGEST_ANSWER`]).

    The client's own repetitions obey `Retry-After` whatever it says: more than [`LONGEST_WAIT`] is an error now.
    """
    set_client_factory(_client)
    return HfApi(library_name="delta-llava", library_version=version("delta-llava"))


def _client() -> httpx.Client:
    hooks = {"request": [_limit_silence], "response": [_refuse_long_wait, _limit_answer]}
    return _Client(event_hooks=hooks, follow_redirects=True)


class _Client(httpx.Client):
    """A client that waits a limited time for an answer to begin: what comes before, its headers too, may drip."""

    def send(self, request: httpx.Request, *, stream: bool = False, **options) -> httpx.Response:
        if request.method not in ("GET", "HEAD"):  # what is sent may take hours
            return super().send(request, stream=stream, **options)
        sending = in_daemon_thread(partial(super().send, request, stream=True, **options))
        if not wait([sending], timeout=2 * SILENCE).done:
            sending.add_done_callback(_close)
            raise httpx.ReadTimeout(f"no answer within {2 * SILENCE:.0f} seconds", request=request)
        response = sending.result()
        if not stream:
            response.stream.limit = LARGEST_ANSWER
            with contextlib.closing(response):
                response.read()
        return response


def _close(sending: Future) -> None:
    if sending.exception() is None:
        sending.result().close()


def _limit_silence(request: httpx.Request) -> None:
    """Calls such as `model_info` ask for no limit, whatever the client's own is."""
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE)


def _refuse_long_wait(response: httpx.Response) -> None:
    asked = retry_after(response) if response.status_code in TRANSIENT else None
    if asked is not None and asked > LONGEST_WAIT:
        raise LongWaitError(f"the Hub asks to wait for {asked:.0f} s: run the same command again then")


def _limit_answer(response: httpx.Response) -> None:
    response.stream = _BoundedStream(response.stream)


class _BoundedStream(httpx.SyncByteStream):
    """The bytes of an answer, and an error when they come slower than [`SLOWEST`] or are more than `limit`."""

    def __init__(self, stream: httpx.SyncByteStream):
        self.stream, self.limit = stream, math.inf

    def __iter__(self) -> Iterator[bytes]:
        started, size = time.monotonic(), 0
        for piece in self.stream:
            size += len(piece)
            if time.monotonic() - started > SILENCE + size / SLOWEST:
                raise httpx.ReadTimeout(f"the answer comes at less than {SLOWEST:.0f} bytes per second")
            if size > self.limit:
                raise httpx.RemoteProtocolError(f"the answer is longer than {self.limit:,} bytes")
            yield piece

    def close(self) -> None:
        self.stream.close()


def retry_after(response: httpx.Response | None) -> float | None:
    """Seconds that the Hub asks to wait, if it does so in seconds."""
    if response is None:
        return None
    value = response.headers.get("Retry-After", "").strip()
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return float(value) if value.isdigit() else None


def causes(error: BaseException) -> list[BaseException]:
    """`error` and what caused it, outermost first."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def response_of(error: BaseException) -> httpx.Response | None:
    """The Hub's answer behind `error`, or None when there was none."""
    answers = (getattr(cause, "response", None) for cause in causes(error))
    return next((answer for answer in answers if answer is not None), None)


def request_of(error: BaseException) -> str:
    """The address that was asked for when `error` happened; empty when that is not known."""
    for cause in causes(error):
        try:
            return str(cause.request.url)
        except (AttributeError, RuntimeError):  # httpx's own error without a request raises the second
            continue
    return ""


def status_of(error: BaseException) -> int | None:
    response = response_of(error)
    return None if response is None else response.status_code


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server's trouble or the connection's, not the user's."""
    if any(isinstance(cause, OfflineModeIsEnabled | LongWaitError) for cause in causes(error)):
        return False
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return any(isinstance(cause, httpx.TransportError | ConnectionError | TimeoutError) for cause in causes(error))


def call(doing: str, repo_id: str, function: Callable[[], Result], say: Callable[[str], None]) -> Result:
    """Calls `function`, again after trouble that passes: for requests that are safe to repeat.

    Args:
        doing: the step, as in "creating the repository".
        say: receives a line about each pause.

    Raises:
        UserError: what went wrong, in one line.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function()
        except UserError:
            raise
        except HUB_ERRORS as error:
            pause(error, doing, repo_id, attempt, say)
    raise AssertionError("the last attempt returns or raises")


def pause(error: Exception, doing: str, repo_id: str, attempt: int, say: Callable[[str], None]) -> None:
    """Sleeps before the next attempt, or raises a `UserError` when there is none or it would not help."""
    if attempt >= ATTEMPTS or not is_transient(error):
        raise UserError(one_line(error, doing, repo_id)) from error
    seconds = max(FIRST_WAIT * 2 ** (attempt - 1), retry_after(response_of(error)) or 0.0)
    why = status_of(error) or type(error).__name__
    say(f"{doing}: {why}, attempt {attempt + 1} of {ATTEMPTS} in {seconds:.1f} s")
    time.sleep(seconds)


def _server_message(error: BaseException) -> str:
    try:
        message = response_of(error).json().get("error")
    except (ValueError, AttributeError, httpx.StreamError):
        message = None
    return reason(ValueError(message)) if isinstance(message, str) and message else reason(causes(error)[-1])


def one_line(error: BaseException, doing: str, repo_id: str) -> str:
    """What went wrong, where, and what to do next, without a token or a signature.

    Args:
        error: as raised by huggingface_hub.
        doing: the step, as in "creating the repository".
        repo_id: namespace/name on the Hub, with its role (`SOURCE user/model`) if it has one.
    """
    chain = causes(error)
    status, server = status_of(error), _server_message(error)
    again = "run the same command again; what is there already is not sent again"
    by_class = {
        LongWaitError: next((str(cause) for cause in chain if isinstance(cause, LongWaitError)), ""),
        LocalTokenNotFoundError: "no token: run `hf auth login`, or set HF_TOKEN to a token that may write",
        OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and it is not in the cache: unset that",
        GatedRepoError: "access must be asked for on its page, then log in with `hf auth login`",
        RevisionNotFoundError: f"it has no such revision ({status}, {server})",
        RepositoryNotFoundError: f"no such repository, or it is private ({status}): check the name, and log in with "
        "`hf auth login`",
    }
    by_status = {
        401: f"the Hub refuses the token (401, {server}): run `hf auth login`, or set HF_TOKEN to a valid token",
        403: f"the token may not do this (403, {server}): use a token with write access to "
        f"{repo_id.split('/')[0]!r}, from https://huggingface.co/settings/tokens",
        404: f"not found (404, {server}): check the name, and that the token can see {repo_id}",
        409: f"conflict (409, {server}): run the same command again",
        412: "somebody else has committed meanwhile (412): look at their commit, then run the same command again",
        413: f"too large (413, {server}): write smaller shards (`max_shard_size`)",
        429: "the Hub limits the rate of requests (429): run the same command again later",
    }
    known = (text for kind, text in by_class.items() if any(isinstance(cause, kind) for cause in chain))
    what = next(known, by_status.get(status))
    if what is None and status is not None and status >= 500:
        what = f"the Hub is in trouble ({status}, {server}): {again}"
    elif what is None and is_transient(error):
        what = f"no connection to the Hub ({server}): {again}"
    elif what is None:
        what = server if status is None else f"{server} ({status})"
    return " ".join(scrub(f"{repo_id}: {doing} failed: {what}").split())
