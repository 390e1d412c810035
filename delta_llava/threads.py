"""Work that may never end, such as reading from a connection, in a thread that keeps nobody waiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_daemon_thread(function: Callable, *arguments) -> Future:
    """What a function will return or raise; the end of the process does not wait for it, as it does for a pool's."""
    future = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
