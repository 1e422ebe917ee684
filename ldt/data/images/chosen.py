"""Some images of a source: those that could be read."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldt.data.images.source import ImageSource


class Chosen(ImageSource):
    """A source without some of its images."""

    def __init__(self, source: ImageSource, without: Sequence[int]) -> None:
        self._source = source
        self._number_n = np.delete(np.arange(len(source)), list(without))
        self.classes, self.left_out, self.barren = source.classes, source.left_out, source.barren
        self.captioned = sum(source.caption_size(i) >= 0 for i in self._number_n.tolist()) if source.captioned else 0

    def __len__(self) -> int:
        return len(self._number_n)

    def label(self, i: int) -> int:
        return self._source.label(int(self._number_n[i]))

    def key(self, i: int) -> str:
        return self._source.key(int(self._number_n[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._number_n[i]))

    def image(self, i: int) -> Image.Image:
        return self._source.image(int(self._number_n[i]))

    def size(self, i: int) -> int:
        return self._source.size(int(self._number_n[i]))

    def caption_size(self, i: int) -> int:
        return self._source.caption_size(int(self._number_n[i]))

    def caption(self, i: int) -> str:
        return self._source.caption(int(self._number_n[i]))

    def remarks(self) -> list[str]:
        return self._source.remarks()
