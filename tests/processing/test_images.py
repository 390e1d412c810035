"""Pixels, bit for bit with the released preprocessing, budgets, and every image that is not a plain RGB photo."""

import inspect
import io
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_STD

from modeling_delta_llava import processing_delta_llava
from modeling_delta_llava.building import build_image_processor, build_processor, load_tokenizer
from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor
from tests.golden import PIXELS, check_pixels
from tests.tiny import encoded, picture, tiny_config
from tests.training_layout import TrainingLayout, write_tokenizer

CAT = Path(__file__).parents[2] / "assets" / "cat.jpg"


@pytest.mark.parametrize("name", PIXELS.files)
def test_pixels_are_the_released_ones_bit_for_bit(name):
    check_pixels(name)


def test_there_are_24_golden_pictures():
    assert len(PIXELS.files) == 24


def test_siglip_gets_its_own_mean_and_size():
    vision_config = tiny_config("siglip").vision_config
    processor = build_image_processor(vision_config, image_aspect_ratio="pad")
    pixels = processor(picture("white", (36, 18)), return_tensors="np")["pixel_values"][0]
    assert pixels.shape == (3, 36, 36)
    assert pixels[0, 18, 18] == pytest.approx(1.0)
    assert abs(pixels[0, 0, 0]) < 0.01  # padding has the mean colour


def ask(processor, image, **kwargs):
    return processor(text="USER: <image>\nWhat? ASSISTANT:", images=image, return_tensors="pt", **kwargs)


RGB = picture((200, 30, 90))


@pytest.mark.parametrize(
    "image",
    [
        RGB.convert("RGBA"),
        RGB.convert("P", palette=Image.Palette.ADAPTIVE),
        RGB.convert("CMYK"),
        RGB.convert("YCbCr"),
        RGB.convert("HSV"),
        np.asarray(RGB),
        torch.from_numpy(np.asarray(RGB).copy()).permute(2, 0, 1),
    ],
    ids=["RGBA", "palette", "CMYK", "YCbCr", "HSV", "numpy", "torch"],
)
def test_colour_modes_are_converted(image, processor):
    torch.testing.assert_close(
        ask(processor, image)["pixel_values"], ask(processor, RGB)["pixel_values"], atol=0.05, rtol=0
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_are_converted(mode, processor):
    grey = picture("white").convert(mode)
    assert torch.equal(ask(processor, grey)["pixel_values"], ask(processor, picture("white"))["pixel_values"])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize(("value", "grey"), [(1, 0), (200, 0), (255, 0), (256, 1), (0x8080, 128), (0xFFFF, 255)])
def test_sixteen_bits_are_scaled_and_not_clipped(value, grey, mode, processor):
    image = Image.fromarray(np.full((8, 8), value, np.int32 if mode == "I" else np.uint16))
    if mode == "I;16B":
        image = Image.frombytes(mode, (8, 8), np.full((8, 8), value, ">u2").tobytes())
    assert image.mode == mode
    if mode == "I" and value < 256:
        grey = value  # 8 bits in a wider type
    expected = ask(processor, picture((grey, grey, grey), (8, 8)))["pixel_values"]
    assert torch.equal(ask(processor, image)["pixel_values"], expected)
    assert torch.equal(ask(processor, np.asarray(image))["pixel_values"], expected)


@pytest.mark.parametrize("value", [-1, 70000])
def test_integers_beyond_sixteen_bits_are_refused(value, processor):
    with pytest.raises(ValueError, match=r"Image 0 .*outside 0 to 65535"):
        ask(processor, Image.fromarray(np.full((8, 8), value, np.int32)))


def test_floating_point_pictures_are_refused(processor):
    with pytest.raises(ValueError, match=r"Image 0 .*mode 'F'"):
        ask(processor, Image.new("F", (8, 8), 0.5))


def test_animated_pictures_use_their_current_frame(processor):
    stream = io.BytesIO()
    picture("black").save(stream, "GIF", save_all=True, append_images=[picture("white")])
    with Image.open(stream) as animation:
        assert animation.n_frames == 2
        pixels = ask(processor, animation)["pixel_values"]
    assert torch.equal(pixels, ask(processor, picture("black"))["pixel_values"])


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (31, 33)])
def test_extreme_shapes_are_padded_to_squares(size, processor):
    output = ask(processor, picture("white", size))
    assert output["pixel_values"].shape == (1, 3, 32, 32)


def limits(monkeypatch, padded_side: int, aspect_ratio: int):
    monkeypatch.setattr(processing_delta_llava, "MAX_PADDED_SIDE", padded_side)
    monkeypatch.setattr(processing_delta_llava, "MAX_ASPECT_RATIO", aspect_ratio)


@pytest.mark.parametrize("size", [(1, 20000), (12000, 90)])
@pytest.mark.parametrize("do_pad", [True, False])
def test_panoramas_are_resized_like_any_other_picture(size, do_pad, processor, monkeypatch):
    limits(monkeypatch, 1024, 200)
    largest = []
    inner = processor.image_processor._preprocess
    monkeypatch.setattr(
        processor.image_processor,
        "_preprocess",
        lambda images, **k: largest.append(images[0].shape) or inner(images, **k),
    )
    assert ask(processor, picture("white", size), do_pad=do_pad)["pixel_values"].shape == (1, 3, 32, 32)
    assert max(largest[0]) <= (1024 if do_pad else 200 * min(size))


def levels(first, second):
    """Largest and mean difference of normalised pixels, in levels of 8 bits."""
    differences = (first - second).abs() * 255 * torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    return differences.max().item(), differences.mean().item()


def test_shrinking_a_large_picture_first_is_a_matter_of_rounding(processor, monkeypatch):
    photo = Image.open(CAT).convert("RGB").resize((1500, 1200))
    exact = ask(processor, photo)["pixel_values"]
    limits(monkeypatch, 1024, 200)
    largest, mean = levels(ask(processor, photo)["pixel_values"], exact)
    assert 0 < largest < 2.1
    assert mean < 0.3


@pytest.mark.parametrize("size", [(3, 100), (101, 4), (1, 57)])
def test_cropping_a_long_picture_first_is_a_matter_of_rounding(size, processor, monkeypatch):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), dtype=np.uint8))
    exact = ask(processor, noise, do_pad=False)["pixel_values"]
    limits(monkeypatch, 8192, 10)
    largest, mean = levels(ask(processor, noise, do_pad=False)["pixel_values"], exact)
    assert largest < 2.1
    assert mean < 0.2


def test_ordinary_pictures_are_left_to_the_image_processor(processor):
    for size in ((8192, 60), (60, 4000), (300, 500)):
        assert processing_delta_llava.bounded(image := picture("red", size), True, True) is image


@pytest.mark.parametrize(
    ("array", "layout"),
    [
        (np.asarray(RGB), None),
        (np.dstack([np.asarray(RGB), np.zeros((30, 40), np.uint8)]), None),
        (np.asarray(RGB).transpose(2, 0, 1), None),
        (np.asarray(RGB)[None], None),
        (np.asarray(RGB).astype(np.int64), None),
        (np.asarray(RGB).astype(np.uint16) * 256 + 7, None),
        (np.asarray(RGB).astype(np.float32), None),
        (np.dstack([np.asarray(RGB), np.zeros((30, 40))]).astype(np.float32), None),
        (torch.tensor(np.asarray(RGB)).permute(2, 0, 1), None),
        (torch.tensor(np.asarray(RGB)).permute(2, 0, 1)[None].double(), None),
        (np.asarray(RGB), "channels_last"),
        (np.asarray(RGB).transpose(2, 0, 1), "channels_first"),
    ],
    ids=str,
)
def test_arrays_are_pictures(array, layout, processor):
    expected = ask(processor, RGB)["pixel_values"]
    for options in ({"input_data_format": layout}, {"images_kwargs": {"input_data_format": layout}}):
        options = options if layout else {}
        torch.testing.assert_close(ask(processor, array, **options)["pixel_values"], expected, atol=0.01, rtol=0)


def test_a_batch_of_arrays_is_a_list(processor):
    batch, prompts = np.stack([np.asarray(RGB)] * 2), ["<image> ?", "<image> ?"]
    assert processor(text=prompts, images=batch, return_tensors="pt")["pixel_values"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("height", [1, 2, 3])
def test_low_arrays_are_not_taken_for_channels(height, processor):
    low = np.random.RandomState(0).randint(0, 256, (height, 9, 3), dtype=np.uint8)
    assert torch.equal(
        ask(processor, low)["pixel_values"], ask(processor, Image.fromarray(low.copy()))["pixel_values"]
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((9, 9, 5), np.uint8), r"shape is \(9, 9, 5\)"),
        (np.zeros((9, 9), bool), "dtype is bool"),
        (np.full((9, 9), 70000), "outside 0 to 65535"),
        (np.zeros((0, 9), np.uint8), "it is 9 x 0 pixels"),
        ("nowhere.png", "'nowhere.png' is no file, no http"),
        ("http://127.0.0.1:9/a.png", "refused"),
        (b"no picture", "cannot identify"),
    ],
)
def test_images_that_cannot_be_read(image, message, processor):
    with pytest.raises(ValueError, match=f"Image 1 cannot be read: .*{message}"):
        processor(text="<image><image>", images=[RGB, image])


def test_truncated_files_name_the_image(processor):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, "JPEG")
    with pytest.raises(ValueError, match="Image 1 cannot be read"):
        processor(text="<image><image> ?", images=[RGB, Image.open(io.BytesIO(data[: len(data) // 2]))])


@pytest.mark.parametrize("image", [42, {"a": 1}, object()], ids=["int", "dict", "object"])
def test_wrong_types_are_refused(image, processor):
    with pytest.raises(TypeError, match=rf"Image 1 is a {type(image).__name__}: give"):
        processor(text="<image><image>", images=[RGB, image])


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/my photo.jpg", "http://127.0.0.1:9/x.jpg"])
def test_addresses_that_give_nothing_are_refused(address, processor):
    with pytest.raises(ValueError, match="Image 0 cannot be read"):
        ask(processor, address)


def test_missing_files_are_refused(processor, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png"):
        ask(processor, str(tmp_path / "gone.png"))


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("no placeholder", [RGB], r"hold \[0\] <image> placeholders, but \[1\] images"),
        ("<image> ?", None, r"hold \[1\] <image> placeholders, but \[0\] images"),
        ("<image> ?", [[], []], r"hold \[1\] <image> placeholders, but \[0\] images"),
        ("<image> ?", [RGB, RGB], r"hold \[1\] <image> placeholders, but \[2\] images"),
        (["<image> ?", "<image><image>"], [RGB, RGB], r"hold \[1, 2\] .*\[2\] images"),
        (["<image> ?", "<image><image>"], [[RGB], [RGB]], r"hold \[1, 2\] .*\[1, 1\] images"),
        (["<image><image>", "fine"], [[RGB], [RGB]], r"hold \[2, 0\] .*\[1, 1\] images"),
        (["<image> ?", "fine"], [[], [RGB]], r"hold \[1, 0\] .*\[0, 1\] images"),
        (["<image> ?", "fine"], [[RGB]], r"hold \[1, 0\] .*\[1\] images"),
        ([None], [RGB], "text must be a string or a list of strings"),
        (["<image>", None], [RGB], "text must be a string or a list of strings"),
        ("", None, "prompt is empty"),
        (["fine", "  "], None, "prompt is empty"),
        (7, None, "string"),
    ],
)
def test_mismatches_name_both_numbers(text, images, message, processor):
    with pytest.raises((ValueError, TypeError), match=message):
        processor(text=text, images=images)


def test_truncation_inside_an_image_is_refused(processor):
    first = ask(processor, RGB)["input_ids"][0].tolist().index(processor.image_token_id)
    with pytest.raises(ValueError, match="truncation"):
        ask(processor, RGB, truncation=True, max_length=first + 2)


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_what_the_model_cannot_take_is_refused(name, processor):
    with pytest.raises(ValueError, match=f"without {name}"):
        processor(text="<image> ?", images=RGB, **{name: [np.zeros((2, 8, 8, 3), np.uint8)]})


# --- budgets ---------------------------------------------------------------------------------------


def test_default_budget_returns_no_budgets(processor):
    output = ask(processor, RGB)
    assert "num_visual_tokens" not in output
    assert (output["input_ids"] == processor.image_token_id).sum() == 4


def test_one_budget_for_all_images_and_one_for_each(processor):
    prompts = ["<image><image> ?", "<image> ?"]
    output = processor(
        text=prompts, images=[[RGB, RGB], [RGB]], num_visual_tokens=16, padding=True, return_tensors="pt"
    )
    assert output["num_visual_tokens"].tolist() == [16, 16, 16]
    assert (output["input_ids"] == processor.image_token_id).sum(-1).tolist() == [32, 16]
    output = processor(
        text=prompts, images=[[RGB, RGB], [RGB]], num_visual_tokens=[1, 16, 4], padding=True, return_tensors="pt"
    )
    assert output["num_visual_tokens"].dtype == torch.int64
    assert output["num_visual_tokens"].tolist() == [1, 16, 4]
    assert (output["input_ids"] == processor.image_token_id).sum(-1).tolist() == [17, 4]


@pytest.mark.parametrize(
    "budgets",
    [16, np.int64(16), torch.tensor(16), [16, 1], (16, 1), np.array([16, 1]), torch.tensor([16, 1])],
    ids=repr,
)
def test_numbers_and_lists_of_every_library_are_budgets(budgets, processor):
    expected = [16, 1] if np.ndim(budgets) else [16, 16]
    flat, nested = {"num_visual_tokens": budgets}, {"images_kwargs": {"num_visual_tokens": budgets}}
    if isinstance(budgets, np.ndarray) and Version(transformers.__version__) < Version("5.23"):
        nested = flat  # older releases compare what is nested with a string
    for options in (flat, nested):
        output = processor(text="<image><image> ?", images=[RGB, RGB], return_tensors="pt", **options)
        assert output["num_visual_tokens"].tolist() == expected
        assert (output["input_ids"] == processor.image_token_id).sum() == sum(expected)
    counts = processor._get_num_multimodal_tokens([(1, 1), (2, 2)], num_visual_tokens=budgets)
    assert counts["num_image_tokens"] == expected


@pytest.mark.parametrize(
    "budget",
    ["16", "", b"4", True, [True], 4.0, float("nan"), 9, 0, -4, 10**40, [4, 4], [], [5], ["4"], [None], [[4]], ([4],),
     {4}, {"budget": 4}, np.array([[4]]), np.array([4.0]), np.array(True), torch.tensor([]), torch.tensor(True),
     "x" * 10**6, [4] * 10**6],
    ids=lambda budget: repr(budget)[:30],
)  # fmt: skip
def test_wrong_budgets_say_which_are_right(budget, processor):
    message = r"^num_visual_tokens=.{,80} is not possible on a 4 x 4 patch grid; choose one of \[16, 4, 1\]"
    for call in (
        lambda: ask(processor, RGB, num_visual_tokens=budget),
        lambda: processor(text="<image> ?", images=RGB, images_kwargs={"num_visual_tokens": budget}),
        lambda: processor._get_num_multimodal_tokens([(8, 8)], num_visual_tokens=budget),
        lambda: DeltaLlavaProcessor(processor.image_processor, processor.tokenizer, budget, 4),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_budget_is_the_processors(processor):
    assert "num_visual_tokens" not in ask(processor, RGB, num_visual_tokens=None)
    assert processor._get_num_multimodal_tokens([(8, 8)], num_visual_tokens=None)["num_image_tokens"] == [4]


def test_budgets_are_checked_without_images_too(processor):
    with pytest.raises(ValueError, match="choose one of"):
        processor(text="hi", num_visual_tokens=7)


def test_text_only_prompts_and_prompts_with_images_mix(processor):
    output = processor(text=["hello", "<image> ?"], images=[[], [RGB]], padding=True, return_tensors="pt")
    assert output["pixel_values"].shape[0] == 1
    assert output["attention_mask"][0].tolist() == sorted(output["attention_mask"][0].tolist())  # padded on the left


def test_templates_take_budgets(processor):
    content = [{"type": "image", "image": RGB}, {"type": "text", "text": "What?"}]
    output = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": 16},
    )
    assert output["num_visual_tokens"].tolist() == [16]


def test_what_inference_servers_ask_for(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(40, 30), (10, 10)])
    assert (counts["num_image_tokens"], counts["num_image_patches"]) == ([4, 4], [1, 1])
    assert processor._get_num_multimodal_tokens([(1, 1)], num_visual_tokens=16)["num_image_tokens"] == [16]
    assert processor.replace_image_token({"num_visual_tokens": [1, 16]}, 1) == "<image>" * 16
    assert processor.image_token_ids == [processor.image_token_id]
    output = processor(text="<image> ?", images=[RGB], return_mm_token_type_ids=True)
    kinds = np.asarray(output["mm_token_type_ids"][0])
    assert (kinds == (np.asarray(output["input_ids"][0]) == processor.image_token_id)).all()


def test_servers_find_the_option_of_a_call():
    # vLLM reads the options of a request off this annotation; to the constructor, a list of budgets is none.
    annotation = inspect.signature(DeltaLlavaProcessor.__call__).parameters["kwargs"].annotation
    (options,) = typing.get_args(annotation)
    assert "num_visual_tokens" in typing.get_type_hints(options)["images_kwargs"].__annotations__


def test_saved_processor_loads_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = DeltaLlavaProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.num_visual_tokens, loaded.grid_size, loaded.image_token) == (4, 4, "<image>")
    assert loaded.chat_template == processor.chat_template
    assert torch.equal(ask(loaded, RGB)["pixel_values"], ask(processor, RGB)["pixel_values"])


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path):
    write_tokenizer(tmp_path, TrainingLayout())
    tokenizer, _ = load_tokenizer(tmp_path, "llama")
    with pytest.raises(ValueError, match="no token '<picture>'"):
        build_processor(tiny_config(), tokenizer, "<picture>")
