"""One answer while it is generated: text for those who wait for it, and a reason to stop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

# How a tokenizer shows bytes that are no whole character yet.
INCOMPLETE = "\ufffd"


class Answer(BaseStreamer):
    """
    Takes the tokens of one sequence from `generate`, in its thread, and gives text to the event loop it was made in.

    Text is handed on once no later token can change it: not half a character, no bytes behind which more bytes may
    come (sentencepiece's decoder shows all of a row as broken if one is), and nothing that may turn out to be the
    beginning of a stop string. All pieces together are what the tokenizer makes of all tokens at once, up to the first
    stop string.

    Args:
        decode: gives the text of a list of token ids.
        stops: strings that end the answer and are no part of it.
        end_ids: token ids that end the answer.
        byte_ids: token ids that stand for single bytes.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: Sequence[str] = (),
        end_ids: Collection[int] = (),
        byte_ids: Collection[int] = (),
    ):
        self.decode, self.stops, self.end_ids, self.byte_ids = decode, stops, end_ids, byte_ids
        self.ids: list[int] = []
        self.stopped = False  # by a stop string
        self.abandoned = False  # by those who waited for it
        self._text, self._sent, self._prompt_has_passed = "", 0, False
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which is passed over, and then each new token, of shape (1,)."""
        if not self._prompt_has_passed:
            self._prompt_has_passed = True
            return
        self.ids += value.tolist()
        self._text = self.decode(self.ids)
        ends = [self._text.index(stop) for stop in self.stops if stop in self._text]
        if ends:
            self._text, self.stopped = self._text[: min(ends)], True
        if self.ids[-1] not in self.byte_ids:
            held = max((len(stop) - 1 for stop in self.stops), default=0)
            self._send(min(len(self._text) - held, len(self._text.rstrip(INCOMPLETE))))

    def end(self) -> None:
        """Hands on what was held back; `generate` calls it behind the last token."""
        self._send(len(self._text))

    def _send(self, end: int) -> None:
        if end > self._sent:
            self._put(self._text[self._sent : end])
            self._sent = end

    def _put(self, piece: str | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def finish(self, error: Exception | None = None) -> None:
        """Ends `pieces`, with the error if there was one. For the thread that generates."""
        self._put(error)

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece. An answer whose reader goes away is abandoned.

        Raises:
            Exception: what generating it raised.
        """
        try:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.abandoned = True

    async def whole(self) -> str:
        """All of the text at once, as `pieces`."""
        return "".join([piece async for piece in self.pieces()])

    @property
    def finish_reason(self) -> str:
        return "stop" if self.stopped or (self.ids and self.ids[-1] in self.end_ids) else "length"


class Ended(StoppingCriteria):
    """Stops `generate` behind a stop string, and when nobody waits for the answer."""

    def __init__(self, answer: Answer):
        self.answer = answer

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Whether each of B sequences is done: `input_ids` of shape (B, tokens), the result of shape (B,)."""
        done = self.answer.stopped or self.answer.abandoned
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)
