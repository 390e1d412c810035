"""The page of `delta-llava app` in a headless Chromium, for tests and for the README's picture.

`python -m tests.serving.browser MODEL PICTURE QUESTION OUTPUT.png` asks a question and draws the page.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

REPOSITORY = Path(__file__).parents[2]
WIDE, NARROW = (1280, 900), (390, 844)
SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(model: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """`delta-llava app` for a model: its address and its process."""
    port = free_port()
    command = [sys.executable, "-m", "delta_llava", "app", str(model), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, env=environment) as process:
        try:
            end = time.monotonic() + 180
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > end:
                        raise AssertionError(log.read_text()) from None
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()
            process.wait(30)


class Page:
    """A browser window with the page in it."""

    def __init__(self, address: str, size: tuple[int, int] = WIDE):
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        self.resize(size)
        self.driver.get(address)
        self.until(lambda: self.find("#question textarea"))

    def close(self):
        self.driver.quit()

    def resize(self, size: tuple[int, int]):
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def find(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable, seconds: float = SECONDS):
        return WebDriverWait(self.driver, seconds, 0.1, [Exception]).until(lambda _: condition())

    def send(self, question: str, *pictures: Path):
        """Uploads pictures, types a question and presses enter."""
        (files,) = self.find("#question input[type=file]")
        # The element keeps the files of the question before.
        self.driver.execute_script("arguments[0].value = null", files)
        if pictures:
            files.send_keys("\n".join(map(str, pictures)))
            self.until(lambda: len(self.find("#question .thumbnail-item")) == len(pictures))
        (line,) = self.find("#question textarea")
        line.send_keys(question, Keys.ENTER)

    def ask(self, question: str, *pictures: Path) -> str:
        """The last message after a question: what was answered, and the note under it."""
        before = len(self.find("#chat .user"))
        self.send(question, *pictures)
        self.until(lambda: len(self.find("#chat .user")) > before and self.is_ready())
        return self.answers()[-1]

    def is_ready(self) -> bool:
        return bool(self.find("#question .submit-button")) and self.find("#question textarea")[0].is_enabled()

    def answers(self) -> list[str]:
        """The messages that are not the user's, notes included, as their text stands in the page."""
        return [element.get_property("innerText").strip() for element in self.find("#chat .bot.message")]

    def choose(self, budget: int):
        (label,) = [label for label in self.find("#budget label") if label.text.strip() == str(budget)]
        label.click()

    def set_longest(self, tokens: int):
        (line,) = self.find("#longest input[type=number]")
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.driver.execute_script(script, line, tokens)

    def scrolls_sideways(self) -> bool:
        root = "document.documentElement"
        return self.driver.execute_script(f"return {root}.scrollWidth > {root}.clientWidth")

    def hosts(self) -> set[str]:
        """Hosts that the page asked for anything since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        addresses = [
            urlsplit(event["params"]["request"]["url"])
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return {address.netloc for address in addresses if address.scheme not in ("data", "blob")}


def draw(model: Path, picture: Path, question: str, output: Path):
    with served(model, output.with_suffix(".log")) as (address, _):
        page = Page(address)
        try:
            page.ask(question, picture)
            page.find("#look")[0].click()
            page.until(lambda: page.find("#sheet img"))
            time.sleep(2)  # the picture appears by and by
            page.driver.save_screenshot(str(output))
        finally:
            page.close()
    output.with_suffix(".log").unlink()


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3], Path(sys.argv[4]))
