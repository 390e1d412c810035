"""What `predict_with_generate` compares answers with: exact match, or a function of the user's."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delta_llava.errors import UserError, told


def exact_match(predictions: list[str], references: list[str]) -> float:
    """The share of answers that equal the rows' own, capitals and spaces around them aside."""
    equal = [
        prediction.strip().casefold() == reference.strip().casefold()
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return sum(equal) / max(len(equal), 1)


def load_metric(name: str) -> Callable[[list[str], list[str]], Any]:
    """A metric: (predictions, references) to a number, or to a dict of names and numbers.

    Args:
        name: `exact_match`, or a function of the user's as `FILE.py:function` or `module:function`.
    Raises:
        UserError: there is no such function.
    """
    if name == "exact_match":
        return exact_match
    source, _, function_name = name.rpartition(":")
    if not source:
        raise UserError(f"metric: {name} is not known; give exact_match, FILE.py:function or module:function")
    with told(f"metric: {name} cannot be loaded", "give FILE.py:function or module:function"):
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, function_name)
    if not callable(function):
        raise UserError(f"metric: {name} is no function; name one that takes predictions and references")
    return function


def scores(metric: Callable[[list[str], list[str]], Any], predictions: list[str], references: list[str]) -> dict:
    """What a metric says, as numbers by name.

    Raises:
        UserError: it fails, or gives something else, or a name that the trainer itself uses.
    """
    name = getattr(metric, "__name__", type(metric).__name__)
    with told(f"metric: {name} failed on {len(references)} answers", "correct the function"):
        value = metric(predictions, references)
        values = value if isinstance(value, dict) else {name: value}
        values = {str(key): float(number) for key, number in values.items()}
    taken = {"loss", "skipped_rows", "cut_answers"} & values.keys()
    if taken:
        raise UserError(f"metric: {name} gives {min(taken)}, which the trainer measures itself; name it otherwise")
    return values
