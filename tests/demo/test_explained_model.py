"""Where the model that `make demo` trained looks, by the measure of `benchmarks/explain.py`."""

import importlib
from pathlib import Path

import pytest
import torch

from modeling_delta_llava.asking import load
from modeling_delta_llava.evaluation.explain import explain


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("explain")


def test_heat_lies_on_the_shape_in_question_and_follows_the_trained_weights(demo_output, benchmark):
    model, processor = load(str(demo_output / "model"), device="cpu")
    asked = list(benchmark.examples(24, seed=7))

    def measured() -> dict:
        return benchmark.summary(
            [
                (explain(model, processor, picture, question.text, [16], None, 6, hirescam=True)[0], question, *boxes)
                for picture, question, *boxes in asked
            ]
        )

    trained = measured()
    benchmark.shuffle(model, torch.Generator().manual_seed(0))
    assert trained["accuracy"] > 0.6
    assert trained["asked"] > max(3, trained["others"], 1.2 * measured()["asked"])
