"""Delta-LLaVA for Hugging Face transformers. Importing this package makes the Auto classes know the model."""

from importlib.metadata import version

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_delta_llava import DeltaLlavaConfig
from .modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel
from .processing_delta_llava import DeltaLlavaProcessor

__version__ = version("delta-llava")
__all__ = ["DeltaLlavaConfig", "DeltaLlavaForConditionalGeneration", "DeltaLlavaModel", "DeltaLlavaProcessor"]

AutoConfig.register(DeltaLlavaConfig.model_type, DeltaLlavaConfig)
AutoModel.register(DeltaLlavaConfig, DeltaLlavaModel)
AutoModelForImageTextToText.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration)
AutoProcessor.register(DeltaLlavaConfig, DeltaLlavaProcessor)
