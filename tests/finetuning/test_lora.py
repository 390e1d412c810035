"""LoRA and QLoRA: what trains, what is saved, and that merging it back computes the same."""

import pytest
import torch
from transformers import TrainerCallback

from delta_llava import cli
from modeling_delta_llava.finetuning.parts import LANGUAGE_MODEL, LORA, PROJECTOR, count_parts, part_of
from modeling_delta_llava.finetuning.run import prepare, run
from modeling_delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from modeling_delta_llava.processing_delta_llava import DeltaLlavaProcessor
from tests import tiny
from tests.finetuning.helpers import losses, trained, weights

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


def test_adapter_is_loaded_by_peft(arguments, exact_folder):
    from peft import PeftModel

    folder = run(arguments(**LORA_SETTINGS, max_steps=2))
    base = DeltaLlavaForConditionalGeneration.from_pretrained(exact_folder, dtype=torch.float32)
    plain = logits(base, exact_folder)
    adapted = PeftModel.from_pretrained(base, folder)
    assert adapted.peft_config["default"].base_model_name_or_path == str(exact_folder)
    assert not torch.allclose(logits(adapted, exact_folder), plain)


class LastGradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: item.grad.clone() for name, item in model.named_parameters() if item.requires_grad}


def test_gradient_checkpointing_leaves_the_gradients_as_they_are(arguments, tmp_path):
    """As in the recipe. Weights that begin as zero are moved first, because others have no gradients till then."""
    kept = {}
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
        trainer.train()
        used = [getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()]
        assert any(used) == checkpointing
    plain, checkpointed = (kept[checkpointing].gradients for checkpointing in (False, True))
    assert {part_of(name) for name in plain} == {LORA, PROJECTOR}
    assert plain.keys() == checkpointed.keys()
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
    assert "quantization_config" not in (tmp_path / "run" / "config.json").read_text()
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
