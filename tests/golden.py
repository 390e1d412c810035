"""Values of the authors' released code, and what they were computed from (see tests/data/README.md)."""

import json
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_delta_llava.building import build_image_processor, read_chat_template
from modeling_delta_llava.configuration_delta_llava import DeltaLlavaConfig
from modeling_delta_llava.conversion.tables import DELTA_ROWS, rename
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector
from modeling_delta_llava.tokenization import sentencepiece_tokenizer
from tests.tiny import TOWERS
from tests.training_layout import TrainingLayout, projector_shapes

DATA = Path(__file__).parent / "data"
PROJECTOR_VALUES, PIXELS = np.load(DATA / "projector_golden.npz"), np.load(DATA / "image_golden.npz")
PROJECTOR_ENTRIES = sorted({name.rsplit("_", 1)[0] for name in PROJECTOR_VALUES.files})
# The Llama tokenizer may not be shipped.
REFERENCE = os.environ.get("DELTA_LLAVA_REFERENCE")
needs_reference = pytest.mark.skipif(
    not REFERENCE, reason="the Llama tokenizer may not be shipped: set DELTA_LLAVA_REFERENCE to a folder that has it"
)
IMAGE = -200


def golden_weights(text_width: int) -> dict[str, torch.Tensor]:
    """The training tensors of the reference run, under our names."""
    shapes = projector_shapes(TrainingLayout.released_projector(text_hidden_size=text_width))
    generator = np.random.RandomState(20260101)
    names = rename([f"model.mm_projector.{name}" for name in shapes], DELTA_ROWS, "the reference values")[0]
    weights = {}
    for name in sorted(shapes):
        values = generator.standard_normal(size=shapes[name]).astype(np.float32)
        if ".norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.05 * values
        else:
            values = values / np.float32(np.sqrt(np.prod(shapes[name][1:])))
        tensor = torch.from_numpy(values)
        ours = names[f"model.mm_projector.{name}"].removeprefix("model.multi_modal_projector.")
        if "qkv_proj" in ours:
            weights.update(
                {
                    ours.replace("qkv_proj", f"{part}_proj"): rows
                    for part, rows in zip("qkv", tensor.chunk(3), strict=False)
                }
            )
        else:
            weights[ours] = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor
    return weights


@cache
def golden_projector(text_width: int) -> DeltaLlavaProjector:
    text = {"model_type": "llama", "hidden_size": text_width, "vocab_size": 8, "num_attention_heads": 1}
    with torch.device("meta"):
        projector = DeltaLlavaProjector(DeltaLlavaConfig(text_config=text))
    projector.load_state_dict(golden_weights(text_width), assign=True)
    return projector.eval()


@cache
def golden_streams() -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.RandomState(20260102)
    query = generator.standard_normal((2, 576, 1024)).astype(np.float32)
    return torch.from_numpy(query), torch.from_numpy(generator.standard_normal((2, 576, 4096)).astype(np.float32))


def check_projector(entry: str) -> None:
    """One entry of the reference values; a right fp32 implementation is within 2e-5."""
    text_width, scale = map(int, re.fullmatch(r"h(\d+)_s(\d+)", entry).groups())
    with torch.no_grad():
        output = golden_projector(text_width)(*golden_streams(), scale).numpy()
    expected = PROJECTOR_VALUES[f"{entry}_sample"]
    sample = output[:, PROJECTOR_VALUES[f"{entry}_rows"]][:, :, PROJECTOR_VALUES[f"{entry}_columns"]]
    assert output.shape == (2, (24 // scale) ** 2, text_width)
    assert np.abs(sample - expected).max() <= 2e-5 * np.abs(expected).max()
    moments = np.array([output.mean(), output.std(), np.abs(output).max()])
    np.testing.assert_allclose(moments, PROJECTOR_VALUES[f"{entry}_moments"], rtol=2e-5, atol=1e-7)


def golden_picture(width: int, height: int) -> Image.Image:
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    channels = [columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1), (columns + rows) % 256]
    pixels = np.stack(channels, axis=-1).astype(np.uint8)
    generator = np.random.RandomState(5)
    for _ in range(24):
        left, top = generator.randint(0, width), generator.randint(0, height)
        block_width, block_height = generator.randint(1, max(2, width // 4)), generator.randint(1, max(2, height // 4))
        pixels[top : top + block_height, left : left + block_width] = generator.randint(0, 256, 3)
    return Image.fromarray(pixels)


def check_pixels(name: str) -> None:
    """One picture of the reference values, bit for bit."""
    size, mode, shape = name.split("_")
    vision_config = DeltaLlavaConfig(
        vision_config={**TOWERS["clip"], "image_size": int(size), "patch_size": 14}
    ).vision_config
    processor = build_image_processor(vision_config, image_aspect_ratio=mode)
    assert "Pil" in type(processor).__name__, "the golden values are PIL's; run this test without torchvision"
    pixels = processor(golden_picture(*map(int, shape.split("x"))), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels[:, ::7, ::7], PIXELS[name])


def check_text_rows() -> None:
    """The 24 conversations: ids and labels of training, and ids of inference."""
    folder = Path(REFERENCE)
    rows = json.loads((folder / "text_golden.json").read_text(encoding="utf-8"))
    assert len(rows) == 24
    tokenizers = {
        legacy: sentencepiece_tokenizer(folder / "llama_tokenizer.model", legacy=legacy) for legacy in (True, False)
    }
    image_id = tokenizers[True].convert_tokens_to_ids("<image>")
    for row in rows:
        tokenizer, template = tokenizers[row["legacy"]], read_chat_template(row["template"])
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        output = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = [IMAGE if index == image_id else index for index in output["input_ids"]]
        assert ids == row["input_ids"], row["name"]
        labels = [index if mask else -100 for index, mask in zip(ids, output["assistant_masks"], strict=True)]
        assert labels == row["labels"], row["name"]
        if "prompt" in row:
            prompt = tokenizer.apply_chat_template(
                messages[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
            )
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert [IMAGE if index == image_id else index for index in prompt_ids] == row["prompt_ids"], row["name"]
