"""What a choice of data.streams and data.window costs and gives, without any data: `python tools/simulate_data.py`.

Drives the real order of thousands of ranks over thousands of shards and reports, for each choice, shard downloads of a
node whose cache holds a share of the data, and how many classes a global batch of class-sorted data has. With --start
instead what it costs one rank to start, and to resume in the middle of an epoch, with so many shards.
"""

import argparse
import pickle
import tempfile
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from program import run_tool

from ldt.data.latent_spec import LatentSpec
from ldt.data.mixture import MixedOrder
from ldt.data.order import Order
from ldt.data.shards.manifest import Manifest, make_table


def simulate(
    *,
    shards: int,
    shard_samples: int,
    classes: int,
    batch: int,
    nodes: int,
    streams: int,
    window: int,
    cache: int,
    steps: int,
    watched: int = 4,
) -> dict[str, float]:
    """Downloads of `watched` nodes over `steps` steps in an LRU cache of `cache` shards, and classes in a batch.

    Data are sorted by class. `necessary` is what a node that reads each of its shards once would download.
    """  # fmt: skip
    order = Order(np.full(shards, shard_samples), 0, batch, streams, window)
    chosen = np.linspace(0, nodes - 1, min(watched, nodes)).astype(int).tolist()
    held: dict[int, OrderedDict[int, None]] = {n: OrderedDict() for n in chosen}
    downloads, classes_seen, samples = 0, [], shards * shard_samples
    for step in range(steps):
        for node in chosen:
            index_n = step * batch + np.arange(node * batch // nodes, (node + 1) * batch // nodes)
            for shard in np.unique(order.locate(index_n)[0]).tolist():
                if shard not in held[node]:
                    downloads += 1
                    if len(held[node]) >= cache:
                        held[node].popitem(last=False)
                held[node][shard] = None
                held[node].move_to_end(shard)
        if step % max(steps // 8, 1) == 0:
            shard_n, sample_n = order.locate(step * batch + np.arange(batch))
            classes_seen.append(len(np.unique((shard_n * shard_samples + sample_n) * classes // samples)))
    necessary = steps * batch / nodes / shard_samples
    expected = classes * (1 - (1 - 1 / classes) ** batch)
    return {
        "downloads_a_node": downloads / len(chosen),
        "times_necessary": downloads / len(chosen) / necessary,
        "classes_in_a_batch": float(np.mean(classes_seen)),
        "classes_if_random": expected,
    }


def start(*, shards: int, shard_samples: int, batch: int, streams: int = 64, window: int = 65536) -> dict[str, float]:
    """Milliseconds (the best of 5) and peak megabytes of each part of a rank's start, rank 17 of 1024."""
    rows = [(f"shard-{i:08d}.tar", 4096, shard_samples, i * 7919, i * 104729) for i in range(shards)]
    classes, shape = [str(i) for i in range(1000)], (4, 32, 32)
    spec = LatentSpec(shape, classes, [0.0] * 4, [1.0] * 4, "vae", "0" * 16, 256, 3, class_counts=[shards] * 1000)
    manifest = Manifest(**vars(spec), format="tar", dtype="fp16", flips=False, table=make_table(rows))
    slots, counts = np.arange(17 * batch // 1024, 18 * batch // 1024), manifest.counts
    middle = shards * shard_samples // 2 // batch * batch
    halves = [counts[: shards // 2], counts[shards // 2 :]]

    def mixed() -> MixedOrder:
        return MixedOrder(halves, [1, 3], 0, batch, streams, window)

    with tempfile.TemporaryDirectory() as directory:
        manifest.save(Path(directory))
        sent = pickle.dumps(manifest)  # as broadcast does
        parts: dict[str, Callable[[], Any]] = {
            "rank 0: manifest from disk": lambda: Manifest.load(directory),
            "other ranks: manifest from rank 0": lambda: pickle.loads(sent),
            "order, start": lambda: Order(counts, 0, batch, streams, window).locate(slots),
            "order, mid-epoch": lambda: Order(counts, 0, batch, streams, window).locate(middle + slots),
            "order of two sources, mid-epoch": lambda: mixed().locate(middle + slots),
        }
        return {name: value for part, action in parts.items() for name, value in _cost(part, action).items()}


def _cost(part: str, action: Callable[[], Any]) -> dict[str, float]:
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    tracemalloc.start()
    kept = action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return {f"{part}, ms": 1e3 * min(times), f"{part}, MB": peak / 1e6}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("shards", 10_000), ("shard_samples", 1000), ("classes", 1000), ("batch", 4096),
                          ("nodes", 512), ("cache", 200), ("steps", 500)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--start", action="store_true")
    arguments: dict[str, Any] = vars(parser.parse_args())
    if arguments.pop("start"):
        for name, value in start(**{k: arguments[k] for k in ("shards", "shard_samples", "batch")}).items():
            print(f"{name:44} {value:.1f}")
        return
    print("| streams | window | downloads a node | times necessary | classes in a batch | if random |")
    print("|---|---|---|---|---|---|")
    for streams in (16, 64, 512):
        for window in (4096, 65536, 262144):
            r = simulate(streams=streams, window=window, **arguments)
            print(f"| {streams} | {window} | {r['downloads_a_node']:.1f} | {r['times_necessary']:.1f} "
                  f"| {r['classes_in_a_batch']:.0f} | {r['classes_if_random']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
