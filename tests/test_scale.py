"""100,000 shards, 100 million samples, 4096 ranks: small, quick to start, and as well shuffled as promised."""

import tracemalloc

import numpy as np
from simulate_data import simulate, start

from ldt.data.order import Order

SHARDS, EACH = 100_000, 1000


def test_memory_of_a_rank_stays_small_at_any_position():
    counts = np.full(SHARDS, EACH)
    tracemalloc.start()
    order = Order(counts, 0, 4096, 64, 65536)
    for first in (0, 50_000_000 // 4096 * 4096, 100_000_000 // 4096 * 4096):  # start, mid-epoch, over the boundary
        order.locate(first + np.arange(17 * 4, 18 * 4))  # rank 17 of 1024
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, f"{peak / 1e6:.1f} MB"


def test_no_part_of_a_ranks_start_takes_more():
    cost = start(shards=SHARDS, shard_samples=EACH, batch=4096)
    manifest = cost["rank 0: manifest from disk, MB"]
    assert manifest < 20 and cost["other ranks: manifest from rank 0, MB"] < 10
    assert all(value < 10 for name, value in cost.items() if name.endswith("MB") and "order" in name), cost


def test_4096_ranks_share_a_batch_without_overlap():
    order = Order(np.full(SHARDS, EACH), 0, 8192, 64, 65536)
    base = 12_000 * 8192
    parts = [order.locate(base + np.arange(2 * r, 2 * r + 2)) for r in range(0, 4096, 16)]
    whole = order.locate(base + np.arange(8192))
    for k, (shard, sample) in enumerate(parts):
        at = slice(32 * k, 32 * k + 2)
        np.testing.assert_array_equal(shard, whole[0][at])
        np.testing.assert_array_equal(sample, whole[1][at])
    assert len(set(zip(*map(np.ndarray.tolist, whole), strict=True))) == 8192


def test_streams_and_window_trade_downloads_for_mixing():
    setting = {"shards": 2000, "shard_samples": 100, "classes": 1000, "batch": 512, "nodes": 512, "cache": 60,
               "steps": 60}  # fmt: skip
    few = simulate(streams=8, window=400, **setting)
    many = simulate(streams=512, window=400, **setting)
    wide = simulate(streams=64, window=100_000, **setting)
    assert many["classes_in_a_batch"] > 0.95 * many["classes_if_random"]
    assert wide["classes_in_a_batch"] > few["classes_in_a_batch"] * 1.5
    assert few["classes_in_a_batch"] < 0.5 * few["classes_if_random"]  # the measure sees a bad shuffle
    assert wide["downloads_a_node"] > many["downloads_a_node"]
