"""A rank's rows of one step: which samples they are, how they fall into micro-batches, and the memory they lie in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch

from ldt.data.batch import Batch, Ints, Located, SampleDraws
from ldt.data.digest import device_digest, digest
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
    """One step's rows, reused. On CUDA the host's are pinned and are copied on a stream of the buffer's own, where
    latents and noise are drawn too (runs of version 2 draw on the host and copy what was drawn).

    The batches of all buckets lie in the same memory, of which a step uses one.
    """

    def __init__(
        self, shares: Sequence[RankSlice], shards: Sequence[Shards], device: torch.device, draws: SampleDraws
    ) -> None:
        self._shares, self._shards, self._device, self._bucket = shares, shards, device, 0
        cuda = device.type == "cuda"
        self._hosts = _shared_batches([s.rows for s in shares], shards, cuda, draws)
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None
        self._on_device = self._hosts[0]
        self.digest = 0

    def wait_until_free(self) -> None:
        """Block until the last copy out of this buffer is done."""
        if self._copied is not None:
            self._copied.synchronize()

    def load(self, bucket: int, draws: SampleDraws, samples: Located, index_n: Ints, ordinal_n: Ints) -> None:
        """Read the samples of a bucket, draw for them and hash what came out; the rest of the rows is padding.

        index_n: the numbers that the batch shows; ordinal_n: the samples' places in the data set.
        """
        self._bucket = bucket
        if self._stream is None or self._copied is None:
            self._on_device = self._draw_on_host(draws, samples, index_n, ordinal_n)
            return
        with torch.cuda.stream(self._stream):
            if draws.version == 2:
                self._on_device = self._draw_on_host(draws, samples, index_n, ordinal_n).to(self._device)
            else:
                self._draw_on_device(draws, samples, index_n, ordinal_n)
            self._copied.record(self._stream)

    def _draw_on_host(self, draws: SampleDraws, samples: Located, index_n: Ints, ordinal_n: Ints) -> Batch:
        host, n = self._hosts[self._bucket], len(index_n)
        draws.fill(host, self._shards[self._bucket], samples)
        host.index_B.numpy()[:n] = index_n
        if len(self._hosts) > 1:  # other buckets write there
            host.latent_BCHW[n:], host.noise_BCHW[n:] = 0.0, 0.0
        self.digest = digest(host, ordinal_n, draws.version)
        return host

    def _draw_on_device(self, draws: SampleDraws, samples: Located, index_n: Ints, ordinal_n: Ints) -> None:
        """Read mean and deviation alone on the host, into the places of latent and noise.

        The digest is waited for, by the loader's thread and on the buffer's stream.
        """
        host, shards, n = self._hosts[self._bucket], self._shards[self._bucket], len(index_n)
        records = draws.read(shards, samples, text=host.text is not None)
        draws.draw_all_but_latents(host, shards.manifest, records, samples.key_n)
        host.index_B.numpy()[:n] = index_n
        host.latent_BCHW.numpy()[:n] = records.mean_nCHW
        if shards.manifest.posterior:
            host.noise_BCHW.numpy()[:n] = records.std_nCHW
        read = host.to(self._device)
        latent_BCHW, noise_BCHW = torch.zeros_like(read.latent_BCHW), torch.zeros_like(read.noise_BCHW)
        std_nCHW = read.noise_BCHW[:n] if shards.manifest.posterior else None
        key_n, whitening = self._there(samples.key_n), tuple(map(self._there, shards.manifest.whitening))
        draws.draw_latents(latent_BCHW[:n], noise_BCHW[:n], key_n, read.latent_BCHW[:n], std_nCHW, whitening)
        ordinal_B = torch.zeros_like(read.index_B)
        ordinal_B[:n] = self._there(ordinal_n)
        self._on_device = replace(read, latent_BCHW=latent_BCHW, noise_BCHW=noise_BCHW)
        self.digest = int(device_digest(self._on_device, ordinal_B))

    def _there(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def batches(self) -> list[Batch]:
        """The micro-batches, ordered after the copy on the caller's stream."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied)
            for _, value in self._on_device.tensors():
                value.record_stream(current)
        share, second_B = self._shares[self._bucket], self._hosts[self._bucket].second_B
        starts = range(0, share.rows, share.size)
        batches = [self._on_device.rows(start, start + share.size) for start in starts]
        if second_B is None:
            return batches
        counts = [int(np.count_nonzero(second_B.numpy()[start : start + share.size])) for start in starts]
        return [replace(batch, intervals=count) for batch, count in zip(batches, counts, strict=True)]


def _shared_batches(rows: Sequence[int], shards: Sequence[Shards], pin: bool, draws: SampleDraws) -> list[Batch]:
    """A batch of padding for each bucket, over one memory: the real rows are the same ones in all of them."""

    def padding(k: int) -> Batch:
        has = (draws.uses_text, draws.mean_flow > 0, draws.target, draws.token)
        return Batch.padding(rows[k], shards[k].manifest, pin, *has)

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
