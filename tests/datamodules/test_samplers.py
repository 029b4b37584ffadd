"""Batches are a function of (seed, step, rank, world size) and of nothing else."""

from itertools import islice

import pytest

from datamodules.samplers import StepBatchSampler, sample_seed


def batches(count, length=7, batch_size=3, seed=0, **where):
    return list(islice(StepBatchSampler(length, batch_size, seed, **where), count))


def test_each_pass_draws_every_sample_once_in_another_order():
    drawn = [index for batch in batches(7) for index, _ in batch]
    passes = [drawn[:7], drawn[7:14], drawn[14:]]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_draws_count_the_samples_since_the_start():
    assert [draw for batch in batches(5) for _, draw in batch] == list(range(15))


def test_the_order_depends_on_the_seed_only():
    assert batches(5) == batches(5)
    assert batches(5) != batches(5, seed=1)


def test_starting_later_equals_skipping_batches():
    assert batches(6, start_batch=4) == batches(10)[4:]


def test_ranks_share_the_batches_of_a_single_process_between_them():
    alone = batches(5, batch_size=6)
    first, second = (batches(5, batch_size=3, rank=rank, world_size=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    assert batches(2, rank=1, world_size=2, start_batch=3) == second[3:]


def test_a_batch_may_be_larger_than_the_data():
    assert [draw for _, draw in batches(1, length=2, batch_size=5)[0]] == [0, 1, 2, 3, 4]


def test_sample_seeds_differ_by_draw_and_by_run():
    assert len({sample_seed(seed, draw) for seed in range(20) for draw in range(500)}) == 10_000
    assert sample_seed(3, 4) == sample_seed(3, 4) < 2**32


@pytest.mark.parametrize("wrong", [{"length": 0}, {"batch_size": 0}])
def test_nothing_to_draw_is_an_error_that_names_it(wrong):
    with pytest.raises(ValueError, match=r"found \d samples and batch_size \d"):
        batches(1, **wrong)
