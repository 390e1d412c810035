"""The benchmark scripts: they state their use, and compare like with like."""

import importlib
import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = ("projector", "end_to_end", "processor", "loading", "finetuning", "conversion", "publish")


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks folder, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_measured(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--output" in printed
    assert "--repeats" in printed


def test_the_baseline_computes_what_the_projector_computes(benchmark):
    released, ours = benchmark("authors_projector"), benchmark("projector")
    config = tiny_config(projector_num_attention_heads=2)
    projector = ours.random_projector(config, torch.device("cpu"))
    baseline = released.ReleasedProjector(projector).eval()
    width, layers = config.vision_config.hidden_size, len(config.memory_feature_layers)
    streams = [torch.randn(2, config.num_patches, width * count) for count in (1, layers)]
    for budget in config.legal_num_visual_tokens:
        scale = config.scale_factor(budget)
        with torch.no_grad():
            expected, result = projector(*streams, scale), baseline(*streams, scale)
        assert (result - expected).norm() < 1e-5 * expected.norm()


def test_every_weight_has_a_name_in_the_authors_class(benchmark):
    projector = benchmark("projector").random_projector(tiny_config(), torch.device("cpu"))
    weights = benchmark("authors_projector").their_weights(projector)
    assert {name.split(".")[0] for name in weights} == {
        "q_proj_1", "k_proj_1", "v_proj_1", "clip_attn", "mlp", "combined_block",
    }  # fmt: skip
    assert sum(tensor.numel() for tensor in weights.values()) == sum(map(torch.numel, projector.parameters()))


def test_both_models_of_the_end_to_end_comparison_share_their_parts(benchmark):
    end_to_end = benchmark("end_to_end")
    model, native = end_to_end.build(tiny_config(), torch.device("cpu"), torch.float32)
    assert native.model.language_model is model.model.language_model
    towers = (len(one.model.vision_tower.encoder.layers) for one in (model, native))
    assert tuple(towers) == (4, 5)
    assert not any(weight.is_meta for one in (model, native) for weight in (*one.parameters(), *one.buffers()))
    for one, tokens in ((native, 16), (model, 4)):
        inputs = end_to_end.prompt(model.config, tokens, 6, torch.randn(1, 3, 32, 32))
        answers = end_to_end.Answers(one, inputs, 5, torch.device("cpu"))
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            assert answers().shape == (1, 6 + tokens + 5)
            seconds.append(time.perf_counter() - begin)
        assert all(0 < first < whole for first, whole in zip(answers.first, seconds, strict=True))
        assert answers.decode_rate(seconds) > 0
        assert answers.peak_memory_mib > 0


def test_first_tokens_of_the_warm_up_are_dropped(benchmark):
    class Answers:
        def __init__(self):
            self.first = []

        def __call__(self):
            self.first.append(len(self.first))

    answers = {"a": Answers(), "b": Answers()}
    seconds = benchmark("end_to_end").measure_answers(answers, torch.device("cpu"), repeats=2, warmup=1)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert [each.first for each in answers.values()] == [[1, 2], [1, 2]]


def test_timing_takes_turns_and_ratios_are_within_rounds(benchmark):
    common = benchmark("common")
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("one", "two")}
    times = common.measure(functions, torch.device("cpu"), repeats=3, warmup=1)
    assert calls == ["one", "two"] * 4
    assert [len(seconds) for seconds in times.values()] == [3, 3]
    assert common.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_committed_results_describe_the_machine(script):
    paths = list((BENCHMARKS / "results").glob(f"{script}-*.json"))
    assert paths
    for path in paths:
        document = json.loads(path.read_text())
        assert document["versions"]["torch"]
        assert document["machine"]["cpu"]
        assert document["settings"]
        assert document["results"]
