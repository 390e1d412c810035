"""`delta-llava profile`: what it prints and writes, and how it refuses."""

import json
import shutil

import pytest
import torch

from delta_llava import cli
from modeling_delta_llava.evaluation import backbones, efficiency
from modeling_delta_llava.evaluation.counts import paper_convention
from modeling_delta_llava.evaluation.measurements import FirstTokenClock
from modeling_delta_llava.evaluation.units import flop_unit, readable_number
from modeling_delta_llava.hub_cards.variants import variants
from tests.tiny import tiny_config


def test_analytic_profile_of_a_variant_needs_no_weights(tmp_path, capsys):
    path = tmp_path / "new" / "profile.json"
    arguments = ["profile", "delta-llava-vicuna-13b-144", "--analytic", "--num-visual-tokens", "1,144"]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [row["num_visual_tokens"] for row in document["budgets"]] == [144, 1]
    assert document["parameters"]["total"] == pytest.approx(13.37e9, rel=0.001)
    row = document["budgets"][0]
    assert row["flops"]["counted"]["total"] == pytest.approx(row["flops"]["closed_form"]["total"], rel=1e-6)
    assert row["key_value_cache_bytes"] == 2 * 40 * 5120 * (68 + 144 + 30) * 2
    assert "measured" not in row
    printed = capsys.readouterr().out
    assert "13.36 B" in printed
    assert f"{row['flops']['counted']['total'] / 1e12:.3f}" in printed


@pytest.mark.parametrize("name", sorted(variants()))
def test_every_variant_has_a_known_geometry(name):
    variant = variants()[name]
    config = backbones.known_config(variant.backbone.id, variant.tower.id, variant.num_visual_tokens)
    for section, part in (("text_config", variant.backbone), ("vision_config", variant.tower)):
        for field, value in part.shape.items():
            assert getattr(getattr(config, section), field) == value


def test_measured_profile_of_a_folder(hub_folder, tmp_path, capsys):
    path, figure = tmp_path / "profile.json", tmp_path / "profile.png"
    arguments = ["profile", str(hub_folder), "--json", str(path), "--repeats", "2", "--batch-size", "2"]
    pytest.importorskip("matplotlib")
    assert cli.main([*arguments, "--new-tokens", "4", "--png", str(figure), "--device", "cpu"]) == 0
    document = json.loads(path.read_text())
    assert document["measured_on"]["dtype"] == "float32"
    assert [row["num_visual_tokens"] for row in document["budgets"]] == [16, 4, 1]
    for row in document["budgets"]:
        figures = row["measured"]
        assert figures["batch_size"] == 2
        assert all(value > 0 for value in figures.values())
        assert figures["time_to_first_token_ms"] > figures["projector_ms"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "Requests/s" in capsys.readouterr().out


def test_random_weights_stand_for_a_variant():
    config = tiny_config()
    document = efficiency.profile(config, "tiny", "random", budgets=[4], new_tokens=3, batch_size=1, repeats=1)
    assert document["measured_on"]["dtype"] == "bfloat16"
    assert document["budgets"][0]["measured"]["decode_tokens_per_s"] > 0


def test_the_clock_stops_at_the_first_logits():
    clock = FirstTokenClock(torch.device("cpu"))
    scores = torch.randn(1, 4)
    assert clock(torch.zeros(1, 3), scores) is scores
    first = clock.first
    clock(torch.zeros(1, 4), scores)
    assert 0 < clock.first == first


def test_the_figure_stacks_components_and_labels_budgets(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    from modeling_delta_llava.evaluation import figure

    config = backbones.known_config("lmsys/vicuna-7b-v1.5")
    rows = [
        {"num_visual_tokens": budget, "flops": {"counted": paper_convention(config, budget).to_dict()}}
        for budget in (576, 1)
    ]
    document = {"model": "paper", "text_tokens": 68, "new_tokens": 30, "budgets": rows}
    figure.draw(document, tmp_path / "figure.png")
    pixels = matplotlib_image.imread(tmp_path / "figure.png")[..., :3]

    def columns(colour: str) -> int:
        wanted = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        return int((abs(pixels - wanted) < 0.01).all(-1).sum())

    prefill, tower = (columns(figure.COMPONENTS[name][1]) for name in ("prefill", "vision_tower"))
    assert prefill / tower == pytest.approx((6.70 + 0.70) / (2 * 0.382), rel=0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["delta-llava-vicuna-7b-144"], "--analytic"),
        (
            ["delta-llava-vicuna-7b-144", "--analytic", "--num-visual-tokens", "100"],
            "num_visual_tokens=100 is",
        ),
        (["delta-llava-vicuna-7b-144", "--analytic", "--num-visual-tokens", "many"], "'many'"),
        (["delta-llava-vicuna-7b-144", "--analytic", "--png", "figure.svg"], "figure.svg"),
        (["delta-llava-vicuna-7b-144", "--analytic", "--dtype", "int3"], "int3"),
        (["delta-llava-vicuna-7b-144", "--analytic", "--device", "nosuch"], "nosuch"),
        (["delta-llava-vicuna-7b-144", "--analytic", "--device", "cuda:99"], "cuda:99"),
        (["delta-llava-vicuna-7b-144", "--analytic", "--dtype", "evil"], "evil"),
        (["delta-llava-vicuna-7b-144", "--random-weights", "--text-tokens", "5000"], "context"),
    ],
)
def test_refusals_are_one_line(arguments, message, capsys):
    assert cli.main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_other_folders_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(["profile", str(tmp_path), "--analytic"]) == 2
    assert "model_type 'llama'" in capsys.readouterr().err
    assert cli.main(["profile", str(tmp_path / "nothing"), "--analytic"]) == 2
    assert "nothing" in capsys.readouterr().err


def config_with(**fields):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        for section, values in fields.items():
            config[section] = {**config[section], **values} if isinstance(values, dict) else values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def config_of(text):
    return lambda folder: (folder / "config.json").write_text(text)


def link_config_to_itself(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (config_with(num_visual_tokens=5), "num_visual_tokens"),
        (config_with(dtype="evil"), "evil"),
        (config_with(dtype=["float32"]), "describes no model"),
        (config_with(text_config={"num_hidden_layers": 10**9}), "text_config.num_hidden_layers"),
        (config_with(text_config={"hidden_size": 33}), "describes no model"),
        (config_with(text_config=[1]), "describes no model"),
        (config_of("{"), "not valid JSON"),
        (config_of("[1]"), "JSON object"),
        (link_config_to_itself, "link that leads nowhere"),
        (cut_weights, "delta-llava verify"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(damage, words, hub_folder, tmp_path, capsys):
    shutil.copytree(hub_folder, tmp_path / "model")
    damage(tmp_path / "model")
    assert cli.main(["profile", str(tmp_path / "model"), "--repeats", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'model'}")
    assert words in error


def test_unwritable_files_are_refused_before_anything_is_measured(hub_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("modeling_delta_llava.evaluation.efficiency.measured", None)
    for option, name in (("--json", "profile.json"), ("--png", "profile.png")):
        (tmp_path / name).mkdir()
        assert cli.main(["profile", str(hub_folder), option, str(tmp_path / name)]) == 2
        assert f"{tmp_path / name} cannot be written" in capsys.readouterr().err


def test_units_follow_the_size_of_the_model():
    def document(total: float) -> dict:
        return {"budgets": [{"flops": {"counted": {"total": total}}}, {"flops": {"counted": {"total": 1}}}]}

    assert flop_unit(document(9.3e12))[0] == "TFLOPs"
    assert flop_unit(document(2e11))[0] == "TFLOPs"
    assert flop_unit(document(5e9))[0] == "GFLOPs"
    assert flop_unit(document(10))[0] == "MFLOPs"
    assert [readable_number(count) for count in (7_084_426_752, 42_503_680, 1500, 3)] == [
        "7.08 B",
        "42.50 M",
        "1.50 K",
        "3",
    ]
