"""The order over buckets: every global batch is of one latent shape, and which one is a function of its number.

A bucket's share of the batches is its share of the samples. `Mixture` says how many of the first n batches each bucket
has; stretches of `STRETCH` batches are shuffled by a keyed permutation, so that buckets come in no fixed rhythm. At
every stretch's end no bucket is off its share by as many batches as there are buckets. Each bucket has an `Order` of
its own over its batches, counted in the order in which they come: in each of its epochs every sample of it comes once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ldt import rng
from ldt.data.mixture import Mixture, locate_in
from ldt.data.order import Ints, Order

STRETCH = 64  # batches


class BucketOrder:
    """Where the sample of each global index lies: `Order` over several buckets, one of them a global batch.

    counts_S: samples of each shard, for each bucket; shards are numbered through all buckets.
    """

    def __init__(self, counts_S: Sequence[Ints], seed: int, batch: int, streams: int, window: int) -> None:
        self.batch, self._seed = batch, seed
        self.counts = np.concatenate(counts_S)
        self._first_S = np.cumsum([0, *map(len, counts_S)])
        self._mixture = Mixture([int(counts.sum()) for counts in counts_S], 1)  # of batches, not of slots
        seeds = rng.bits(seed, rng.Purpose.SOURCE, np.arange(len(counts_S)), 1)[:, 0].tolist()
        self.orders = [Order(c, s, batch, streams, window) for c, s in zip(counts_S, seeds, strict=True)]

    def turn(self, batch_n: ArrayLike) -> tuple[Ints, Ints]:
        """(bucket, how many batches of that bucket came before) of each global batch. Thread-safe."""
        stretches, inverse = np.unique(np.asarray(batch_n, np.int64) // STRETCH, return_inverse=True)
        bucket_TB = np.stack([self._stretch(t) for t in stretches.tolist()])  # stretches × the batches of one
        nth_TB = np.empty_like(bucket_TB)
        before_ST = self._mixture.before(stretches * STRETCH)
        for bucket, before_T in enumerate(before_ST):
            here_TB = bucket_TB == bucket
            nth_TB[here_TB] = (before_T[:, None] + here_TB.cumsum(1) - 1)[here_TB]
        place_n = np.asarray(batch_n, np.int64) % STRETCH
        return bucket_TB[inverse, place_n], nth_TB[inverse, place_n]

    def bucket_of(self, index: int) -> int:
        """The bucket of the sample at a global index, and so of all its batch."""
        return int(self.turn([index // self.batch])[0][0])

    def locate(self, index_n: ArrayLike) -> tuple[Ints, Ints]:
        """(shard, sample in shard) of each global index. Thread-safe."""
        batch_n, slot_n = np.divmod(np.asarray(index_n, np.int64), self.batch)
        bucket_n, nth_n = self.turn(batch_n)
        return locate_in(self.orders, self._first_S, bucket_n, nth_n, slot_n)

    def _stretch(self, number: int) -> Ints:
        """The bucket of each batch of one stretch."""
        place = rng.permute(np.arange(STRETCH), STRETCH, self._seed, rng.Purpose.BUCKET, number)
        return self._mixture.locate(number * STRETCH + place)[0]
