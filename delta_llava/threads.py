"""Work that may never end, such as reading from a connection, in a thread that keeps nobody waiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_daemon_thread(function: Callable, *arguments) -> Future:
    """What a function will return or raise; the end of the process does not wait for it, as it does for a pool's."""
    future = Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=_run, args=(future, function, arguments), daemon=True).start()
    return future


def _run(future: Future, function: Callable, arguments: tuple) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)
        # The error's traceback holds this frame: with the future in it, a circle that keeps the arguments for long.
        del future
