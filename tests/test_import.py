"""In a fresh interpreter: importing the package makes the Auto classes know the model; `--help` does without it."""

import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent(
    """
    import sys
    from delta_llava.cli import app, main

    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    names.remove("finetune")  # its help lists transformers' own settings
    for arguments in ([], ["--help"], ["-h"], ["--version"], *([name, "--help"] for name in names)):
        assert main(arguments) == 0, arguments
    heavy = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "datasets", "modeling_delta_llava"}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)

    import modeling_delta_llava as package
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.for_model("delta_llava")
    assert type(config) is package.DeltaLlavaConfig
    assert AutoModel._model_mapping[type(config)] is package.DeltaLlavaModel
    assert AutoModelForImageTextToText._model_mapping[type(config)] is package.DeltaLlavaForConditionalGeneration
    assert PROCESSOR_MAPPING[type(config)] is package.DeltaLlavaProcessor
    assert set(package.__all__) <= set(dir(package))
    assert package.__version__
    """
)


def test_import_registers_and_help_does_not_import():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
