"""The order of samples: a bijection in every epoch, independent of who asks, cheap at any scale."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldt.data.order import Order
from ldt.errors import InputError

shapes = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
        "seed": st.integers(0, 2**32),
        "batch": st.integers(1, 40),
        "streams": st.integers(1, 9),
        "window": st.integers(1, 30),
    }
)


def ordinals(order: Order, start: int, stop: int) -> list[int]:
    shard, sample = order.locate(np.arange(start, stop))
    assert (sample >= 0).all() and (sample < order.counts[shard]).all()
    return ((np.cumsum(order.counts) - order.counts)[shard] + sample).tolist()


@given(shapes, st.integers(0, 5))
@settings(deadline=None)
def test_every_epoch_holds_every_sample_once(shape, epoch):
    order = Order(**shape)
    n = order.samples
    assert sorted(ordinals(order, epoch * n, (epoch + 1) * n)) == list(range(n))


@given(shapes, st.integers(0, 200), st.data())
@settings(deadline=None)
def test_one_index_does_not_depend_on_what_else_is_asked(shape, start, data):
    whole = ordinals(Order(**shape), start, start + 60)
    picked = data.draw(st.permutations(range(60)))[:13]
    fresh = Order(**shape)
    assert [ordinals(fresh, start + i, start + i + 1)[0] for i in picked] == [whole[i] for i in picked]


def test_contiguous_slots_stay_within_their_stream():
    order = Order(counts=np.full(64, 100), seed=3, batch=64, streams=8, window=200)
    for slots in (range(8), range(56, 64)):  # one stream each, here two shards wide at a time
        index = (np.arange(10)[:, None] * 64 + np.array(slots)).ravel()
        assert len(set(order.locate(index)[0].tolist())) <= 3


def test_epochs_and_seeds_differ():
    order, other = (Order(counts=[50] * 20, seed=s, batch=32, streams=4, window=100) for s in (0, 1))
    first, second = ordinals(order, 0, 1000), ordinals(order, 1000, 2000)
    assert np.mean(np.equal(first, second)) < 0.02
    assert np.mean(np.equal(first, ordinals(other, 0, 1000))) < 0.02


def test_class_sorted_data_is_mixed_as_well_as_by_a_random_draw():
    """256 draws from 1000 equal classes show 1000·(1 − (1 − 1/1000)^256) = 226 distinct ones on average."""
    order = Order(counts=np.full(1000, 100), seed=0, batch=256, streams=8, window=50_000)
    label = np.arange(100_000) // 100
    distinct = [len(set(label[ordinals(order, t * 256, t * 256 + 256)])) for t in range(20)]
    assert abs(np.mean(distinct) - 1000 * (1 - (1 - 1 / 1000) ** 256)) < 8


def test_golden():
    """These numbers are part of the format of a run: a change here breaks every resume."""
    order = Order(counts=[5, 0, 7, 3], seed=11, batch=4, streams=2, window=4)
    shard, sample = order.locate(np.arange(12, 24))
    assert list(zip(shard.tolist(), sample.tolist(), strict=True)) == GOLDEN


GOLDEN = [(2, 2), (2, 3), (0, 3), (0, 0), (3, 2), (3, 1), (0, 4), (0, 1), (3, 0), (2, 0), (0, 3), (2, 5)]


def test_start_and_resume_at_a_hundred_million_samples_cost_next_to_nothing():
    counts = np.full(100_000, 1000)
    tracemalloc.start()
    order = Order(counts, seed=0, batch=4096, streams=64, window=1 << 16)
    slots = 17 * 4096 // 1024 + np.arange(4)
    order.locate(24_413 * 4096 - 4096 + slots)  # the end of the first epoch
    order.locate(24_414 * 4096 + slots)
    for epoch in range(2, 22):  # what is kept of each would be 1.6 MB
        order.locate(epoch * 100_000_000 + slots)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"streams": 0}, {"window": 0}, {"counts": [0, 0]}])
def test_impossible_orders_are_refused(wrong):
    good = {"counts": [3], "seed": 0, "batch": 2, "streams": 1, "window": 1}
    with pytest.raises(InputError, match=next(iter(wrong)) if "counts" not in wrong else "no samples"):
        Order(**(good | wrong))
