"""The loader: this rank's micro-batches of each optimizer step, drawn ahead of time by threads.

Rank r of W takes slots [r·B//W, (r+1)·B//W) of every global batch of B samples, so the samples of a step never depend
on W. Every rank makes the same number of equal micro-batches; a rank short of samples pads with rows of weight 0.
With buckets every global batch is of one of them, and so is all that is said here of a step: buckets of smaller latents
have fewer and larger micro-batches.
"""

import contextlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import torch

from ldt.cluster.gpus import use_device
from ldt.data.batch import Batch, Ints, Located, SampleDraws
from ldt.data.bucket_order import BucketOrder
from ldt.data.buffer import Buffer, RankSlice
from ldt.data.mixture import MixedOrder
from ldt.data.order import Order
from ldt.data.prefetch import prefetch
from ldt.data.shards import BucketShards, MixedShards, Shards
from ldt.errors import InputError

PREFETCH_STEPS = 32  # how far ahead of the position remote shards are asked for
LOCATED_TOGETHER = 4096  # samples
VALIDATION_KEYS = 1 << 62  # validation draws never meet the noise of a training sample

AnyOrder = Order | MixedOrder | BucketOrder
AnyShards = Shards | BucketShards


@dataclass(frozen=True)
class StepInputs:
    """One optimizer step's share of this rank.

    first: global index of the global batch's first sample; micro_batches: on the loader's device, valid until
    the next step is asked for; digest: int64, to be summed over ranks (wrapping) and shown by `digest_text`;
    waited: seconds the caller waited for it; bucket: the name of the step's bucket, if the data have buckets.
    """

    first: int
    micro_batches: list[Batch]
    digest: int
    waited: float
    bucket: str = ""


class _Loader:
    """Threads that fill buffers in order. Close it, or use it as a context manager."""

    def __init__(
        self,
        shares: Sequence[RankSlice],
        shards: Sequence[Shards],
        draws: SampleDraws,
        device: torch.device | str,
        threads: int,
        ahead: int,
    ) -> None:
        self.shares, self.draws, self.device = shares, draws, torch.device(device)
        self._pool = ThreadPoolExecutor(threads, "ldt-loader", initializer=use_device, initargs=(self.device,))
        self._buffers = [Buffer(shares, shards, self.device, draws) for _ in range(ahead + 1)]

    def _run(
        self, find: Callable[[int], tuple[int, Located, Ints, Ints]], jobs: Iterable[int]
    ) -> Iterator[tuple[int, Buffer, float]]:
        """Load a buffer for each job, several ahead; yield them in order with the seconds waited.

        find: the bucket of a job, its samples, the numbers that the batch shows for them, and their places in the data.
        """

        def work(item: tuple[int, Buffer]) -> None:
            job, buffer = item
            bucket, samples, index_n, ordinal_n = find(job)
            buffer.wait_until_free()
            buffer.load(bucket, self.draws, samples, index_n, ordinal_n)

        items = zip(jobs, itertools.cycle(self._buffers), strict=False)
        done = prefetch(self._pool, work, items, depth=len(self._buffers) - 1)
        with contextlib.closing(done):
            while True:
                started = time.perf_counter()
                item = next(done, None)
                if item is None:
                    return
                yield *item[0], time.perf_counter() - started

    def use_random_numbers(self, version: int) -> None:
        """Draw with this version, that of the run, from the next pass on."""
        self.draws = replace(self.draws, version=version)

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
    """Where a rank's samples lie, looked up for several steps at once, because most of the cost is per call."""

    def __init__(self, order: AnyOrder, share: RankSlice) -> None:
        self._order, self._slots = order, np.arange(share.start, share.stop)
        self._steps = min(64, max(1, LOCATED_TOGETHER // max(1, len(self._slots))))
        self._kept: OrderedDict[tuple[int, int], Located] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, first: int) -> Located:
        """The rank's samples of the step whose global batch begins at index `first`, any index. Thread-safe."""
        number, offset = divmod(first, self._order.batch)
        block, row = divmod(number, self._steps)
        with self._lock:
            if (block, offset) not in self._kept:
                step_n = block * self._steps + np.arange(self._steps)
                index_n = (step_n[:, None] * self._order.batch + offset + self._slots).ravel()
                self._kept[block, offset] = Located(index_n, *self._order.locate(index_n))
                if len(self._kept) > 4 + 2 * PREFETCH_STEPS // self._steps:
                    self._kept.popitem(last=False)
            kept = self._kept[block, offset]
        rows = slice(row * len(self._slots), (row + 1) * len(self._slots))
        return Located(*(array[rows] for array in kept))


class Loader(_Loader):
    """Endless training steps over `order`'s samples, of which this rank reads `share`, one for each bucket.

    draws: the random choices about each sample; threads, ahead: how many fill buffers, and how many steps ahead.
    """

    def __init__(
        self,
        shards: AnyShards,
        order: AnyOrder,
        share: RankSlice | Sequence[RankSlice],
        draws: SampleDraws,
        device: torch.device | str = "cpu",
        threads: int = 2,
        ahead: int = 4,
    ) -> None:
        self.shards, self.order, self.batch = shards, order, order.batch
        shares, views = [share] if isinstance(share, RankSlice) else share, views_of(shards)
        self._start_of_shard = np.cumsum(order.counts) - order.counts
        self._downloads = ThreadPoolExecutor(4, thread_name_prefix="ldt-download") if shards.cache else None
        self._asked: OrderedDict[int, None] = OrderedDict()
        self._locations = LocationCache(order, shares[0])  # all shares have the same slots
        super().__init__(shares, list(views.values()), draws, device, threads, ahead)

    @property
    def share(self) -> RankSlice:
        """Of the steps with the most micro-batches: those of the largest latents."""
        return max(self.shares, key=lambda share: share.count)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a step has, at the most."""
        return self.share.count

    def steps(self, samples_seen: int = 0) -> Iterator[StepInputs]:
        """The steps from a global index on. Starting far into a run takes no longer than at its beginning."""
        for first, buffer, waited in self._run(self._find, self._positions(samples_seen)):
            yield StepInputs(first, buffer.batches(), buffer.digest, waited, self.bucket_name(first))

    def check_position(self, samples_seen: int) -> None:
        """Refuse to begin in the middle of a bucket's global batch."""
        if isinstance(self.order, BucketOrder) and samples_seen % self.batch:
            raise InputError(
                f"a global batch is of one bucket, and none of train.global_batch={self.batch} begins at "
                f"{samples_seen:,} samples; go on with a size that divides them"
            )

    def bucket_name(self, first: int) -> str:
        """The bucket of the step at an index; nothing where there are no buckets."""
        return self.shards.names[self._bucket(first)] if isinstance(self.shards, BucketShards) else ""

    def _bucket(self, first: int) -> int:
        return self.order.bucket_of(first) if isinstance(self.order, BucketOrder) else 0

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
        for shard in np.unique(self._locations.of(first).shard_n).tolist():
            if shard not in self._asked:
                self._downloads.submit(self.shards.fetch, shard)  # an error comes again when the shard is read
            self._asked[shard] = None
            self._asked.move_to_end(shard)
        while len(self._asked) > 4096:
            self._asked.popitem(last=False)

    def _find(self, first: int) -> tuple[int, Located, Ints, Ints]:
        samples, bucket, shards = self._locations.of(first), self._bucket(first), self.shards
        ordinal_n = self._start_of_shard[samples.shard_n] + samples.sample_n
        if isinstance(shards, BucketShards):
            samples = samples._replace(shard_n=samples.shard_n - shards.first_S[bucket])
        return bucket, samples, samples.key_n, ordinal_n


def views_of(shards: AnyShards) -> dict[str, Shards]:
    """The buckets of data by name; of data without buckets all, under no name."""
    return dict(zip(shards.names, shards.views, strict=True)) if isinstance(shards, BucketShards) else {"": shards}


def make_order(shards: AnyShards, seed: int, batch: int, streams: int, window: int) -> AnyOrder:
    """The order of a data set's samples, or of those of several mixed ones, in global batches of `batch`."""
    if isinstance(shards, BucketShards):
        for name, view in views_of(shards).items():
            if view.manifest.samples < batch:
                raise InputError(
                    f"bucket {name} of {shards.path} has {view.manifest.samples:,} images, and a global batch is of "
                    f"one bucket; lower train.global_batch={batch}, or encode without this bucket"
                )
        return BucketOrder([view.manifest.counts for view in shards.views], seed, batch, streams, window)
    if isinstance(shards, MixedShards):
        counts_S = [s.manifest.counts for s in shards.sources.values()]
        return MixedOrder(counts_S, list(shards.parts.values()), seed, batch, streams, window)
    return Order(shards.manifest.counts, seed, batch, streams, window)


class ValidationLoader(_Loader):
    """The held-out samples, each once, with the same draws every time: no flips, no dropped labels.

    share: this rank's part of the split, in micro-batches. index_B is the sample's number in the split; first: of the
    split's first sample, where it is one of several.
    """

    def __init__(
        self,
        shards: Shards,
        draws: SampleDraws,
        share: RankSlice,
        device: torch.device | str = "cpu",
        threads: int = 1,
        ahead: int = 2,
        first: int = 0,
    ) -> None:
        self.shards, self._whole, self._first = shards, share, first
        self._ends = np.cumsum(shards.manifest.counts)
        one = RankSlice(0, share.size, 1, share.size)
        super().__init__([one], [shards], draws, device, threads, ahead)

    @property
    def parts(self) -> "dict[str, ValidationLoader]":
        """By bucket; here there are none."""
        return {"": self}

    def batches(self) -> Iterator[Batch]:
        """One pass; every rank yields the same number of batches of the same size."""
        size = self._whole.size
        for _, buffer, _ in self._run(self._find, range(0, self._whole.rows, size)):
            yield buffer.batches()[0]

    def _find(self, offset: int) -> tuple[int, Located, Ints, Ints]:
        start = self._whole.start + offset
        number_n = np.arange(start, max(start, min(start + self.shares[0].size, self._whole.stop)))
        shard_n = np.searchsorted(self._ends, number_n, "right")
        sample_n = number_n - (self._ends - self.shards.manifest.counts)[shard_n]
        number_n += self._first
        return 0, Located(VALIDATION_KEYS + number_n, shard_n, sample_n), number_n, number_n


class BucketValidation:
    """Validation loaders by bucket, as a context manager of them all."""

    def __init__(self, parts: dict[str, ValidationLoader]) -> None:
        self.parts = parts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for part in self.parts.values():
            part.close()
