"""Some images of a source: those that could be read, or those of some classes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldt.data.images.bucket_rule import Size
from ldt.data.images.source import ImageSource
from ldt.errors import InputError


class Chosen(ImageSource):
    """The images of a source that have these numbers, and the classes of these names, in this order (all by default).

    Every image has to be of one of the classes.
    """

    def __init__(self, source: ImageSource, number_n: NDArray[np.int64], classes: Sequence[str] = ()) -> None:
        self._source, self._number_n = source, number_n
        self.classes, self.left_out, self.barren = tuple(classes) or source.classes, source.left_out, source.barren
        self._label = {source.classes.index(name): label for label, name in enumerate(self.classes)}
        self.turn = source.turn
        self.captioned = len(number_n) if source.captioned == len(source) else self._count_captions()

    def _count_captions(self) -> int:
        return sum(self.caption_size(i) >= 0 for i in range(len(self))) if self._source.captioned else 0

    def __len__(self) -> int:
        return len(self._number_n)

    def label(self, i: int) -> int:
        return self._label[self._source.label(int(self._number_n[i]))]

    def key(self, i: int) -> str:
        return self._source.key(int(self._number_n[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._number_n[i]))

    def image(self, i: int) -> Image.Image:
        return self._source.image(int(self._number_n[i]))

    def shape(self, i: int) -> Size:
        return self._source.shape(int(self._number_n[i]))

    def size(self, i: int) -> int:
        return self._source.size(int(self._number_n[i]))

    def caption_size(self, i: int) -> int:
        return self._source.caption_size(int(self._number_n[i]))

    def caption(self, i: int) -> str:
        return self._source.caption(int(self._number_n[i]))

    def remarks(self) -> list[str]:
        return self._source.remarks()


def of_classes(source: ImageSource, classes: Sequence[str]) -> Chosen:
    """The images of some classes, which get their numbers in the order given."""
    unknown = [name for name in classes if name not in source.classes]
    if unknown or len(set(classes)) < len(classes):
        wrong = f"has no class {unknown[0]}" if unknown else "is asked for a class twice"
        there = ", ".join(source.classes[:20]) + (", …" if len(source.classes) > 20 else "")
        raise InputError(f"images.classes=[{','.join(classes)}] can't be chosen: the source {wrong}; it has {there}")
    wanted = np.zeros(len(source.classes), bool)
    wanted[[source.classes.index(name) for name in classes]] = True
    label_n = np.fromiter((source.label(i) for i in range(len(source))), np.int64, len(source))
    return Chosen(source, np.flatnonzero(wanted[label_n]), classes)
