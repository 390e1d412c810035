"""A tiny CLIP tower that learns to see before it is frozen.

The tower starts from random weights and is trained on drawings of its own, as a labeller of patches: for each patch it
says which shape in which colour covers it, if any, and in which quarter of the picture. Nothing about questions,
counts or words is shown to it. The label heads are then thrown away, and the tower stays frozen in both stages.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from .drawings import COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, draw_scene, paint

PATCH_SIZE = 12
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE
IMAGE_MEAN = [0.5, 0.5, 0.5]
IMAGE_STD = [0.25, 0.25, 0.25]
# Patches of which a thing covers less than this share are labelled as ground.
COVERED_SHARE = 0.2
# What a patch is labelled with, as named by the attributes of a thing.
LABELS = {"shape": SHAPES, "colour": tuple(COLOURS), "position": POSITIONS}
GROUND_WEIGHT = 0.1


def tower_config() -> CLIPVisionConfig:
    """Four layers of width 128 over an 8 x 8 grid: budgets 64, 16, 4 and 1."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
        initializer_range=0.05,
    )


def labelled_drawings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random drawings with the shape, colour and position of what covers each patch.

    Returns:
        Pixels, uint8 of shape (count, 3, `IMAGE_SIZE`, `IMAGE_SIZE`), and int64 labels of shape
        (3, count, `GRID_SIZE`**2) in the order of `LABELS`: 0 for ground, else 1 + the index of the label.
    """
    rng = random.Random(seed)
    pixels, labels = [], []
    for _ in range(count):
        scene = draw_scene(rng)
        picture, owners = paint(scene, rng)
        pixels.append(torch.from_numpy(np.array(picture)))
        owners = torch.from_numpy(owners).view(GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE)
        cover = torch.stack([(owners == number).float().mean((1, 3)) for number in range(1, len(scene) + 1)])
        share, covering = cover.max(0)
        named = torch.tensor(
            [[1 + names.index(getattr(thing, kind)) for thing in scene] for kind, names in LABELS.items()]
        )
        labels.append((named[:, covering] * (share >= COVERED_SHARE)).flatten(1))
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous(), torch.stack(labels, dim=1)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (B, 3, H, W) as the processor would give them."""
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD).view(3, 1, 1)
    return (pixels / 255 - mean) / std


class PatchLabeller(nn.Module):
    """The tower with linear heads on its patch features, one for each of `LABELS`."""

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower
        self.norm = nn.LayerNorm(tower.config.hidden_size)
        self.heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, 1 + len(names)) for names in LABELS.values())

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, N, 1 + names) of each head, from (B, 3, H, W)."""
        # The layer below the last: the highest that the projector reads. The class token stands first.
        features = self.norm(self.tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:])
        return [head(features) for head in self.heads]


def train_tower(
    steps: int,
    drawings: int,
    batch_size: int = 32,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> tuple[CLIPVisionModel, float]:
    """Trains a tower from scratch.

    Args:
        steps: optimizer steps.
        drawings: how many there are; each is seen several times.
        batch_size: drawings in a step.
        seed: seed of drawings, weights and order.
        report: called with (step, loss) after each step.
    Returns:
        The tower and the share of covered patches of unseen drawings of which it names everything right.
    """
    torch.manual_seed(seed)
    pixels, labels = labelled_drawings(drawings, seed)
    model = PatchLabeller(CLIPVisionModel(tower_config()))
    # Most patches show the ground.
    weights = [torch.tensor([GROUND_WEIGHT] + [1.0] * len(names)) for names in LABELS.values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15)
    model.train()
    for step in range(steps):
        chosen = torch.randint(drawings, (batch_size,))
        losses = [
            nn.functional.cross_entropy(logits.flatten(0, 1), wanted[chosen].flatten(), weight)
            for logits, wanted, weight in zip(model(normalised(pixels[chosen])), labels, weights, strict=True)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, loss.item())
    model.eval()
    pixels, labels = labelled_drawings(100, seed + 1)
    with torch.no_grad():
        named = torch.stack([logits.argmax(-1) for logits in model(normalised(pixels))])
    right = (named == labels).all(0)
    return model.tower, right[labels[0] > 0].float().mean().item()


def make_tower(folder: Path, steps: int, drawings: int, seed: int) -> float:
    """Trains a tower on one core, with a progress bar, and writes a folder as it has on the Hub.

    Returns:
        The share of covered patches of unseen drawings that it names right.
    """
    torch.set_num_threads(1)
    with tqdm(total=steps, desc="  the tower learns to see ", position=0) as bar:
        tower, share = train_tower(steps, drawings, seed=seed, report=lambda step, loss: bar.update())
    tower.save_pretrained(folder)
    settings = {
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_center_crop": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return share
