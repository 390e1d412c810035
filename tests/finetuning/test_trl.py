"""TRL's `SFTTrainer` with its stock recipe for vision-language models, as its users write it."""

import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import modeling_delta_llava  # noqa: F401 - registers the classes, so that no remote code is loaded
from modeling_delta_llava.finetuning.parts import LORA, PROJECTOR, part_of
from tests import tiny
from tests.finetuning.helpers import losses, weights

# TRL asks for this version before it reads the assistant's marks in a processor's template.
ASSISTANT_ONLY = Version(transformers.__version__) >= Version("5.18")


@pytest.fixture(scope="module")
def dataset():
    """Questions about pictures of one colour, in the chat format of TRL's documentation."""
    rows = [
        {
            "images": [tiny.picture(colour)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"It is {colour}."}]},
            ],
        }
        for colour in ("red", "blue", "green", "white") * 2
    ]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_stock_vlm_recipe(exact_folder, dataset, tmp_path, lora):
    model = AutoModelForImageTextToText.from_pretrained(exact_folder, dtype=torch.float32)
    before = weights(model)
    config = SFTConfig(
        output_dir=str(tmp_path / "sft"),
        max_length=None,
        assistant_only_loss=ASSISTANT_ONLY,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        per_device_train_batch_size=4,
        num_train_epochs=4,
        learning_rate=5e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(exact_folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    assert len(losses(trainer)) == 8
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    if lora:
        changed = {part_of(name) for name, value in trainer.model.named_parameters() if value.requires_grad}
        assert changed == {LORA}
        assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()
    else:
        saved = weights(AutoModelForImageTextToText.from_pretrained(tmp_path / "sft", dtype=torch.float32))
        changed = {part_of(name) for name, value in saved.items() if not torch.equal(value, before[name])}
        assert PROJECTOR in changed
        assert (tmp_path / "sft" / "modeling_delta_llava.py").is_file()
