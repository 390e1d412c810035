"""Rows of data files: what is read, and where a bad one is said to be."""

import contextlib
import itertools
import json
import pickle

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from delta_llava.errors import UserError
from modeling_delta_llava.finetuning.collator import DeltaLlavaCollator
from modeling_delta_llava.finetuning.data import (
    LENGTH_COLUMN,
    ROW_COLUMN,
    check_rows,
    load_rows,
    place_of,
    row_of,
    sample_of,
)
from modeling_delta_llava.finetuning.rows import RowError, parse_row
from modeling_delta_llava.finetuning.text import ConversationEncoder
from tests import tiny


def turns(*values):
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


def test_llava_turn_shows_its_images_first():
    sample = parse_row({"image": "a.png", "conversations": turns("Look at <image> and say.", "Yes")})
    assert sample.images == ["a.png"]
    assert sample.messages == [
        {"role": "user", "content": [IMAGE, text("Look at  and say.")]},
        {"role": "assistant", "content": [text("Yes")]},
    ]


def test_several_images_and_an_image_only_turn():
    sample = parse_row({"image": ["a.png", "b.png"], "conversations": turns("<image><image>", "Two", "More?", "No")})
    assert sample.images == ["a.png", "b.png"]
    assert sample.messages[0]["content"] == [IMAGE, IMAGE]


@pytest.mark.parametrize("missing", [{}, {"image": None}, {"image": []}, {"image": "", "images": None}])
def test_text_only_row_keeps_its_text_unchanged(missing):
    sample = parse_row({**missing, "conversations": turns("  Hi ", "Hello\n")})
    assert sample.images == []
    assert sample.messages[0]["content"] == [text("  Hi ")]
    assert sample.messages[1]["content"] == [text("Hello\n")]


def test_chat_row():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("What"), IMAGE, text("?")]},
        {"role": "assistant", "content": [text("A cat.")]},
    ]
    sample = parse_row({"messages": messages, "images": [{"bytes": b"x", "path": None}]})
    assert sample.images == [{"bytes": b"x"}]
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[1]["content"] == [text("What"), IMAGE, text("?")]


def test_leading_answer_is_left_out_and_said():
    row = {"conversations": [{"from": "gpt", "value": "Hi!"}, *turns("Name?", "Ann")]}
    sample = parse_row(row)
    assert sample.dropped_leading_answer
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]


def question(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes"}]}


def test_pictures_inside_message_parts():
    """In the order of their parts, whichever key holds them."""
    row = question(
        {"type": "image", "image": "a.png", "text": None},
        {"type": "image", "url": "https://example.com/b.png"},
        text("Which?"),
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa", "detail": "low"}},
        {"type": "image_url", "image_url": "c.png"},
        {"type": "image", "path": "d.png"},
        {"type": "image", "base64": "aaaa"},
        {"type": "image", "image": {"bytes": b"x", "path": None}},
    )
    sample = parse_row(row)
    assert sample.images == [
        *("a.png", "https://example.com/b.png", "data:image/png;base64,aaaa", "c.png", "d.png"),
        *("data:;base64,aaaa", {"bytes": b"x"}),
    ]
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image"] * 2 + ["text"] + ["image"] * 5


def test_the_index_of_an_image_part_is_used():
    second, first = ({"type": "image", "index": number} for number in (1, 0))
    row = {"images": ["a.png", "b.png"], **question(second, text("Which?"), first, second)}
    assert parse_row(row).images == ["b.png", "a.png", "b.png"]
    for bad, words in (
        ((second,), "lists 2 images"),
        ((first, {"type": "image", "index": 2}), "has the index 2, but the row lists 2"),
        ((first, {"type": "image", "index": -1}), "has the index -1"),
        ((first, {"type": "image", "index": True}), "has the index True"),
        ((first, IMAGE), "some image parts have an `index`"),
        (({"type": "image", "index": 0, "image": "c.png"},), "leave one of them"),
    ):
        with pytest.raises(RowError, match=words):
            parse_row({"images": ["a.png", "b.png"], **question(*bad)})


@pytest.mark.parametrize(("empty", "full"), [("image", "images"), ("images", "image"), ("messages", "conversations")])
def test_null_means_absent(empty, full):
    row = {"image": ["a.png"], "conversations": turns("<image> a", "b"), "tools": None, "videos": []}
    row[full] = row.pop(full, None) or row.pop("image")
    assert parse_row({empty: None, **row}).images == ["a.png"]


def test_what_training_does_not_use_is_named_or_ignored_on_request():
    row = {"conversations": turns("a", "b"), "id": 7, "weight": 0.5}
    with pytest.raises(RowError, match=r"the row has id, weight, which training does not use; add it to ignored_keys"):
        parse_row(row)
    assert parse_row(row, ignored_keys=["id", "weight"]).messages
    row = {"conversations": [*turns("a", "b")[:1], {"from": "gpt", "value": "b", "loss": False, "tool": "x"}]}
    with pytest.raises(RowError, match="turn 2 has loss, tool"):
        parse_row(row)
    with pytest.raises(RowError, match="a text part of turn 1 has image"):
        parse_row(question({"type": "text", "text": "a", "image": "b.png"}))


def test_the_tag_is_text_where_it_shows_no_picture():
    sample = parse_row({"conversations": turns("What is <image>?", "A tag: <image>")})
    assert sample.messages[0]["content"] == [text("What is <image>?")]
    sample = parse_row({"image": "a.png", "conversations": turns("<image>\nWhat?", "<image> stands for it")})
    assert sample.images == ["a.png"]
    assert sample.messages[1]["content"] == [text("<image> stands for it")]
    sample = parse_row({"images": ["a.png"], **question(IMAGE, text("What does <image> mean?"))})
    assert sample.messages[0]["content"] == [IMAGE, text("What does <image> mean?")]


BAD_ROWS = {
    "no object": ([], "must be an object"),
    "no turns": ({"conversations": []}, "`conversations` is empty"),
    "no layout": ({"image": "a.png"}, "neither"),
    "two layouts": ({"conversations": turns("a", "b"), **question(text("a"))}, "both `conversations` and `messages`"),
    "two lists of pictures": ({"image": "a", "images": ["b"], "conversations": turns("a", "b")}, "both `image` and"),
    "too few pictures": ({"image": ["a.png"], "conversations": turns("<image><image> a", "b")}, "2 <image>"),
    "too many pictures": ({"image": ["a.png", "b.png"], "conversations": turns("<image> a", "b")}, "lists 2 images"),
    "no mark": ({"image": "a.png", "conversations": turns("a", "<image> b")}, "0 <image> but the row lists 1"),
    "picture in an answer": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "image", "url": "b"}]},
            ]
        },
        "only user turns",
    ),
    "roles out of order": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "roles out of order",
    ),
    "unknown role": ({"conversations": [{"from": "bard", "value": "a"}]}, "'bard'"),
    "no answer": ({"conversations": turns("a", "b", "c")}, "no answer"),
    "only an answer": ({"conversations": [{"from": "gpt", "value": "a"}]}, "no question"),
    "empty answer": ({"conversations": turns("a", " ")}, "assistant turn is empty"),
    "empty question": ({"conversations": turns("", "b")}, "user turn is empty"),
    "number as text": ({"conversations": turns("a", 3)}, "type int"),
    "no value": ({"conversations": [{"from": "human"}]}, "`from` and `value`"),
    "empty image name": ({"image": [""], "conversations": turns("<image>a", "b")}, "image name is empty"),
    "number as image": ({"image": 7, "conversations": turns("<image>a", "b")}, "type int"),
    "picture of nothing": ({"image": {"width": 3}, "conversations": turns("<image>a", "b")}, "has the keys width"),
    "half an emoji": ({"conversations": turns("a \ud83d", "b")}, "turn 1 has half of a character"),
    "half an emoji in a name": (
        {"image": "\ud83d", "conversations": turns("<image>a", "b")},
        "an image name has half",
    ),
    "chat part of another kind": (question({"type": "video"}), "neither an image nor a text"),
    "chat part without a kind": (question({"text": "a"}), "neither an image nor a text"),
    "chat role": ({"messages": [{"role": "tool", "content": "a"}]}, "'tool'"),
    "chat role that is no text": ({"messages": [{"role": ["user"], "content": "a"}]}, "has the role"),
    "chat content": ({"messages": [{"role": "user", "content": 3}]}, "type int"),
    "no character": ({"conversations": turns("a \ufdd0image\ufdd1", "b")}, "U\\+FDD0, which is no character"),
    "turns that are no list": ({"messages": {"role": "user"}}, "type dict, no list"),
}


@pytest.mark.parametrize(("row", "words"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows(row, words):
    with pytest.raises(RowError, match=words):
        parse_row(row)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "image", "x"]), inner)
    ),
    max_leaves=8,
)


def places_in(value, path=()):
    """The paths to everything inside a row."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from places_in(entry, (*path, key))


@pytest.mark.parametrize("layout", ["LLaVA", "chat"])
@given(data=st.data())
def test_a_row_with_something_else_in_one_place_is_read_or_refused(layout, data):
    """Read means that everything it holds is there: as many pictures as it shows, and text in every turn."""
    row = {"image": ["a.png"], "conversations": turns("<image>\nWhat?", "A cat.", "Sure?", "Yes.")}
    if layout == "chat":
        row = {"images": ["a.png"], **question({"type": "image", "index": 0}, text("What?"))}
    *path, last = data.draw(st.sampled_from(list(places_in(row))[1:]))
    inner = row
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(ANYTHING)
    with contextlib.suppress(RowError):
        sample = parse_row(row)
        shown = sum(part["type"] == "image" for turn in sample.messages for part in turn["content"])
        assert shown == len(sample.images)
        assert all(isinstance(part.get("text", ""), str) for turn in sample.messages for part in turn["content"])
        assert [turn["role"] for turn in sample.messages] == ["user", "assistant"] * (len(sample.messages) // 2)


def test_nesting_without_end_is_refused(monkeypatch):
    """JSON of newer Pythons reads thousands of levels."""
    value = "a.png"
    for _ in range(20_000):
        value = {"image": value}
    with pytest.raises(RowError, match="nested too deeply"):
        sample_of({ROW_COLUMN: 0, "image": value, "conversations": turns("<image>", "b")}, ())


@pytest.fixture
def checked(processor):
    """Reads a data file as a run does before its first step."""

    def check(file, policy="stop", split="train"):
        collator = DeltaLlavaCollator(processor, ConversationEncoder(processor), str(file), on_bad_row=policy)
        rows = load_rows(str(file), split)
        return check_rows(rows, collator, num_visual_tokens=4, look_for_images=False)

    return check


GOOD = {"conversations": turns("a", "b, [c] {d}")}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSON"])
def test_a_bad_row_is_named_with_its_line(tmp_path, checked, suffix):
    file = tmp_path / f"data{suffix}"
    rows = [GOOD, GOOD, {"conversations": []}]
    if suffix == ".jsonl":
        file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        line = 5
    else:
        file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        line = 1 + file.read_text().split('"conversations": []')[0].rstrip("{ \n").count("\n") + 1
    with pytest.raises(UserError, match=rf"line {line} \(row 2\): `conversations` is empty.*on_bad_row skip"):
        checked(file)
    good, messages = checked(file, "skip")
    assert len(good) == 2
    assert messages == [f"{file}: line {line} (row 2): `conversations` is empty"]
    assert row_of(good[1]) == GOOD
    assert good[LENGTH_COLUMN][:] == [4, 4]


BROKEN_LINES = {
    "no JSON": (b"{oops}", "no JSON"),
    "half an emoji": (json.dumps({"conversations": turns("a \ud83d", "b")}).encode(), "half of a character"),
    "nested": (b'{"conversations": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a long number": (b'{"id": ' + b"7" * 5000 + b"}", "no JSON .*digits"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8"),
    "a key twice": (b'{"id": 1, "id": 2}', "names 'id' twice"),
}


@pytest.mark.parametrize(("line", "words"), BROKEN_LINES.values(), ids=BROKEN_LINES.keys())
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_broken_line_is_left_out_before_the_first_step(tmp_path, checked, line, words, name):
    file = tmp_path / name
    file.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n" + line + b"\n" + json.dumps(GOOD).encode()
    )
    with pytest.raises(UserError, match=rf"line 3 \(row 1\): .*{words}.*on_bad_row skip") as raised:
        checked(file)
    assert "template" not in str(raised.value)
    rows, messages = checked(file, "skip")
    assert len(rows) == 2
    assert len(messages) == 1
    array = tmp_path / "array.json"
    array.write_bytes(b"[\n" + json.dumps(GOOD).encode() + b",\n" + line + b"]")
    with pytest.raises(UserError, match=r"line 3|UTF-8") as raised:
        checked(array)
    assert len(str(raised.value)) < 500


def test_files_that_are_no_rows(tmp_path, checked):
    for content, words in (
        ('[\n{"conversations": []},\n{oops}\n]', "line 3 column 2 is no JSON"),
        ('[{"conversations": []}', "neither comma nor bracket"),
        ('[{"conversations": []} {}]', "neither comma nor bracket"),
        ('[{"conversations": []}] []', "something follows"),
        ('{"conversations": []}', "`conversations` is empty"),
        ("[]", "no usable row"),
        ("", "no usable row"),
        ("7", "must be an object"),
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=words):
            checked(tmp_path / "a.json")
    with pytest.raises(UserError, match="no such data file"):
        checked(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be streamed"):
        load_rows(str(tmp_path / "a.json"), streaming=True)


@pytest.mark.parametrize("block_size", [1, 3])
def test_a_stream_gives_the_same_rows_to_any_number_of_readers(tmp_path, block_size):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({**GOOD, "id": number}) for number in range(10)))

    def batches(workers):
        rows = load_rows(str(file), streaming=True, num_parts=max(1, workers), block_size=block_size)
        loader = DataLoader(
            rows, block_size, num_workers=workers, collate_fn=lambda records: [row_of(row)["id"] for row in records]
        )
        return list(itertools.islice(loader, 12))

    alone = batches(0)
    assert [number for batch in alone for number in batch] == [number % 10 for number in range(12 * block_size)]
    assert batches(2) == alone
    once = load_rows(str(file), streaming=True, passes=1)
    assert [place_of(record) for record in once] == [f"line {number + 1} (row {number})" for number in range(10)]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        next(iter(load_rows(str(tmp_path / "empty.jsonl"), streaming=True)))


@pytest.fixture
def saved(tmp_path):
    """Ten rows with a picture in a parquet file and on disk, with and without splits; and as JSON."""
    rows = {
        "images": [[tiny.picture("red")]] * 9 + [[]],
        "messages": [
            [
                {"role": "user", "content": ("<image>" if number < 9 else "") + f"What is {number}?"},
                {"role": "assistant", "content": "Red."},
            ]
            for number in range(10)
        ],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.with_format("numpy").save_to_disk(tmp_path / "disk")
    dataset.to_parquet(tmp_path / "data.PARQUET")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "splits")
    lines = [
        json.dumps({"messages": messages, "image": ["a.png"] * (number < 9)})
        for number, messages in enumerate(rows["messages"])
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "data.json").write_text(f"[{','.join(lines)}]")
    return tmp_path


def test_pictures_stay_encoded(saved, checked):
    for name in ("disk", "data.PARQUET", "splits"):
        rows, _ = checked(saved / name)
        assert len(rows) == 10
        assert rows[0]["images"][0]["bytes"].startswith(b"\x89PNG")
        assert place_of(rows[9]) == "row 9"
        assert parse_row(row_of(rows[9])).images == []
        assert rows[LENGTH_COLUMN][:] == [4 + 4] * 9 + [4]
        streamed = load_rows(str(saved / name), streaming=True, passes=1)
        assert [len(parse_row(row_of(record)).images) for record in streamed] == [1] * 9 + [0]
        assert len(list(itertools.islice(load_rows(str(saved / name), streaming=True), 25))) == 25


@pytest.mark.parametrize("name", ["disk", "data.PARQUET", "splits", "data.jsonl", "data.json"])
def test_a_part_of_a_split_is_what_was_asked_for(saved, checked, name):
    def asked(split):
        rows, _ = checked(saved / name, split=split)
        return [parse_row(row_of(row)).messages[0]["content"][-1]["text"] for row in rows]

    everything = [f"What is {number}?" for number in range(10)]
    assert asked("train[:80%]") == everything[:8]
    assert asked("train[80%:]") == everything[8:]
    assert asked("train[2:4]") == everything[2:4]
    assert asked("train[-1:]") == everything[-1:]
    assert asked("train[:1]+train[9:]") == [everything[0], everything[9]]
    for bad in ("train[80%", "train[a:]", "valid[:1]" if name == "splits" else "train[:1]+valid"):
        with pytest.raises(UserError, match=r"--split|name one of"):
            asked(bad)
    with pytest.raises(UserError, match="a stream has no part"):
        load_rows(str(saved / name), "train[:1]", streaming=True)


def test_a_stream_of_few_files_takes_few_workers(saved):
    with pytest.raises(UserError, match=r"dataloader_num_workers: .* streamed from 1 files"):
        load_rows(str(saved / "data.PARQUET"), streaming=True, num_parts=2)


def test_a_saved_set_is_streamed_in_order_by_any_number_of_processes(saved):
    def order(workers):
        rows = load_rows(str(saved / "disk"), streaming=True, num_parts=max(1, workers), block_size=2)
        loader = DataLoader(pickle.loads(pickle.dumps(rows)), 2, num_workers=workers, collate_fn=places_of)
        return list(itertools.islice(loader, 8))

    alone = order(0)
    assert [place for batch in alone for place in batch] == [f"row {number % 10}" for number in range(16)]
    assert order(2) == alone
    parquet = load_rows(str(saved / "data.PARQUET"), streaming=True, passes=1)
    assert [places_of([row]) for row in pickle.loads(pickle.dumps(parquet))] == [[f"row {n}"] for n in range(10)]


def places_of(records):
    return [place_of(record) for record in records]


def test_columns_of_training_are_not_those_of_a_data_set(saved):
    datasets.Dataset.from_dict({"_row": [5], "messages": [[]]}).to_parquet(saved / "named.parquet")
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"its column _row has a name that training uses"):
            load_rows(str(saved / "named.parquet"), streaming=streaming)
