"""A source of images as a detector takes them: uint8 blocks of one size, in order, and the hash of their pixels."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldt.data.images import ImageSource, prepare
from ldt.data.images.decode import convert
from ldt.dist import World, in_block_order
from ldt.errors import InputError

BLOCK = 64


@dataclass(frozen=True)
class ImageSet:
    """Images of height × width and 1 or 3 channels.

    `fit`: how a source comes to that size, `crop` and `pad` as for encoding, `as_is` where it must have it already.
    """

    source: ImageSource
    height: int
    width: int
    channels: int
    fit: str

    @classmethod
    def of(cls, source: ImageSource, size: int, fit: str) -> "ImageSet":
        """A source's images in colour: squares of `size`, or as large as its first where that is 0."""
        width, height = (size, size) if size else source.image(0).size
        return cls(source, height, width, 3, fit)

    def __len__(self) -> int:
        return len(self.source)

    def images(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        """These images: uint8 [B, H, W, C]."""
        return np.stack([self._image(i) for i in ids])

    def block(self, k: int, size: int = BLOCK) -> NDArray[np.uint8]:
        """Block k of `size` images; the last one may have fewer."""
        return self.images(range(k * size, min((k + 1) * size, len(self))))

    @property
    def blocks(self) -> int:
        """How many blocks of `BLOCK` there are."""
        return -(-len(self) // BLOCK)

    def digests(self, world: World) -> Iterator[bytes]:
        """A hash of the pixels of every block of `BLOCK`, in order, on every rank; the ranks share the work."""
        yield from in_block_order(self.blocks, lambda k: hashlib.sha256(self.block(k).tobytes()).digest(), world)

    def hash(self, world: World) -> str:
        """SHA-256 of size and pixels."""
        digest = hashlib.sha256(f"{self.height} {self.width} {self.channels}".encode())
        for block in self.digests(world):
            digest.update(block)
        return digest.hexdigest()

    def _image(self, i: int) -> NDArray[np.uint8]:
        image, size = self.source.image(i), f"{self.width}x{self.height}"
        if self.fit != "as_is":
            return prepare(image, (self.height, self.width), self.channels, self.fit)
        if image.size != (self.width, self.height):
            raise InputError(
                f"image {self.source.name(i)} is {image.width}x{image.height}, and others are {size}; give images of "
                "one size, or bring them to one by size= and fit=crop or pad"
            )
        return convert(image, self.channels)
