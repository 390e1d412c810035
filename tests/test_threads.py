"""Work in threads that nobody waits for."""

import gc
import time
import weakref

from delta_llava.threads import in_daemon_thread


class Picture:
    """Something large."""


def test_an_error_keeps_no_arguments():
    def fail(picture):
        raise ValueError("broken")

    picture = Picture()
    kept = weakref.ref(picture)
    gc.disable()  # which would find it some time
    try:
        future = in_daemon_thread(fail, picture)
        assert str(future.exception(10)) == "broken"
        del future, picture
        end = time.monotonic() + 10
        while kept() is not None and time.monotonic() < end:
            time.sleep(0.01)
        assert kept() is None
    finally:
        gc.enable()
