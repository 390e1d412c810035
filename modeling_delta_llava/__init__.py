"""Delta-LLaVA for Hugging Face transformers.

Importing this package is cheap: the classes below are loaded when they are first used, and transformers' Auto classes
learn about them when transformers itself is used (see `auto_registration`).
"""

from typing import TYPE_CHECKING

from . import auto_registration

if TYPE_CHECKING:
    from .configuration_delta_llava import DeltaLlavaConfig
    from .modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel
    from .processing_delta_llava import DeltaLlavaProcessor

    __version__: str

_MODULE_OF = {
    "DeltaLlavaConfig": "configuration_delta_llava",
    "DeltaLlavaForConditionalGeneration": "modeling_delta_llava",
    "DeltaLlavaModel": "modeling_delta_llava",
    "DeltaLlavaProcessor": "processing_delta_llava",
}

__all__ = [
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaProcessor",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("delta-llava")
    elif name in _MODULE_OF:
        from importlib import import_module

        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto_registration.install()
