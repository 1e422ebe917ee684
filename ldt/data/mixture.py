"""Several data sets in one run: which of them each global index takes its sample from, and which sample that is.

Every global batch has a contiguous run of slots for each source, as long as its weight asks, to within a few slots
from batch to batch and exactly in the long run. How many slots a source has had before any batch is a closed form, so
nothing is walked, and each source has an `Order` of its own over all its slots: in each of its epochs every sample of
it comes once. Contiguous slots keep what `Order` gives: a rank touches few sources, streams and shards at a time.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ldt import rng
from ldt.data.order import Ints, Order
from ldt.errors import InputError

WHOLE = 1 << 20  # weights are kept as parts of so many


def shares(weights: dict[str, float]) -> dict[str, int]:
    """Weights as parts of `WHOLE`, by name; none is lost to rounding."""
    total = sum(weights.values())
    parts = {name: round(weight / total * WHOLE) for name, weight in weights.items()}
    for name, part in parts.items():
        if part < 1:
            raise InputError(
                f"data.sources.{name}.weight={weights[name]} is less than a millionth of all weights; raise it or "
                "leave the source out"
            )
    return parts


class Mixture:
    """How the slots of global batches fall to sources. parts: positive integers, in the order of the sources.

    Of the first n slots the first source has ⌊n·p⌋, the second the same of what is left, and so on to the last, which
    has the rest: sums are right by construction, and no source ever loses a slot that it had.
    """

    def __init__(self, parts: Sequence[int], batch: int) -> None:
        self.batch = batch
        self._parts = np.asarray(parts, np.int64)
        self._left = np.cumsum(self._parts[::-1])[::-1]  # of this source and all after it

    def before(self, batch_n: Ints) -> Ints:
        """Slots that each source has had in all batches before each one: int64 [sources, n]."""
        rest = np.asarray(batch_n, np.int64) * self.batch
        out = np.empty((len(self._parts), len(rest)), np.int64)
        for mine, part, left in zip(out, self._parts, self._left, strict=True):
            mine[:] = rest // left * part + rest % left * part // left  # ⌊rest·part / left⌋ without overflow
            rest = rest - mine
        return out

    def least(self) -> list[int]:
        """A number of slots that each source has in every batch: as many as it can have at the least."""
        low, out = self.batch, []
        for part, left in zip(self._parts.tolist(), self._left.tolist(), strict=True):
            out.append(low * part // left)
            low = low * (left - part) // left
        return out

    def locate(self, index_n: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """(source, batch, slot among the source's slots of that batch) of each global index."""
        batch_n, slot_n = np.divmod(np.asarray(index_n, np.int64), self.batch)
        batches, inverse = np.unique(batch_n, return_inverse=True)
        ends = np.cumsum(self.before(batches + 1) - self.before(batches), axis=0)[:, inverse]
        source_n = (ends <= slot_n).sum(0)
        starts = np.concatenate([np.zeros((1, len(batch_n)), np.int64), ends])
        return source_n, batch_n, slot_n - starts[source_n, np.arange(len(batch_n))]


class MixedOrder:
    """Where the sample of each global index lies: `Order` over several sources.

    counts_S: samples of each shard, for each source; shards are numbered through all sources. parts: the sources'
    weights as `shares` gives them. Streams are divided among the sources like slots, at least one each.
    """

    def __init__(
        self, counts_S: Sequence[Ints], parts: Sequence[int], seed: int, batch: int, streams: int, window: int
    ) -> None:
        self.batch, self.mixture = batch, Mixture(parts, batch)
        self.counts = np.concatenate(counts_S)
        self._first_S = np.cumsum([0, *map(len, counts_S)])
        seeds = rng.bits(seed, rng.Purpose.SOURCE, np.arange(len(parts)), 1)[:, 0].tolist()
        share = [max(1, round(streams * part / sum(parts))) for part in parts]
        least = self.mixture.least()

        def order(s: int) -> Order:
            return Order(counts_S[s], seeds[s], least[s], share[s], window, lambda t: self.mixture.before(t)[s])

        self.orders = [order(s) for s in range(len(parts))]

    def locate(self, index_n: ArrayLike) -> tuple[Ints, Ints]:
        """(shard, sample in shard) of each global index. Thread-safe."""
        return locate_in(self.orders, self._first_S, *self.mixture.locate(index_n))


def locate_in(orders: Sequence[Order], first_S: Ints, source_n: Ints, batch_n: Ints, slot_n: Ints) -> tuple[Ints, Ints]:
    """(shard, sample in shard) of slots of batches of sources, each in the order of its source.

    first_S: the number of each source's first shard among those of all.
    """
    shard_n, sample_n = np.empty_like(slot_n), np.empty_like(slot_n)
    for source in np.unique(source_n).tolist():
        here = np.flatnonzero(source_n == source)
        shard, sample_n[here] = orders[source].locate_slots(batch_n[here], slot_n[here])
        shard_n[here] = shard + first_S[source]
    return shard_n, sample_n
