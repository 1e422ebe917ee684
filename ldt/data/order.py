"""The order of training samples: a pure function of the global sample index.

Nothing here knows of ranks, nodes or threads, so a run may stop at any index and go on anywhere else. An epoch of N
samples is the index range [eN, (e+1)N); the index itself never resets, and batches straddle epochs, so that every
global batch is full and every epoch is a bijection onto the data.

A global batch of B slots is divided among C canonical streams by contiguous slot ranges. In each epoch the shards are
permuted and concatenated, every stream owns one contiguous range of that concatenation, and is shuffled within windows
of `window` samples. A rank, which takes contiguous slots, therefore touches few streams and few shards at a time: more
streams mix the data better, fewer need fewer downloads a node.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldt import rng
from ldt.errors import InputError

Ints = NDArray[np.int64]
EPOCHS_KEPT = 2  # a batch straddles two


@dataclass(frozen=True)
class _Epoch:
    """shards: permuted; starts: where each of them starts in their concatenation; before_C, size_C: samples of each
    stream before the epoch and in it."""

    shards: Ints
    starts: Ints
    before_C: Ints
    size_C: Ints


class Order:
    """Where the sample of each global index lies. Memory and start-up are O(number of shards), never O(samples).

    counts: samples of each shard; batch: global batch size; streams, window: see the module. All five, with the
    seed, are part of a run's identity: changing one changes every batch.

    before, for a source of a mixture, which has at least `batch` slots of every global batch and sometimes a few more,
    tells how many it had in all batches before the t-th; the last stream takes what is more.
    """

    def __init__(
        self,
        counts: ArrayLike,
        seed: int,
        batch: int,
        streams: int,
        window: int,
        before: Callable[[Ints], Ints] | None = None,
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        for name, value in (("batch", batch if before is None else 1), ("streams", streams), ("window", window)):
            if value < 1:
                raise InputError(f"the data order needs a {name} of at least 1, not {value}")
        if self.samples == 0:
            raise InputError("the shards hold no samples at all; encode some images first")
        self.seed, self.batch, self.window = seed, batch, window
        self.streams = max(1, min(streams, batch))
        bounds = np.arange(self.streams + 1) * batch // self.streams
        self._lower_C, self._width_C = bounds[:-1], np.diff(bounds)
        self._slots_before = before or (lambda batch_n: batch_n * batch)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lock = threading.Lock()

    def locate(self, index_n: ArrayLike) -> tuple[Ints, Ints]:
        """(shard, sample in shard) of each global index. Thread-safe."""
        batch_n, slot_n = np.divmod(np.asarray(index_n, np.int64), self.batch)
        return self.locate_slots(batch_n, slot_n)

    def locate_slots(self, batch_n: Ints, slot_n: Ints) -> tuple[Ints, Ints]:
        """Like `locate`, for the slot_n-th sample of each batch."""
        shard_n, sample_n = np.empty_like(batch_n), np.empty_like(batch_n)
        epoch_n = (self._slots_before(batch_n) + slot_n) // self.samples
        for epoch in np.unique(epoch_n).tolist():
            here = np.flatnonzero(epoch_n == epoch)
            of = self._epoch(epoch)
            position = self._position(epoch, of, batch_n[here], slot_n[here])
            k = np.searchsorted(of.starts, position, "right") - 1  # "right" also steps over empty shards
            shard_n[here], sample_n[here] = of.shards[k], position - of.starts[k]
        return shard_n, sample_n

    def _before(self, ordinal: int) -> Ints:
        """How many of the first `ordinal` samples belong to each stream, in closed form: int64 [C]."""
        batch = self._batch_of(ordinal)
        there = self._slots_before(np.array([batch]))[0]
        before_C = batch * self._width_C + np.clip(ordinal - there - self._lower_C, 0, self._width_C)
        before_C[-1] = ordinal - before_C[:-1].sum()
        return before_C

    def _batch_of(self, ordinal: int) -> int:
        """The batch that holds a sample, by bisection: the last one with at most `ordinal` samples before it."""
        low, high = 0, 1
        while self._slots_before(np.array([high]))[0] <= ordinal:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._slots_before(np.array([middle]))[0] <= ordinal else (low, middle)
        return low

    def _position(self, epoch: int, of: "_Epoch", batch_n: Ints, slot_n: Ints) -> Ints:
        """Place of each sample of one epoch in that epoch's concatenation of permuted shards."""
        start_C = np.cumsum(of.size_C) - of.size_C
        stream_n = np.searchsorted(self._lower_C, slot_n, "right") - 1
        rank_n = batch_n * self._width_C[stream_n] + slot_n - self._lower_C[stream_n] - of.before_C[stream_n]
        rank_n += np.where(stream_n == self.streams - 1, self._slots_before(batch_n) - batch_n * self.batch, 0)
        last_C = np.maximum(of.size_C // self.window, 1) - 1  # the last window takes the remainder as well
        window_n = np.minimum(rank_n // self.window, last_C[stream_n])
        position_n = np.empty_like(batch_n)
        for stream, window in np.unique(np.stack([stream_n, window_n]), axis=1).T.tolist():
            here = np.flatnonzero((stream_n == stream) & (window_n == window))
            low = window * self.window
            size = int(of.size_C[stream]) - low if window == last_C[stream] else self.window
            inside = rng.permute(rank_n[here] - low, size, self.seed, rng.Purpose.ORDER_WINDOW, epoch, stream, window)
            position_n[here] = start_C[stream] + low + inside
        return position_n

    def _epoch(self, epoch: int) -> _Epoch:
        """What is the same for all samples of an epoch."""
        with self._lock:
            if epoch not in self._epochs:
                key = rng.bits(self.seed, rng.Purpose.ORDER_SHARDS, [epoch], len(self.counts))[0]
                shards = np.argsort(key, kind="stable")
                counts = self.counts[shards]
                before_C = self._before(epoch * self.samples)
                size_C = self._before((epoch + 1) * self.samples) - before_C
                self._epochs[epoch] = _Epoch(shards, np.cumsum(counts) - counts, before_C, size_C)
                if len(self._epochs) > EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
