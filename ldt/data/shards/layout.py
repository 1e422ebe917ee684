"""What one stored sample is, independent of the file format around it.

A sample is its label and its posterior moments: one array [2, C, H, W] of mean and standard deviation, and with
`flips` a second one of the mirrored image. Moments are raw autoencoder output; whitening happens at load.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

LABEL, MOMENTS, FLIPPED = "label", "moments", "moments_flipped"

# numpy has no bfloat16: its bits are stored as unsigned integers and the manifest says what they are
STORED: dict[str, np.dtype[Any]] = {"fp16": np.dtype("<f2"), "bf16": np.dtype("<u2"), "fp32": np.dtype("<f4")}
_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """latent_shape: (C, H, W); dtype: fp16, bf16 or fp32; flips: whether mirrored moments are there too."""

    latent_shape: tuple[int, int, int]
    dtype: str
    flips: bool

    @property
    def moments_shape(self) -> tuple[int, int, int, int]:
        return (2, *self.latent_shape)

    @property
    def moments_bytes(self) -> int:
        return prod(self.moments_shape) * STORED[self.dtype].itemsize

    def pack(self, moments: torch.Tensor) -> NDArray[np.generic]:
        """Moments of any shape as they are stored: a numpy array of STORED[dtype]."""
        rounded = moments.detach().cpu().contiguous().to(_TORCH[self.dtype])
        return rounded.view(torch.uint16).numpy() if self.dtype == "bf16" else rounded.numpy()

    def unpack(self, raw_nb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Stored bytes of n samples as float32 [n, 2, C, H, W]."""
        stored = torch.from_numpy(raw_nb.reshape(-1).view(STORED[self.dtype])).view(_TORCH[self.dtype])
        return stored.to(torch.float32).numpy().reshape(-1, *self.moments_shape)


@dataclass(frozen=True)
class Index:
    """Where the samples of one shard lie: labels, and byte offsets of each sample's moments."""

    label_n: NDArray[np.int64]
    moments_n: NDArray[np.int64]
    flipped_n: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.label_n)


@dataclass(frozen=True)
class Samples:
    """Samples about to be written. moments (and flipped, or None): STORED[dtype] [n, 2, C, H, W]; label int64 [n]."""

    label_n: NDArray[np.int64]
    moments_n2CHW: NDArray[np.generic]
    flipped_n2CHW: NDArray[np.generic] | None

    def __len__(self) -> int:
        return len(self.label_n)

    def content_hash(self) -> int:
        """xxh64 of labels and moments in their stored bits: the same whatever format they are written in."""
        digest = xxhash.xxh64(np.ascontiguousarray(self.label_n, "<i8").data)
        for moments in (self.moments_n2CHW, self.flipped_n2CHW):
            if moments is not None:
                digest.update(np.ascontiguousarray(moments).data)
        return digest.intdigest()
