"""A converted folder behind vLLM's Transformers back end: the same ids and the same answers as transformers.

One server for all of it, in fp32: prefix caching on, prompts in pieces of 576 tokens at most, four pictures at most, a
LoRA adapter beside the model, and a budget in any request. Opt-in: `make test-vllm`, which makes an environment with
vLLM and names its Python in `DELTA_LLAVA_VLLM_PYTHON`.
"""

import base64
import json
import os
import re
import shlex
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from tests import tiny
from tests.serving.vllm_server import environment, vllm_server

PYTHON = os.environ.get("DELTA_LLAVA_VLLM_PYTHON")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="set DELTA_LLAVA_VLLM_PYTHON to the python of an environment with vLLM"),
    # PEFT's use of transformers' old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

CONTEXT, PIECE, MOST_PICTURES, NEW_TOKENS = 2560, 576, 4, 8
BUDGETS = [576, 144, 64, 36, 16, 9, 4, 1]
CAT = Image.open(ROOT / "assets" / "cat.jpg").convert("RGB")
PICTURES = {
    "cat": CAT,
    "turned": CAT.rotate(180),
    "part": CAT.crop((0, 0, CAT.width // 3, CAT.height)),
    "white": tiny.picture("white", (50, 30)),
}


@dataclass(frozen=True)
class Question:
    pictures: tuple[str, ...] = ("cat",)
    text: str = "What is it?"
    budget: int | tuple[int, ...] | None = None
    adapter: bool = False
    text_first: bool = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model on a grid of 24 x 24 patches, 144 visual tokens by default, with the adapter `adapter` in it."""
    patch = pytest.MonkeyPatch()
    # vLLM's attention kernels want heads of 32 channels.
    tower = {"hidden_size": 64, "image_size": 48, "patch_size": 2}
    patch.setitem(tiny.TOWERS, "clip", {**tiny.TOWERS["clip"], **tower})
    decoder = {"hidden_size": 64, "max_position_embeddings": 4096}
    patch.setattr(tiny, "DECODER_SIZES", {**tiny.DECODER_SIZES, **decoder})
    folder = tiny.write_hub_folder(tmp_path_factory.mktemp("vllm") / "model", num_visual_tokens=144)
    patch.undo()

    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    adapted.save_pretrained(folder.parent / "adapter")
    return folder


@pytest.fixture(scope="module")
def generate(folder):
    """Question -> ids of prompt and answer, and log-probabilities of the answer, by transformers in this process."""
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder).eval()
    assert model.config.legal_num_visual_tokens == BUDGETS
    adapted = PeftModel.from_pretrained(
        DeltaLlavaForConditionalGeneration.from_pretrained(folder), folder.parent / "adapter"
    ).eval()

    @torch.no_grad()
    def run(question: Question) -> tuple[list[int], list[int], list[float]]:
        parts = [{"type": "image", "image": PICTURES[name]} for name in question.pictures]
        budget = list(question.budget) if isinstance(question.budget, tuple) else question.budget
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": in_order(question, parts)}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": budget} if budget else {},
        )
        output = (adapted if question.adapter else model).generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        scores = torch.stack(output.logits)[:, 0].log_softmax(-1)[range(len(ids)), ids]
        return inputs["input_ids"][0].tolist(), ids, scores.tolist()

    return run


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    options = ["--trust-remote-code", "--model-impl", "transformers", "--enforce-eager", "--dtype", "float32"]
    options += ["--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(PIECE)]
    options += ["--limit-mm-per-prompt", json.dumps({"image": MOST_PICTURES}), "--trust-request-mm-kwargs"]
    options += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={folder.parent / 'adapter'}"]
    # A slot more than adapters: the CPU build gives requests without one, in a batch, what the last slot holds.
    options += ["--max-loras", "2"]
    with vllm_server(PYTHON, folder, *options, log=tmp_path_factory.mktemp("server") / "log") as address:
        yield address


def in_order(question: Question, pictures: list[dict]) -> list[dict]:
    text = {"type": "text", "text": question.text}
    return [text, *pictures] if question.text_first else [*pictures, text]


def as_address(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def body(folder: Path, question: Question, addresses: list[str] | None = None, **fields) -> dict:
    """The request of a question, or of the same with pictures at other addresses."""
    addresses = addresses or [as_address(tiny.encoded(PICTURES[name])) for name in question.pictures]
    pictures = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    if question.budget is not None:
        fields["mm_processor_kwargs"] = {"num_visual_tokens": question.budget}
    return {
        "model": "adapter" if question.adapter else str(folder),
        "messages": [{"role": "user", "content": in_order(question, pictures)}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
        "logprobs": True,
        **fields,
    }


def post(server: str, content: dict):
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=300)


def ask(server: str, content: dict) -> dict:
    with post(server, content) as response:
        return json.load(response)


def refusal(server: str, content: dict) -> tuple[int, str]:
    """Status and message of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, content)
    with refused.value as response:
        return response.status, json.load(response)["error"]["message"]


def metric(server: str, name: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as response:
        return float(re.search(rf"^{name}{{.*}} (.*)$", response.read().decode(), re.MULTILINE)[1])


def assert_same(answer: dict, expected: tuple[list[int], list[int], list[float]]):
    prompt, ids, scores = expected
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == ids
    told = [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
    assert told == pytest.approx(scores, abs=1e-3)


ONE_BY_ONE = [
    Question(pictures=(), text="Hello"),
    Question(),
    Question(pictures=("white",)),
    Question(text=""),
    Question(pictures=("cat", "white"), text="Compare."),
    Question(pictures=("cat", "turned", "white"), text="Compare."),
    Question(pictures=("cat", "turned", "white", "part"), text="Compare."),
    Question(text_first=True),
    Question(pictures=("part", "cat"), text="Compare.", text_first=True),
    *(Question(budget=budget) for budget in BUDGETS),
    Question(pictures=("cat", "white"), budget=36),
    Question(pictures=("cat", "turned"), budget=(576, 1)),
    Question(pictures=("cat", "turned", "white", "part"), budget=(1, 576, 16, 64)),
    Question(pictures=("cat", "turned", "white", "part"), budget=576),
    Question(adapter=True),
    Question(pictures=("cat", "white"), budget=(4, 144), adapter=True),
    Question(pictures=(), text="Hello", adapter=True),
]


@pytest.mark.parametrize("question", ONE_BY_ONE, ids=str)
def test_same_ids_and_same_answer(question, folder, server, generate):
    assert_same(ask(server, body(folder, question)), generate(question))


def test_pictures_budgets_and_the_adapter_change_the_answer(generate):
    """What the other tests compare depends on what they vary."""
    questions = [Question(), Question(("turned",)), Question(adapter=True), Question(budget=576), Question(budget=1)]
    answers = [tuple(round(score, 3) for score in generate(question)[2]) for question in questions]
    assert len(set(answers)) == len(questions)


def test_a_prompt_longer_than_a_piece_is_cut_inside_a_picture(folder, server, generate):
    question = Question(text="Cut.", budget=576)
    prompt, _, _ = expected = generate(question)
    first = prompt.index(tiny.IMAGE_TOKEN_ID)
    assert 0 < first < PIECE < first + 576
    assert_same(ask(server, body(folder, question)), expected)


def test_streaming(folder, server, generate):
    question = Question(pictures=("cat", "white"), text="Stream.")
    prompt, ids, _ = generate(question)
    with post(server, body(folder, question, stream=True)) as response:
        lines = [line.decode().strip() for line in response]
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[0]["prompt_token_ids"] == prompt
    streamed = [chunk["choices"][0].get("token_ids") or [] for chunk in chunks if chunk["choices"]]
    assert [token for tokens in streamed for token in tokens] == ids
    assert len([tokens for tokens in streamed if tokens]) > 1


def test_a_cached_prefix_is_of_the_same_picture_and_budget(folder, server, generate):
    """The second time the prompt is read from the cache; another picture, budget or adapter is not."""
    question = Question(pictures=("part", "turned"), text="Again.", budget=144)
    hits = "vllm:prefix_cache_hits_total"
    before = metric(server, hits)
    assert_same(ask(server, body(folder, question)), generate(question))
    first = metric(server, hits)
    assert_same(ask(server, body(folder, question)), generate(question))
    assert metric(server, hits) - first >= 256 > first - before
    for other in (
        Question(pictures=("turned", "part"), text="Again.", budget=144),
        Question(pictures=("part", "cat"), text="Again.", budget=144),
        Question(pictures=("part", "turned"), text="Again.", budget=(144, 576)),
        Question(pictures=("part", "turned"), text="Again.", budget=64),
        Question(pictures=("part", "turned"), text="Again.", budget=144, adapter=True),
    ):
        assert_same(ask(server, body(folder, other)), generate(other))


MIXED = [
    Question(pictures=pictures, text=f"Mixed {number}.", budget=budget, adapter=number % 4 == 3)
    for number, (pictures, budget) in enumerate(
        [
            *(((), None), (("cat",), None), (("cat", "white"), None), (("cat", "turned", "white", "part"), None)),
            *((("turned",), budget) for budget in BUDGETS),
            *((("cat", "part"), (576, 4)), (("part", "cat"), (4, 576)), (("white",), 9), ((), None)),
        ]
    )
]


def test_sixteen_at_once(folder, server, generate):
    assert len(MIXED) == 16
    expected = [generate(question) for question in MIXED]
    with ThreadPoolExecutor(len(MIXED)) as pool:
        answers = list(pool.map(lambda question: ask(server, body(folder, question)), MIXED))
    for answer, each in zip(answers, expected, strict=True):
        assert_same(answer, each)


TWO = ("cat", "white")
CUT = tiny.encoded(CAT.resize((64, 64)))[:2000]
REFUSED = {
    # vLLM keeps the processor's sentence, which names the legal budgets, to itself.
    **{
        f"budget {budget}": (Question(TWO, budget=budget), {}, "Failed to apply DeltaLlavaProcessor")
        for budget in (7, 0, -1, 577, 10**30, "x", 1.5, True, (1,), (576, 1, 4), (576, 7), ())
    },
    "no picture": (Question(), {"addresses": [as_address(b"no picture")]}, "cannot identify image file"),
    "an empty one": (Question(), {"addresses": [as_address(b"")]}, "cannot identify image file"),
    "a cut one": (Question(), {"addresses": [as_address(CUT)]}, "truncated"),
    "a good and a bad one": (Question(TWO), {"addresses": [as_address(tiny.encoded(CAT)), as_address(CUT)]}, "trunc"),
    "no base64": (Question(), {"addresses": ["data:image/png;base64,%%%"]}, "Non-base64"),
    "a path": (Question(), {"addresses": ["/etc/hostname"]}, "must be either a HTTP, data or file URL"),
    "too many": (Question(TWO), {"addresses": [as_address(tiny.encoded(CAT))] * 5}, "At most 4 image"),
    "long text": (Question((), text="cat " * 3000), {}, "maximum context length is 2560"),
    "long with pictures": (
        Question(("cat",) * 4, text="cat " * 250, budget=576),
        {},
        "exceeds model's maximum context length",
    ),
    "no messages": (Question(), {"messages": []}, "empty conversation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_a_400_with_a_reason(name, folder, server):
    question, fields, reason = REFUSED[name]
    status, message = refusal(server, body(folder, question, **fields))
    assert status == 400
    assert reason in message


def test_bad_requests_among_good_ones_leave_them_right(folder, server, generate):
    good = [question for question in MIXED if not question.adapter][:8]
    expected = [generate(question) for question in good]
    bad = [body(folder, question, **fields) for question, fields, _ in REFUSED.values()]
    with ThreadPoolExecutor(16) as pool:
        refused = [pool.submit(refusal, server, content) for content in bad]
        answers = list(pool.map(lambda question: ask(server, body(folder, question)), good))
        assert {future.result()[0] for future in refused} == {400}
    for answer, each in zip(answers, expected, strict=True):
        assert_same(answer, each)


def test_local_files_stay_closed(folder, server):
    question = Question()
    status, message = refusal(server, body(folder, question, addresses=[f"file://{ROOT / 'assets' / 'cat.jpg'}"]))
    assert "--allowed-local-media-path" in message
    assert status == 500  # vLLM's own choice


def block(language: str, holds: str) -> str:
    """The block of docs/serving.md that holds something."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = [text for name, text in blocks if name == language and holds in text]
    return found


def in_vllms_environment(command: list[str], cwd: Path) -> str:
    process = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.fixture
def place(tmp_path):
    (tmp_path / "photo.jpg").write_bytes((ROOT / "assets" / "cat.jpg").read_bytes())
    return tmp_path


@pytest.fixture
def clients_code(folder, server):
    return (
        block("python", 'extra_body={"mm_processor_kwargs')
        .replace("FOLDER", str(folder))
        .replace("http://localhost:8000", server)
    )


def answer_of_the_page(folder: Path, server: str, budget: int | None) -> str:
    question = Question(text="What is weird here?", budget=budget)
    address = as_address((ROOT / "assets" / "cat.jpg").read_bytes())
    answer = ask(server, body(folder, question, addresses=[address], max_tokens=64))
    return answer["choices"][0]["message"]["content"]


def test_the_client_of_the_page(folder, server, place, clients_code):
    printed = in_vllms_environment([PYTHON, "-c", clients_code], place)
    assert printed == answer_of_the_page(folder, server, 36) + "\n"


def test_the_request_of_the_page(folder, server, place):
    request = block("", '"max_tokens"').replace("FOLDER", str(folder))
    address = as_address((place / "photo.jpg").read_bytes())
    request = {**json.loads(request.replace("https://example.org/photo.jpg", address)), "temperature": 0}
    (place / "request.json").write_text(json.dumps(request))
    command = block("bash", "curl").replace("http://localhost:8000", server)
    answer = json.loads(in_vllms_environment(["bash", "-c", command], place))
    assert answer["choices"][0]["message"]["content"] == answer_of_the_page(folder, server, None)


def test_the_commands_of_the_page_are_understood(place):
    commands = re.findall(r"^(?:vllm serve|python -m vllm\S+) (.*)$", PAGE, re.M)
    assert len(commands) > 5
    code = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.loads(sys.argv[1]):
    make_arg_parser(FlexibleArgumentParser()).parse_args(words)
"""
    in_vllms_environment([PYTHON, "-c", code, json.dumps([shlex.split(command) for command in commands])], place)


def test_answers_without_a_server(folder, server, place, clients_code):
    expected = answer_of_the_page(folder, server, 36)
    picture = clients_code[: clients_code.index("answer = ")].replace("from openai import OpenAI", "")
    picture = "".join(line for line in picture.splitlines(True) if not line.startswith("client"))
    code = block("python", "from vllm").replace("FOLDER", str(folder))
    # Compiling first would take minutes.
    code = code.replace("max_model_len=2048", "max_model_len=2048, enforce_eager=True")
    (place / "offline.py").write_text(picture + code)
    assert expected in in_vllms_environment([PYTHON, "offline.py"], place)
