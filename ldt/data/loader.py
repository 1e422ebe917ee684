"""The loader: this rank's micro-batches of each optimizer step, drawn ahead of time by threads.

Rank r of W takes slots [r·B//W, (r+1)·B//W) of every global batch of B samples, so the samples of a step never depend
on W. Every rank makes the same number of equal micro-batches; a rank short of samples pads with rows of weight 0.
"""

import contextlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch

from ldt.data.batch import Batch, digest, fill
from ldt.data.mixture import MixedOrder
from ldt.data.order import Ints, Order
from ldt.data.prefetch import ahead
from ldt.data.shards import MixedShards, Shards
from ldt.errors import InputError

PREFETCH_STEPS = 32  # how far ahead of the position remote shards are asked for
LOCATED_TOGETHER = 4096  # samples
VALIDATION_KEYS = 1 << 62  # validation draws never meet the noise of a training sample


@dataclass(frozen=True)
class StepInputs:
    """One optimizer step's share of this rank.

    first: global index of the global batch's first sample; micro_batches: on the loader's device, valid until
    the next step is asked for; digest: int64, to be summed over ranks (wrapping) and shown by `digest_text`;
    waited: seconds the caller waited for it.
    """

    first: int
    micro_batches: list[Batch]
    digest: int
    waited: float


@dataclass(frozen=True)
class RankSlice:
    """How `total` samples fall to one of `ranks` ranks: rows [start, stop), in `count` micro-batches of `size` rows."""

    start: int
    stop: int
    count: int
    size: int

    @classmethod
    def of(cls, total: int, rank: int, ranks: int, micro_batch: int) -> "RankSlice":
        """micro_batch: the most rows in one micro-batch; 0 for all at once."""
        largest = -(-total // ranks)
        count = -(-largest // micro_batch) if micro_batch else 1
        return cls(rank * total // ranks, (rank + 1) * total // ranks, count, -(-largest // count))

    @property
    def rows(self) -> int:
        return self.count * self.size


class _Buffer:
    """One step's rows, reused: pinned on CUDA hosts, with their copy to the device on a stream of its own."""

    def __init__(self, share: RankSlice, shards: Shards, device: torch.device, text: bool) -> None:
        self._share, self._device = share, device
        cuda = device.type == "cuda"
        self.host = Batch.padding(share.rows, shards.manifest, pin=cuda, text=text)
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None
        self._on_device = self.host
        self.digest = 0

    def wait_until_free(self) -> None:
        """Block until the last copy out of this buffer is done."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self) -> None:
        """Start the copy to the device."""
        if self._stream is not None and self._copied is not None:
            with torch.cuda.stream(self._stream):
                self._on_device = self.host.to(self._device)
                self._copied.record(self._stream)

    def batches(self) -> list[Batch]:
        """The micro-batches, ordered after the copy on the caller's stream."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied)
            for _, value in self._on_device.tensors():
                value.record_stream(current)
        size = self._share.size
        return [self._on_device.rows(i * size, (i + 1) * size) for i in range(self._share.count)]


class _Loader:
    """Threads that fill buffers in order. Close it, or use it as a context manager."""

    def __init__(
        self,
        share: RankSlice,
        shards: Shards,
        device: torch.device | str,
        threads: int,
        ahead: int,
        condition_on: str,
    ) -> None:
        self.share, self.shards, self.device = share, shards, torch.device(device)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ldt-loader")
        self.condition_on = condition_on
        text = condition_on != "class"
        self._buffers = [_Buffer(share, shards, self.device, text) for _ in range(ahead + 1)]

    def _run(self, fill: Callable[[int, _Buffer], None], jobs: Iterable[int]) -> Iterator[tuple[int, _Buffer, float]]:
        """Fill a buffer for each job, several ahead; yield them in order with the seconds waited."""

        def work(item: tuple[int, _Buffer]) -> None:
            job, buffer = item
            buffer.wait_until_free()
            fill(job, buffer)
            buffer.send()

        items = zip(jobs, itertools.cycle(self._buffers), strict=False)
        done = ahead(self._pool, work, items, depth=len(self._buffers) - 1)
        with contextlib.closing(done):
            while True:
                started = time.perf_counter()
                item = next(done, None)
                if item is None:
                    return
                yield *item[0], time.perf_counter() - started

    def close(self) -> None:
        """Stop the threads; what they are doing is finished first."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LocationCache:
    """Where a rank's samples lie, found for several steps at once: much of the cost is a call's, not a sample's."""

    def __init__(self, order: Order | MixedOrder, share: RankSlice) -> None:
        self._order, self._slots = order, np.arange(share.start, share.stop)
        self._steps = min(64, max(1, LOCATED_TOGETHER // max(1, len(self._slots))))
        self._kept: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, first: int) -> tuple[Ints, Ints]:
        """(shard, sample in shard) of the rank's samples of the step at global index `first`. Thread-safe."""
        block, row = divmod(first // self._order.batch, self._steps)
        with self._lock:
            if block not in self._kept:
                step_n = block * self._steps + np.arange(self._steps)
                index_n = (step_n[:, None] * self._order.batch + self._slots).ravel()
                self._kept[block] = self._order.locate(index_n)
                if len(self._kept) > 4 + 2 * PREFETCH_STEPS // self._steps:
                    self._kept.popitem(last=False)
            shard_n, sample_n = self._kept[block]
        rows = slice(row * len(self._slots), (row + 1) * len(self._slots))
        return shard_n[rows], sample_n[rows]


class Loader(_Loader):
    """Endless training steps.

    shards: the data; batch: global batch size; seed, streams, window: of the order and of all draws; micro_batch: most
    samples of one forward pass, 0 for the rank's whole share; label_drop: probability with which a sample loses its
    condition; condition_on: class, text or class_and_text; threads, ahead: how many fill buffers and how many steps
    ahead.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch: int,
        seed: int,
        streams: int = 8,
        window: int = 1 << 16,
        rank: int = 0,
        ranks: int = 1,
        micro_batch: int = 0,
        label_drop: float = 0.0,
        condition_on: str = "class",
        device: torch.device | str = "cpu",
        threads: int = 2,
        ahead: int = 4,
    ) -> None:
        self.order = _order_of(shards, seed, batch, streams, window)
        self.batch, self.seed, self.label_drop = batch, seed, label_drop
        self._start_of_shard = np.cumsum(self.order.counts) - self.order.counts
        self._downloads = ThreadPoolExecutor(4, thread_name_prefix="ldt-download") if shards.cache else None
        self._asked: OrderedDict[int, None] = OrderedDict()
        share = RankSlice.of(batch, rank, ranks, micro_batch)
        self._places = LocationCache(self.order, share)
        super().__init__(share, shards, device, threads, ahead, condition_on)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches every step has."""
        return self.share.count

    def steps(self, samples_seen: int = 0) -> Iterator[StepInputs]:
        """Steps from a multiple of the global batch on, at once, wherever that is."""
        if samples_seen % self.batch:
            raise InputError(f"samples_seen={samples_seen} is not a multiple of the global batch of {self.batch}")
        for first, buffer, waited in self._run(self._fill, self._positions(samples_seen)):
            yield StepInputs(first, buffer.batches(), buffer.digest, waited)

    def _positions(self, samples_seen: int) -> Iterator[int]:
        """First index of each step; remote shards are asked for on the way."""
        ahead = PREFETCH_STEPS * self.batch
        if self._downloads is not None:
            for first in range(samples_seen, samples_seen + ahead, self.batch):
                self._prefetch(first)
        for first in range(samples_seen, 1 << 62, self.batch):
            if self._downloads is not None:
                self._prefetch(first + ahead)
            yield first

    def close(self) -> None:
        """Stop the threads; downloads that have begun are finished, so that nothing half-done stays behind."""
        if self._downloads is not None:
            self._downloads.shutdown(wait=True, cancel_futures=True)
        super().close()

    def _prefetch(self, first: int) -> None:
        """Ask for the shards of the step at `first`, once each while they are likely to be in use."""
        assert self._downloads is not None
        shard_n, _ = self._places.of(first)
        for shard in np.unique(shard_n).tolist():
            if shard not in self._asked:
                self._downloads.submit(self.shards.fetch, shard)  # an error comes again when the shard is read
            self._asked[shard] = None
            self._asked.move_to_end(shard)
        while len(self._asked) > 4096:
            self._asked.popitem(last=False)

    def _fill(self, first: int, buffer: _Buffer) -> None:
        index_n = first + np.arange(self.share.start, self.share.stop)
        shard_n, sample_n = self._places.of(first)
        flip = self.shards.manifest.flips
        drop, told = self.label_drop, self.condition_on
        fill(buffer.host, self.shards, index_n, shard_n, sample_n, self.seed, drop, flip, told)
        buffer.digest = digest(buffer.host, self._start_of_shard[shard_n] + sample_n)


def _order_of(shards: Shards, seed: int, batch: int, streams: int, window: int) -> Order | MixedOrder:
    if isinstance(shards, MixedShards):
        counts_S = [s.manifest.counts for s in shards.sources.values()]
        return MixedOrder(counts_S, list(shards.parts.values()), seed, batch, streams, window)
    return Order(shards.manifest.counts, seed, batch, streams, window)


class ValidationLoader(_Loader):
    """The held-out samples, each once, with the same draws every time: no flips, no dropped labels.

    limit: use only the first so many (0 for all). index_B is the sample's number in the split.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seed: int,
        micro_batch: int,
        rank: int = 0,
        ranks: int = 1,
        limit: int = 0,
        condition_on: str = "class",
        device: torch.device | str = "cpu",
        threads: int = 1,
        ahead: int = 2,
    ) -> None:
        total = min(limit or shards.manifest.samples, shards.manifest.samples)
        if total == 0:
            raise InputError(f"{shards.path} holds no samples; encode with a larger validation_fraction")
        self.seed, self.total = seed, total
        self._whole = RankSlice.of(total, rank, ranks, micro_batch)
        self._ends = np.cumsum(shards.manifest.counts)
        one = RankSlice(0, self._whole.size, 1, self._whole.size)
        super().__init__(one, shards, device, threads, ahead, condition_on)

    def batches(self) -> Iterator[Batch]:
        """One pass; every rank yields the same number of batches of the same size."""
        size = self._whole.size
        for _, buffer, _ in self._run(self._fill, range(0, self._whole.rows, size)):
            yield buffer.batches()[0]

    def _fill(self, offset: int, buffer: _Buffer) -> None:
        start = self._whole.start + offset
        number_n = np.arange(start, max(start, min(start + self.share.size, self._whole.stop)))
        shard_n = np.searchsorted(self._ends, number_n, "right")
        sample_n = number_n - (self._ends - self.shards.manifest.counts)[shard_n]
        key_n = VALIDATION_KEYS + number_n
        buffer.host.weight_B.zero_()
        fill(buffer.host, self.shards, key_n, shard_n, sample_n, self.seed, 0.0, False, self.condition_on)
        buffer.host.index_B.numpy()[:] = -1
        buffer.host.index_B.numpy()[: len(number_n)] = number_n
