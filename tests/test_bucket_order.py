"""Buckets in order: one a global batch, exact shares, each sample once in each of its bucket's epochs."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldt.data.bucket_order import STRETCH, BucketOrder

shapes = st.fixed_dictionaries(
    {
        "counts_S": st.lists(
            st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), min_size=1, max_size=5
        ).map(lambda counts_S: [np.array(counts) for counts in counts_S]),
        "seed": st.integers(0, 2**32),
        "batch": st.integers(1, 12),
        "streams": st.integers(1, 9),
        "window": st.integers(1, 20),
    }
)


@given(shapes, st.integers(0, 10**9))
@settings(deadline=None)
def test_shares_of_batches_are_those_of_samples(shape, start):
    order = BucketOrder(**shape)
    samples = np.array([counts.sum() for counts in shape["counts_S"]])
    share = samples / samples.sum()
    bucket, nth = order.turn(np.arange(start * STRETCH, (start + 4) * STRETCH))
    for k, p in enumerate(share):
        mine = nth[bucket == k]
        assert (np.diff(mine) == 1).all()  # none is left out, none comes twice, and they come in their order
        for end in range(1, 5):
            assert abs((bucket[: end * STRETCH] == k).sum() - p * end * STRETCH) < 2 * len(share)
        if len(mine):
            assert abs(mine[-1] + 1 - p * (start + 4) * STRETCH) < len(share)  # over all the run, too


@given(shapes)
@settings(deadline=None, max_examples=15)
def test_every_bucket_comes_once_in_each_of_its_epochs_and_every_batch_is_of_one(shape):
    order, batch = BucketOrder(**shape), shape["batch"]
    total = 2 * sum(int(counts.sum()) for counts in shape["counts_S"]) + 2 * STRETCH * batch
    total -= total % batch
    shard, sample = order.locate(np.arange(total))
    bucket = np.searchsorted(np.cumsum([len(counts) for counts in shape["counts_S"]]), shard, "right")
    assert (bucket.reshape(-1, batch) == bucket.reshape(-1, batch)[:, :1]).all()
    assert bucket[::batch].tolist() == [order.bucket_of(first) for first in range(0, total, batch)]
    first = 0
    for k, counts in enumerate(shape["counts_S"]):
        mine = bucket == k
        ordinal = (np.cumsum(counts) - counts)[shard[mine] - first] + sample[mine]
        for epoch in range(len(ordinal) // counts.sum()):
            here = ordinal[epoch * counts.sum() : (epoch + 1) * counts.sum()]
            assert sorted(here) == list(range(counts.sum()))
        first += len(counts)


@given(shapes, st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=25)
def test_one_index_does_not_depend_on_what_else_is_asked(shape, start, data):
    whole = list(zip(*BucketOrder(**shape).locate(np.arange(start, start + 60)), strict=True))
    picked = data.draw(st.permutations(range(60)))[:9]
    fresh = BucketOrder(**shape)
    assert [tuple(v[0] for v in fresh.locate([start + i])) for i in picked] == [whole[i] for i in picked]


def test_buckets_come_in_no_rhythm_and_by_the_seed():
    """Two equal buckets by turns would be a period of two batches."""
    counts_S = [np.array([500]), np.array([500])]
    turns = [BucketOrder(counts_S, s, 10, 1, 100).turn(np.arange(640))[0] for s in (0, 1)]
    for bucket in turns:
        assert 200 < (bucket[1:] != bucket[:-1]).sum() < 440
        assert (bucket.reshape(-1, STRETCH).sum(1) == STRETCH // 2).all()
    assert 200 < (turns[0] == turns[1]).sum() < 440
    assert 10 < (turns[0][:64] == turns[0][64:128]).sum() < 54


@pytest.mark.parametrize("batch", [0, 14_000, 10**9])
def test_start_anywhere_in_a_hundred_million_samples_costs_next_to_nothing(batch):
    counts_S = [np.full(40_000, 1000), np.full(30_000, 1000), np.full(30_000, 1000)]
    tracemalloc.start()
    order = BucketOrder(counts_S, seed=0, batch=4096, streams=64, window=1 << 16)
    order.locate(batch * 4096 + 17 * 4 + np.arange(4))  # rank 17 of 1024
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_golden():
    """These numbers are part of the format of a run: a change here breaks every resume."""
    order = BucketOrder([np.array([5, 4]), np.array([7])], seed=11, batch=4, streams=3, window=4)
    assert order.counts.tolist() == [5, 4, 7]
    shard, sample = order.locate(np.arange(100, 116))
    assert list(zip(shard.tolist(), sample.tolist(), strict=True)) == GOLDEN


GOLDEN = [
    (1, 1), (1, 2), (0, 3), (0, 3), (1, 1), (1, 3), (0, 2), (0, 4),
    (2, 0), (2, 2), (2, 5), (2, 3), (1, 0), (1, 2), (0, 1), (0, 0),
]  # fmt: skip
