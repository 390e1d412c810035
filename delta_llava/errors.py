"""The error that a user can act on, and how any other is told in one line."""

import contextlib
from collections.abc import Iterator

LONGEST_REASON = 300


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, where, and what to do next.

    The command line prints it as `error: <message>` and exits with status 2; in Python it is a `ValueError`.
    """


def printable(text: str, longest: int | None = LONGEST_REASON) -> str:
    """A text as part of a line: without control characters and line breaks, cut behind `longest` characters."""
    if longest is not None:
        text = text[: 20 * longest]
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if longest is None or len(text) <= longest else text[: longest - 3] + "..."


def reason(error: BaseException) -> str:
    """What an error of a library says, as part of a line: printable, and 300 characters at most.

    Its class stands in front where the message alone says nothing (`KeyError: 'model_type'`) or there is none.
    """
    text = printable(str(error))
    if not text or isinstance(error, LookupError | AssertionError | ArithmeticError | AttributeError | TypeError):
        text = printable(f"{type(error).__name__}: {text}".removesuffix(": "))
    return text


@contextlib.contextmanager
def told(what: str, advice: str) -> Iterator[None]:
    """Tells whatever the block raises in one line, `what (reason): advice`, as a `UserError`.

    For calls of libraries on what others made: what those raise has many classes. An interrupt, a reader of standard
    output that has gone, and a `UserError`, which says all that already, pass.
    """
    try:
        yield
    except (UserError, BrokenPipeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise UserError(f"{what} ({reason(error)}): {advice}") from error
