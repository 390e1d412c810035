"""A converted folder behind vLLM's Transformers back end: the same prompt ids and the same answers as transformers.

Opt-in: `DELTA_LLAVA_VLLM_PYTHON=<python of an environment with vLLM> make test PYTEST_ARGS='-m vllm'`.
"""

import base64
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import tiny

PYTHON = os.environ.get("DELTA_LLAVA_VLLM_PYTHON")
CAT = Path(__file__).parents[1] / "assets" / "cat.jpg"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="set DELTA_LLAVA_VLLM_PYTHON to the python of an environment with vLLM"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # vLLM's attention kernels want heads of 32 channels.
    patch = pytest.MonkeyPatch()
    patch.setitem(tiny.TOWERS, "clip", {**tiny.TOWERS["clip"], "hidden_size": 64})
    patch.setattr(tiny, "DECODER_SIZES", {**tiny.DECODER_SIZES, "hidden_size": 64})
    folder = tiny.write_hub_folder(tmp_path_factory.mktemp("vllm") / "model")
    patch.undo()
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--trust-remote-code"]
    command += ["--model-impl", "transformers", "--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--trust-request-mm-kwargs"]
    command += ["--limit-mm-per-prompt", '{"image": 3}']
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONPATH", None)
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=log.parent)
        try:
            for _ in range(300):
                if process.poll() is not None:
                    pytest.fail(log.read_text()[-4000:])
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.terminate()
            process.wait(60)


def as_address(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(tiny.encoded(image)).decode()


PICTURES = {"cat": Image.open(CAT).convert("RGB"), "white": tiny.picture("white", (50, 30))}


@pytest.mark.parametrize(
    ("names", "text", "budget"),
    [
        (["cat"], "What is it?", None),
        (["white"], "What is it?", None),
        (["cat", "white"], "Compare.", None),
        ([], "Hello", None),
        (["cat"], "", None),
        (["cat"], "What is it?", 16),
        (["cat"], "What is it?", 1),
    ],
)
def test_same_ids_and_same_answer(names, text, budget, folder, server):
    from modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor

    images = [PICTURES[name] for name in names]
    content = [{"type": "image_url", "image_url": {"url": as_address(image)}} for image in images]
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        "max_tokens": 8,
        "temperature": 0,
        "return_token_ids": True,
    }
    if budget:
        body["mm_processor_kwargs"] = {"num_visual_tokens": budget}
    request = urllib.request.Request(server, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode())

    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    parts = [{"type": "image", "image": image} for image in images]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": budget} if budget else {},
    )
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["prompt_token_ids"] == inputs["input_ids"][0].tolist()
    assert answer["choices"][0]["token_ids"] == expected.tolist()
