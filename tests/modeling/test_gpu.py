"""What only a CUDA device shows: half precision, compiled decoding and FlashAttention 2 there. `pytest -m gpu`."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.tiny import IMAGE_TOKEN_ID, tiny_model

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture
def inputs():
    """Two prompts with an image of 4 visual tokens each, on the device."""
    torch.manual_seed(0)
    ids = torch.randint(5, 400, (2, 24))
    ids[:, 2:6] = IMAGE_TOKEN_ID
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32)}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def relative_error(found, expected):
    return ((found - expected).float().norm() / expected.float().norm()).item()


def test_the_device_computes_what_the_cpu_computes(inputs):
    model = tiny_model()
    with torch.no_grad():
        expected = model(**{name: tensor.cpu() for name, tensor in inputs.items()}).logits
        model.to(DEVICE)
        assert relative_error(model(**inputs).logits.cpu(), expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(inputs, dtype):
    model = tiny_model().to(DEVICE)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.to(dtype)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        assert relative_error(model(**inputs).logits, expected) < 5e-2


def test_compiled_decoding_with_a_static_cache_gives_the_same_tokens(inputs):
    model = tiny_model().to(DEVICE)
    settings = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static"), expected)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_flash_attention_computes_what_sdpa_computes(inputs):
    model = tiny_model().to(DEVICE, torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flash_attention_2")
        assert model.model.language_model.config._attn_implementation == "flash_attention_2"
        assert model.model.vision_tower.config._attn_implementation == "flash_attention_2"
        assert relative_error(model(**inputs).logits, expected) < 2e-2
