"""Row order and budgets: every row once, alike on all ranks, unchanged by resuming."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from modeling_delta_llava.finetuning.samplers import BudgetDraw, TrainingSampler, grouped_order


def drawn(sampler, world_size=1, rank=0):
    """The micro-batches of one rank, as accelerate deals them."""
    batches = BatchSampler(sampler, sampler.batch_size, drop_last=False)
    return list(BatchSamplerShard(batches, world_size, rank) if world_size > 1 else batches)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50).flatmap(lambda n: st.sampled_from([n, -n])), min_size=1, max_size=60),
    step_size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_grouped_order_has_every_row_once_and_whole_steps_of_one_modality(lengths, step_size, seed):
    order = grouped_order(lengths, step_size, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(len(lengths)))
    whole = {sign: sum((length > 0) == sign for length in lengths) // step_size for sign in (True, False)}
    steps = [order[start : start + step_size] for start in range(0, len(order), step_size)]
    pure = Counter()
    for step in steps[: sum(whole.values())]:
        signs = {lengths[index] > 0 for index in step}
        assert len(signs) == 1
        pure[signs.pop()] += 1
        sizes = [abs(lengths[index]) for index in step]
        assert sizes == sorted(sizes, reverse=True)
    assert pure == Counter({sign: count for sign, count in whole.items() if count})


def test_grouping_pads_less_than_shuffling():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 400, (512,), generator=generator).tolist()

    def padding(order, size=8):
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)
        return 1 - sum(lengths) / padded

    grouped = padding(grouped_order(lengths, 8, generator))
    shuffled = padding(torch.randperm(512, generator=generator).tolist())
    assert grouped < 0.1
    assert shuffled > 0.3


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 50),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    grouped=st.booleans(),
)
def test_ranks_share_each_step_and_its_budget(rows, batch_size, world_size, accumulation, grouped):
    def sampler():
        lengths = [(index % 7 + 1) * (-1 if index % 3 else 1) for index in range(rows)] if grouped else None
        draw = BudgetDraw([576, 144, 1], seed=3)
        return TrainingSampler(rows, batch_size, world_size, accumulation, 3, lengths, draw)

    ranks = [drawn(sampler(), world_size, rank) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter()
    for start in range(0, len(ranks[0]), accumulation):
        items = [item for batches in ranks for batch in batches[start : start + accumulation] for item in batch]
        assert len({item.num_visual_tokens for item in items}) == 1
        seen.update(item.index for item in items)
    assert set(seen) == set(range(rows))
    if world_size == 1:
        assert set(seen.values()) == {1}
    else:
        assert sum(seen.values()) - rows < batch_size * world_size


@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), [(8, 1, 1), (4, 2, 1), (1, 1, 8), (2, 2, 2)])
def test_a_step_does_not_depend_on_how_it_is_split(batch_size, world_size, accumulation):
    """The rows and the budget of each optimizer step are those of one process with the whole batch."""

    def steps(size, world, micro):
        draw = BudgetDraw([4, 1], seed=1)
        ranks = [drawn(TrainingSampler(32, size, world, micro, 1, None, draw), world, rank) for rank in range(world)]
        return [
            sorted(
                (item.index, item.num_visual_tokens)
                for batches in ranks
                for batch in batches[start : start + micro]
                for item in batch
            )
            for start in range(0, len(ranks[0]), micro)
        ]

    assert steps(batch_size, world_size, accumulation) == steps(8, 1, 1)


def test_epochs_differ_and_repeat():
    sampler = TrainingSampler(20, 4, seed=0)
    first = [item.index for item in sampler]
    sampler.set_epoch(1)
    second = [item.index for item in sampler]
    sampler.set_epoch(0)
    assert first != second
    assert [item.index for item in sampler] == first
    assert [item.index for item in TrainingSampler(20, 4, seed=1)] != first


def test_skipping_batches_leaves_the_rest_unchanged():
    sampler = TrainingSampler(20, 4, seed=0, draw_budget=BudgetDraw([9, 4, 1]))
    batches = drawn(sampler)
    assert list(SkipBatchSampler(BatchSampler(sampler, 4, False), skip_batches=3)) == batches[3:]


def test_budget_weights_are_followed():
    draw = BudgetDraw([144, 36, 1], weights=[6, 3, 1], seed=0)
    counts = Counter(draw(0, step) for step in range(2000))
    assert counts[144] / 2000 == pytest.approx(0.6, abs=0.04)
    assert counts[36] / 2000 == pytest.approx(0.3, abs=0.04)
    never = BudgetDraw([144, 1], weights=[1, 0])
    assert {never(epoch, step) for epoch in range(3) for step in range(100)} == {144}
