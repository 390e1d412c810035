"""The error that a user can act on."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, where, and what to do next.

    The command line prints it as `error: <message>` and exits with status 2; in Python it is a `ValueError`.
    """
