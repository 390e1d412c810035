"""Minutes of bad input: thousands of broken requests among good ones, against one server in a process of its own.

    python -m tests.serving.stress [MODEL] [--seconds 300]

MODEL is a Hub folder; by default a tiny random one. Clients on loopback send at random what the tests know to be
broken, good requests with bytes changed or cut off, and what is no HTTP at all; others hang up while their request or
its answer is under way. Beside them others ask good questions. Every good answer must be that of `generate`, every
refusal a 4xx with its reason, and the server's memory must not grow. Exits with 1 if anything was otherwise.
"""

import argparse
import collections
import json
import random
import socket
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from modeling_delta_llava import asking
from tests import tiny
from tests.serving.broken import BROKEN, KEY, SAID, as_address, body_of, served, shown, thirds
from tests.tiny import picture

BAD_CLIENTS, GOOD_CLIENTS = 6, 2
NEW_TOKENS = 12
PICTURES = [picture("red"), picture("blue", (64, 20)), picture((20, 200, 90), (300, 280))]


def questions(model: str) -> list[tuple[dict, str]]:
    """Good requests, and what `generate` answers to them."""
    network, processor = asking.load(model, device="cpu")
    asked = []
    for shown_pictures in ([], PICTURES[:1], PICTURES[1:2], PICTURES[:2], PICTURES):
        for budget in (1, 4):
            parts = [{"type": "image", "image": image} for image in shown_pictures]
            text = {"type": "text", "text": SAID["content"]}
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": [*parts, text]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"num_visual_tokens": budget},
            )
            ids = network.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
            answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages = shown(*map(as_address, shown_pictures))
            asked.append(({"messages": messages, "num_visual_tokens": budget, "max_tokens": NEW_TOKENS}, answer))
    return asked


class Clients:
    """Threads that ask until the time is over, and what they saw."""

    def __init__(self, url: str, asked: list[tuple[dict, str]], seconds: float):
        self.url, self.asked, self.end = url, asked, time.monotonic() + seconds
        self.counts = collections.Counter()
        self.waited = []
        self.wrong = []

    def post(self, body: bytes) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask_well(self, chance: random.Random) -> None:
        request, expected = chance.choice(self.asked)
        stream = chance.random() < 0.5
        start = time.monotonic()
        status, text = self.post(body_of({**request, "stream": stream}))
        self.waited.append(time.monotonic() - start)
        if status != 200:
            got = text
        elif stream:
            *events, done, _ = text.split("\n\n")
            deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
            got = "".join(delta.get("content", "") for delta in deltas) + done.removeprefix("data: [DONE]")
        else:
            got = json.loads(text)["choices"][0]["message"]["content"]
        self.counts["good"] += 1
        if got != expected:
            self.wrong.append(f"{status} {got!r} in place of {expected!r}")

    def ask_badly(self, chance: random.Random) -> None:
        case, expected, said = BROKEN[chance.choice([*BROKEN])]
        status, text = self.post(body_of(case))
        self.counts["refused as expected"] += 1
        if status != expected or said not in json.loads(text)["error"]["message"]:
            self.wrong.append(f"{status} {text[:300]} in place of {expected} {said}")

    def ask_with_noise(self, chance: random.Random) -> None:
        body = bytearray(body_of(chance.choice(self.asked)[0]))
        for _ in range(chance.randint(1, 5)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        del body[chance.choice([len(body), chance.randrange(len(body))]) :]
        status, text = self.post(bytes(body))
        self.counts["changed"] += 1  # which may have left it good
        if status not in (200, 400, 404):
            self.wrong.append(f"{status} {text[:300]} for {bytes(body[-200:])!r}")

    def hang_up(self, chance: random.Random) -> None:
        address = urlsplit(self.url)
        body = body_of({**chance.choice(self.asked)[0], "stream": chance.random() < 0.5, "max_tokens": 200})
        head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        noise = chance.randbytes(chance.randrange(1, 2000)) + b"\r\n\r\n"
        part = chance.choice([message, message[: chance.randrange(len(message))], noise])
        with socket.create_connection((address.hostname, address.port), timeout=60) as client:
            client.sendall(part)
            time.sleep(chance.random() / 4)
        self.counts["hung up"] += 1

    def run(self, seed: int, kinds: list) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                chance.choice(kinds)(chance)
            except OSError as error:
                self.wrong.append(f"{type(error).__name__}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Broken requests among good ones.")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(tiny.write_hub_folder(Path(folder) / "model"))
        asked = questions(model)
        log = Path(folder) / "log"
        with served(Path(model).resolve(), log, ["--device", "cpu", "--max-new-tokens", "256"]) as server:
            memory = psutil.Process(server.process.pid).memory_info
            clients = Clients(server.url, asked, options.seconds)
            bad = [clients.ask_badly] * 6 + [clients.ask_with_noise] * 2 + [clients.hang_up]
            kinds = [bad] * BAD_CLIENTS + [[clients.ask_well]] * GOOD_CLIENTS
            threads = [threading.Thread(target=clients.run, args=entry) for entry in enumerate(kinds)]
            for thread in threads:
                thread.start()
            sizes = []
            while any(thread.is_alive() for thread in threads):
                sizes.append(memory().rss)
                time.sleep(options.seconds / 60)
        lines = [line for line in log.read_text().splitlines()[1:] if line.strip()]
    line, flat = thirds(sizes)
    print(f"{options.seconds:.0f} s:", ", ".join(f"{count} {kind}" for kind, count in sorted(clients.counts.items())))
    print(
        f"a good answer took {statistics.median(clients.waited):.2f} s (median), {max(clients.waited):.2f} s at most"
    )
    print(line)
    print(f"exit status {server.process.returncode}; lines in the log:", *collections.Counter(lines).most_common(5))
    print(f"{len(clients.wrong)} wrong", *clients.wrong[:10], sep="\n")
    return int(bool(clients.wrong) or server.process.returncode != 0 or not flat)


if __name__ == "__main__":
    raise SystemExit(main())
