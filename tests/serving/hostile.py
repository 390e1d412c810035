"""A hostile client of `delta-llava app`: broken requests among good ones, and the server's memory meanwhile.

`python -m tests.serving.hostile http://127.0.0.1:7860 PROCESS_ID SECONDS` prints its figures, and fails if a good
request gets another answer than before the broken ones, or memory grows to the end.
"""

import collections
import json
import random
import sys
import time
import uuid
from collections.abc import Iterator

import httpx
import psutil

from tests import tiny
from tests.serving.broken import thirds

FILE = {"meta": {"_type": "gradio.FileData"}, "mime_type": "image/png", "orig_name": "a.png"}
ELSEWHERE = ("/etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/a.png", "http://example.com/a.png")


class Client:
    """Speaks to the page's endpoints as its own script does, or nearly."""

    def __init__(self, address: str):
        # A connection for each request: the server closes one whose body it did not read.
        connections = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=f"{address}/gradio_api", timeout=120, limits=connections)
        events = httpx.get(f"{address}/config").json()["dependencies"]
        self.take, self.answer, self.explain = (
            next(event["id"] for event in events if event["api_name"] == name)
            for name in ("take", "answer", "explain_last")
        )
        self.random = random.Random(0)

    def upload(self, content: bytes, name: str = "a.png") -> httpx.Response:
        return self.http.post("/upload", files={"files": (name, content, "image/png")})

    def join(self, event: int, data, session: str) -> httpx.Response:
        return self.http.post("/queue/join", json={"data": data, "fn_index": event, "session_hash": session})

    def outcome(self, session: str) -> list:
        """What the event at hand gives in the end."""
        with self.http.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return message["output"]["data"]
        raise AssertionError("the stream ended")

    def good(self, colour: str) -> list[str]:
        """The answer about a picture of one colour."""
        session = uuid.uuid4().hex
        (path,) = self.upload(tiny.encoded(tiny.picture(colour))).json()
        self.join(self.take, [{"text": "What is it?", "files": [FILE | {"path": path}]}, None], session)
        self.outcome(session)
        self.join(self.answer, [None, 4, 24], session)
        _, chat = self.outcome(session)
        said = [part for message in chat if message["role"] == "assistant" for part in message["content"]]
        return [part["text"] for part in said if part["type"] == "text"]

    def junk(self, depth: int = 0):
        kinds = [None, self.random.randrange(-(10**9), 10**9), "x" * self.random.randrange(300), True, 1e308]
        if depth < 4:
            inner = [self.junk(depth + 1) for _ in range(self.random.randrange(4))]
            kinds += [inner, {"text": inner}, FILE | {"path": self.random.choice(ELSEWHERE)}]
        return self.random.choice(kinds)

    def broken(self) -> Iterator[tuple[str, httpx.Response]]:
        """One round of broken requests, each with its name."""
        junk, session = self.junk, uuid.uuid4().hex
        multipart = {"content-type": "multipart/form-data; boundary=x"}
        elsewhere = FILE | {"path": self.random.choice(ELSEWHERE)}
        yield "no JSON", self.http.post("/queue/join", content=b"{broken")
        yield "deep JSON", self.http.post("/queue/join", content=b"[" * 200_000)
        yield "large JSON", self.http.post("/queue/join", content=b" " * 1_100_000)
        yield "any event", self.join(self.random.choice([0, 2, 5, 99, -1]), junk(), session)
        yield "question", self.join(self.take, [{"text": junk(), "files": junk()}, junk()], session)
        yield "file elsewhere", self.join(self.take, [{"text": "What?", "files": [elsewhere]}, None], session)
        yield "budget", self.join(self.answer, [junk(), junk(), junk()], session)
        yield "explain", self.join(self.explain, [junk(), junk()], session)
        yield "half an upload", self.http.post("/upload", content=b"--x\r\nnothing", headers=multipart)
        yield "name of a file", self.upload(self.random.randbytes(2000), "../../evil.png")
        yield "file of the machine", self.http.get("/file=/etc/passwd")
        yield "no such page", self.http.get("/" + "x" * 400)
        yield "cancel", self.http.post("/cancel", json={"session_hash": session, "fn_index": 1, "event_id": session})
        if self.random.random() < 0.05:
            yield "large picture", self.upload(bytes(21_000_000))
        (path,) = self.upload(b"\x89PNG\r\n\x1a\n" + self.random.randbytes(40)).json()
        session = uuid.uuid4().hex  # which leaves before its answer comes
        question = {"text": "What?", "files": [FILE | {"path": path}]}
        yield "broken picture", self.join(self.take, [question, None], session)
        yield "its answer", self.join(self.answer, [None, self.random.choice([4, 7, "x"]), 8], session)


def main(address: str, process_id: int, seconds: float):
    client, process = Client(address), psutil.Process(process_id)
    expected = {colour: client.good(colour) for colour in ("red", "blue", "green")}
    end = time.monotonic() + seconds
    answers, statuses, memory = collections.Counter(), collections.Counter(), []
    while time.monotonic() < end:
        for name, response in client.broken():
            statuses[name, response.status_code] += 1
            assert "root:" not in response.text
        colour = client.random.choice([*expected])
        answers[client.good(colour) == expected[colour]] += 1
        memory.append(process.memory_info().rss)
    print(f"{statuses.total()} broken requests; {answers[True]} good ones right, {answers[False]} wrong")
    line, flat = thirds(memory)
    print(line)
    print(f"{process.num_threads()} threads, {process.num_fds()} open files")
    for (name, status), count in sorted(statuses.items()):
        print(f"{name}: {status}, {count} times")
    assert not answers[False]
    assert flat


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
