"""The body of a `POST /v1/chat/completions`: every field is used, or refused by name."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from delta_llava.errors import UserError, printable

MAX_PICTURES = 32
MAX_STOPS = 4
# Messages, parts of one, and budgets.
MAX_ITEMS = 1000
# Commas and opening brackets, those in texts included: each may begin a value, of some hundred bytes in memory.
MAX_SIGNS = 500_000


class RequestError(UserError):
    """A request that cannot be answered, with the HTTP status and OpenAI's `param` and `code` of the answer to it."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _Object(BaseModel):
    """A JSON object without fields that are not named here. Values are not converted; null is a field left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given):
        return (
            {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given
        )


class Address(_Object):
    url: str
    detail: Literal["auto"] = "auto"


class TextPart(_Object):
    type: Literal["text"]
    text: str


class ImagePart(_Object):
    type: Literal["image_url"]
    image_url: Address


class VideoPart(_Object):
    type: Literal["video_url"]
    video_url: Address


class Message(_Object):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]],
        FailFast(),
        Field(max_length=MAX_ITEMS),
    ]

    @field_validator("content", mode="before")
    @classmethod
    def _string_is_one_text(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @model_validator(mode="after")
    def _says_something(self):
        has_pictures = any(not isinstance(part, TextPart) for part in self.content)
        if has_pictures and self.role != "user":
            raise ValueError(f"only users show pictures and videos, and this message is from {self.role}")
        if not has_pictures and not any(part.text.strip() for part in self.content):
            raise ValueError("the message has neither text nor picture nor video")
        return self


class StreamOptions(_Object):
    include_usage: bool = False


class ChatRequest(_Object):
    """OpenAI's fields, where they have a meaning here, and two of ours.

    `num_visual_tokens` is one budget, or a list with one for each picture and frame; `num_frames` says how many frames
    of each video are shown at most.

    `n`, the penalties and `logprobs` may be given with the value that changes nothing, as many clients do.
    """

    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_ITEMS)]
    num_visual_tokens: int | list[int] | None = None
    num_frames: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    n: Literal[1] = 1
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    logprobs: Literal[False] = False

    @field_validator("num_visual_tokens", mode="before")
    @classmethod
    def _budgets_are_few(cls, budgets):
        if isinstance(budgets, list) and len(budgets) > MAX_ITEMS:
            raise ValueError(f"{len(budgets)} budgets, and a request may have {MAX_ITEMS}")
        return budgets

    @field_validator("stop", mode="before")
    @classmethod
    def _string_is_one_stop(cls, stop):
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _consistent(self):
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be from the user")
        if len(self.media) > MAX_PICTURES:
            raise ValueError(f"{len(self.media)} pictures and videos, and a request may show {MAX_PICTURES}")
        if self.num_frames is not None and not any(isinstance(part, VideoPart) for part in self.media):
            raise ValueError("num_frames is for videos, and there is none: leave it out")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit: give one of them")
        return self

    @property
    def media(self) -> list[ImagePart | VideoPart]:
        """The pictures and videos, in the order of the conversation."""
        return [part for message in self.messages for part in message.content if not isinstance(part, TextPart)]

    @property
    def characters(self) -> int:
        return sum(len(part.text) for message in self.messages for part in message.content if part.type == "text")


def read_request(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
        RequestError: it is no JSON, or a field is missing, unknown, or of a type or value that cannot be used.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_SIGNS:
        raise RequestError(f"more than {MAX_SIGNS:,} commas and brackets: send fewer messages, or less content")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # What was sent stays out of the message: it may be megabytes of a picture.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = printable(".".join(str(step) for step in first["loc"]), 100)
    problem = "this server has no such field" if first["type"] == "extra_forbidden" else first["msg"]
    message = printable(f"{where}: {problem.removeprefix('Value error, ')}".removeprefix(": "))
    raise RequestError(message, param=printable(str(first["loc"][0]), 100) if first["loc"] else None)


def address_of(part: ImagePart | VideoPart) -> str:
    return part.video_url.url if isinstance(part, VideoPart) else part.image_url.url


def part_for_template(part: TextPart | ImagePart | VideoPart, media) -> dict:
    """A part of a message as chat templates and the processor take it.

    Args:
        media: iterator over the decoded pictures and the files of videos of the request.
    """
    if isinstance(part, ImagePart):
        return {"type": "image", "image": next(media)}
    if isinstance(part, VideoPart):
        return {"type": "video", "video": next(media)}
    return {"type": "text", "text": part.text}
