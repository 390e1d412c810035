"""What `delta-llava finetune --list-settings` prints."""

import dataclasses
import textwrap
from typing import Any

import transformers

from .arguments import CONFIG_FOLDER, DataArguments, DeltaLlavaTrainingArguments, ModelArguments, packaged_recipes

WIDTH = 119
_INHERITED = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}


def settings_list() -> str:
    """Every setting with its default and its help, and where the packaged recipes lie."""
    training = [entry for entry in dataclasses.fields(DeltaLlavaTrainingArguments) if entry.init]
    sections = {
        "Model": dataclasses.fields(ModelArguments),
        "Data": dataclasses.fields(DataArguments),
        "Training, of Delta-LLaVA's recipe": [entry for entry in training if entry.name not in _INHERITED],
        "Training, of transformers.TrainingArguments": [entry for entry in training if entry.name in _INHERITED],
    }
    lines = [
        f"Packaged recipes: {', '.join(packaged_recipes())}",
        f"They lie in {CONFIG_FOLDER}, beside configs of `accelerate launch`.",
        "Settings, with their values where neither the recipe nor the command line says otherwise:",
    ]
    for title, entries in sections.items():
        lines += ["", f"{title}:"]
        for entry in entries:
            lines.append(f"  {entry.name} = {_default(entry)}")
            words = " ".join(entry.metadata.get("help", "").split())
            lines += textwrap.wrap(words, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _default(entry: dataclasses.Field) -> Any:
    value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    return getattr(value, "value", value)
