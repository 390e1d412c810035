"""What the Hub's refusals mean for the user, in one line, without a token or a signature in it."""

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from delta_llava.redaction import scrub

TRANSIENT = (408, 429, 500, 502, 503, 504)


def causes(error: BaseException) -> list[BaseException]:
    """`error` and what caused it, outermost first."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def http_response(error: BaseException):
    """The Hub's answer behind `error`, or None when there was none."""
    for cause in causes(error):
        if isinstance(cause, httpx.HTTPError | HfHubHTTPError):
            response = getattr(cause, "response", None)
            if response is not None:
                return response
    return None


def status_of(error: BaseException) -> int | None:
    response = http_response(error)
    return None if response is None else response.status_code


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server's trouble or the connection's, not the user's."""
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error)):
        return False
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return any(isinstance(cause, httpx.TransportError | ConnectionError | TimeoutError) for cause in causes(error))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, if it does so in seconds."""
    response = http_response(error)
    value = response.headers.get("Retry-After") if response is not None else None
    return float(value) if value and value.strip().isdigit() else None


def _server_message(error: BaseException) -> str:
    response = http_response(error)
    if response is not None:
        try:
            message = response.json().get("error")
        except (ValueError, AttributeError):
            message = None
        if isinstance(message, str) and message:
            return message
    innermost = causes(error)[-1]
    text = str(innermost).strip() or type(innermost).__name__
    return text.splitlines()[0]


def one_line(error: BaseException, doing: str, repo_id: str) -> str:
    """What went wrong, where, and what to do next.

    Args:
        error: as raised by huggingface_hub.
        doing: the step, as in "creating the repository".
        repo_id: namespace/name on the Hub.
    """
    status = status_of(error)
    server = _server_message(error)
    namespace = repo_id.split("/")[0]
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes(error)):
        reason = "no token: run `hf auth login`, or set HF_TOKEN to a token that may write"
    elif any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error)):
        reason = "HF_HUB_OFFLINE is set: unset it to publish"
    elif status == 401:
        reason = f"the Hub refuses the token (401, {server}): run `hf auth login`, or set HF_TOKEN to a valid token"
    elif status == 403:
        reason = (
            f"the token may not do this (403, {server}): use a token with write access to {namespace!r}, "
            "from https://huggingface.co/settings/tokens"
        )
    elif status == 404:
        reason = f"not found (404, {server}): check the name, and that the token can see {repo_id}"
    elif status == 412:
        reason = "somebody else has committed meanwhile (412): look at their commit, then run the same command again"
    elif status == 409:
        reason = f"conflict (409, {server}): run the same command again"
    elif status == 413:
        reason = f"too large (413, {server}): write smaller shards (`max_shard_size`)"
    elif status == 429:
        wait = retry_after(error)
        after = f" in {wait:.0f} s" if wait is not None else " later"
        reason = f"the Hub limits the rate of requests (429): run the same command again{after}"
    elif status is not None and status >= 500:
        reason = f"the Hub is in trouble ({status}, {server}): run the same command again; what it holds is not resent"
    elif is_transient(error):
        reason = f"no connection to the Hub ({server}): run the same command again; what it holds is not resent"
    else:
        reason = server if status is None else f"{server} ({status})"
    return " ".join(scrub(f"{repo_id}: {doing} failed: {reason}").split())
