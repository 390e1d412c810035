"""The model as a transformers model: losses, back ends, precisions, devices, vocabulary, compilation, budgets."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

import modeling_delta_llava  # noqa: F401  (registers the Auto classes)
from modeling_delta_llava.configuration_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel
from tests.tiny import DECODERS, IMAGE_TOKEN_ID, TOWERS, tiny_config, tiny_model


def inputs(model, images_per_row=(1, 2), budget: int | None = None, length: int = 24, seed: int = 0) -> dict:
    """Random ids with the placeholders of `images_per_row` images in each row, and random pictures."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    tokens = budget or config.num_visual_tokens
    ids = torch.randint(3, 440, (len(images_per_row), length + 4 * tokens), generator=generator)
    for row, count in zip(ids, images_per_row, strict=True):
        position = 2
        for _ in range(count):
            row[position : position + tokens] = IMAGE_TOKEN_ID
            position += tokens + 1
    side = config.vision_config.image_size
    pixels = torch.randn(sum(images_per_row), 3, side, side, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sum(images_per_row):
        batch["pixel_values"] = pixels
    if budget:
        batch["num_visual_tokens"] = torch.full((sum(images_per_row),), budget)
    return batch


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_and_decoder_trains_and_sees(tower, decoder):
    model = tiny_model(tiny_config(tower, decoder))
    batch = inputs(model)
    with torch.no_grad():
        logits = model(**batch).logits
        other = model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}).logits
    assert logits.shape == (*batch["input_ids"].shape, IMAGE_TOKEN_ID + 1)
    assert (logits - other).abs().max() > 1e-3
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if "vision_tower" not in name:
            assert parameter.grad is not None, name


def test_gemma2_logits_are_capped():
    model = tiny_model(tiny_config(decoder="gemma2", text={"final_logit_softcapping": 0.5}))
    with torch.no_grad():
        assert model(**inputs(model)).logits.abs().max() <= 0.5


def test_loss_is_the_mean_cross_entropy_of_shifted_labels(model):
    batch = inputs(model)
    labels = batch["input_ids"].clone()
    labels[:, :10] = -100
    with torch.no_grad():
        output = model(**batch, labels=labels)
        logits = output.logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(output.loss, expected)
        count = torch.tensor(1000)
        scaled = model(**batch, labels=labels, num_items_in_batch=count).loss
    torch.testing.assert_close(scaled, expected * (labels[:, 1:] != -100).sum() / count)


def test_logits_to_keep(model):
    batch = inputs(model)
    with torch.no_grad():
        full = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, full[:, -3:])
        torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(drop_path_rate=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        batch = inputs(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_attention_back_ends_reach_the_parts_and_agree(hub_folder):
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model = AutoModelForImageTextToText.from_pretrained(hub_folder, attn_implementation=implementation)
        assert model.config.text_config._attn_implementation == implementation
        assert model.config.vision_config._attn_implementation == implementation
        with torch.no_grad():
            outputs[implementation] = model(**inputs(model)).logits
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], rtol=1e-4, atol=1e-4)
    mixed = AutoModelForImageTextToText.from_pretrained(
        hub_folder, attn_implementation={"vision_config": "eager", "text_config": "sdpa"}
    )
    assert mixed.config.vision_config._attn_implementation == "eager"
    assert mixed.config.text_config._attn_implementation == "sdpa"


def test_hidden_states_and_attentions(hub_folder):
    model = AutoModelForImageTextToText.from_pretrained(hub_folder, attn_implementation="eager")
    batch = inputs(model)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        as_tuple = model(**batch, return_dict=False)
        none_is_default = model(**batch, return_dict=None)
    length = batch["input_ids"].shape[1]
    assert len(output.hidden_states) == 3
    assert output.hidden_states[-1].shape == (2, length, 32)
    assert [attention.shape for attention in output.attentions] == [(2, 2, length, length)] * 2
    assert output.image_hidden_states.shape == (12, 32)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], output.logits)
    torch.testing.assert_close(none_is_default.logits, output.logits)


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_the_vocabulary(tied, tmp_path):
    model = tiny_model(tiny_config(text={"tie_word_embeddings": tied}))
    batch = inputs(model)
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(460)
        after = model(**batch).logits
    assert model.config.text_config.vocab_size == 460
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(after[..., : IMAGE_TOKEN_ID + 1], before)
    model.save_pretrained(tmp_path)
    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, after)


def test_tied_head_is_saved_once_and_tied_after_loading(tmp_path):
    from safetensors import safe_open

    model = tiny_model(tiny_config(text={"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum("embed_tokens" in key or "lm_head" in key for key in file.keys()) == 1  # noqa: SIM118
    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_loading_matches_every_key_and_every_value(hub_folder):
    reference = tiny_model()
    model, report = AutoModelForImageTextToText.from_pretrained(hub_folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_poisoned_memory_changes_nothing(hub_folder, monkeypatch):
    """Whatever `torch.empty` leaves in memory, a loaded model computes from its weights alone."""
    batch = inputs(tiny_model())
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(hub_folder)(**batch).logits
    real = torch.empty_like

    def poisoned(tensor, **kwargs):
        value = real(tensor, **kwargs)
        return value.fill_(float("nan")) if value.is_floating_point() and not value.is_meta else value

    monkeypatch.setattr(torch, "empty_like", poisoned)
    model = AutoModelForImageTextToText.from_pretrained(hub_folder)
    monkeypatch.undo()
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers() if buffer.is_floating_point())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)


def test_meta_device_and_from_config(hub_folder):
    config = AutoConfig.from_pretrained(hub_folder)
    assert isinstance(config, DeltaLlavaConfig)
    with torch.device("meta"):
        base = AutoModel.from_config(config)
        model = AutoModelForImageTextToText.from_config(config)
    assert isinstance(base, DeltaLlavaModel)
    assert all(parameter.is_meta for parameter in model.parameters())
    empty = model.to_empty(device="cpu").eval()
    empty.load_state_dict(tiny_model().state_dict())
    assert not list(empty.model.multi_modal_projector.buffers())  # nothing that only __init__ would fill


def test_headless_model_says_which_class_generates(hub_folder):
    base = AutoModel.from_pretrained(hub_folder)
    with pytest.raises(TypeError, match="AutoModelForImageTextToText"):
        base.generate(torch.tensor([[1]]))
    model = tiny_model()
    batch = inputs(model)
    with torch.no_grad():
        hidden = base(**batch, return_dict=False)[0]
        torch.testing.assert_close(model.lm_head(hidden), model(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, hub_folder):
    reference = tiny_model()
    model = AutoModelForImageTextToText.from_pretrained(hub_folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    batch = inputs(model)
    with torch.no_grad():
        logits, expected = model(**batch).logits, reference(**batch).logits
        half_pixels = model(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)}).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    torch.testing.assert_close(half_pixels, logits, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("offloaded", ["cpu", "disk"])
def test_offloading_computes_the_same(offloaded, hub_folder, tmp_path):
    model = tiny_model()
    batch = inputs(model)
    device_map = {
        "model.vision_tower": offloaded,
        "model.multi_modal_projector": offloaded,
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": offloaded,
        "model.language_model.layers.1": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    from accelerate import cpu_offload

    if offloaded == "cpu":
        moved = AutoModelForImageTextToText.from_pretrained(hub_folder)
        cpu_offload(moved, execution_device="cpu")
    else:
        moved = AutoModelForImageTextToText.from_pretrained(hub_folder, device_map=device_map, offload_folder=tmp_path)
        assert any(parameter.is_meta for parameter in moved.parameters())
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(moved(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        generated = moved.generate(**batch, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, model.generate(**batch, max_new_tokens=4, do_sample=False))


def test_a_siglip_tower_on_disk_computes_the_same(tmp_path):
    """Its pooling head, which nothing reads and which offloading would not load, is not built."""
    model = tiny_model(tiny_config("siglip"))
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"}
    device_map |= {"model.language_model": "cpu", "lm_head": "cpu"}
    moved = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    pixels = torch.randn(1, 3, 36, 36)
    with torch.no_grad():
        found, expected = (each.get_image_features(pixels).pooler_output for each in (moved, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_is_set_for_each_part_alone():
    model = tiny_model()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    parts = (model.model.vision_tower, model.model.language_model)
    assert [part.config._attn_implementation for part in parts] == ["eager", "sdpa"]


def test_device_map_auto_offloads_what_does_not_fit(hub_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(
        hub_folder, device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(model)).logits, tiny_model()(**inputs(model)).logits)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_tower_is_as_deep_as_it_is_read_and_its_parts_see_their_calls(tower, tmp_path, caplog):
    """Layers above are neither built nor run; a checkpoint that holds them loads without a word."""
    config = tiny_config(tower)
    depth = config.vision_config.num_hidden_layers
    deeper = tiny_model(tiny_config(tower, memory_feature_layers=[*config.memory_feature_layers[:-1], depth]))
    deeper.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    transformers_logging.enable_propagation()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        transformers_logging.disable_propagation()
    assert {name: report[name] for name in ("missing_keys", "unexpected_keys")} == {
        "missing_keys": set(),
        "unexpected_keys": set(),
    }
    assert not [record for record in caplog.records if "not used" in record.message or "UNEXPECTED" in record.message]
    layers, calls = model.model.vision_tower.encoder.layers, []
    assert len(layers) == depth - 1
    for module in (model.model.vision_tower, *layers):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    pixels = inputs(model)["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixels, output_hidden_states=True)
        whole = deeper.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert calls == [*layers, model.model.vision_tower]
    for found, expected in zip(features.hidden_states, whole, strict=False):
        assert torch.equal(found, expected)


def test_any_other_tower_works():
    vision = {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    config = tiny_config().to_dict()
    model = tiny_model(DeltaLlavaConfig(vision_config=vision, text_config=config["text_config"], image_token_id=448))
    with torch.no_grad():
        assert torch.isfinite(model(**inputs(model)).logits).all()


def test_wrong_feature_selection_names_both_counts():
    model = tiny_model(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r"17 patch tokens.* 4 x 4 grid of 16"):
        model.get_image_features(torch.randn(1, 3, 32, 32))


# --- placeholders and budgets ----------------------------------------------------------------------


def test_mismatch_names_numbers_budget_and_cause(model):
    batch = inputs(model, (1, 1))
    with pytest.raises(ValueError, match=r"8 image tokens, but 2 image\(s\) gave 32 visual tokens .*16; .* 4\)"):
        model(**batch, num_visual_tokens=16)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError, match=r"Image tokens and image features do not match.* 8 .* 1 image"):
        model(**batch)


def test_pictures_without_placeholders_are_never_dropped(model):
    batch = inputs(model, (0,))
    with pytest.raises(ValueError, match="0 image tokens, but 1 image"):
        model(**batch, pixel_values=torch.randn(1, 3, 32, 32))


def test_mixed_budgets_equal_single_ones(model):
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        mixed = model.get_image_features(pixels, torch.tensor([4, 16, 1])).pooler_output
        for image, budget in enumerate((4, 16, 1)):
            single = model.get_image_features(pixels[image : image + 1], budget).pooler_output[0]
            torch.testing.assert_close(mixed[image], single, rtol=1e-4, atol=1e-5)
    assert [tokens.shape for tokens in mixed] == [(4, 32), (16, 32), (1, 32)]


@pytest.mark.parametrize("budget", [16, 4, 1])
def test_budgets_work_in_training(budget):
    model = tiny_model().train()
    batch = inputs(model, budget=budget)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (9, "num_visual_tokens=9 "),
        ("4", "num_visual_tokens='4' "),
        (True, "num_visual_tokens=True "),
        (4.0, r"num_visual_tokens=4\.0 "),
        (torch.tensor([[4, 4, 4]]), r"num_visual_tokens=\[\[4, 4, 4\]\] "),
        ([4], r"num_visual_tokens=\[4\] .* for each of 3 image\(s\)"),
        ([], r"num_visual_tokens=\[\] "),
        ([4, 4, 0], r"num_visual_tokens=\[4, 4, 0\] "),
        (["4", "4", "4"], r"num_visual_tokens=\['4', '4', '4'\] "),
        ([4, 4, None], r"num_visual_tokens=\[4, 4, None\] "),
    ],
    ids=repr,
)
def test_wrong_budgets(budget, message, model):
    message += r".*choose one of \[16, 4, 1\]" if "each" not in message else ""
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs(model), num_visual_tokens=budget)


def test_untrained_budgets_warn_once(caplog, monkeypatch):
    model = tiny_model(trained_num_visual_tokens=[4])
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    module_logger = logging.getLogger(DeltaLlavaModel.__module__)
    monkeypatch.setattr(module_logger, "propagate", True)
    transformers_logging.warning_once.cache_clear()
    pixels = torch.randn(1, 3, 32, 32)
    with caplog.at_level(logging.WARNING):
        model.get_image_features(pixels, 4)
        assert not caplog.records
        model.get_image_features(pixels, 16)
        model.get_image_features(pixels, 16)
    assert [record.getMessage()[:12] for record in caplog.records] == ["Running at 1"]


def test_forgotten_pictures_are_an_error(model):
    batch = inputs(model, (1,))
    del batch["pixel_values"]
    for call in (model, lambda **batch: model.generate(**batch, max_new_tokens=2)):
        with pytest.raises(ValueError, match="Image tokens and image features do not match"):
            call(**batch)


def test_encoded_pictures_equal_pictures(model):
    batch = inputs(model)
    pixels = batch.pop("pixel_values")
    with torch.no_grad():
        encoded = {"image": model.get_image_features(pixels)}
        expected = model(**batch, pixel_values=pixels).logits
        torch.testing.assert_close(model(**batch, mm_encoder_outputs=encoded).logits, expected)
        with pytest.raises(ValueError, match="Give images once"):
            model(**batch, pixel_values=pixels, mm_encoder_outputs=encoded)


def test_no_pictures_at_all_are_no_pictures(model):
    batch = inputs(model, (0,))
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(model(**batch, pixel_values=torch.zeros(0, 3, 32, 32)).logits, expected)


def test_token_types_are_accepted(model):
    batch = inputs(model, (1,))
    types = (batch["input_ids"] == IMAGE_TOKEN_ID).long()
    with torch.no_grad():
        expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert torch.equal(
            model.generate(**batch, mm_token_type_ids=types, max_new_tokens=3, do_sample=False), expected
        )


def test_embeddings_instead_of_ids(model):
    batch = inputs(model)
    ids = batch.pop("input_ids")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        expected = model(input_ids=ids, **batch).logits
        torch.testing.assert_close(model(**batch, inputs_embeds=embeddings).logits, expected)
    with pytest.raises(ValueError, match="exactly one"):
        model(**batch)


# --- compilation -----------------------------------------------------------------------------------


def test_forward_compiles_without_graph_breaks(model):
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        black = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
        torch.testing.assert_close(compiled(**black).logits, model(**black).logits, rtol=1e-4, atol=1e-4)


def test_budgets_compile_without_graph_breaks(model):
    batch = inputs(model, budget=4)
    images = len(batch["pixel_values"])
    with torch.no_grad():
        expected = model(**batch).logits
        for budgets in (4, [4] * images):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            found = compiled(**{**batch, "num_visual_tokens": budgets}).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_training_step_compiles_without_graph_breaks():
    model = tiny_model(drop_path_rate=0.0).train()
    batch = inputs(model)
    labels = batch["input_ids"]
    expected = model(**batch, labels=labels).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()


def test_prompts_of_one_length_do_not_recompile(model):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        model(**inputs(model))  # transformers puts its hooks for hidden states into the tower at the first call
        for seed in range(3):
            compiled(**inputs(model, seed=seed))
    assert len(graphs) == 1
