"""Rows of data files: what is read, and where a bad one is said to be."""

import json

import pytest

from delta_llava.errors import UserError
from modeling_delta_llava.finetuning.data import PackedRows, StreamedDataset, check_rows, load_rows
from modeling_delta_llava.finetuning.rows import RowError, line_of_row, parse_row, read_json_rows


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


@pytest.mark.parametrize("missing", [{}, {"image": None}, {"image": []}])
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
    assert sample.images == [{"bytes": b"x", "path": None}]
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[1]["content"] == [text("What"), IMAGE, text("?")]


def test_leading_answer_is_left_out_and_said():
    row = {"conversations": [{"from": "gpt", "value": "Hi!"}, *turns("Name?", "Ann")]}
    sample = parse_row(row)
    assert sample.dropped_leading_answer
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]


BAD_ROWS = {
    "no object": ([], "must be an object"),
    "no turns": ({"conversations": []}, "empty"),
    "no layout": ({"image": "a.png"}, "neither"),
    "too few pictures": ({"image": ["a.png"], "conversations": turns("<image><image> a", "b")}, "2 <image>"),
    "too many pictures": ({"image": ["a.png", "b.png"], "conversations": turns("<image> a", "b")}, "lists 2 images"),
    "mark without picture": ({"conversations": turns("<image>\na", "b")}, "without images"),
    "picture in an answer": ({"image": "a.png", "conversations": turns("a", "<image> b")}, "only user turns"),
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
    "empty image name": ({"image": "", "conversations": turns("<image>a", "b")}, "image name is empty"),
    "number as image": ({"image": 7, "conversations": turns("<image>a", "b")}, "type int"),
    "chat mark in a part": (
        {"images": ["a"], "messages": [{"role": "user", "content": [text("<image> a")]}]},
        "inside a text part",
    ),
    "chat part of another kind": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither"),
    "chat role": ({"messages": [{"role": "tool", "content": "a"}]}, "'tool'"),
    "chat content": ({"messages": [{"role": "user", "content": 3}]}, "type int"),
}


@pytest.mark.parametrize(("row", "words"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows(row, words):
    with pytest.raises(RowError, match=words):
        parse_row(row)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_bad_row_is_named_with_its_line(tmp_path, suffix):
    rows = [{"conversations": turns("a", "b")}, {"conversations": turns("a", "b, [c] {d}")}, {"conversations": []}]
    file = tmp_path / f"data{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        line = 1 + file.read_text().split('"conversations": []')[0].rindex("{")
        line = file.read_text()[:line].count("\n") + 1
    else:
        file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        line = 5
    assert line_of_row(file, 2) == line
    with pytest.raises(UserError, match=rf"line {line} \(row 2\): `conversations` is empty.*on_bad_row skip"):
        check_rows(load_rows(str(file)))
    good, messages = check_rows(load_rows(str(file)), on_bad_row="skip")
    assert len(good) == 2
    assert len(messages) == 1
    assert good.sample(1).messages[1]["content"] == [text("b, [c] {d}")]


def test_broken_json_is_named_with_its_line(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"conversations": []},\n{oops}\n]')
    with pytest.raises(UserError, match="line 3"):
        read_json_rows(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"conversations": []}\n\n{oops}\n')
    with pytest.raises(UserError, match="line 3"):
        read_json_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text('{"conversations": []}')
    with pytest.raises(UserError, match="list of rows"):
        read_json_rows(tmp_path / "b.json")


def test_broken_lines_are_skipped_and_named_when_asked_for(tmp_path):
    good = json.dumps({"conversations": turns("a", "b")})
    file = tmp_path / "a.jsonl"
    file.write_text(f"{good}\n\n{{oops}}\n{good}\n")
    with pytest.raises(UserError, match=r"line 3 is no JSON .*on_bad_row skip"):
        load_rows(str(file))
    rows, messages = check_rows(load_rows(str(file), on_bad_row="skip"), "skip")
    assert len(rows) == 2
    (message,) = messages
    assert "a.jsonl: line 3 (row 1): no JSON" in message


def test_a_stream_repeats_its_rows_and_says_which_pass_begins(tmp_path):
    class Rows:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([f"{self.epoch}a", f"{self.epoch}b"])

    placed = StreamedDataset(Rows(), None, "pets", block_size=1).placed_rows()
    names = ["pets: row 0", "pets: row 1"] * 2
    assert [next(placed) for _ in range(4)] == list(zip(names, ["0a", "0b", "1a", "1b"], strict=True))
    (tmp_path / "empty.jsonl").write_text("\n")
    empty = StreamedDataset(load_rows(str(tmp_path / "empty.jsonl"), streaming=True), None, "empty", block_size=1)
    with pytest.raises(UserError, match="empty: no rows"):
        next(empty.placed_rows())


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        load_rows(str(tmp_path / "none.json"))
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="UTF-8"):
        load_rows(str(tmp_path / "latin.json"))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="no usable row"):
        check_rows(load_rows(str(tmp_path / "empty.json")))
    with pytest.raises(UserError, match="cannot be streamed"):
        load_rows(str(tmp_path / "empty.json"), streaming=True)


def test_packed_rows_give_back_what_went_in():
    rows = [{"a": [1, "ü"]}, None, "text", {"b": {"c": 1.5}}]
    packed = PackedRows(rows)
    assert len(packed) == 4
    assert [packed[index] for index in range(4)] == rows


def test_datasets_on_disk_and_parquet_stay_undecoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    from tests import tiny

    rows = {
        "images": [[tiny.picture("red")], []],
        "messages": [
            [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "Red."},
            ],
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        ],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "disk")
    dataset.to_parquet(tmp_path / "data.parquet")
    for path in (tmp_path / "disk", tmp_path / "data.parquet"):
        loaded, _ = check_rows(load_rows(str(path)))
        assert len(loaded) == 2
        assert isinstance(loaded.sample(0).images[0]["bytes"], bytes)
        assert loaded.sample(1).images == []
    streamed = list(load_rows(str(tmp_path / "disk"), streaming=True))
    assert [len(parse_row(row).images) for row in streamed] == [1, 0]
