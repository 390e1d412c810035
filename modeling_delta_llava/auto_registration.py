"""Makes transformers' Auto classes know Delta-LLaVA as soon as this package is imported.

Why an import hook: `AutoModel.register` takes the class itself, so registering while this package is being imported
would import torch and most of transformers (seconds) for `delta-llava --help`, for a script that only reads a recipe,
and inside any library that probes its plug-ins. The hook instead registers each class right after the transformers
module with its Auto class has been imported, which is the first moment at which the registration can be seen. It waits
until no import of transformers or of this package is under way in the thread, since these import each other's names.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_delta_llava import DeltaLlavaConfig

    AutoConfig.register(DeltaLlavaConfig.model_type, DeltaLlavaConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageTextToText

    from .configuration_delta_llava import DeltaLlavaConfig
    from .modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel

    AutoModel.register(DeltaLlavaConfig, DeltaLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, exist_ok=True)


def _register_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from .configuration_delta_llava import DeltaLlavaConfig
    from .processing_delta_llava import DeltaLlavaProcessor

    AutoProcessor.register(DeltaLlavaConfig, DeltaLlavaProcessor, exist_ok=True)


_REGISTER_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processor,
}
_WATCHED_PREFIXES = ("transformers.", f"{__package__}.")


def _is_being_imported(module_name: str) -> bool:
    spec = getattr(sys.modules.get(module_name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _is_transient(error: BaseException | None) -> bool:
    """Whether the error, or one behind it, comes from a module that some thread is still importing."""
    while error is not None:
        if isinstance(error, ImportError) and _is_being_imported(error.name or ""):
            return True
        error = error.__cause__ or error.__context__
    return False


def _attempt(module_name: str) -> Exception | None:
    try:
        _REGISTER_AFTER[module_name]()
    except Exception as error:
        return error
    return None


class _ThreadState(threading.local):
    imports_under_way = 0


class _WatchingLoader(Loader):
    """Runs the real loader once, hands the module back to it, and tells the finder when the module is complete."""

    def __init__(self, loader: Loader, finder: "AutoRegistrationFinder"):
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with self._finder.importing(module.__name__):
            self._loader.exec_module(module)


class _Importing:
    """One module's import, counted in its thread; the outermost one that succeeds or fails runs what is pending."""

    def __init__(self, finder: "AutoRegistrationFinder", module_name: str):
        self._finder = finder
        self._module_name = module_name

    def __enter__(self) -> None:
        self._finder.state.imports_under_way += 1

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._finder.state.imports_under_way -= 1
        if error_type is None and self._module_name in _REGISTER_AFTER:
            self._finder.pending.add(self._module_name)
        if self._finder.pending and not self._finder.state.imports_under_way:
            self._finder.register_pending()


class AutoRegistrationFinder(MetaPathFinder):
    """Finds nothing itself: wraps the loader that the other finders give for the watched modules.

    It stays installed, so that a reloaded transformers module is registered with again. Registering twice is harmless
    (`exist_ok`), hence no lock, which could deadlock with the import system's own.
    """

    def __init__(self) -> None:
        self.pending: set[str] = set()
        self.state = _ThreadState()
        self._warned = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(_WATCHED_PREFIXES):
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _WatchingLoader(spec.loader, self)
                return spec
        return None

    def importing(self, module_name: str) -> _Importing:
        return _Importing(self, module_name)

    def register_pending(self) -> None:
        """Registers with every Auto class that has become available.

        What fails stays pending, also while it is tried: a thread whose import was in the way then finds it.
        """
        failed: set[str] = set()
        self.state.imports_under_way += 1
        try:
            while ready := self.pending - failed:
                module_name = min(ready)
                error = _attempt(module_name)
                if error is not None and not _is_transient(error):
                    # Another thread may have completed what was missing in the meantime.
                    error = _attempt(module_name)
                if error is None:
                    self.pending.discard(module_name)
                else:
                    failed.add(module_name)
                    self._warn_once(error)
        finally:
            self.state.imports_under_way -= 1

    def _warn_once(self, error: Exception) -> None:
        if self._warned or _is_transient(error):
            return
        self._warned = True
        warnings.warn(f"Delta-LLaVA could not be registered with transformers' Auto classes: {error}", stacklevel=2)


def install() -> None:
    """Installs the hook, once a process, and registers at once with what is already imported."""
    finder = next((finder for finder in sys.meta_path if isinstance(finder, AutoRegistrationFinder)), None)
    if finder is None:
        finder = AutoRegistrationFinder()
        sys.meta_path.insert(0, finder)
    for module_name in _REGISTER_AFTER:
        if module_name in sys.modules and not _is_being_imported(module_name):
            finder.pending.add(module_name)
    if not finder.state.imports_under_way:
        finder.register_pending()
