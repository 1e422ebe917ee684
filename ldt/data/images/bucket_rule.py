"""Which bucket an image belongs to: the one whose shape keeps most of it; nothing is ever stretched."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from ldt.errors import InputError


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str, key: str) -> "Size":
        """The inverse of `str`; key: for the message."""
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if match is None:
            raise InputError(f"{key} has {text!r}, which is not HEIGHTxWIDTH in pixels, such as 256x384")
        return cls(int(match[1]), int(match[2]))


def kept(image: Size, bucket: Size) -> Fraction:
    """The share of an image that is left when it is scaled to cover a bucket and what stands over is cut off."""
    one, other = image.height * bucket.width, image.width * bucket.height
    return Fraction(min(one, other), max(one, other))


def is_enlarged(image: Size, bucket: Size) -> bool:
    """Whether an image has to be enlarged to cover a bucket."""
    return image.height < bucket.height or image.width < bucket.width


def choose(image: Size, buckets: Sequence[Size], fit: str) -> int:
    """The number of an image's bucket.

    `crop`: the bucket that keeps most of the image; of several, the largest that it fills without being enlarged, else
    the smallest. `pad`: the smallest bucket that holds the image. Among equals the first one.
    """
    numbers = range(len(buckets))
    areas = [b.height * b.width for b in buckets]
    if fit == "pad":
        holding = [k for k in numbers if image.height <= buckets[k].height and image.width <= buckets[k].width]
        if not holding:
            raise InputError(
                f"an image of {image.width}x{image.height} (width first) fits into none of "
                f"images.buckets={','.join(map(str, buckets))} (height first); use images.fit=crop, or a larger bucket"
            )
        return min(holding, key=lambda k: areas[k])
    most = max(kept(image, b) for b in buckets)
    best = [k for k in numbers if kept(image, buckets[k]) == most]
    filled = [k for k in best if not is_enlarged(image, buckets[k])]
    return max(filled, key=lambda k: areas[k]) if filled else min(best, key=lambda k: areas[k])
