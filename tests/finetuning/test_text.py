"""Ids and labels of conversations, and their expansion to visual tokens."""

import json
import os
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_llava.errors import UserError
from modeling_delta_llava.building import build_processor
from modeling_delta_llava.finetuning.collator import expand
from modeling_delta_llava.finetuning.rows import RowError, parse_row
from modeling_delta_llava.finetuning.text import IGNORED_LABEL, ConversationEncoder
from modeling_delta_llava.tokenization import sentencepiece_tokenizer
from tests import tiny

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
IMAGE = -200


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def chat(request, tmp_path_factory):
    """A processor and an oracle: the slow sentencepiece tokenizer applied to each chunk between images."""
    import sentencepiece

    from tests.training_layout import sentencepiece_model

    folder = tmp_path_factory.mktemp("tokenizer")
    processor = tiny.tiny_processor(folder, tiny.tiny_config(), legacy=request.param)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())

    def chunk(text):
        """The slow tokenizer: special tokens split the text; behind them, legacy adds the dummy space again."""
        ids = []
        for place, part in enumerate(text.split("</s>")):
            if place:
                ids.append(pieces.eos_id())
            if not part:
                continue
            if place == 0 or request.param:
                ids += pieces.encode(part)
            else:  # no dummy space: encode behind a newline, which cannot merge, and take that off again
                ids += pieces.encode("\n" + part)[len(pieces.encode("\n")) :]
        return ids

    return processor, chunk


def released_ids(turns, chunk, bos=1):
    """Ids as LLaVA's training makes them: every chunk between images is tokenised on its own."""
    text = SYSTEM + " " + "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
    ids = [bos]
    for place, part in enumerate(text.split("<image>")):
        if place:
            ids.append(IMAGE)
        if part:
            ids += chunk(part)
    return ids


TURNS = {
    "one turn": [("<image>\nWhat is in the image?", "A cat.")],
    "two turns": [("<image>\nWhat is in the image?", "A cat."), ("What colour?", "Black and white.")],
    "text only": [("Name the capital.", "Paris.")],
    "short answers": [("<image>\nAre there people?", "Yes"), ("How many?", "3")],
    "only an image": [("<image>", "A cat.")],
    "spaces and code": [("<image>\nTranscribe   the code:", "def f(x):\n    return x\t+ 1\n")],
    # Of these the released code learns nothing, or ASSISTANT: too.
    "the prompt's own word": [("What does ASSISTANT: mean?", "A mark."), ("Say ASSISTANT:", "No.")],
    "other scripts": [("<image>\n这是什么？ Опиши 🐈", "кошка 🐈.")],
}


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS.keys())
def test_vicuna_rows_equal_the_released_preprocessing(chat, turns):
    processor, chunk = chat
    row = {"conversations": []}
    for question, answer in turns:
        row["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if "<image>" in turns[0][0]:
        row["image"] = "a.png"
    encoded = ConversationEncoder(processor, "v1").encode(parse_row(row).messages)
    ids = [IMAGE if token == processor.image_token_id else token for token in encoded.input_ids]
    assert ids == released_ids(turns, chunk)
    learned = [token for token in encoded.labels if token != IGNORED_LABEL]
    answers = "".join(
        processor.tokenizer.decode(part).strip(" ") for part in split_after(learned, processor.tokenizer.eos_token_id)
    )
    assert answers == "".join(answer + "</s>" for _, answer in turns)
    kept = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED_LABEL]
    assert kept == learned


def split_after(tokens, end):
    parts, current = [], []
    for token in tokens:
        current.append(token)
        if token == end:
            parts.append(current)
            current = []
    return parts + ([current] if current else [])


def test_plain_rows_are_image_caption_newline(chat):
    processor, chunk = chat
    row = {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "Give a summary.\n<image>"},
            {"from": "gpt", "value": "the pope's visit , in colour ."},
        ],
    }
    encoded = ConversationEncoder(processor, "plain").encode(parse_row(row).messages)
    caption = chunk("the pope's visit , in colour .\n")
    assert encoded.input_ids == [1, processor.image_token_id, *caption]
    assert encoded.labels == [IGNORED_LABEL, IGNORED_LABEL, *caption]


def test_expanded_ids_equal_the_processors(processor):
    """Training sees the ids that inference sees, at every budget and with several pictures."""
    messages = parse_row(
        {
            "image": ["a", "b"],
            "conversations": [
                {"from": "human", "value": "<image><image>\nWhich is red?"},
                {"from": "gpt", "value": "The first."},
            ],
        }
    ).messages
    encoded = ConversationEncoder(processor).encode(messages)
    ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)
    for budget in (16, 4, 1):
        expected = processor(
            images=[tiny.picture("red"), tiny.picture("blue")],
            text=processor.apply_chat_template(messages),
            num_visual_tokens=budget,
        )["input_ids"]
        expanded, _, kept = expand(ids, labels, processor.image_token_id, budget, max_length=10_000)
        assert expanded.tolist() == list(expected[0])
        assert kept.tolist() == [True, True]


def test_other_backbones_learn_what_their_template_marks(tmp_path):
    from modeling_delta_llava.building import build_processor, load_tokenizer
    from tests.training_layout import TrainingLayout, write_tokenizer

    write_tokenizer(tmp_path, TrainingLayout(text_model_type="qwen2"))
    tokenizer, image_token = load_tokenizer(tmp_path, "qwen2")
    config = tiny.tiny_config(decoder="qwen2", text={"vocab_size": len(tokenizer)}, image_token_id=5)
    qwen = build_processor(config, tokenizer, image_token)
    row = {
        "image": "a",
        "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello there"}],
    }
    encoded = ConversationEncoder(qwen).encode(parse_row(row).messages)
    learned = [label for label in encoded.labels if label != IGNORED_LABEL]
    assert qwen.tokenizer.decode(learned) == "Hello there<|im_end|>"
    assert encoded.input_ids.count(qwen.image_token_id) == 1
    vicuna = ConversationEncoder(qwen, "v1").encode(parse_row(row).messages)
    answer = [label for label in vicuna.labels if label != IGNORED_LABEL]
    assert qwen.tokenizer.decode(answer) == " Hello there<|im_end|>"
    plain = ConversationEncoder(qwen, "plain").encode(parse_row(row).messages)
    assert plain.input_ids[0] == qwen.image_token_id
    assert qwen.tokenizer.decode(plain.input_ids[1:]) == "Hello there\n"


def test_tokenizer_and_template_are_checked(processor):
    stub = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(pad_token_id=None),
        image_token="<image>",
        image_token_id=5,
        chat_template=processor.chat_template,
    )
    with pytest.raises(UserError, match="no pad token"):
        ConversationEncoder(stub)
    stub.tokenizer.pad_token_id = 0
    stub.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"no {% generation %} marks.*pass --format v1"):
        ConversationEncoder(stub)
    stub.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ConversationEncoder(stub)


def test_what_a_template_refuses_is_named(processor):
    asked = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    good = parse_row({"conversations": asked}).messages
    bad = parse_row({"conversations": [{"from": "system", "value": "Be brief."}, *asked]}).messages
    plain = ConversationEncoder(processor, "plain")
    plain.check(good)
    for refuse in (plain.check, plain.encode):
        with pytest.raises(RowError, match=r"cannot show this conversation \(The plain format knows.*not system\)"):
            refuse(bad)
    text_only = types.SimpleNamespace(
        image_token=processor.image_token,
        tokenizer=processor.tokenizer,
        image_token_id=processor.image_token_id,
        chat_template="{% for m in messages %}{% generation %}{{ '' + m.content }}{% endgeneration %}{% endfor %}",
    )
    with pytest.raises(RowError, match="cannot show this conversation"):
        ConversationEncoder(text_only).check(good)


def test_a_conversation_like_one_before_is_not_rendered_again(processor, monkeypatch):
    encoder = ConversationEncoder(processor)
    short, long, pictured = (
        parse_row({"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes."}], **image})
        for value, image in (("Hi", {}), ("Hi, are you there?", {}), ("<image>\nHi", {"image": "a"}))
    )
    rendered = []
    monkeypatch.setattr(encoder, "_apply_template", lambda messages, **options: rendered.append(messages))
    for sample in (short, long, pictured, short):
        encoder.check(sample.messages)
    assert rendered == [short.messages, pictured.messages]


@settings(max_examples=100, deadline=None)
@given(
    kinds=st.lists(st.booleans(), max_size=12),
    budget=st.integers(1, 9),
    max_length=st.integers(1, 60),
)
def test_a_cut_never_leaves_part_of_a_picture(kinds, budget, max_length):
    image_id = 99
    text = torch.tensor([image_id if is_image else 7 for is_image in kinds], dtype=torch.int64)
    ids, labels, kept = expand(text, text, image_id, budget, max_length)
    whole, _, every = expand(text, text, image_id, budget, 10**9)
    assert len(ids) == len(labels) <= max_length
    assert ids.equal(whole[: len(ids)])
    assert (ids == image_id).sum() == kept.sum() * budget
    assert every.all()
    assert len(kept) == len(every) == sum(kinds)
    if len(ids) < len(whole):
        following = whole[len(ids)]
        assert len(ids) + (budget if following == image_id else 1) > max_length


TALK = "Write <image> where a picture belongs."


def encoded_row(processor, row, format):  # noqa: A002 - the setting's name
    return ConversationEncoder(processor, format).encode(parse_row(row).messages)


@pytest.mark.parametrize("turns", [[(TALK, "So <image>?")], [("<image>", "<image>")]], ids=["sentences", "alone"])
def test_text_about_the_image_token_equals_the_released_preprocessing(chat, turns):
    """Without a picture the released code tokenises the whole text at once, the tag included."""
    processor, chunk = chat
    row = {
        "conversations": [
            {"from": who, "value": value} for turn in turns for who, value in zip(("human", "gpt"), turn, strict=True)
        ]
    }
    text = SYSTEM + " " + "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
    encoded = encoded_row(processor, row, "v1")
    assert encoded.input_ids == [1, *chunk(text)]
    assert processor.image_token_id not in encoded.input_ids


def test_an_answer_may_talk_about_the_image_token_beside_a_picture(processor):
    row = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": TALK}],
    }
    encoded = encoded_row(processor, row, "template")
    assert encoded.input_ids.count(processor.image_token_id) == 1
    learned = [label for label in encoded.labels if label != IGNORED_LABEL]
    assert processor.tokenizer.decode(learned, skip_special_tokens=True).strip() == TALK


REFERENCE = os.environ.get("DELTA_LLAVA_REFERENCE")


@pytest.mark.skipif(not REFERENCE, reason="the Llama tokenizer may not be shipped: set DELTA_LLAVA_REFERENCE")
def test_labels_of_the_released_rows():
    """Rows of the reference, read as training reads them: ids and labels token for token."""
    rows = json.loads((Path(REFERENCE) / "text_golden.json").read_text(encoding="utf-8"))
    config = tiny.tiny_config(text={"vocab_size": 32001}, image_token_id=32000)
    encoders = {}
    for legacy in (True, False):
        tokenizer = sentencepiece_tokenizer(Path(REFERENCE) / "llama_tokenizer.model", legacy=legacy)
        processor = build_processor(config, tokenizer)
        encoders |= {(legacy, name): ConversationEncoder(processor, name) for name in ("v1", "plain")}
    for row in rows:
        picture = {"image": "a.png"} if any("<image>" in turn["value"] for turn in row["conversations"]) else {}
        sample = parse_row({"conversations": row["conversations"], **picture})
        name = {"vicuna_v1": "v1", "plain": "plain"}[row["template"]]
        encoded = encoders[row["legacy"], name].encode(sample.messages)
        assert [IMAGE if token == 32000 else token for token in encoded.input_ids] == row["input_ids"], row["name"]
        assert encoded.labels == row["labels"], row["name"]
