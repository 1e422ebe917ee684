"""Mixed sources: shares by weight, each source once in each of its epochs, a pure function of the index."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldt.data.mixture import WHOLE, MixedOrder, Mixture, shares
from ldt.errors import InputError

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def parts_of(values):
    return list(shares({str(i): v for i, v in enumerate(values)}).values())


@given(weights, st.integers(1, 40), st.integers(0, 10**9))
@settings(deadline=None)
def test_slots_follow_the_weights_and_add_up(values, batch, start):
    parts = parts_of(values)
    mixture = Mixture(parts, batch)
    before = mixture.before(np.arange(start, start + 50))
    assert (before.sum(0) == np.arange(start, start + 50) * batch).all()
    slots = np.diff(before, axis=1)
    assert (slots >= np.array(mixture.least())[:, None]).all()
    share = np.array(parts) / sum(parts)
    assert (np.abs(before - share[:, None] * before.sum(0)) < len(parts)).all()  # wherever one looks
    source, batches, slot = mixture.locate(np.arange(start * batch, (start + 49) * batch))
    for t in range(49):
        here = batches == start + t
        assert np.bincount(source[here], minlength=len(parts)).tolist() == slots[:, t].tolist()
        assert slot[here].tolist() == [k for n in slots[:, t] for k in range(n)]


shapes = st.fixed_dictionaries(
    {
        "counts_S": st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
        "seed": st.integers(0, 2**32),
        "batch": st.integers(1, 30),
        "streams": st.integers(1, 9),
        "window": st.integers(1, 20),
    }
)


def mixed(shape, values):
    counts_S = [np.array(c) for c in shape["counts_S"]]
    return MixedOrder(**(shape | {"counts_S": counts_S, "parts": parts_of(values[: len(counts_S)])}))


@given(shapes, st.lists(st.floats(0.05, 10), min_size=4, max_size=4))
@settings(deadline=None, max_examples=50)
def test_every_source_comes_once_in_each_of_its_epochs(shape, values):
    order = mixed(shape, values)
    total = 3 * sum(map(sum, shape["counts_S"])) + 200
    shard, sample = order.locate(np.arange(total))
    first = 0
    for counts in shape["counts_S"]:
        mine = (shard >= first) & (shard < first + len(counts))
        ordinal = (np.cumsum(counts) - counts)[shard[mine] - first] + sample[mine]
        for epoch in range(len(ordinal) // sum(counts)):
            here = ordinal[epoch * sum(counts) : (epoch + 1) * sum(counts)]
            assert sorted(here) == list(range(sum(counts)))
        first += len(counts)


@given(shapes, st.lists(st.floats(0.05, 10), min_size=4, max_size=4), st.integers(0, 300), st.data())
@settings(deadline=None, max_examples=50)
def test_one_index_does_not_depend_on_what_else_is_asked(shape, values, start, data):
    whole = list(zip(*mixed(shape, values).locate(np.arange(start, start + 60)), strict=True))
    picked = data.draw(st.permutations(range(60)))[:9]
    fresh = mixed(shape, values)
    assert [tuple(v[0] for v in fresh.locate([start + i])) for i in picked] == [whole[i] for i in picked]


def test_alike_sources_are_shuffled_differently():
    order = MixedOrder([np.array([200])] * 2, [1, 1], seed=0, batch=20, streams=2, window=100)
    shard, sample = order.locate(np.arange(400))
    assert np.mean(sample[shard == 0] == sample[shard == 1]) < 0.05


def test_a_contiguous_share_touches_few_streams_of_few_sources():
    """Rank 17 of 64: 16 slots of 1024, 600 steps of two sources of 1000 shards each."""
    order = MixedOrder([np.full(1000, 100)] * 2, parts_of([0.37, 0.63]), 0, batch=1024, streams=64, window=400)
    seen = [order.locate(t * 1024 + np.arange(17 * 16, 18 * 16))[0] for t in range(600)]
    assert len(np.unique(np.concatenate(seen))) < 2 * 600 * 16 / 100  # each shard holds 100


@pytest.mark.parametrize(("values", "streams"), [([0.25, 0.75], [2, 6]), ([0.02, 0.98], [1, 8]), ([0.3, 0.7], [2, 6])])
def test_streams_are_divided_like_slots_with_one_each_at_the_least(values, streams):
    order = MixedOrder([np.array([100])] * 2, parts_of(values), 0, batch=100, streams=8, window=4)
    assert [one.streams for one in order.orders] == streams


def test_golden():
    """These numbers are part of the format of a run: a change here breaks every resume."""
    order = MixedOrder([np.array([5, 4]), np.array([7])], parts_of([0.3, 0.7]), 11, batch=4, streams=3, window=4)
    assert order.counts.tolist() == [5, 4, 7]
    shard, sample = order.locate(np.arange(100, 112))
    assert list(zip(shard.tolist(), sample.tolist(), strict=True)) == GOLDEN


GOLDEN = [(0, 0), (2, 2), (2, 6), (2, 3), (1, 0), (2, 0), (2, 4), (2, 5), (1, 1), (2, 1), (2, 3), (2, 2)]


def test_start_anywhere_in_a_hundred_million_samples_costs_next_to_nothing():
    counts_S = [np.full(70_000, 1000), np.full(30_000, 1000)]
    tracemalloc.start()
    order = MixedOrder(counts_S, parts_of([0.5, 0.5]), seed=0, batch=4096, streams=64, window=1 << 16)
    for batch in (0, 14_000, 24_413, 10**6):
        order.locate(batch * 4096 + 17 * 4 + np.arange(4))  # rank 17 of 1024
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_shares():
    assert shares({"a": 3, "b": 1}) == {"a": WHOLE * 3 // 4, "b": WHOLE // 4}
    assert shares({"a": 1, "b": 2}) == {"a": 349525, "b": 699051}, "golden as well: of 2²⁰ parts"
    assert shares({"a": WHOLE - 1, "b": 1}) == {"a": WHOLE - 1, "b": 1}, "the least that there is"
    with pytest.raises(InputError, match=r"data\.sources\.b\.weight=1e-09 is less than a millionth"):
        shares({"a": 1, "b": 1e-9})
