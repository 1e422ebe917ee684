"""What one stored sample is, independent of the file format around it.

A sample is its label and its posterior moments: one array [2, C, H, W] of mean and standard deviation, and with
`flips` a second one of the mirrored image. Of an autoencoder without a posterior there is no deviation, and the array
is [1, C, H, W]. Moments are raw autoencoder output; whitening happens at load. With captions it also has its caption in
UTF-8, of any length, and with a text encoder what that makes of it: token numbers uint16 [M], or features float16
[M, F], zero where there is no text. With a target it also has the features of its image's patches that another
network is to be aligned with, float16 [D, G, G], and with `flips` those of the mirrored image.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ldt.errors import InputError
from ldt.nn.text_shape import TextShape

if TYPE_CHECKING:
    import torch

LABEL, MOMENTS, FLIPPED, CAPTION, TEXT = "label", "moments", "moments_flipped", "caption", "text"
TARGET, TARGET_FLIPPED = "target", "target_flipped"
TARGET_DTYPE = np.dtype("<f2")

# numpy has no bfloat16: its bits are stored as unsigned integers and the manifest says what they are
STORED: dict[str, np.dtype[Any]] = {"fp16": np.dtype("<f2"), "bf16": np.dtype("<u2"), "fp32": np.dtype("<f4")}
# names in torch, which is imported late: job scripts read manifests
_TORCH = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Layout:
    """latent_shape: (C, H, W); dtype: fp16, bf16 or fp32; flips: whether mirrored moments are there too.

    captions: whether captions are there; text: of what an encoder made of them, or None; posterior: whether moments
    have a standard deviation beside the mean; target: the shape of features of patches [D, G, G], or None.
    """

    latent_shape: tuple[int, int, int]
    dtype: str
    flips: bool
    captions: bool = False
    text: TextShape | None = None
    posterior: bool = True
    target: tuple[int, int, int] | None = None

    @property
    def moments_shape(self) -> tuple[int, int, int, int]:
        return (2 if self.posterior else 1, *self.latent_shape)

    @property
    def moments_bytes(self) -> int:
        return prod(self.moments_shape) * STORED[self.dtype].itemsize

    @property
    def text_shape(self) -> tuple[int, ...]:
        assert self.text is not None
        return (self.text.length,) if self.text.vocabulary else (self.text.length, self.text.width)

    @property
    def text_dtype(self) -> np.dtype[Any]:
        assert self.text is not None
        return np.dtype("<u2") if self.text.vocabulary else np.dtype("<f2")

    @property
    def text_bytes(self) -> int:
        return prod(self.text_shape) * self.text_dtype.itemsize

    @property
    def target_bytes(self) -> int:
        assert self.target is not None
        return prod(self.target) * TARGET_DTYPE.itemsize

    @property
    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """dtype and shape of each array of a sample, by name, in the order in which they are stored."""
        moments, target = (STORED[self.dtype], self.moments_shape), (TARGET_DTYPE, self.target or ())
        out: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {MOMENTS: moments}
        out |= {FLIPPED: moments} if self.flips else {}
        out |= {TARGET: target} if self.target else {}
        out |= {TARGET_FLIPPED: target} if self.target and self.flips else {}
        return out | ({TEXT: (self.text_dtype, self.text_shape)} if self.text else {})

    def pack(self, moments: "torch.Tensor") -> NDArray[np.generic]:
        """Moments of any shape as they are stored: a numpy array of STORED[dtype]."""
        import torch

        rounded = moments.detach().cpu().contiguous().to(getattr(torch, _TORCH[self.dtype]))
        return rounded.view(torch.uint16).numpy() if self.dtype == "bf16" else rounded.numpy()

    def unpack(self, raw_nb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Stored bytes of n samples as float32 [n, 2 or 1, C, H, W]."""
        import torch

        stored = torch.from_numpy(raw_nb.reshape(-1).view(STORED[self.dtype]))
        return (
            stored.view(getattr(torch, _TORCH[self.dtype])).to(torch.float32).numpy().reshape(-1, *self.moments_shape)
        )


@dataclass(frozen=True)
class Index:
    """Where the samples of one shard lie: labels, and byte offsets of each sample's moments, text and targets.

    caption_n2: offset and size of each caption.
    """

    label_n: NDArray[np.int64]
    moments_n: NDArray[np.int64]
    flipped_n: NDArray[np.int64] | None
    text_n: NDArray[np.int64] | None = None
    caption_n2: NDArray[np.int64] | None = None
    target_n: NDArray[np.int64] | None = None
    target_flipped_n: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.label_n)


def make_index(
    layout: Layout,
    label_n: NDArray[np.int64],
    place: Mapping[str, NDArray[np.int64]],
    caption_n2: NDArray[np.int64] | None = None,
) -> Index:
    """The index from the offsets of each of the layout's arrays by name."""
    assert place.keys() == layout.arrays.keys(), place.keys()
    flipped_n, text_n, *targets = (place.get(name) for name in (FLIPPED, TEXT, TARGET, TARGET_FLIPPED))
    return Index(label_n, place[MOMENTS], flipped_n, text_n, caption_n2, *targets)


def refuse_targets(arrays: Collection[str], shard: str) -> None:
    """Refuse a shard of another writer with targets among its arrays: it does not say by which network."""
    if TARGET in arrays:
        raise InputError(
            f"shard {shard} holds features to align with (.{TARGET}), and nothing in it says which network made them; "
            "encode the images with target=, or write the shards again without them"
        )


@dataclass(frozen=True)
class Samples:
    """Samples about to be written. moments (and flipped, or None): STORED[dtype] [n, 2 or 1, C, H, W]; label int64 [n].

    captions: UTF-8; text and targets: as `Layout` says.
    """

    label_n: NDArray[np.int64]
    moments_n2CHW: NDArray[np.generic]
    flipped_n2CHW: NDArray[np.generic] | None
    captions: list[bytes] | None = None
    text_n: NDArray[np.generic] | None = None
    target_n: NDArray[np.generic] | None = None
    target_flipped_n: NDArray[np.generic] | None = None

    def __len__(self) -> int:
        return len(self.label_n)

    @property
    def views(self) -> list[NDArray[np.generic]]:
        """The moments as they are and, where they are there too, mirrored."""
        return [self.moments_n2CHW] if self.flipped_n2CHW is None else [self.moments_n2CHW, self.flipped_n2CHW]

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Those that are there by name, in the order of `Layout.arrays`."""
        named = (
            (MOMENTS, self.moments_n2CHW),
            (FLIPPED, self.flipped_n2CHW),
            (TARGET, self.target_n),
            (TARGET_FLIPPED, self.target_flipped_n),
            (TEXT, self.text_n),
        )
        return {name: array for name, array in named if array is not None}

    def content_hash(self) -> int:
        """xxh64 of labels, arrays and captions in their stored bits: the same whatever format holds them."""
        digest = xxhash.xxh64(np.ascontiguousarray(self.label_n, "<i8").data)
        for moments in self.views:
            digest.update(np.ascontiguousarray(moments).data)
        for caption in self.captions or []:
            digest.update(len(caption).to_bytes(8, "little") + caption)
        for array in (self.text_n, self.target_n, self.target_flipped_n):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.intdigest()
