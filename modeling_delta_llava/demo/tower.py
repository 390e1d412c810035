"""A tiny CLIP tower that learns to see before it is frozen.

The tower starts from random weights and is trained on drawings of its own, as a labeller of patches: for each patch it
says which shape and which colour covers it, if any. Nothing about questions, counts or words is shown to it. The two
label heads are then thrown away, as CLIP's are, and the tower stays frozen in both training stages.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from .drawings import COLOURS, IMAGE_SIZE, SHAPES, draw_scene, paint

PATCH_SIZE = 8
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE
IMAGE_MEAN = [0.5, 0.5, 0.5]
IMAGE_STD = [0.25, 0.25, 0.25]
# Patches of which a thing covers less than this share are labelled as ground.
COVERED_SHARE = 0.2
IGNORED = -100


def tower_config() -> CLIPVisionConfig:
    """Four layers of width 128 over a 12 x 12 grid: budgets 144, 36, 16, 9, 4 and 1."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )


def labelled_drawings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random drawings with the shape and the colour of each patch.

    Returns:
        Pixels, uint8 of shape (count, 3, `IMAGE_SIZE`, `IMAGE_SIZE`), and two int64 labels of shape
        (count, `GRID_SIZE`**2): 0 for ground, else 1 + the index of the shape or colour.
    """
    rng = random.Random(seed)
    colour_names = list(COLOURS)
    pixels, shapes, colours = [], [], []
    for _ in range(count):
        scene = draw_scene(rng)
        picture, owners = paint(scene, rng)
        pixels.append(torch.from_numpy(np.array(picture)))
        owners = torch.from_numpy(owners).view(GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE)
        cover = torch.stack([(owners == number).float().mean((1, 3)) for number in range(1, len(scene) + 1)])
        share, thing = cover.max(0)
        shape_of = torch.tensor([1 + SHAPES.index(thing.shape) for thing in scene])
        colour_of = torch.tensor([1 + colour_names.index(thing.colour) for thing in scene])
        covered = share >= COVERED_SHARE
        shapes.append((shape_of[thing] * covered).flatten())
        colours.append((colour_of[thing] * covered).flatten())
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous(), torch.stack(shapes), torch.stack(colours)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (B, 3, H, W) as the processor would give them."""
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD).view(3, 1, 1)
    return (pixels / 255 - mean) / std


class PatchLabeller(nn.Module):
    """The tower with two linear heads on its patch features."""

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.shape_head = nn.Linear(width, 1 + len(SHAPES))
        self.colour_head = nn.Linear(width, 1 + len(COLOURS))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.tower(pixel_values).last_hidden_state[:, 1:]  # (B, N, C), without the class token
        features = self.norm(features)
        return self.shape_head(features), self.colour_head(features)


def train_tower(
    steps: int,
    batch_size: int = 32,
    pool_size: int = 2000,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> tuple[CLIPVisionModel, float]:
    """Trains a tower from scratch.

    Args:
        steps: optimizer steps.
        batch_size: drawings in a step.
        pool_size: distinct drawings; each is seen several times.
        seed: seed of drawings, weights and order.
        report: called with (step, loss) after each step.
    Returns:
        The tower and the share of covered patches of unseen drawings whose shape and colour it names right.
    """
    torch.manual_seed(seed)
    pixels, shapes, colours = labelled_drawings(pool_size, seed)
    model = PatchLabeller(CLIPVisionModel(tower_config()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15)
    model.train()
    for step in range(steps):
        chosen = torch.randint(pool_size, (batch_size,))
        shape_logits, colour_logits = model(normalised(pixels[chosen]))
        loss = nn.functional.cross_entropy(shape_logits.flatten(0, 1), shapes[chosen].flatten())
        loss = loss + nn.functional.cross_entropy(colour_logits.flatten(0, 1), colours[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, loss.item())
    model.eval()
    pixels, shapes, colours = labelled_drawings(100, seed + 1)
    with torch.no_grad():
        shape_logits, colour_logits = model(normalised(pixels))
    covered = shapes > 0
    right = (shape_logits.argmax(-1) == shapes) & (colour_logits.argmax(-1) == colours)
    return model.tower, right[covered].float().mean().item()
