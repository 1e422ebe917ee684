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

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldt import rng
from ldt.errors import InputError

Ints = NDArray[np.int64]
EPOCHS_KEPT = 2  # a batch straddles two


class Order:
    """Where the sample of each global index lies. Memory and start-up are O(number of shards), never O(samples).

    counts: samples of each shard; batch: global batch size; streams, window: see the module. All five, with the
    seed, are part of a run's identity: changing one changes every batch.
    """

    def __init__(self, counts: ArrayLike, seed: int, batch: int, streams: int, window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        for name, value in (("batch", batch), ("streams", streams), ("window", window)):
            if value < 1:
                raise InputError(f"the data order needs a {name} of at least 1, not {value}")
        if self.samples == 0:
            raise InputError("the shards hold no samples at all; encode some images first")
        self.seed, self.batch, self.window = seed, batch, window
        self.streams = min(streams, batch)
        bounds = np.arange(self.streams + 1) * batch // self.streams
        self._lower_C, self._width_C = bounds[:-1], np.diff(bounds)
        self._epochs: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._lock = threading.Lock()

    def locate(self, index_n: ArrayLike) -> tuple[Ints, Ints]:
        """(shard, sample in shard) of each global index. Thread-safe."""
        index_n = np.asarray(index_n, np.int64)
        shard_n, sample_n = np.empty_like(index_n), np.empty_like(index_n)
        epoch_n = index_n // self.samples
        for epoch in np.unique(epoch_n).tolist():
            here = np.flatnonzero(epoch_n == epoch)
            position = self._position(epoch, index_n[here])
            shards, starts = self._epoch(epoch)
            k = np.searchsorted(starts, position, "right") - 1  # "right" also steps over empty shards
            shard_n[here], sample_n[here] = shards[k], position - starts[k]
        return shard_n, sample_n

    def _before(self, index: int) -> Ints:
        """How many global indices below `index` belong to each stream, in closed form: int64 [C]."""
        return index // self.batch * self._width_C + np.clip(index % self.batch - self._lower_C, 0, self._width_C)

    def _position(self, epoch: int, index_n: Ints) -> Ints:
        """Place of each index of one epoch in that epoch's concatenation of permuted shards."""
        before_C = self._before(epoch * self.samples)
        size_C = self._before((epoch + 1) * self.samples) - before_C
        start_C = np.cumsum(size_C) - size_C
        slot_n = index_n % self.batch
        stream_n = np.searchsorted(self._lower_C, slot_n, "right") - 1
        rank_n = index_n // self.batch * self._width_C[stream_n] + slot_n - self._lower_C[stream_n] - before_C[stream_n]
        last_C = np.maximum(size_C // self.window, 1) - 1  # the last window takes the remainder as well
        window_n = np.minimum(rank_n // self.window, last_C[stream_n])
        position_n = np.empty_like(index_n)
        for stream, window in np.unique(np.stack([stream_n, window_n]), axis=1).T.tolist():
            here = np.flatnonzero((stream_n == stream) & (window_n == window))
            low = window * self.window
            size = int(size_C[stream]) - low if window == last_C[stream] else self.window
            inside = rng.permute(rank_n[here] - low, size, self.seed, rng.Purpose.ORDER_WINDOW, epoch, stream, window)
            position_n[here] = start_C[stream] + low + inside
        return position_n

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The permuted shard numbers of an epoch and where each starts in their concatenation."""
        with self._lock:
            if epoch not in self._epochs:
                key = rng.bits(self.seed, rng.Purpose.ORDER_SHARDS, [epoch], len(self.counts))[0]
                shards = np.argsort(key, kind="stable")
                counts = self.counts[shards]
                self._epochs[epoch] = shards, np.cumsum(counts) - counts
                if len(self._epochs) > EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
