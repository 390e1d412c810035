"""transformers' own ways of publishing leave a repository that loads with remote code and has a card."""

import json

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from modeling_delta_llava.card import state_of
from modeling_delta_llava.hub_cards.metadata import metadata_problems
from tests.hub_cards.test_publish import ANSWER

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
# The answer that `test_publish.ANSWER` gets from a repository, from the model in memory.
SAY = """
import json
from PIL import Image
content = [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, {"type": "text", "text": "What is it?"}]
asked = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
def say(name):
    print(json.dumps({name: model.eval().generate(**asked, max_new_tokens=8, do_sample=False)[0].tolist()}))
"""
PUSH = """
say("pushed")
model.push_to_hub("user/pushed")
processor.push_to_hub("user/pushed")
processor.push_to_hub("user/processor")
"""
TRAIN = """
import torch
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
    push_to_hub=True, hub_model_id="user/trained", remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-3,
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=[row] * 4, data_collator=collate, processing_class=processor
)
trainer.train()
trainer.save_model()
trainer.push_to_hub()
say("trained")
"""


def card_of(hub, repo_id) -> ModelCard:
    return ModelCard(hub.repos[repo_id].find("main").tree["README.md"].content.decode())


def answer(client, name, home) -> list[int]:
    process = client("-c", ANSWER, name, "{}", home=home, token=None)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("load", [LOAD_REMOTE, LOAD_PACKAGE], ids=["remote-code", "package"])
def test_model_processor_and_trainer_push_to_hub(hub, client, hub_folder, load):
    process = client("-c", "import sys\n" + load + SAY + PUSH + TRAIN, hub_folder)
    assert process.returncode == 0, process.stderr
    said = {}
    for line in process.stdout.splitlines():
        if line.startswith('{"'):
            said |= json.loads(line)
    assert said["pushed"] != said["trained"]
    for repo_id, name in (("user/pushed", "pushed"), ("user/trained", "trained")):
        files = hub.files(repo_id)
        for file in ("modeling_delta_llava.py", "processing_delta_llava.py", "chat_template.jinja", "README.md"):
            assert file in files
        assert answer(client, repo_id, f"fresh-{name}") == said[name]
    card = card_of(hub, "user/pushed")  # transformers' own, with our tags
    assert card.data.library_name == "transformers"
    assert {"delta-llava", "arxiv:2512.18910"} <= set(card.data.tags)
    card = card_of(hub, "user/trained")
    assert card.data.library_name == "transformers"
    assert "generated_from_trainer" in card.data.tags


def test_a_card_that_is_there_stays(hub, client, hub_folder):
    """On the Hub, and in a folder that `save_pretrained(..., push_to_hub=True)` uploads."""
    theirs = "---\nlicense: mit\n---\n# Written by hand\n"
    hub.add_text(hub.create_repo("user/pushed"), "README.md", theirs)
    code = """
import sys
from pathlib import Path
from modeling_delta_llava import DeltaLlavaProcessor
processor = DeltaLlavaProcessor.from_pretrained(sys.argv[1])
processor.push_to_hub("user/pushed")
Path("mine").mkdir()
Path("mine/README.md").write_text("# Mine")
processor.save_pretrained("mine", push_to_hub=True, repo_id="user/saved")
assert Path("mine/README.md").read_text() == "# Mine"
"""
    process = client("-c", code, hub_folder)
    assert process.returncode == 0, process.stderr
    assert "processor_config.json" in hub.files("user/pushed")
    assert card_of(hub, "user/pushed").content.strip() == theirs.strip()
    assert "processor_config.json" in hub.files("user/saved")


def test_our_trainer_names_the_repository_in_its_card(hub, client, hub_folder, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red picture."}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}] * 4))
    settings = {
        "model": hub_folder,
        "data_path": tmp_path / "train.json",
        "image_folder": tmp_path,
        "output_dir": tmp_path / "run",
        "hub_model_id": "user/tuned",
        **dict.fromkeys(["push_to_hub", "use_cpu"], "true"),
        **dict.fromkeys(["bf16", "tf32", "trial_save"], "false"),
        **dict.fromkeys(["save_strategy", "eval_strategy"], "no"),
        "report_to": "none",
        "max_steps": 1,
        "num_visual_tokens": 4,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    process = client("-m", "delta_llava", "finetune", "stage2", *words)
    assert process.returncode == 0, process.stderr
    card = card_of(hub, "user/tuned")
    assert metadata_problems(card.data.to_dict()) == []
    assert 'model_id = "user/tuned"\nrevision = "main"\n' in card.text
    assert state_of(card.data.to_dict())["training"]["steps"] == 1
    assert "example.png" in hub.files("user/tuned")
    assert str(tmp_path) not in card.content
    assert "modeling_delta_llava.py" in hub.files("user/tuned")
