"""`generate` with images: every way of decoding says what the language model says about spliced embeddings."""

import gc

import pytest
import torch
from transformers import AutoModelForImageTextToText

import modeling_delta_llava  # noqa: F401  (registers the Auto classes)
from modeling_delta_llava.modeling_delta_llava import CACHE_NAME
from tests.prompts import (
    FIRST_TURN,
    GREEDY,
    IMAGES_OF_ROWS,
    ROWS,
    SECOND_TURN,
    batch,
    encode_alone,
    encoded,
    image,
    language_model_of,
    new_tokens,
    pictures,
    spliced,
    words,
)
from tests.tiny import IMAGE_TOKEN_ID, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def language_model(model):
    return language_model_of(model)


DECODING = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "beams without cache": {"num_beams": 2, "use_cache": False},
    "sampling": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "temperature": 2.0, "num_beams": 2, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
}


@pytest.mark.parametrize("decoding", DECODING)
def test_decoding_equals_the_language_model_on_spliced_embeddings(decoding, model, language_model):
    inputs, pixels = batch(*ROWS), pictures(6)
    settings = {**GREEDY, **DECODING[decoding]}
    torch.manual_seed(1)
    expected = language_model.generate(**spliced(model, inputs, encode_alone(model, pixels)), **settings)
    torch.manual_seed(1)
    output = model.generate(**inputs, pixel_values=pixels, **settings)
    assert torch.equal(new_tokens(output, inputs), expected)
    if settings["do_sample"]:
        sequences = new_tokens(output, inputs).view(len(ROWS), settings["num_return_sequences"], -1)
        assert any(not torch.equal(first, second) for first, second, *_ in sequences)


def test_left_padded_rows_equal_single_calls(model):
    inputs, pixels = batch(*ROWS), pictures(6)
    settings = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    together = model.generate(**inputs, pixel_values=pixels, **settings)
    for index, (row, images) in enumerate(zip(ROWS, IMAGES_OF_ROWS, strict=True)):
        single = batch(row)
        alone = model.generate(**single, pixel_values=pixels[images] if images else None, **settings)
        assert torch.equal(new_tokens(alone.sequences, single)[0], new_tokens(together.sequences, inputs)[index])
        for scores, scores_alone in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(scores[index], scores_alone[0], rtol=1e-4, atol=1e-4)


def test_beams_of_a_row_do_not_depend_on_the_batch(model):
    inputs, pixels = batch(*ROWS), pictures(6)
    settings = {**GREEDY, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    together = model.generate(**inputs, pixel_values=pixels, **settings)
    for index, (row, images) in enumerate(zip(ROWS, IMAGES_OF_ROWS, strict=True)):
        single = batch(row)
        alone = model.generate(**single, pixel_values=pixels[images] if images else None, **settings)
        assert torch.equal(new_tokens(alone.sequences, single)[0], new_tokens(together.sequences, inputs)[index])
        torch.testing.assert_close(alone.sequences_scores[0], together.sequences_scores[index], rtol=1e-4, atol=1e-4)


def test_order_of_pictures_within_a_row_matters(model):
    inputs, pixels = batch(ROWS[0]), pictures(2)
    settings = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    scores = [model.generate(**inputs, pixel_values=p, **settings).scores[0] for p in (pixels, pixels.flip(0))]
    assert (scores[0] - scores[1]).abs().max() > 1e-2


# --- assisted decoding -----------------------------------------------------------------------------


@pytest.mark.parametrize("assistant", ["another model", "itself", "prompt lookup"])
def test_assisted_decoding_equals_greedy(assistant, model):
    inputs, pixels = batch(ROWS[0]), pictures(2)
    settings = {**GREEDY, "max_new_tokens": 12}
    expected = model.generate(**inputs, pixel_values=pixels, **settings)
    drafter = {"another model": tiny_model(seed=1), "itself": model}.get(assistant)
    extra = {"prompt_lookup_num_tokens": 2} if drafter is None else {"assistant_model": drafter}
    assert torch.equal(model.generate(**inputs, pixel_values=pixels, **settings, **extra), expected)


# --- caches ----------------------------------------------------------------------------------------


def test_pictures_are_encoded_once(model):
    inputs, pixels = batch(*ROWS), pictures(6)
    batches = []
    handle = model.model.vision_tower.embeddings.register_forward_hook(
        lambda module, arguments, output: batches.append(len(output))
    )
    model.generate(**inputs, pixel_values=pixels, **GREEDY)
    handle.remove()
    assert batches == [6]


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("form", ["pixel_values", "encoded", "text only"])
def test_prefill_in_chunks_keeps_the_pictures(form, num_beams, model):
    inputs, pixels = (batch(ROWS[1]), None) if form == "text only" else (batch(*ROWS), pictures(6))
    settings = {**GREEDY, "num_beams": num_beams}
    expected = model.generate(**inputs, pixel_values=pixels, **settings)
    given = (
        {"mm_encoder_outputs": encoded(encode_alone(model, pixels))} if form == "encoded" else {"pixel_values": pixels}
    )
    assert torch.equal(model.generate(**inputs, **given, **settings, prefill_chunk_size=5), expected)


# --- inputs_embeds, image_features and budgets -----------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_equal_ids(with_ids, num_beams, model):
    inputs, pixels = batch(*ROWS), pictures(6)
    settings = {**GREEDY, "num_beams": num_beams}
    expected = new_tokens(model.generate(**inputs, pixel_values=pixels, **settings), inputs)
    ids = inputs["input_ids"] if with_ids else None
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
    output = model.generate(
        ids, inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], pixel_values=pixels, **settings
    )
    assert torch.equal(new_tokens(output, inputs) if with_ids else output, expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_encoded_pictures_equal_pictures(num_beams, model):
    inputs, pixels = batch(*ROWS), pictures(6)
    settings = {**GREEDY, "num_beams": num_beams}
    expected = model.generate(**inputs, pixel_values=pixels, **settings)
    with torch.no_grad():
        features = model.get_image_features(pixels)
    handle = model.model.vision_tower.embeddings.register_forward_hook(lambda *_: pytest.fail("encoded again"))
    for _ in range(2):  # what the caller gives is not changed
        output = model.generate(**inputs, mm_encoder_outputs={"image": features}, **settings)
        assert torch.equal(output, expected)
    handle.remove()


@pytest.mark.parametrize("form", ["tensor", "list", "encoded"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_budget_for_each_picture(num_beams, form, model, language_model):
    """A thumbnail at 4 visual tokens and a page at 16, in one prompt and over the rows of a batch."""
    budgets, pixels = [4, 16, 16, 1], pictures(4)
    inputs = batch(
        [*words(2), *image(4), *words(2, 1), *image(16), *words(3, 2)],
        words(4, 5),
        [*image(16), *image(1), *words(3, 3)],
    )
    settings = {**GREEDY, "num_beams": num_beams}
    visual_tokens = encode_alone(model, pixels, budgets)
    expected = language_model.generate(**spliced(model, inputs, visual_tokens), **settings)
    given = {
        "tensor": {"pixel_values": pixels, "num_visual_tokens": torch.tensor(budgets)},
        "list": {"pixel_values": pixels, "num_visual_tokens": budgets},
        "encoded": {"mm_encoder_outputs": encoded(visual_tokens)},
    }[form]
    assert torch.equal(new_tokens(model.generate(**inputs, **given, **settings), inputs), expected)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("count", [5, 7])
def test_too_few_and_too_many_pictures_are_refused(count, num_beams, model):
    with pytest.raises(ValueError, match="Image tokens and image features do not match"):
        model.generate(**batch(*ROWS), pixel_values=pictures(count), **GREEDY, num_beams=num_beams)


# --- further turns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["all pictures", "the new pictures", "all features"])
@pytest.mark.parametrize(("rows", "name"), [(1, "cache"), (3, "past_key_values")])
def test_second_turn_continues_from_the_cache(rows, name, given, model):
    pixels = pictures(5)
    old, new, every = ([0, 1], [2], [0, 1, 2]) if rows == 1 else ([0, 1, 3], [2, 4], [0, 1, 2, 3, 4])
    first = batch(*FIRST_TURN[:rows])
    answer = model.generate(**first, pixel_values=pixels[old], **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([answer.sequences, torch.tensor(SECOND_TURN[:rows])], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(rows, ids.shape[1] - first["input_ids"].shape[1])], dim=1)
    second = {"input_ids": ids, "attention_mask": mask.long()}
    expected = model.generate(**second, pixel_values=pixels[every], **GREEDY)

    new_length = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: new_length.append(keywords["inputs_embeds"].shape[1]), with_kwargs=True
    )
    images = {
        "all pictures": {"pixel_values": pixels[every]},
        "the new pictures": {"pixel_values": pixels[new]},
        "all features": {"mm_encoder_outputs": encoded(encode_alone(model, pixels[every]))},
    }[given]
    output = model.generate(**second, **images, **{name: answer[CACHE_NAME]}, **GREEDY)
    handle.remove()
    assert torch.equal(output, expected)
    assert new_length[0] == len(SECOND_TURN[0]) + 1  # the last token of the answer was not cached yet


@pytest.mark.parametrize("given", [[0, 1], []], ids=["all pictures", "none"])
def test_second_turn_without_new_pictures(given, model):
    pixels, first = pictures(2), batch(FIRST_TURN[0])
    answer = model.generate(**first, pixel_values=pixels, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([answer.sequences, torch.tensor([words(4, 7)])], dim=1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**second, pixel_values=pixels, **GREEDY)
    images = {"pixel_values": pixels} if given else {}
    output = model.generate(**second, **images, **{CACHE_NAME: answer[CACHE_NAME]}, **GREEDY)
    assert torch.equal(output, expected)


# --- the image token and the context ---------------------------------------------------------------


@pytest.mark.parametrize(
    "decoding",
    [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}],
    ids=["greedy", "beams", "sampling", "prompt lookup"],
)
def test_the_image_token_is_never_generated(decoding, hub_folder):
    model = AutoModelForImageTextToText.from_pretrained(hub_folder)

    def favour_the_image_token(module, arguments, logits):
        logits[..., IMAGE_TOKEN_ID] = 1000.0
        return logits

    model.lm_head.register_forward_hook(favour_the_image_token)
    inputs = batch(ROWS[0])
    settings = {**GREEDY, **decoding}
    output = model.generate(**inputs, pixel_values=pictures(2), **settings)
    assert IMAGE_TOKEN_ID not in new_tokens(output, inputs)
    model.generation_config.suppress_tokens = None
    assert IMAGE_TOKEN_ID in new_tokens(model.generate(**inputs, pixel_values=pictures(2), **settings), inputs)


@pytest.mark.parametrize("name", ["inputs", "input_ids", "inputs_embeds"])
def test_prompt_longer_than_the_context(name, model):
    inputs = batch([*image(), *words(508)])
    prompt = inputs["input_ids"] if name != "inputs_embeds" else model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"512 tokens, visual tokens included, .* context is 512"):
        model.generate(**{name: prompt}, pixel_values=pictures(1), **GREEDY)
    inputs = batch([*image(), *words(507)])
    assert model.generate(**inputs, pixel_values=pictures(1), **{**GREEDY, "max_new_tokens": 1}).shape == (1, 512)


# --- black and white -------------------------------------------------------------------------------


def on_path(path: str, folder, scratch):
    """A model loaded, placed or compiled in one way, and what `generate` is told on that path."""
    if path == "bfloat16":
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16), {}
    if path == "offloaded to disk":
        device_map = {"model": "disk", "lm_head": "cpu"}
        loaded = AutoModelForImageTextToText.from_pretrained(folder, device_map=device_map, offload_folder=scratch)
        assert any(parameter.is_meta for parameter in loaded.parameters())
        return loaded, {}
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    if path == "offloaded to memory":
        from accelerate import cpu_offload

        cpu_offload(loaded, execution_device="cpu")
    elif path == "compiled":
        loaded.forward = torch.compile(loaded.forward, backend="eager", fullgraph=True, dynamic=False)
    settings = {
        "without cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
        "compiled": {"cache_implementation": "static"},
        "beams": {"num_beams": 2},
    }
    return loaded, settings.get(path, {})


@pytest.mark.parametrize(
    "path",
    [
        "cached",
        "without cache",
        "static cache",
        "beams",
        "batched",
        "offloaded to memory",
        "offloaded to disk",
        "compiled",
        "bfloat16",
    ],
)
def test_black_and_white_pictures_differ(path, hub_folder, tmp_path):
    torch._dynamo.reset()
    model, settings = on_path(path, hub_folder, tmp_path)
    inputs = batch(*(ROWS if path == "batched" else ROWS[2:3]))
    count = 6 if path == "batched" else 1
    plain = tiny_model()
    settings = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True, **settings}
    logits = {}
    for colour, value in {"black": -2.0, "white": 2.0}.items():
        pixels = torch.full((count, 3, 32, 32), value)
        logits[colour] = model.generate(**inputs, pixel_values=pixels, **settings).logits[0].float()
        with torch.no_grad():
            expected = plain(**inputs, pixel_values=pixels).logits[:, -1]
        rows = logits[colour][:: settings.get("num_beams", 1)]
        tolerance = 0.1 * expected.abs().max().item() if path == "bfloat16" else 1e-3
        torch.testing.assert_close(rows, expected, rtol=0, atol=tolerance)
    seen = torch.tensor([bool(images) for images in IMAGES_OF_ROWS]) if path == "batched" else torch.tensor([True])
    seen = seen.repeat_interleave(settings.get("num_beams", 1))
    difference = (logits["black"] - logits["white"]).abs().amax(-1)
    assert (difference[seen] > 0.5).all()
    assert (difference[~seen] < 1e-4).all()
    del model
    gc.collect()
