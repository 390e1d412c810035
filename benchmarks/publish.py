"""Publishing a large folder to the Hub on loopback: memory and rate of `delta-llava publish`.

A model of about 2 GB with random weights and a tiny tokenizer is written once, then published by the real command,
with preflight (verification, loading in a fresh process), upload and the check afterwards, and published again, which
uploads nothing. Memory is that of the command and all processes it starts, sampled 20 times a second: resident memory
of each process at its highest, and of all of them together, with and without the pages of files that the system can
drop at any time (mapped weights, libraries). The server runs in this process and is not counted; server and client
share disk and cores, so the rate is a lower bound for the client.
"""

import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import machine, parser, print_table, start, write_result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from modeling_delta_llava.evaluation.backbones import VISION_TOWERS
from modeling_delta_llava.hub_cards.card import write_card
from tests.hub_cards.local_hub import LocalHub
from tests.tiny import IMAGE_TOKEN_ID, tiny_processor

REPO = "user/delta-llava-2gb"
TEXT = {
    "model_type": "llama",
    "vocab_size": 32001,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
MEGABYTE = 1e6
INTERVAL = 0.05


def write_folder(folder: Path) -> int:
    """A Hub folder of about 2 GB in bfloat16, in shards of 500 MB; bytes of its weights."""
    config = DeltaLlavaConfig(
        vision_config=dict(VISION_TOWERS["openai/clip-vit-large-patch14-336"]),
        text_config=TEXT,
        image_token_id=IMAGE_TOKEN_ID,
        num_visual_tokens=144,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = DeltaLlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN_ID])
    model.save_pretrained(folder, max_shard_size="500MB")
    tiny_processor(folder.parent / "tokenizer", config).save_pretrained(folder)
    write_card(folder, repo_id=REPO, licence="mit")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def children(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in thread.read_text().split():
            found += children(int(child))
    return found


class MemoryOf:
    """Samples a process and its descendants until `stop`; peaks in bytes."""

    def __init__(self, pid: int):
        self.pid, self.running = pid, True
        self.each: dict[str, int] = {}
        self.together = self.anonymous = 0
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()

    def sample(self) -> None:
        while self.running:
            resident = anonymous = 0
            try:
                for pid in children(self.pid):
                    status = Path(f"/proc/{pid}/status").read_text()
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    kilobytes = dict(re.findall(r"^(VmRSS|RssAnon):\s+(\d+) kB", status, re.MULTILINE))
                    own = 1024 * int(kilobytes.get("VmRSS", 0))
                    resident += own
                    anonymous += 1024 * int(kilobytes.get("RssAnon", 0))
                    found = re.search(r"check_folder|cli publish", command)
                    name = found[0] if found else "other"
                    self.each[name] = max(self.each.get(name, 0), own)
            except (OSError, ValueError):
                pass  # a process ended while it was looked at
            self.together, self.anonymous = max(self.together, resident), max(self.anonymous, anonymous)
            time.sleep(INTERVAL)

    def stop(self) -> dict[str, float]:
        self.running = False
        self.thread.join()
        peaks = {f"peak_mb_{name.split('.')[-1].replace(' ', '_')}": value for name, value in self.each.items()}
        peaks |= {"peak_mb_together": self.together, "peak_mb_together_without_file_pages": self.anonymous}
        return {name: round(value / MEGABYTE, 1) for name, value in peaks.items()}


def publish(hub: LocalHub, folder: Path, home: Path) -> dict[str, object]:
    """Runs the command once: its time, memory, and what it says about its rate."""
    environment = hub.environment(home) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "delta_llava", "publish", str(folder), REPO, "--tag", "v1.0"]
    before = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent
    )
    memory = MemoryOf(process.pid)
    output, errors = process.communicate()
    seconds = time.perf_counter() - before
    peaks = memory.stop()
    if process.returncode:
        raise SystemExit(errors)
    steps = {text: float(at) for at, text in re.findall(r"^\[\s*([\d.]+) s\] (.*)$", errors, re.MULTILINE)}
    rate = re.search(r"(\d+) MB/s", output)
    said = re.sub(r"http://\S+?:\d+", "HUB", output.strip())
    return {"seconds": round(seconds, 1), "said": said, "mb_per_second": int(rate[1]) if rate else None, **peaks} | {
        "steps_started_at": {re.sub(r"http://\S+", "HUB", text): at for text, at in steps.items()}
    }


def main() -> None:
    arguments = parser(__doc__, "publish").parse_args()
    device = start(arguments)
    about = machine(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "delta-llava-2gb"
        size = write_folder(folder)
        with LocalHub(Path(scratch) / "hub") as hub:
            first = publish(hub, folder, Path(scratch) / "home")
            sent = sum(request.received for request in hub.requests("^PUT"))
            hub.log.clear()
            second = publish(hub, folder, Path(scratch) / "home")
            resent = sum(request.received for request in hub.requests("^PUT|commit"))
    results = {"weights_bytes": size, "first": {"bytes_put": sent, **first}, "second": {"bytes_put": resent, **second}}
    shown = [key for key in first if key.startswith(("seconds", "mb", "peak"))]
    print_table(["run", *shown], [[name, *(results[name].get(key) for key in shown)] for name in ("first", "second")])
    write_result(arguments, device, about, results)


if __name__ == "__main__":
    main()
