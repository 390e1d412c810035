"""The order of the training rows and the visual-token budget of each optimizer step.

Everything here is a pure function of (seed, epoch), computed alike on every rank: accelerate then hands each rank its
micro-batches of the one global order, and a resumed run sees the order that it left.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from .arguments import DeltaLlavaTrainingArguments
from .data import DrawnIndex


class BudgetDraw:
    """Draws the visual-token budget of an optimizer step; equal on every rank and after resuming.

    Args:
        budgets: the budgets to draw from, in visual tokens per image.
        weights: how often each is drawn, relative to the others; equally often when not given.
        seed: seed of the draws.
    """

    def __init__(self, budgets: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0):
        self.budgets = list(budgets)
        self.weights = torch.tensor(weights if weights is not None else [1.0] * len(self.budgets), dtype=torch.float64)
        self.seed = seed

    def __call__(self, epoch: int, step: int) -> int:
        """The budget of optimizer step `step` of epoch `epoch` (both from 0)."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, step))
        return self.budgets[int(torch.multinomial(self.weights, 1, generator=generator))]


def budget_draw(args: DeltaLlavaTrainingArguments) -> BudgetDraw | None:
    """How a run draws its budgets, or None when it always uses the model's default."""
    if not args.visual_token_budgets:
        return None
    seed = args.data_seed if args.data_seed is not None else args.seed
    return BudgetDraw(args.visual_token_budgets, args.visual_token_budget_weights, seed=seed)


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several small numbers, such that neighbours give unrelated seeds."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 31)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 29
    return state % 2**63


def grouped_order(lengths: Sequence[int], step_size: int, generator: torch.Generator) -> list[int]:
    """A random order in which the `step_size` rows of each step are of one modality and of similar length.

    Args:
        lengths: words of each row, negative for rows without a picture.
        step_size: rows of one optimizer step over all ranks.
        generator: source of the randomness.
    Returns:
        Every index once, the longest first within a step, so that the micro-batches of a step pad little. Leftover
        rows of both modalities, fewer than a step each, share the last steps.
    """
    steps: list[list[int]] = []
    leftovers: list[int] = []
    for has_picture in (True, False):
        indices = [index for index, length in enumerate(lengths) if (length > 0) == has_picture]
        shuffled = [indices[place] for place in torch.randperm(len(indices), generator=generator).tolist()]
        # Sorting within chunks of many steps, not over everything, keeps the steps of an epoch in random company.
        chunk = step_size * 50
        ordered = [
            index
            for start in range(0, len(shuffled), chunk)
            for index in sorted(shuffled[start : start + chunk], key=lambda index: abs(lengths[index]), reverse=True)
        ]
        whole = len(ordered) // step_size * step_size
        steps += [ordered[start : start + step_size] for start in range(0, whole, step_size)]
        leftovers += ordered[whole:]
    order = [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]
    order += [leftovers[start : start + step_size] for start in range(0, len(leftovers), step_size)]
    return [index for step in order for index in step]


class TrainingSampler(Sampler[DrawnIndex]):
    """Row order of an epoch, shuffled or grouped, with the budget of each optimizer step.

    Args:
        num_rows: rows of the dataset.
        batch_size: rows of one micro-batch on one rank.
        world_size: number of ranks.
        accumulation: micro-batches of one optimizer step on one rank.
        seed: seed of order and budgets.
        lengths: see [`grouped_order`]; a plain shuffle when not given.
        draw_budget: budgets to draw; the model's default budget when not given.
        shuffle: `False` keeps the rows in their own order (when no lengths are given).
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        draw_budget: BudgetDraw | None = None,
        shuffle: bool = True,
    ):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.world_size = world_size
        self.step_size = batch_size * world_size * accumulation
        self.seed = seed
        self.lengths = lengths
        self.draw_budget = draw_budget
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        # Ranks must take the same number of rows: the end is filled up here, with the budget of its own step, where
        # accelerate would reuse the first rows with the budget of the first step.
        block = self.batch_size * self.world_size if self.world_size > 1 else 1
        return math.ceil(self.num_rows / block) * block

    def __iter__(self) -> Iterator[DrawnIndex]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        if self.lengths is not None:
            order = grouped_order(self.lengths, self.step_size, generator)
        elif self.shuffle:
            order = torch.randperm(self.num_rows, generator=generator).tolist()
        else:
            order = list(range(self.num_rows))
        for position in range(len(self)):
            step = position // self.step_size
            budget = self.draw_budget(self.epoch, step) if self.draw_budget is not None else None
            yield DrawnIndex(order[position % self.num_rows], budget)
