"""Batches: padding, pictures, budgets, and what is left out."""

import base64
import io
import json
import random

import pytest
import torch
from PIL import Image, PngImagePlugin

from delta_llava.errors import UserError
from modeling_delta_llava.finetuning.collator import ROWS_KEY, DeltaLlavaCollator, at_budget
from modeling_delta_llava.finetuning.data import LENGTH_COLUMN, check_rows, load_rows
from modeling_delta_llava.finetuning.pictures import BrokenImageError, open_image
from modeling_delta_llava.finetuning.text import IGNORED_LABEL, ConversationEncoder
from tests import tiny
from tests.finetuning.conftest import write_data


@pytest.fixture
def collator(data_folder, processor):
    return DeltaLlavaCollator(processor, ConversationEncoder(processor), image_folder=data_folder / "images")


@pytest.fixture
def rows(data_folder):
    """Rows with one, one, two and no pictures, and so on."""
    return load_rows(str(data_folder / "data.json"))


@pytest.fixture
def batch(collator, rows, processor):
    """Some rows at a budget, as the trainer shows them to the model."""

    def build(*indices, budget=4, max_length=512):
        collated = collator([rows[index] for index in indices])
        assert [problem for _, problem in collated.pop(ROWS_KEY)] == [None] * len(indices)
        return at_budget(collated, processor.image_token_id, processor.tokenizer.pad_token_id, budget, max_length)

    return build


def test_mixed_batch_runs_through_the_model(batch, processor, model):
    mixed = batch(0, 1, 2, 3)
    assert mixed["pixel_values"].shape == (4, 3, 32, 32)
    assert mixed["num_visual_tokens"].tolist() == [4] * 4
    assert (mixed["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 4, 8, 0]
    lengths = mixed["attention_mask"].sum(1)
    for row, length in enumerate(lengths):
        assert mixed["attention_mask"][row, :length].all()
        assert (mixed["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert (mixed["labels"][row, length:] == IGNORED_LABEL).all()
    assert lengths.max() == mixed["input_ids"].shape[1]
    assert torch.isfinite(model(**mixed).loss)


def test_a_row_alone_and_in_company_gives_the_same_loss(batch, model):
    together = batch(0, 2, 3)
    labels = together.pop("labels")
    with torch.no_grad():
        logits = model(**together).logits
        for place, index in enumerate((0, 2, 3)):
            alone = batch(index)
            own = alone.pop("labels")
            length = int(alone["attention_mask"].sum())
            assert torch.equal(labels[place, :length], own[0, :length])
            assert (own[0, length:] == IGNORED_LABEL).all()
            alone = model(**alone).logits[0, :length]
            torch.testing.assert_close(logits[place, :length], alone, atol=1e-5, rtol=1e-5)


def test_cut_rows_lose_whole_pictures(batch, processor):
    whole = batch(2, budget=16)
    first_image = (whole["input_ids"][0] == processor.image_token_id).nonzero()[0].item()
    cut = batch(2, 3, budget=16, max_length=first_image + 20)
    assert cut["pixel_values"].shape[0] == 1
    assert torch.equal(cut["pixel_values"], whole["pixel_values"][:1])
    assert (cut["input_ids"][0] == processor.image_token_id).sum() == 16
    assert int(cut["attention_mask"][0].sum()) == first_image + 16


def test_a_batch_whose_pictures_are_all_cut_off_keeps_one_in_masked_padding(batch, processor, model):
    cut = batch(0, 1, budget=16, max_length=20)
    shown = cut["input_ids"] == processor.image_token_id
    assert shown.sum(1).tolist() == [16, 0]
    assert not cut["attention_mask"][shown].any()
    assert cut["pixel_values"].shape[0] == 1
    assert torch.isfinite(model(**cut).logits).all()


def test_a_batch_without_pictures_gets_a_blank_one_that_changes_nothing(batch, processor, model):
    """Every projector weight gets its gradient, zero: several processes wait for one another's."""
    blank = batch(3, budget=16)
    assert blank["num_visual_tokens"].tolist() == [16]
    length = int(blank["attention_mask"].sum())
    assert (blank["input_ids"][0, :length] != processor.image_token_id).all()
    assert (blank["input_ids"][0, length:] == processor.image_token_id).all()
    model.train()
    loss = model(**blank).loss
    loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() < 1e-12, name
    plain = {name: blank[name][:, :length] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(model(**plain).loss, loss)


@pytest.fixture
def broken(tmp_path, processor):
    """Rows with a missing, a truncated, a fake and a huge picture, and good ones."""
    file = write_data(tmp_path, rows=8)
    images = tmp_path / "images"
    (images / "0.png").unlink()
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
    (images / "4.png").write_text("no picture")
    tiny.picture("red", (300, 200)).save(images / "5.png")

    def build(policy):
        encoder = ConversationEncoder(processor)
        collator = DeltaLlavaCollator(processor, encoder, "data.json", images, policy, policy, max_image_pixels=50_000)
        return load_rows(str(file)), collator

    return build


def test_broken_pictures_are_skipped_and_named(broken, processor, model):
    rows, collator = broken("skip")
    batch = collator([rows[index] for index in range(8)])
    problems = {place: problem for place, problem in batch.pop(ROWS_KEY) if problem is not None}
    for words in ("0.png: missing", "1.png: cannot be decoded", "4.png: not a picture", "5.png: 300 x 200 is over"):
        assert sum(words in problem for problem in problems.values()) == 1, words
    assert all(place.startswith("data.json: line ") for place in problems)
    assert batch["input_ids"].shape[0] == 8
    assert (batch["labels"] != IGNORED_LABEL).any(1).sum() == 4
    nothing = collator([rows[0], rows[1]])
    nothing.pop(ROWS_KEY)
    batch = at_budget(nothing, processor.image_token_id, processor.tokenizer.pad_token_id, 4, 512)
    assert model(**batch, num_items_in_batch=torch.tensor(1)).loss == 0


@pytest.mark.parametrize(("index", "words"), [(0, "missing"), (1, "decoded"), (4, "not a picture"), (5, "limit")])
def test_broken_pictures_stop_the_run(broken, index, words):
    rows, collator = broken("stop")
    with pytest.raises(UserError, match=rf"data.json: line \d+ \(row {index}\): .*{words}.*on_broken_image skip"):
        collator([rows[index]])


def test_missing_pictures_are_found_without_opening_any(broken):
    rows, collator = broken("skip")
    good, (message,) = check_rows(rows, collator, num_visual_tokens=4)
    assert "0.png: missing" in message
    assert len(good) == 7
    assert [length > 0 for length in good[LENGTH_COLUMN]] == [True] * 7
    everything, left_out = check_rows(rows, collator, num_visual_tokens=4, look_for_images=False)
    assert len(everything) == 8
    assert left_out == []


def test_pictures_may_be_names_addresses_bytes_or_open(tmp_path):
    red = tiny.picture("red", (5, 4))
    red.save(tmp_path / "a.png")
    address = "data:image/png;base64," + base64.b64encode(tiny.encoded(red)).decode()
    for image in ("a.png", tmp_path / "a.png", address, tiny.encoded(red), {"bytes": tiny.encoded(red)}, red):
        assert open_image(image, tmp_path).getpixel((0, 0)) == (255, 0, 0)


def large_text_chunk():
    """A picture of 2 kB whose text unpacks to more than Pillow takes."""
    information = PngImagePlugin.PngInfo()
    information.add_text("comment", "a" * 2_000_000, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", pnginfo=information)
    return file.getvalue()


BROKEN = {
    "three bytes": b"P6\n",
    "large text": large_text_chunk(),
    "nothing": b"",
    "a number": b"P6 4 4 999999999999999999999 ",
    "no address": "data:image/png;base64,####",
    "a cut address": "data:",
    "a name with NUL": "a\0b.png",
    "a long name": "a" * 5000,
    "many folders": "/".join(["a"] * 5000),
    "a folder": ".",
}


@pytest.mark.parametrize("image", BROKEN.values(), ids=BROKEN.keys())
def test_whatever_pillow_raises_it_is_a_broken_picture(image, tmp_path):
    with pytest.raises(BrokenImageError) as raised:
        open_image(image, tmp_path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "QOI")


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it reads past
@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_files_are_broken_or_read(file_format):
    """10,000 mutations over all formats: bytes changed, cut out, repeated and cut off."""
    noise = Image.effect_noise((9, 7), 80).convert("RGB")
    file = io.BytesIO()
    noise.save(file, file_format)
    whole = file.getvalue()
    rng = random.Random(0)
    for _ in range(10_000 // len(FORMATS)):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(min(len(data), 200) if rng.random() < 0.7 else len(data))
            change = rng.random()
            if change < 0.6:
                data[place] = rng.randrange(256)
            elif change < 0.8:
                del data[place : place + rng.randint(1, 8)]
            else:
                data[place:place] = data[place : place + rng.randint(1, 8)]
            if len(data) < 4:
                break
        if rng.random() < 0.2:
            del data[rng.randrange(len(data) + 1) :]
        try:
            picture = open_image(bytes(data), max_pixels=10_000)
        except BrokenImageError:
            continue
        assert picture.mode == "RGB"


def test_training_sees_the_pixels_that_inference_sees(tmp_path, processor):
    """Upright and without transparency, as `processor(images=...)` makes them of the same file."""
    picture = Image.effect_noise((40, 24), 80).convert("RGBA")
    picture.putalpha(40)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "alpha.png", exif=exif)
    picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=95)
    row = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]}
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({**row, "image": name}) for name in ("alpha.png", "turned.jpg")))
    collator = DeltaLlavaCollator(processor, ConversationEncoder(processor), image_folder=tmp_path)
    trained = collator(list(load_rows(str(file))))["pixel_values"]
    seen = processor(images=[tmp_path / "alpha.png", tmp_path / "turned.jpg"], return_tensors="pt")["pixel_values"]
    assert torch.equal(trained, seen)
