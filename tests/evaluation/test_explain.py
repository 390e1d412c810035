"""`delta-llava explain`: heat against finite differences, attention against its definition, the sheet, refusals."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.card import SKIP_MODULES
from modeling_delta_llava.evaluation import heat_maps
from modeling_delta_llava.evaluation.explain import Explanation, answer_positions, explain
from tests.tiny import IMAGE_TOKEN_ID, TOWERS, encoded, picture, tiny_config, tiny_model, tiny_processor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CAT = Path(__file__).parents[2] / "assets" / "cat.jpg"
QUESTION = "What is it?"
LENGTH = {"max_new_tokens": 8}


def cat() -> Image.Image:
    return Image.open(CAT)


def prompt(processor, budget: int) -> dict:
    content = [{"type": "image", "image": cat()}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": budget},
    )


def quiet(model):
    """The model, which never says the image token."""
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN_ID])
    return model


@pytest.mark.parametrize("hirescam", [False, True])
@pytest.mark.parametrize(("budget", "of_a_word"), [(16, False), (4, False), (4, True), (1, True)])
def test_heat_is_what_finite_differences_give(budget, of_a_word, hirescam, processor):
    """A patch's heat is how fast the score grows with its features: added to all patches, or to itself alone."""
    model = quiet(tiny_model(seed=3).double())
    inputs = prompt(processor, budget)
    sequence = model.generate(**inputs, do_sample=False, **LENGTH)
    answer_ids = sequence[0, inputs["input_ids"].shape[1] :].tolist()
    answer = processor.tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
    positions, word = [place for place, token in enumerate(answer_ids) if token > 2], None
    if of_a_word:
        word = re.findall(r"[a-z]+", answer, re.IGNORECASE)[-1]
        runs = [(end - start, start, end) for end in range(len(answer_ids) + 1) for start in range(end)]
        _, start, end = min(run for run in runs if word in processor.tokenizer.decode(answer_ids[run[1] : run[2]]))
        positions = list(range(start, end))
    places = torch.tensor(positions) + inputs["input_ids"].shape[1]
    (explanation,) = explain(model, processor, cat(), QUESTION, [budget], word, **LENGTH, hirescam=hirescam)
    assert explanation.answer == answer

    patch, step = 0, 0.0

    def grow(module, given):
        grown = []
        for stream in given[:2]:
            added = step * stream[:, patch : patch + 1]
            where = torch.ones(16, 1)
            if hirescam:
                where = (torch.arange(16) == patch)[:, None]
            grown.append(stream + added * where)
        return (*grown, given[2])

    model.model.multi_modal_projector.register_forward_pre_hook(grow)

    @torch.no_grad()
    def score() -> float:
        given = {**inputs, "input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
        logits = model(**given).logits[0, places - 1]
        return logits.log_softmax(-1).gather(1, sequence[0, places, None]).sum().item()

    heat = np.zeros(16)
    for patch in range(16):
        for step in (-0.005, 0.005):
            heat[patch] += score() / step
    heat = heat.clip(0).reshape(4, 4)
    assert heat.max() > 0
    # The language model's norms compute in single precision.
    np.testing.assert_allclose(explanation.heat, heat / heat.max(), atol=0.02)


def test_attention_is_the_softmax_of_each_window(processor):
    model = quiet(tiny_model(projector_num_attention_heads=2))
    cross_attention = model.model.multi_modal_projector.cross_attention
    taken = []
    handle = cross_attention.register_forward_pre_hook(lambda module, given: taken.append(given))
    explanations = explain(model, processor, cat(), QUESTION, [16, 4, 1], **LENGTH)
    handle.remove()
    by_budget = {given[3] ** 2: given for given in taken}
    assert by_budget.keys() == {4, 1}  # with a token for each patch the projector asks no query
    np.testing.assert_array_equal(explanations[0].attention.reshape(16, 16), np.eye(16))
    for explanation in explanations[1:]:
        queries, keys, _, grid_size, scale = by_budget[explanation.num_visual_tokens]
        q, k = cross_attention.q_proj(queries)[0].detach(), cross_attention.k_proj(keys)[0].detach()
        expected = np.zeros((grid_size**2, 4, 4))
        for token in range(grid_size**2):
            row, column = divmod(token, grid_size)
            window = [(row * scale + i, column * scale + j) for i in range(scale) for j in range(scale)]
            for head in (slice(0, 16), slice(16, 32)):
                scores = [float(q[token, head] @ k[4 * i + j, head]) / 4 for i, j in window]
                shares = np.exp(scores) / np.exp(scores).sum()
                for (i, j), share in zip(window, shares, strict=True):
                    expected[token, i, j] += share / 2
        assert expected.max() > 1.5 / scale**2
        np.testing.assert_allclose(explanation.attention, expected, atol=1e-5)
        np.testing.assert_allclose(explanation.attention.sum((1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_and_decoder_at_every_budget(tower, decoder, dtype, tmp_path):
    config = tiny_config(tower, decoder)
    model, processor = quiet(tiny_model(config)).to(dtype), tiny_processor(tmp_path, config)
    budgets, side = config.legal_num_visual_tokens, config.grid_size
    with torch.no_grad():  # as a caller's own
        explanations = explain(model, processor, cat(), QUESTION, budgets, **LENGTH)
    assert [each.num_visual_tokens for each in explanations] == budgets
    for each in explanations:
        assert each.heat.shape == (side, side)
        assert each.heat.dtype == each.attention.dtype == np.float32
        assert each.heat.min() >= 0
        assert each.heat.max() in (0, 1)
        assert each.attention.shape == (each.num_visual_tokens, side, side)
        np.testing.assert_allclose(each.attention.sum((1, 2)), 1, atol=1e-3)
    assert any(each.heat.max() == 1 for each in explanations)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_grid_of_the_paper_and_its_budgets(tmp_path):
    text = {**tiny_config().text_config.to_dict(), "max_position_embeddings": 1024}
    tower = {**TOWERS["clip"], "image_size": 48, "patch_size": 2}
    config = DeltaLlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN_ID)
    model, processor = quiet(tiny_model(config)), tiny_processor(tmp_path, config)
    for budgets, expected in ((None, [16, 64, 144]), ([576, 1], [576, 1])):
        explanations = explain(model, processor, cat(), QUESTION, budgets, max_new_tokens=2)
        assert [each.attention.shape for each in explanations] == [(budget, 24, 24) for budget in expected]


def test_the_picture_is_what_the_tower_sees(model, tmp_path):
    """A wide picture lies in the middle of a square, or loses its ends, as the processor was made."""
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (0, 0, 16, 32))
    for ratio, left_of_the_middle in (("pad", (0, 0, 255)), ("resize", (255, 0, 0))):
        folder = tmp_path / ratio
        folder.mkdir()
        processor = tiny_processor(folder, tiny_config(), image_aspect_ratio=ratio)
        (explanation,) = explain(quiet(model), processor, wide, QUESTION, [4], **LENGTH)
        assert explanation.picture.shape == (32, 32, 3)
        assert explanation.picture.dtype == np.uint8
        assert tuple(explanation.picture[16, 3]) == left_of_the_middle
        assert tuple(explanation.picture[16, 28]) == (255, 0, 0)
        background = tuple(explanation.picture[2, 16])
        assert background == ((122, 116, 104) if ratio == "pad" else (255, 0, 0))  # 255 times CLIP's mean


@pytest.mark.parametrize(
    ("answer", "word", "found"),
    [
        ("A woman and a man, a red bus.", "man", "man"),
        ("A woman and a man, a red bus.", "RED Bus", "red bus"),
        ("A woman and a man, a red bus.", " bus ", "bus"),
        ("A woman and a man, a red bus.", "oma", None),
        ("A woman and a man, a red bus.", "", None),
        ("It costs $5 (five).", "$5", "$5"),
        ("一只猫在看。", "猫", "猫"),
    ],
)
def test_a_word_and_its_tokens(answer, word, found, processor):
    tokenizer = processor.tokenizer
    ids = torch.tensor([*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
    assert answer_positions(tokenizer, ids, None) == list(range(len(ids) - 1))
    positions = answer_positions(tokenizer, ids, word)
    if found is None:
        assert positions is None
    else:
        assert positions == list(range(positions[0], positions[-1] + 1))
        assert found in tokenizer.decode(ids[positions])
        assert found not in tokenizer.decode(ids[positions[:-1]])
        assert found not in tokenizer.decode(ids[positions[1:]])


@pytest.mark.filterwarnings("ignore:.*gemv_4bit")  # torch's, of the gradient that 4 bits lack on this CPU
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_has_heat_or_says_why_not(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = tiny_config(text={"hidden_size": 64, "intermediate_size": 128})
    model, processor = quiet(tiny_model(config)), tiny_processor(tmp_path, config)
    model.save_pretrained(tmp_path / "model")
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=SKIP_MODULES,
    )
    quantised = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", quantization_config=settings)
    refused = ""
    try:
        explanations = explain(quantised, processor, cat(), QUESTION, [16, 4, 1], **LENGTH)
    except UserError as error:
        refused = str(error)
    if refused:
        assert (bits, quantised.device.type) == (4, "cpu")
        assert "no gradient of the answer at 16 visual tokens" in refused
    else:
        assert any(each.heat.max() == 1 for each in explanations)


def one_explanation(budget: int, answer: str = "red") -> Explanation:
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1
    side = round(budget**0.5)
    attention = np.zeros((side, side, side, 4 // side, side, 4 // side), np.float32)
    for row, column in np.ndindex(side, side):
        attention[row, column, row, :, column, :] = side**2 / 16
    return Explanation(budget, answer, heat, attention.reshape(budget, 4, 4), np.full((32, 32, 3), 255, np.uint8))


def test_heat_lies_where_it_belongs():
    pytest.importorskip("matplotlib")
    colours = heat_maps.heated(np.full((32, 32, 3), 255, np.uint8), one_explanation(4).heat)
    redness = colours[..., 0] - colours[..., 2]
    row, column = np.unravel_index(redness.argmax(), redness.shape)
    side = heat_maps.SIDE
    assert row < side / 4
    assert column > side * 3 / 4
    assert abs(redness[side // 2 :]).max() < 0.1 * redness.max()


def test_the_sheet_takes_any_text_and_any_number_of_budgets(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sheet.png"
    question = "Is it $5 or $6_x^{?\n" + "long " * 200
    heights = []
    for answers in (["red"], ["red", "", "a $\\frac$ " * 90]):
        explanations = [one_explanation(budget, answer) for budget, answer in zip((4, 1, 16), answers, strict=False)]
        heat_maps.draw(explanations, question, path, token="$r")
        with Image.open(path) as sheet:
            assert sheet.width == pytest.approx(150 * (0.4 + 2.42 * (1 + len(answers)) - 0.12), abs=2)
            heights.append(sheet.height)
    assert list(tmp_path.iterdir()) == [path]


def test_the_command(hub_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sheet.png"
    arguments = ["explain", str(hub_folder), str(CAT), QUESTION, "-o", str(path), "--max-new-tokens", "6"]
    for budgets, expected in ((["1", "16", "4"], ["1", "16", "4"]), (["4,1"], ["4", "1"]), ([], ["16"])):
        assert cli.main([*arguments, *(["--num-visual-tokens", *budgets] if budgets else [])]) == 0
        *answers, wrote = capsys.readouterr().out.splitlines()
        assert [line.partition(": ")[0] for line in answers] == expected
        assert wrote == f"wrote {path}"
        with Image.open(path) as sheet:
            assert sheet.width == pytest.approx(150 * (0.4 + 2.42 * (1 + len(expected)) - 0.12), abs=2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def place(hub_folder, tmp_path, monkeypatch):
    """A folder with what the refusals name."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(hub_folder, "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "llama"}')
    Path("empty").mkdir()
    Path("photo.png").write_bytes(encoded(picture()))
    Path("text.jpg").write_text("no picture")
    Path("folder.png").mkdir()
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "other"}, "other"),
        ({"model": "no_weights"}, "no_weights"),
        ({"model": "empty"}, "no config.json"),
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"image": "text.jpg"}, "text.jpg is not an image"),
        ({"image": "nothing.jpg"}, "no such image: nothing.jpg"),
        ({"image": "empty"}, "empty is a folder"),
        ({"question": " "}, "the question is empty"),
        ({"question": "photo.png"}, "the question is missing"),
        ({"question": "<image> what?"}, "<image>"),
        ({"question": "word " * 600}, "context is 512"),
        ({"output": "sheet.jpg"}, "sheet.jpg"),
        ({"output": "missing/sheet.png"}, "missing is no folder"),
        ({"output": "photo.png"}, "photo.png exists and is no sheet"),
        ({"output": "folder.png"}, "folder.png exists and is no sheet"),
        ({"options": ["--num-visual-tokens", "7"]}, "choose one of [16, 4, 1]"),
        ({"options": ["--num-visual-tokens", "4", "144"]}, "choose one of [16, 4, 1]"),
        ({"options": ["--num-visual-tokens", "many"]}, "'many' is not a number"),
        ({"options": ["--num-visual-tokens", ""]}, "'' is not a number"),
        ({"options": ["--token", "zebra"]}, "'zebra' is not in the answer at 16 visual tokens, '"),
        ({"options": ["--token", ""]}, "'' is not in the answer"),
        ({"options": ["--token", "\udcff\n"]}, "is not in the answer"),
        ({"options": ["--device", "abacus"]}, "abacus"),
        ({"options": ["--dtype", "int8"]}, "choose one of auto"),
    ],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_refusals_are_one_line_and_leave_nothing(changed, message, place, hub_folder, capsys):
    pytest.importorskip("matplotlib")
    given = {"model": str(hub_folder), "image": str(CAT), "question": QUESTION, "output": "sheet.png", **changed}
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    arguments = [given["model"], given["image"], given["question"], "-o", given["output"], *given.get("options", [])]
    assert cli.main(["explain", *arguments, "--max-new-tokens", "6"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before


def test_a_missing_matplotlib_is_told_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modeling_delta_llava.evaluation.figure.find_spec", lambda name: None)
    assert cli.main(["explain", "nowhere", str(CAT), QUESTION, "-o", str(tmp_path / "sheet.png")]) == 2
    assert "pip install 'delta-llava[profile]'" in capsys.readouterr().err


def test_a_failed_drawing_leaves_the_old_sheet(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sheet.png"
    heat_maps.draw([one_explanation(4)], QUESTION, path)
    before = path.read_bytes()

    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        heat_maps.draw([one_explanation(1)], QUESTION, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_weights_that_are_not_finite_are_named(model, processor):
    model.model.multi_modal_projector.linear_1.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="is not finite: compute in bfloat16 or float32"):
        explain(quiet(model), processor, cat(), QUESTION, [4], **LENGTH)


def test_python_refuses_other_models_and_budgets(model, processor):
    with pytest.raises(UserError, match=re.escape("choose one of [16, 4, 1]")):
        explain(model, processor, cat(), QUESTION, [5])
    model.config.model_type = "llava"
    with pytest.raises(UserError, match="of type llava"):
        explain(model, processor, cat(), QUESTION)


def test_the_benchmark_measures_shares_of_boxes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("explain")
    covered = np.zeros((96, 96), bool)
    covered[30, 12:20] = covered[24:36, 15] = True
    inside = benchmark.box(covered)
    assert inside.sum() == 12 * 8
    assert benchmark.share_inside(np.ones((8, 8)), inside) == pytest.approx(12 * 8 / 96**2)
    heat = np.zeros((8, 8))
    heat[2, 1] = 3
    assert benchmark.share_inside(heat, inside) == pytest.approx(8 / 12)
    asked = list(benchmark.examples(40, seed=1))
    assert len(asked) == 40
    for _, question, box, others in asked:
        assert question.kind in benchmark.ABOUT_ONE_SHAPE
        assert box.any()
        assert all(other.any() for other in others)


def test_the_committed_benchmark_shows_heat_on_what_is_asked_and_none_by_chance():
    document = json.loads((BENCHMARKS / "results" / "explain-demo.json").read_text())
    assert document["versions"]["torch"]
    assert document["machine"]["cpu"]
    assert document["settings"]["pictures"] == 100
    rows = document["results"]["rows"]
    assert [(row["method"], row["num_visual_tokens"]) for row in rows] == [
        (method, budget) for method in ("grad_cam", "hirescam") for budget in (64, 16, 4, 1)
    ]
    for row in rows:
        trained, shuffled = row["trained"], row["shuffled"]
        assert trained["asked"] > 1.5
        assert abs(shuffled["preference"] - 1) < 3 * shuffled["preference_standard_error"]
        if row["method"] == "hirescam":
            assert trained["asked"] > max(1.5 * shuffled["asked"], 1.5 * trained["others"])
            if row["num_visual_tokens"] > 1:
                assert trained["preference"] > max(1.1, shuffled["preference"])
