"""A rank's rows of one step: which samples they are, how they fall into micro-batches, and the memory they lie in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from ldt.data.batch import Batch, SampleDraws
from ldt.data.shards import Shards


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

    @classmethod
    def by_bucket(
        cls, total: int, rank: int, ranks: int, micro_batch: int, shapes: Sequence[Sequence[int]]
    ) -> "list[RankSlice]":
        """One for each latent shape. micro_batch: of the largest; of others as many times more as they are smaller."""
        numbers = [prod(shape) for shape in shapes]
        return [cls.of(total, rank, ranks, micro_batch * max(numbers) // n) for n in numbers]

    @property
    def rows(self) -> int:
        return self.count * self.size


class Buffer:
    """One step's rows, reused: pinned on CUDA hosts, with their copy to the device on a stream of its own.

    The batches of all buckets lie in the same memory, of which a step uses one.
    """

    def __init__(
        self, shares: Sequence[RankSlice], shards: Sequence[Shards], device: torch.device, draws: SampleDraws
    ) -> None:
        self._shares, self._device, self._bucket = shares, device, 0
        cuda = device.type == "cuda"
        self._hosts = _shared_batches([s.rows for s in shares], shards, cuda, draws)
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None
        self._on_device = self._hosts[0]
        self.digest = 0

    def choose(self, bucket: int) -> Batch:
        """The batch to be filled for a step of that bucket."""
        self._bucket = bucket
        return self._hosts[bucket]

    def wait_until_free(self) -> None:
        """Block until the last copy out of this buffer is done."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self) -> None:
        """Start the copy to the device."""
        if self._stream is None or self._copied is None:
            self._on_device = self._hosts[self._bucket]
            return
        with torch.cuda.stream(self._stream):
            self._on_device = self._hosts[self._bucket].to(self._device)
            self._copied.record(self._stream)

    def batches(self) -> list[Batch]:
        """The micro-batches, ordered after the copy on the caller's stream."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied)
            for _, value in self._on_device.tensors():
                value.record_stream(current)
        share = self._shares[self._bucket]
        return [self._on_device.rows(i * share.size, (i + 1) * share.size) for i in range(share.count)]


def _shared_batches(rows: Sequence[int], shards: Sequence[Shards], pin: bool, draws: SampleDraws) -> list[Batch]:
    """A batch of padding for each bucket, over one memory: the real rows are the same ones in all of them."""

    def padding(k: int) -> Batch:
        return Batch.padding(rows[k], shards[k].manifest, pin, draws.uses_text, draws.mean_flow > 0, draws.target)

    shapes = [s.manifest.latent_shape for s in shards]
    largest = max(range(len(rows)), key=lambda k: rows[k] * prod(shapes[k]))
    whole = padding(largest)
    if len(rows) == 1:
        return [whole]
    most = max(range(len(rows)), key=lambda k: rows[k])
    others = whole if rows[most] == rows[largest] else padding(most)

    def view(k: int, memory: torch.Tensor) -> torch.Tensor:
        return memory.view(-1)[: rows[k] * prod(shapes[k])].view(rows[k], *shapes[k])

    return [
        replace(others.rows(0, rows[k]), latent_BCHW=view(k, whole.latent_BCHW), noise_BCHW=view(k, whole.noise_BCHW))
        for k in range(len(rows))
    ]
