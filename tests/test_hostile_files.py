"""Small files that would hang a reader, fill its memory or break off with a traceback: one line, within seconds."""

import json
import os
import time

import pytest
from sentencepiece import sentencepiece_model_pb2

from delta_llava.errors import LONGEST_REASON, UserError, reason, told
from delta_llava.templates import render
from modeling_delta_llava.building import (
    backbone_chat_template,
    build_image_processor,
    load_tokenizer,
    read_chat_template,
)
from modeling_delta_llava.json_files import MAX_OTHER_BYTES, check_sizes, read_json
from modeling_delta_llava.tokenization import sentencepiece_tokenizer
from tests.tiny import tiny_config
from tests.training_layout import TrainingLayout, sentencepiece_model, write_tokenizer


@pytest.fixture(autouse=True)
def within_seconds():
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 30


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "does not hold a JSON object"),
        ("3", "does not hold a JSON object"),
        ("null", "does not hold a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice"),
        ("{" + "".join(f'"k{i}": 1, ' for i in range(60_000)) + '"k59999": 2}', "names 'k59999' twice"),
        (b"\xff\xfe{", "not valid JSON"),
        (" " * (MAX_OTHER_BYTES + 1), "no such file needs more than 8"),
        ("loop", "Too many levels of symbolic links"),
        ("pipe", "is no regular file"),
        ("folder", "is a folder"),
        ("missing", "is missing"),
    ],
    ids=lambda value: value[:20],
)
def test_files_that_hold_no_readable_object(text, message, tmp_path):
    path = tmp_path / "config.json"
    if text == "loop":
        path.symlink_to(path.name)
    elif text == "pipe":
        os.mkfifo(path)
    elif text == "folder":
        path.mkdir()
    elif text != "missing":
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as raised:
        read_json(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers"),
        ({"vision_config": {"image_size": 10**12}}, "vision_config.image_size"),
        ({"a": {"b": {"hidden_size": float("inf")}}}, "a.b.hidden_size is inf"),
        ({"num_labels": int("9" * 4000)}, "num_labels is 9999"),
        ({"depths": [2, 2, 10**6]}, "depths is 1000000"),
        ({"memory_feature_layers": [1] * 5000}, "memory_feature_layers is 5000"),
        ({"n_layer": -(10**9)}, "n_layer"),
        ({"num_experts": 10**6}, "num_experts"),
        ({"delta_rank": 10**8}, "delta_rank"),
        ({"size": {"shortest_edge": 10**9}}, "size.shortest_edge"),
        ({"vocab_size": 10**9}, "vocab_size"),
    ],
)
def test_sizes_without_end(fields, field):
    with pytest.raises(UserError, match=field) as raised:
        check_sizes(fields, "config.json")
    assert str(raised.value).startswith("config.json: ")
    assert len(str(raised.value)) < 200


def test_sizes_of_large_models_pass():
    check_sizes(json.loads(tiny_config().to_json_string()), "config.json")
    check_sizes(
        {
            "text_config": {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248},
            "vision_config": {"image_size": 1540, "num_channels": 3},
            "vocab_size": 262_208,
            "num_experts": 512,
            "rope_theta": 500_000_000,
            "max_position_embeddings": 10_485_760,
            "tie_word_embeddings": True,
            "image_token_id": 151_655,
        },
        "config.json",
    )


def test_an_image_processor_without_end():
    vision = tiny_config().vision_config
    for settings in ({"size": 10**9}, {"crop_size": {"height": 10**9, "width": 1}}, {"size": {"nothing": []}}):
        with pytest.raises(UserError, match="preprocessor_config"):
            build_image_processor(vision, settings)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("a\n\x1b[31m" + "b" * 10_000), KeyError("model_type"), ZeroDivisionError(), Exception()),
        BaseException("panic in Rust"),
    ],
)
def test_whatever_is_raised_is_told_in_one_line(error):
    with pytest.raises(UserError) as raised, told("FILE cannot be used", "repair it"):
        raise error
    line = str(raised.value)
    assert line == f"FILE cannot be used ({reason(error)}): repair it"
    assert line.isprintable()
    assert len(reason(error)) <= LONGEST_REASON
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("it says all"), BrokenPipeError(), KeyboardInterrupt()])
def test_what_needs_no_telling_passes(error):
    with pytest.raises(type(error)) as raised, told("FILE cannot be used", "repair it"):
        raise error
    assert raised.value is error


# --- chat templates --------------------------------------------------------------------------------------------------

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a'.ljust(2000000000) }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a'.ljust(2000000) }}",
        "a" * 600_000,
    ],
    ids=lambda text: text[:30],
)
def test_templates_that_take_too_much(template):
    with pytest.raises(UserError, match=r"TEMPLATE (takes more|is no text)"):
        render(template, [CONVERSATION], {}, "TEMPLATE")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "recursion"),
        ("{% include 'other' %}", "no loader"),
        ("{% if", "unexpected"),
    ],
    ids=lambda text: text[:30],
)
def test_templates_that_fail(template, problem, processor):
    (result,) = render(template, [CONVERSATION], {}, "TEMPLATE")
    assert result.text is None
    assert problem in result.problem
    processor.tokenizer.chat_template = template
    try:
        with pytest.raises(UserError, match=r"the chat template of the language model .*cannot show a question"):
            backbone_chat_template(processor.tokenizer, "<image>")
    finally:
        processor.tokenizer.chat_template = None


@pytest.mark.parametrize("name", ["vicuna_v1", "plain", "chatml"])
def test_the_process_renders_as_transformers_does(name, processor):
    template = read_chat_template(name)
    variables = processor.tokenizer.special_tokens_map
    results = render(template, [CONVERSATION, CONVERSATION[:1]], variables, "TEMPLATE")
    for result, messages in zip(results, (CONVERSATION, CONVERSATION[:1]), strict=True):
        assert result.text == processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=len(messages) == 1
        )


# --- tokenizers ------------------------------------------------------------------------------------------------------


def without_pieces(model):
    del model.pieces[:]


def without_unknown(model):
    del model.pieces[0]


def with_a_long_piece(model):
    model.pieces[-1].piece = "a" * 200_000


def with_a_piece_twice(model):
    model.pieces[-1].piece = model.pieces[-2].piece


def with_eos_elsewhere(model):
    model.trainer_spec.eos_id = -1


def with_many_pieces(model):
    model.pieces.extend(type(model.pieces[0])(piece=f"x{number}", score=0) for number in range(150_000))


@pytest.mark.parametrize(
    "change",
    [without_pieces, without_unknown, with_a_long_piece, with_a_piece_twice, with_eos_elsewhere, with_many_pieces],
)
def test_sentencepiece_models_that_make_no_tokenizer(change, tmp_path):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sentencepiece_model())
    change(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"the sentencepiece model .*tokenizer.model has"):
        sentencepiece_tokenizer(tmp_path / "tokenizer.model")


def test_an_id_far_behind_the_embedding(tmp_path):
    write_tokenizer(tmp_path, TrainingLayout(text_model_type="qwen2"))
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["far"] = 30_000_000
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="'far' the id 30000000"):
        load_tokenizer(tmp_path, "qwen2")


def test_ids_that_the_embedding_has_no_rows_for(tmp_path):
    write_tokenizer(tmp_path, TrainingLayout(text_model_type="qwen2"))
    load_tokenizer(tmp_path, "qwen2", rows=10)  # appended tokens
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["far"] = 70_000
    path.write_text(json.dumps(tokenizer))
    load_tokenizer(tmp_path, "qwen2", rows=10_000)
    with pytest.raises(UserError, match="'far' the id 70000, far behind the 10 rows"):
        load_tokenizer(tmp_path, "qwen2", rows=10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("added_tokens.json", {"<far>": 30_000_000}),
        ("added_tokens.json", {f"<{number}>": 10**6 + number for number in range(1000)}),
        ("added_tokens.json", {"<far>": "many"}),
        ("tokenizer_config.json", {"chat_template": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ],
)
def test_tokenizer_files_of_a_sentencepiece_model(name, value, tmp_path):
    write_tokenizer(tmp_path, TrainingLayout())
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path, "llama")
    assert len(str(raised.value)) < len(str(tmp_path)) + 600
