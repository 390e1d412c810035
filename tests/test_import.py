"""Importing the package is cheap, its names are lazy, and transformers' Auto classes know it, in whatever order."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_delta_llava

CHECK_REGISTERED = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
import modeling_delta_llava as package

config = AutoConfig.for_model("delta_llava")
assert type(config) is package.DeltaLlavaConfig, type(config)
assert AutoModel._model_mapping[type(config)] is package.DeltaLlavaModel
assert AutoModelForImageTextToText._model_mapping[type(config)] is package.DeltaLlavaForConditionalGeneration
assert PROCESSOR_MAPPING[type(config)] is package.DeltaLlavaProcessor
"""

FIND_WITHOUT_IMPORTING = """
import importlib.util, modeling_delta_llava
assert importlib.util.find_spec("transformers.models.auto.modeling_auto") is not None
"""


def run_python(code: str, *options: str) -> str:
    """What a fresh interpreter prints for `code`; a failure, and any warning, raises with its output."""
    completed = subprocess.run(
        [sys.executable, "-W", "error:Delta-LLaVA could not be registered", *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def imported_modules(code: str, *names: str) -> set[str]:
    output = run_python(f"import sys\n{code}\nprint(*sys.modules, sep='\\n')")
    return set(names) & set(output.split())


def test_import_is_light():
    heavy = ("torch", "transformers", "numpy", "huggingface_hub", "importlib.metadata", "typer", "PIL")
    assert imported_modules("import modeling_delta_llava", *heavy) == set()
    assert imported_modules("import modeling_delta_llava; dir(modeling_delta_llava)", *heavy) == set()


def test_transformers_alone_does_not_bring_in_torch():
    assert imported_modules("import modeling_delta_llava, transformers", "torch", "transformers") == {"transformers"}
    assert imported_modules("import transformers, modeling_delta_llava", "torch", "transformers") == {"transformers"}


def test_names():
    assert set(modeling_delta_llava.__all__) <= set(dir(modeling_delta_llava))
    for name in modeling_delta_llava.__all__:
        assert getattr(modeling_delta_llava, name) is not None
    assert modeling_delta_llava.DeltaLlavaConfig.__module__ == "modeling_delta_llava.configuration_delta_llava"
    with pytest.raises(AttributeError, match="no attribute 'DeltaLlama'"):
        _ = modeling_delta_llava.DeltaLlama
    with pytest.raises(ImportError, match="DeltaLlama"):
        exec("from modeling_delta_llava import DeltaLlama")


def test_star_import():
    names: dict[str, object] = {}
    exec("from modeling_delta_llava import *", names)
    assert set(modeling_delta_llava.__all__) <= set(names)


@pytest.mark.parametrize(
    "first",
    [
        "import transformers; import modeling_delta_llava",
        "from transformers import AutoModel; import modeling_delta_llava",
        "from transformers import AutoProcessor, LlavaForConditionalGeneration; import modeling_delta_llava",
        "import modeling_delta_llava; import accelerate",
        "import modeling_delta_llava; import transformers.generation.utils",
        "from modeling_delta_llava import DeltaLlavaForConditionalGeneration",
        "import modeling_delta_llava.processing_delta_llava",
        FIND_WITHOUT_IMPORTING,
    ],
)
def test_registered_after(first: str):
    run_python(f"{first}\n{CHECK_REGISTERED}")


@pytest.mark.parametrize("module", ["configuration_delta_llava", "modeling_delta_llava"])
def test_registered_as_soon_as_the_outermost_import_is_complete(module: str):
    """These modules import an Auto class before their own classes exist; no later import may be needed."""
    run_python(
        f"import modeling_delta_llava.{module} as module, sys\n"
        "from modeling_delta_llava.configuration_delta_llava import DeltaLlavaConfig\n"
        "configs = sys.modules['transformers.models.auto.configuration_auto'].CONFIG_MAPPING\n"
        "assert configs['delta_llava'] is DeltaLlavaConfig\n"
        "if 'transformers.models.auto.modeling_auto' in sys.modules:\n"
        "    models = sys.modules['transformers.models.auto.modeling_auto'].MODEL_MAPPING\n"
        "    assert models[DeltaLlavaConfig] is module.DeltaLlavaModel"
    )


def test_registered_again_after_a_reload_of_transformers_auto_module():
    run_python(
        "import importlib, modeling_delta_llava\n"
        "from transformers.models.auto import processing_auto\n"
        f"importlib.reload(processing_auto)\n{CHECK_REGISTERED}"
    )


def test_registered_when_threads_import_at_the_same_time():
    run_python(
        "import importlib, threading, modeling_delta_llava\n"
        "names = ['transformers.models.auto.modeling_auto', 'transformers.models.auto.processing_auto',\n"
        "         'transformers.modeling_utils', 'modeling_delta_llava.modeling_delta_llava']\n"
        "threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join(120) for thread in threads]\n"
        f"assert not any(thread.is_alive() for thread in threads)\n{CHECK_REGISTERED}"
    )


@pytest.mark.parametrize("outer_fails", [False, True])
def test_registers_once_and_only_when_no_import_is_under_way(tmp_path: Path, outer_fails: bool):
    """With a stand-in for transformers, in which one module imports the Auto classes halfway through."""
    auto = tmp_path / "transformers" / "models" / "auto"
    auto.mkdir(parents=True)
    for folder in (auto, auto.parent, auto.parent.parent):
        (folder / "__init__.py").touch()
    (auto / "modeling_auto.py").touch()
    (tmp_path / "transformers" / "outer.py").write_text(
        "import builtins\nfrom .models.auto import modeling_auto\nbuiltins.outer_is_complete = True\n"
        + ("raise RuntimeError('outer')\n" if outer_fails else ""),
        encoding="utf-8",
    )
    output = run_python(
        f"import builtins, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import modeling_delta_llava.auto_registration as registration\n"
        "def register():\n"
        "    print('complete' if hasattr(builtins, 'outer_is_complete') else 'too early')\n"
        "registration._REGISTER_AFTER['transformers.models.auto.modeling_auto'] = register\n"
        "try:\n"
        "    import transformers.outer\n"
        "except RuntimeError as error:\n"
        "    print(error)"
    )
    assert output.split() == (["complete", "outer"] if outer_fails else ["complete"])


def test_transformers_modules_keep_their_own_loaders():
    run_python(
        "import inspect, modeling_delta_llava\n"
        "from importlib.machinery import SourceFileLoader\n"
        "from transformers.models.auto import modeling_auto\n"
        "assert type(modeling_auto.__loader__) is SourceFileLoader, modeling_auto.__loader__\n"
        "assert type(modeling_auto.__spec__.loader) is SourceFileLoader\n"
        "assert 'class AutoModel' in inspect.getsource(modeling_auto)"
    )


def test_package_without_transformers_says_so():
    """The package itself imports; what needs transformers raises the ordinary error."""
    run_python(
        "import sys; sys.modules['transformers'] = None\n"
        "import modeling_delta_llava\n"
        "try:\n"
        "    modeling_delta_llava.DeltaLlavaConfig\n"
        "except ModuleNotFoundError as error:\n"
        "    assert 'transformers' in str(error)\n"
        "else:\n"
        "    raise AssertionError('no error')"
    )


def test_a_registration_that_fails_warns_once_and_breaks_no_other_import():
    output = run_python(
        "import sys, warnings\n"
        "sys.modules['modeling_delta_llava.processing_delta_llava'] = None\n"
        "import modeling_delta_llava\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline\n"
        "print(*[w.message for w in caught if 'Delta-LLaVA' in str(w.message)], sep='\\n')"
    )
    assert len(output.splitlines()) == 1, output
    assert "processing_delta_llava" in output


def test_hook_is_installed_once():
    from modeling_delta_llava.auto_registration import AutoRegistrationFinder

    importlib.reload(modeling_delta_llava)
    assert sum(isinstance(finder, AutoRegistrationFinder) for finder in sys.meta_path) == 1
