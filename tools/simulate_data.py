"""What a choice of data.streams and data.window costs and gives, without any data: `python tools/simulate_data.py`.

Drives the real order of thousands of ranks over thousands of shards and reports, for each choice, shard downloads of a
node whose cache holds a share of the data, and how many classes a global batch of class-sorted data has.
"""

import argparse
from collections import OrderedDict
from typing import Any

import numpy as np

from ldt.data.order import Order


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


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("shards", 10_000), ("shard_samples", 1000), ("classes", 1000), ("batch", 4096),
                          ("nodes", 512), ("cache", 200), ("steps", 500)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments: dict[str, Any] = vars(parser.parse_args())
    print("| streams | window | downloads a node | times necessary | classes in a batch | if random |")
    print("|---|---|---|---|---|---|")
    for streams in (16, 64, 512):
        for window in (4096, 65536, 262144):
            r = simulate(streams=streams, window=window, **arguments)
            print(f"| {streams} | {window} | {r['downloads_a_node']:.1f} | {r['times_necessary']:.1f} "
                  f"| {r['classes_in_a_batch']:.0f} | {r['classes_if_random']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
