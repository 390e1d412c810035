"""transformers' own ways of publishing leave a repository that loads with remote code and has a card."""

import json

import pytest
from huggingface_hub import ModelCard

from tests.hub_cards.test_publish import ANSWER

REPO = "user/pushed"

LOAD_REMOTE = """
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
"""
LOAD_PACKAGE = """
from modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
model = DeltaLlavaForConditionalGeneration.from_pretrained(sys.argv[1])
processor = DeltaLlavaProcessor.from_pretrained(sys.argv[1])
"""
PUSH = """
model.push_to_hub("user/pushed")
processor.push_to_hub("user/pushed")
"""
TRAIN = """
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

text = "A red picture."
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}]},
     {"role": "assistant", "content": [{"type": "text", "text": text}]}],
    tokenize=True, return_dict=True, return_tensors="pt",
)
row = {**{name: value[0] for name, value in inputs.items()}, "labels": inputs["input_ids"][0]}

def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

arguments = TrainingArguments(
    output_dir="run", max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to=[], save_strategy="no",
    push_to_hub=True, hub_model_id="user/pushed", remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-3,
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=[row] * 4, data_collator=collate, processing_class=processor
)
trainer.train()
trainer.save_model()
trainer.push_to_hub()
model.save_pretrained("kept")
processor.save_pretrained("kept")
"""


def card_of(hub) -> ModelCard:
    return ModelCard(hub.repos[REPO].find("main").tree["README.md"].content.decode())


def answer(client, name, home) -> list[int]:
    process = client("-c", ANSWER, name, "{}", home=home, token=None)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("load", [LOAD_REMOTE, LOAD_PACKAGE], ids=["remote-code", "package"])
def test_push_to_hub_of_model_and_processor(hub, client, hub_folder, load):
    process = client("-c", "import sys\n" + load + PUSH, hub_folder)
    assert process.returncode == 0, process.stderr
    files = hub.files(REPO)
    for name in ("modeling_delta_llava.py", "processing_delta_llava.py", "chat_template.jinja", "model.safetensors"):
        assert name in files
    assert card_of(hub).data.library_name == "transformers"
    assert answer(client, REPO, "fresh") == answer(client, str(hub_folder), "local")


@pytest.mark.parametrize("load", [LOAD_REMOTE, LOAD_PACKAGE], ids=["remote-code", "package"])
def test_trainer_push_to_hub(hub, client, hub_folder, tmp_path, load):
    process = client("-c", "import sys\n" + load + TRAIN, hub_folder)
    assert process.returncode == 0, process.stderr
    card = card_of(hub)
    assert card.data.library_name == "transformers"
    assert "generated_from_trainer" in card.data.tags
    assert "modeling_delta_llava.py" in hub.files(REPO)
    trained = answer(client, REPO, "fresh")
    assert trained == answer(client, str(tmp_path / "work" / "kept"), "local")
