"""The error that a user can act on, and how any other is told in one line."""

LONGEST_REASON = 300


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, where, and what to do next.

    The command line prints it as `error: <message>` and exits with status 2; in Python it is a `ValueError`.
    """


def reason(error: BaseException) -> str:
    """What an error of a library says, as part of a line: printable, and 300 characters at most.

    Its class stands in front where the message alone says nothing (`KeyError: 'model_type'`) or there is none.
    """
    text = "".join(character if character.isprintable() else " " for character in str(error)[: 20 * LONGEST_REASON])
    text = " ".join(text.split())
    if not text or isinstance(error, LookupError | AssertionError | ArithmeticError | AttributeError | TypeError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
