"""What has been encoded of one output shard, on its way from the networks into the file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldt.data.shards.layout import Layout, Samples

BLOCK_NUMBERS = 1 << 25  # whose float64 copies are in memory at a time


@dataclass(frozen=True)
class EncodedBatch:
    """moments: a tensor [B, 2 or 1, C, H, W] for each view, the second of which is the mirrored image.

    text: what the text encoder made of the captions; None, and no captions, without one. files: as `Loaded` has them.
    targets: features of patches [B, D, G, G] for each view; empty without a network that makes them.
    """

    moments: tuple[torch.Tensor, ...]
    labels: list[int]
    captions: list[str]
    text: NDArray[np.generic] | None
    files: list[str]
    targets: tuple[NDArray[np.float16], ...] = ()


def pack(batches: Sequence[EncodedBatch], layout: Layout) -> Samples:
    """The batches of one shard in the bits that are stored."""
    views = [layout.pack(torch.cat(view)) for view in zip(*(b.moments for b in batches), strict=True)]
    texts = [b.text for b in batches if b.text is not None]
    return Samples(
        np.array([label for b in batches for label in b.labels], np.int64),
        views[0],
        views[1] if layout.flips else None,
        [caption.encode() for b in batches for caption in b.captions] if layout.captions else None,
        np.concatenate(texts) if texts else None,
        *(np.concatenate(view) for view in zip(*(b.targets for b in batches), strict=True)),
    )


def blocks(packed: NDArray[np.generic], layout: Layout) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Moments [n, 2 or 1, C, H, W] of some consecutive samples at a time, with the number of the first of them."""
    rows = max(1, min(256, BLOCK_NUMBERS // prod(layout.moments_shape)))
    for start in range(0, len(packed), rows):
        yield start, layout.unpack(packed[start : start + rows].view(np.uint8))


def first_not_finite(block: NDArray[Any]) -> int | None:
    """The number of the first sample that holds an infinity or NaN."""
    bad = ~np.isfinite(block).reshape(len(block), -1).all(1)
    return int(bad.argmax()) if bad.any() else None
