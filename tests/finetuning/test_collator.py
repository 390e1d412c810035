"""Batches: padding, pictures, budgets, and what is left out."""

import itertools
import json

import pytest
import torch

from delta_llava.errors import UserError
from modeling_delta_llava.finetuning.collator import SKIPPED_KEY, DeltaLlavaCollator
from modeling_delta_llava.finetuning.data import (
    ConversationDataset,
    DrawnIndex,
    SkippedExample,
    StreamedDataset,
    check_rows,
    load_rows,
    missing_images,
)
from modeling_delta_llava.finetuning.pictures import BrokenImageError, open_image
from modeling_delta_llava.finetuning.text import IGNORED_LABEL, ConversationEncoder
from tests import tiny
from tests.finetuning.conftest import write_data


@pytest.fixture
def dataset(data_folder, processor):
    rows, _ = check_rows(load_rows(str(data_folder / "data.json")))
    return ConversationDataset(rows, ConversationEncoder(processor), image_folder=data_folder / "images")


def test_mixed_batch_runs_through_the_model(dataset, processor, model):
    batch = DeltaLlavaCollator(processor, 512)([dataset[DrawnIndex(index, 4)] for index in range(4)])
    assert batch.pop(SKIPPED_KEY) == []
    assert batch["pixel_values"].shape == (4, 3, 32, 32)  # one, one, two and no pictures
    assert batch["num_visual_tokens"].tolist() == [4] * 4
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 4, 8, 0]
    lengths = batch["attention_mask"].sum(1)
    for row, length in enumerate(lengths):
        assert batch["attention_mask"][row, :length].all()
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == IGNORED_LABEL).all()
    assert torch.isfinite(model(**batch).loss)


def test_a_row_alone_and_in_company_gives_the_same_loss(dataset, processor, model):
    collate = DeltaLlavaCollator(processor, 512)
    together = collate([dataset[index] for index in (0, 2, 3)])
    together.pop(SKIPPED_KEY)
    assert "num_visual_tokens" not in together
    labels = together.pop("labels")
    with torch.no_grad():
        logits = model(**together).logits
        for place, index in enumerate((0, 2, 3)):
            alone = collate([dataset[index]])
            alone.pop(SKIPPED_KEY)
            own = alone.pop("labels")
            length = int(alone["attention_mask"].sum())
            assert torch.equal(labels[place, :length], own[0, :length])
            assert (own[0, length:] == IGNORED_LABEL).all()
            alone = model(**alone).logits[0, :length]
            torch.testing.assert_close(logits[place, :length], alone, atol=1e-5, rtol=1e-5)


def test_cut_rows_lose_whole_pictures(dataset, processor):
    whole = DeltaLlavaCollator(processor, 512)([dataset[DrawnIndex(2, 16)]])
    first_image = (whole["input_ids"][0] == processor.image_token_id).nonzero()[0].item()
    batch = DeltaLlavaCollator(processor, first_image + 20)([dataset[DrawnIndex(2, 16)], dataset[DrawnIndex(3, 16)]])
    assert len(batch[SKIPPED_KEY]) == 1
    assert "nothing to learn within max_length" in batch[SKIPPED_KEY][0]
    assert batch["pixel_values"].shape[0] == 1  # the blank one of a batch without pictures


def test_a_batch_without_pictures_gets_a_blank_one_that_changes_nothing(dataset, processor, model):
    """Every projector weight gets its gradient, zero: several processes wait for one another's."""
    batch = DeltaLlavaCollator(processor, 512)([dataset[DrawnIndex(3, 16)]])
    batch.pop(SKIPPED_KEY)
    assert batch["num_visual_tokens"].tolist() == [16]
    length = int(batch["attention_mask"].sum())
    assert (batch["input_ids"][0, :length] != processor.image_token_id).all()
    assert (batch["input_ids"][0, length:] == processor.image_token_id).all()
    model.train()
    loss = model(**batch).loss
    loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() < 1e-12, name
    plain = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(model(**plain).loss, loss)


def test_a_batch_of_nothing_still_runs(processor, model):
    batch = DeltaLlavaCollator(processor, 512)([SkippedExample("a"), SkippedExample("b")])
    assert batch.pop(SKIPPED_KEY) == ["a", "b"]
    output = model(**batch, num_items_in_batch=torch.tensor(1))
    assert output.loss == 0


def test_bad_lines_of_a_stream_are_named_with_their_line(dataset, tmp_path):
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([json.dumps(row), "", "{oops}", json.dumps({**row, "image": ["a", "b"]})]))

    def streamed(policy):
        rows = load_rows(str(file), streaming=True)
        return iter(StreamedDataset(rows, dataset, "data.jsonl", block_size=2, on_bad_row=policy))

    stream = streamed("stop")
    next(stream)
    with pytest.raises(UserError, match=r"data\.jsonl: line 3: no JSON .*on_bad_row skip"):
        next(stream)
    _, broken, bad, again = itertools.islice(streamed("skip"), 4)
    assert broken.reason.startswith("data.jsonl: line 3: no JSON")
    assert bad.reason.startswith("data.jsonl: line 4: the text has 0 <image>")
    assert not isinstance(again, SkippedExample)


@pytest.fixture
def broken(tmp_path, processor):
    """Rows with a missing, a truncated, a fake and a huge picture, and good ones."""
    file = write_data(tmp_path, rows=8)
    images = tmp_path / "images"
    (images / "0.png").unlink()
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
    (images / "4.png").write_text("no picture")
    tiny.picture("red", (300, 200)).save(images / "5.png")
    rows, _ = check_rows(load_rows(str(file)))
    return lambda policy: ConversationDataset(
        rows, ConversationEncoder(processor), images, on_broken_image=policy, max_image_pixels=50_000
    )


def test_broken_pictures_are_skipped_and_reported(broken, processor):
    dataset = broken("skip")
    batch = DeltaLlavaCollator(processor, 512)([dataset[index] for index in range(8)])
    assert batch["input_ids"].shape[0] == 4
    for words in ("0.png: missing", "1.png: cannot be decoded", "4.png: not a picture", "5.png: 300 x 200 is over"):
        assert sum(words in reason for reason in batch[SKIPPED_KEY]) == 1, words
    assert all("line" in reason for reason in batch[SKIPPED_KEY])


@pytest.mark.parametrize(("index", "words"), [(0, "missing"), (1, "decoded"), (4, "not a picture"), (5, "limit")])
def test_broken_pictures_stop_the_run(broken, index, words):
    with pytest.raises(UserError, match=rf"row {index}\).*{words}.*on_broken_image skip"):
        broken("stop")[index]


def test_missing_pictures_are_found_without_opening_any(broken, tmp_path):
    dataset = broken("stop")
    assert missing_images(dataset.rows, dataset.image_folder) == [str(tmp_path / "images" / "0.png")]


def test_pictures_may_be_bytes_paths_or_open(tmp_path):
    red = tiny.picture("red", (5, 4))
    red.save(tmp_path / "a.png")
    for image in ("a.png", {"path": "a.png"}):
        assert open_image(image, tmp_path).getpixel((0, 0)) == (255, 0, 0)
    for image in (tiny.encoded(red), {"bytes": tiny.encoded(red), "path": None}, red):
        assert open_image(image).size == (5, 4)
    with pytest.raises(BrokenImageError, match="neither"):
        open_image({"path": None})


def test_lengths_are_negative_without_a_picture(dataset):
    lengths = dataset.modality_lengths()
    assert [length > 0 for length in lengths[:4]] == [True, True, True, False]
    assert len(lengths) == len(dataset)
