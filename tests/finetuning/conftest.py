"""Small data sets and run settings for the training tests."""

import json
import random

import pytest
from PIL import Image

from modeling_delta_llava.finetuning.arguments import build_arguments
from tests import tiny

ANSWERS = ("a cat", "a red sofa", "a dog", "two birds", "nothing")
# What a test needs to compare runs exactly: no randomness in the model, fp32, one process.
EXACT = {
    "use_cpu": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "optim": "adamw_torch",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "trial_save": False,
    "train_language_model": True,
    "log_level": "error",
}


def write_pictures(folder, count, seed=0):
    """Pictures of random colours and sizes; their names."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for name in names:
        size = (rng.randint(20, 50), rng.randint(20, 50))
        Image.new("RGB", size, tuple(rng.randint(0, 255) for _ in range(3))).save(folder / name)
    return names


def llava_row(images, rng):
    """One row with a list of pictures (one name where there is one, none where there is none)."""
    marks = "<image>" * len(images)
    turns = [
        {"from": "human", "value": (marks + "\n" if images else "") + "What is in the image?"},
        {"from": "gpt", "value": rng.choice(ANSWERS) + "."},
        {"from": "human", "value": "Are there people?" * rng.randint(1, 3)},
        {"from": "gpt", "value": rng.choice(ANSWERS)},
    ]
    row = {"conversations": turns}
    if images:
        row["image"] = images[0] if len(images) == 1 else list(images)
    return row


def write_data(folder, rows=16, seed=0):
    """A LLaVA JSON of rows with one, several and no pictures."""
    rng = random.Random(seed)
    names = write_pictures(folder / "images", rows, seed)
    pictures = [names[number : number + (1, 1, 2, 0)[number % 4]] for number in range(rows)]
    file = folder / "data.json"
    file.write_text(json.dumps([llava_row(images, rng) for images in pictures], indent=1), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def exact_folder(tmp_path_factory):
    """A tiny Hub folder whose forward pass has no randomness in training."""
    return tiny.write_hub_folder(tmp_path_factory.mktemp("exact") / "tiny", drop_path_rate=0.0)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture
def settings(exact_folder, data_folder, tmp_path):
    """Settings of a short exact run, as `build_arguments` takes them."""
    return {
        **EXACT,
        "model": str(exact_folder),
        "data_path": str(data_folder / "data.json"),
        "image_folder": str(data_folder / "images"),
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def arguments(settings):
    """Builds run arguments from the short exact run's settings and changes to them."""

    def build(**changes):
        return build_arguments({**settings, **changes})

    return build
