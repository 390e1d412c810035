"""What leaves PyTorch: vision and projector traced and exported for any number of images, the whole model as ONNX."""

import pytest
import torch
from torch import nn

from tests.prompts import batch, image, pictures, words
from tests.tiny import tiny_model

# PyTorch's tracers touch deprecated attributes of whatever they trace, and use deprecated parts of their own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class ImageEncoder(nn.Module):
    """Visual tokens `(images, V, D)` at one budget."""

    def __init__(self, model: nn.Module, num_visual_tokens: int):
        super().__init__()
        self.model = model
        self.num_visual_tokens = num_visual_tokens

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, self.num_visual_tokens, return_dict=True).pooler_output


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("how", ["torch.jit.trace", "torch.export"])
@pytest.mark.parametrize("budget", [16, 4, 1])
def test_images_are_encoded_in_any_number(budget, how, model):
    encoder = ImageEncoder(model, budget)
    with torch.no_grad():
        if how == "torch.export":
            images = {"pixel_values": {0: torch.export.Dim("images", min=1, max=64)}}
            encode = torch.export.export(encoder, (pictures(3),), dynamic_shapes=images).module()
        else:
            encode = torch.jit.trace(encoder, pictures(3), check_trace=False)
        for count in (1, 2, 5):
            pixels = pictures(count, seed=count)
            torch.testing.assert_close(encode(pixels), encoder(pixels), rtol=1e-4, atol=1e-5)


def test_onnx_computes_the_same():
    pytest.importorskip("onnxruntime")
    exporters = pytest.importorskip("transformers.exporters")
    model = tiny_model().eval()
    inputs = batch([*words(3), *image(), *words(4, 1)]) | {"pixel_values": pictures(1)}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    settings = exporters.OnnxConfig()
    exported = exporters.OnnxExporter().export(model, {**inputs, "use_cache": False}, config=settings)
    torch.testing.assert_close(exported(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
