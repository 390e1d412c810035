"""LoRA and QLoRA: what trains, what is saved, and that merging it back computes the same."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, pipeline

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava.finetuning.arguments import build_arguments
from modeling_delta_llava.finetuning.check_data import check_data
from modeling_delta_llava.finetuning.parts import LANGUAGE_MODEL, LORA, PROJECTOR, count_parts, part_of
from modeling_delta_llava.finetuning.run import prepare, run
from modeling_delta_llava.json_files import read_json, write_json
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor
from tests import tiny
from tests.finetuning.conftest import EXACT
from tests.finetuning.helpers import LastGradients, losses, python, trained, weights

LORA_SETTINGS = {
    "train_language_model": False,
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "projector_learning_rate": 5e-4,
}


def logits(model, folder):
    """Logits of a fixed question about a fixed picture."""
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    inputs = processor(images=[tiny.picture("red")], text="<image>\nWhat is it?", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_adapter_and_projector_train_and_are_merged_by_convert(arguments, exact_folder, tmp_path, capsys):
    before = weights(DeltaLlavaForConditionalGeneration.from_pretrained(exact_folder, dtype=torch.float32))
    trainer, _ = prepare(arguments(**LORA_SETTINGS, learning_rate=1e-2, save_strategy="steps", save_steps=2))
    trained_parts = {count.part for count in count_parts(trainer.model) if count.trained}
    assert trained_parts == {LORA, PROJECTOR}
    trainer.train()
    trainer.save_model()
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-2, 5e-4}
    frozen = {name.replace(".base_layer", ""): item for name, item in weights(trainer.model).items()}
    for name, value in before.items():
        if part_of(name) != PROJECTOR:
            assert torch.equal(frozen[f"base_model.model.{name}"], value), name

    output = tmp_path / "run"
    names = {file.name for file in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    expected = logits(trainer.model, exact_folder)
    for source, target in ((output, "merged"), (output / "checkpoint-4", "merged-checkpoint")):
        assert cli.main(["convert", str(source), str(tmp_path / target), "--base-model", str(exact_folder)]) == 0
        capsys.readouterr()
        merged = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / target, dtype=torch.float32)
        torch.testing.assert_close(logits(merged, tmp_path / target), expected, atol=2e-5, rtol=1e-4)
        after = weights(merged)
        changed = {name for name, value in before.items() if not torch.allclose(after[name], value, atol=1e-6)}
        assert {part_of(name) for name in changed} == {PROJECTOR, LANGUAGE_MODEL}
        assert all("_proj." in name for name in changed if part_of(name) == LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def adapter(exact_folder, data_folder, tmp_path_factory):
    """The folder of a LoRA run, and the logits of the model in the run's memory."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    settings = {
        **EXACT,
        **LORA_SETTINGS,
        "learning_rate": 1e-2,
        "model": str(exact_folder),
        "data_path": str(data_folder / "data.json"),
        "image_folder": str(data_folder / "images"),
        "output_dir": str(folder),
        "trial_save": True,
    }
    trainer = trained(build_arguments(settings))
    trainer.save_model()
    return folder, logits(trainer.model, exact_folder)


def test_adapter_is_loaded_by_peft(adapter, exact_folder):
    from peft import PeftModel

    folder, expected = adapter
    base = DeltaLlavaForConditionalGeneration.from_pretrained(exact_folder, dtype=torch.float32)
    assert not torch.allclose(logits(base, exact_folder), expected)
    adapted = PeftModel.from_pretrained(base, folder)
    assert adapted.peft_config["default"].base_model_name_or_path == str(exact_folder)
    torch.testing.assert_close(logits(adapted, exact_folder), expected, atol=1e-6, rtol=1e-6)


def test_adapter_is_loaded_by_transformers(adapter):
    """The base model, with the adapter and the trained projector on it, by a model class and by `pipeline`."""
    folder, expected = adapter
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is DeltaLlavaForConditionalGeneration
    torch.testing.assert_close(logits(model, folder), expected, atol=1e-6, rtol=1e-6)
    answering = pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
    torch.testing.assert_close(logits(answering.model, folder), expected, atol=1e-6, rtol=1e-6)
    answer = answering(images=[tiny.picture("red")], text="<image>\nWhat is it?", max_new_tokens=2)
    assert answer[0]["generated_text"]


REMOTE = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.new("RGB", (40, 30), "red")], text="<image>\\nWhat is it?", return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
answering = pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=torch.float32)
assert "modeling_delta_llava" not in sys.modules
with torch.no_grad():
    torch.save([loaded.eval()(**inputs).logits for loaded in (model, answering.model)], output)
"""


def test_adapter_is_loaded_without_the_package(adapter, tmp_path):
    folder, expected = adapter
    modules = str(tmp_path / "modules")
    ended = python("-c", REMOTE, folder, tmp_path / "logits.pt", cwd=tmp_path, HF_MODULES_CACHE=modules)
    assert ended.returncode == 0, ended.stderr
    for found in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_run_starts_from_an_adapter(adapter, arguments, exact_folder, tmp_path, capsys):
    """It goes on with adapter and projector; its result names the same base model, and loads and merges alike."""
    folder, before = adapter
    settings = {**LORA_SETTINGS, "model": str(folder), "lora_dropout": 0.1, "learning_rate": 1e-2, "max_steps": 2}
    trainer, _ = prepare(arguments(**settings))
    torch.testing.assert_close(logits(trainer.model, folder), before, atol=1e-6, rtol=1e-6)
    assert {count.part for count in count_parts(trainer.model) if count.trained} == {LORA, PROJECTOR}
    trainer.train()
    trainer.save_model()
    expected = logits(trainer.model, folder)
    assert not torch.allclose(expected, before, atol=1e-2)
    stored = read_json(tmp_path / "run" / "adapter_config.json")
    assert (stored["base_model_name_or_path"], stored["lora_dropout"]) == (str(exact_folder), 0.1)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "run", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, tmp_path / "run"), expected, atol=1e-6, rtol=1e-6)
    merge = ["convert", str(tmp_path / "run"), str(tmp_path / "merged"), "--base-model", str(exact_folder)]
    assert cli.main(merge) == 0, capsys.readouterr().err
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, tmp_path / "merged"), expected, atol=2e-5, rtol=1e-4)
    assert "Memory of one device" in check_data(arguments(**settings, output_dir=str(tmp_path / "checked")))


CONTRADICTIONS = {
    "rank": ({"lora_rank": 8}, "another lora_rank (4 there, 8 in this run)"),
    "scale": ({"lora_alpha": 16}, "another lora_alpha (8 there, 16 in this run)"),
    "layers": ({"lora_target_modules": ["q_proj"]}, "another lora_target_modules ("),
    "projector": ({"train_projector": False}, "another train_projector ("),
    "no LoRA": ({"lora_rank": 0, "train_language_model": True}, "is a LoRA adapter; set lora_rank"),
}


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_settings_that_contradict_the_adapter_are_refused(adapter, arguments, tmp_path, changes, message):
    settings = {**LORA_SETTINGS, **changes, "model": str(adapter[0])}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(arguments(**settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_damaged_adapter_is_one_line(adapter, arguments, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "damaged")
    settings = {**LORA_SETTINGS, "model": str(folder)}
    state = load_file(folder / "adapter_model.safetensors")
    dropped = min(state)
    save_file({name: item for name, item in state.items() if name != dropped}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"1 weights are missing or do not belong to it, such as {re.escape(dropped)}"):
        prepare(arguments(**settings))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the adapter in .* cannot be loaded .*: copy or download the folder again"):
        prepare(arguments(**settings))
    stored = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", stored | {"base_model_name_or_path": str(tmp_path / "moved")})
    with pytest.raises(UserError, match=r"the base_model_name_or_path of .*_config.json, .*moved does not exist"):
        prepare(arguments(**settings))


def test_a_projector_that_transformers_leaves_out_is_an_error(adapter, tmp_path, monkeypatch):
    """Before 5.18, `load_adapter` takes no weights that an adapter has in whole; here they are missing."""
    folder = shutil.copytree(adapter[0], tmp_path / "without")
    state = load_file(folder / "adapter_model.safetensors")
    low_rank = {name: item for name, item in state.items() if ".lora_" in name}
    save_file(low_rank, folder / "adapter_model.safetensors")
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ValueError, match=r"An adapter with a trained projector needs transformers 5\.18 or newer"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_commands_for_whole_models_say_that_it_is_an_adapter(adapter, tmp_path, capsys):
    folder = str(adapter[0])
    before = {path.name: path.read_bytes() for path in adapter[0].iterdir() if path.is_file()}
    output = str(tmp_path / "output")
    for command in (
        ["ask", folder, "hello"],
        ["card", folder],
        ["quantize", folder, output],
        ["export", folder, output],
    ):
        assert cli.main(command) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{folder} is a LoRA adapter, no whole model: merge it with `delta-llava convert" in message
    assert cli.main(["publish", folder, "you/my-model", "--dry-run"]) == 2
    assert "cannot be published: config.json is missing" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in adapter[0].iterdir() if path.is_file()}
    assert not Path(output).exists()


def test_the_budget_of_the_run_goes_with_the_adapter(arguments, exact_folder, tmp_path, capsys):
    """`convert` and a further run take it over; `from_pretrained` takes the base model's, or the one it is given."""
    folder = run(arguments(**LORA_SETTINGS, max_steps=1, num_visual_tokens=16))
    merge = ["convert", str(folder), str(tmp_path / "merged"), "--base-model", str(exact_folder)]
    assert cli.main(merge) == 0, capsys.readouterr().err
    config = read_json(tmp_path / "merged" / "config.json")
    assert (config["num_visual_tokens"], config["trained_num_visual_tokens"]) == (16, [16])
    further, _ = prepare(arguments(**LORA_SETTINGS, model=str(folder), output_dir=str(tmp_path / "further")))
    assert further.model.config.num_visual_tokens == further.processing_class.num_visual_tokens == 16
    assert AutoModelForImageTextToText.from_pretrained(folder).config.num_visual_tokens == 4
    assert AutoModelForImageTextToText.from_pretrained(folder, num_visual_tokens=16).config.num_visual_tokens == 16


def test_gradient_checkpointing_leaves_the_gradients_as_they_are(arguments, tmp_path):
    """As in the recipe, and the frozen tower is not run backwards.

    Weights that begin as zero are moved first, because others have no gradients till then.
    """
    kept, towers_graphs = {}, []
    for checkpointing in (False, True):
        settings = arguments(
            **LORA_SETTINGS, max_steps=1, gradient_checkpointing=checkpointing, output_dir=str(tmp_path / "run")
        )
        trainer, _ = prepare(settings)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter += 0.01 * torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
        trainer.add_callback(kept.setdefault(checkpointing, LastGradients()))
        tower = trainer.model.get_base_model().model.vision_tower
        tower.register_forward_hook(lambda *call: towers_graphs.append(call[-1].last_hidden_state.requires_grad))
        trainer.train()
        used = [getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()]
        assert any(used) == checkpointing
    assert towers_graphs == [False, False]
    plain, checkpointed = (kept[checkpointing].gradients for checkpointing in (False, True))
    assert {part_of(name) for name in plain} == {LORA, PROJECTOR}
    assert plain.keys() == checkpointed.keys()
    assert plain.keys() == {name for name, item in trainer.model.named_parameters() if item.requires_grad}
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.allclose(checkpointed[name], gradient, atol=1e-6, rtol=1e-4), name


def test_resumed_lora_equals_uninterrupted(arguments, tmp_path):
    settings = {**LORA_SETTINGS, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    whole = trained(arguments(**settings))
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "last")
    resumed = trained(arguments(**settings, resume_from_checkpoint="true"))
    assert losses(resumed) == losses(whole)
    expected = weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_training_leaves_projector_tower_and_head_alone(arguments, exact_folder, quantization):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    before = weights(DeltaLlavaForConditionalGeneration.from_pretrained(exact_folder, dtype=torch.float32))
    trainer, _ = prepare(
        arguments(**LORA_SETTINGS, quantization=quantization, learning_rate=1e-2, gradient_checkpointing=True)
    )
    quantised = {
        name.removesuffix(".base_layer")
        for name, module in trainer.model.named_modules()
        if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
        and "lora_" not in name
        and not hasattr(module, "lora_A")
    }
    linear = [name for name in before if "language_model.layers" in name and "proj.weight" in name]
    assert quantised == {f"base_model.model.{name.removesuffix('.weight')}" for name in linear}
    counted = {count.part: count.trained + count.frozen for count in count_parts(trainer.model)}
    assert counted["language model"] == sum(
        value.numel() for name, value in before.items() if part_of(name) == "language model"
    )
    trainer.train()
    assert len(losses(trainer)) == 4
    assert losses(trainer)[-1] < losses(trainer)[0]
    after = weights(trainer.model)
    for name, value in before.items():
        if part_of(name) == "vision tower" or name == "lm_head.weight":
            assert torch.equal(after[f"base_model.model.{name}"], value), name
    for name, value in after.items():
        if ".modules_to_save." in name:
            assert value.dtype == torch.float32
            assert not torch.equal(value, after[name.replace("modules_to_save.default", "original_module")]), name


def test_qlora_is_merged_into_the_weights_before_quantisation(arguments, exact_folder, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    trainer = trained(arguments(**LORA_SETTINGS, quantization="4bit", learning_rate=1e-2, max_steps=2))
    trainer.save_model()
    assert "quantization_config" not in (tmp_path / "run" / "model_config.json").read_text()
    merge = ["convert", str(tmp_path / "run"), str(tmp_path / "merged"), "--base-model", str(exact_folder)]
    assert cli.main(merge) == 0, capsys.readouterr().err
    before = weights(DeltaLlavaForConditionalGeneration.from_pretrained(exact_folder, dtype=torch.float32))
    merged = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    learned = weights(trainer.model)
    compared = 0
    for name, value in weights(merged).items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.default.weight" in learned:
            factors = [learned[f"{prefix}.lora_{factor}.default.weight"] for factor in "BA"]
            torch.testing.assert_close(value, before[name] + 8 / 4 * factors[0] @ factors[1], atol=1e-6, rtol=1e-5)
            compared += 1
    assert compared == sum(".lora_A." in name for name in learned)
    assert torch.isfinite(logits(merged, tmp_path / "merged")).all()
