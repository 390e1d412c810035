"""On the path of a client process that is not to wait between its attempts: huggingface_hub pauses for seconds."""

import time

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.01))
