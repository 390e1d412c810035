"""TRL's trainers with their stock recipes for vision-language models, as their users write them."""

import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import modeling_delta_llava  # noqa: F401 - registers the classes, so that no remote code is loaded
from modeling_delta_llava.finetuning.parts import LORA, PROJECTOR, part_of
from tests import tiny
from tests.finetuning.helpers import LastGradients, losses, python, weights

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


COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
GENERATED = {"num_generations": 4, "max_completion_length": 4, "temperature": 1.0}


def said(text):
    return [{"role": "assistant", "content": text}]


def preferences(colours):
    """Pictures of the given colours, each with an answer to prefer; the answers say nothing of the colours."""
    rows = [
        {
            "images": [tiny.picture(colour)],
            "prompt": [{"role": "user", "content": "What colour is it?"}],
            "chosen": said("a cat"),
            "rejected": said("two birds"),
        }
        for colour in colours
    ]
    return datasets.Dataset.from_list(rows)


def last_token(completion_ids, **kwargs):
    """A reward that differs between answers, whatever an untrained model says."""
    return [float(ids[-1] % 17) for ids in completion_ids]


def preferring(folder, output, colours, **settings):
    config = DPOConfig(output_dir=str(output), max_length=None, model_init_kwargs=settings or None, **COMMON)
    processor = AutoProcessor.from_pretrained(folder)
    return DPOTrainer(str(folder), args=config, train_dataset=preferences(colours), processing_class=processor)


def rewarding(trainer_class, config_class):
    def build(folder, output, colours, **settings):
        config = config_class(output_dir=str(output), model_init_kwargs=settings or None, **GENERATED, **COMMON)
        return trainer_class(
            str(folder),
            reward_funcs=last_token,
            args=config,
            train_dataset=preferences(colours).select_columns(["images", "prompt"]),
            processing_class=AutoProcessor.from_pretrained(folder, padding_side="left"),
        )

    return build


TRAINERS = {
    "DPO": preferring,
    "RLOO": rewarding(RLOOTrainer, RLOOConfig),
    "GRPO": rewarding(GRPOTrainer, GRPOConfig),
}


@pytest.mark.slow
@pytest.mark.parametrize("build", TRAINERS.values(), ids=TRAINERS)
def test_preferences_and_rewards_reach_the_projector(exact_folder, tmp_path, build):
    """The projector learns only through pictures; a row with another picture teaches it something else."""
    gradients = []
    for colour in ("red", "blue"):
        trainer = build(exact_folder, tmp_path, [colour] * 4)
        trainer.add_callback(last := LastGradients())
        trainer.train()
        assert type(trainer.model).__module__ == "modeling_delta_llava.modeling_delta_llava"
        gradients.append({name: item for name, item in last.gradients.items() if part_of(name) == PROJECTOR})
    first, second = gradients
    assert first
    for name, gradient in first.items():
        assert torch.isfinite(gradient).all(), name
    moved = [name for name, gradient in first.items() if gradient.abs().max() > 0]
    assert len(moved) > len(first) / 2
    assert not any(torch.equal(first[name], second[name]) for name in moved)


REMOTE = """
import sys
import datasets
from PIL import Image
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

folder, output = sys.argv[1:]
picture = Image.new("RGB", (40, 30), "red")
row = {"images": [picture], "prompt": [{"role": "user", "content": "What colour is it?"}]}
answers = {"chosen": [{"role": "assistant", "content": "red"}], "rejected": [{"role": "assistant", "content": "blue"}]}
common = dict(output_dir=output, max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
              report_to="none", save_strategy="no", model_init_kwargs={"trust_remote_code": True})
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, padding_side="left")
trainers = [
    DPOTrainer(folder, args=DPOConfig(max_length=None, **common), processing_class=processor,
               train_dataset=datasets.Dataset.from_list([row | answers] * 2)),
    RLOOTrainer(folder, reward_funcs=lambda completion_ids, **kwargs: [float(ids[-1]) for ids in completion_ids],
                args=RLOOConfig(num_generations=2, max_completion_length=3, **common), processing_class=processor,
                train_dataset=datasets.Dataset.from_list([row] * 2)),
]
for trainer in trainers:
    trainer.train()
    assert type(trainer.model).__module__.startswith("transformers_modules."), type(trainer.model)
    print(type(trainer).__name__, trainer.state.global_step)
assert "modeling_delta_llava" not in sys.modules
"""


@pytest.mark.slow
def test_dpo_and_rloo_take_the_code_of_the_folder(exact_folder, tmp_path):
    """Without the package: `trust_remote_code` reaches the model and the reference model that TRL loads by name."""
    ended = python("-c", REMOTE, exact_folder, tmp_path / "out", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert ended.returncode == 0, ended.stderr
    assert "DPOTrainer 1" in ended.stdout
    assert "RLOOTrainer 1" in ended.stdout
