"""A list of images as arrays: some 70 bytes an image with its name, so that ten million fit into memory.

Nothing here is a Python object an image: names lie one after another in one block of bytes.
"""

from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class Names:
    """Names in one block of bytes, UTF-8 with what is none of it kept as it is."""

    def __init__(self, content: bytes | bytearray, end_n: NDArray[np.int64]) -> None:
        self._content, self._end_n = content, end_n

    def __len__(self) -> int:
        return len(self._end_n)

    def __getitem__(self, i: int) -> str:
        start = int(self._end_n[i - 1]) if i else 0
        return bytes(self._content[start : int(self._end_n[i])]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    @property
    def content(self) -> bytes | bytearray:
        return self._content

    def order(self) -> NDArray[np.int64]:
        """The permutation that sorts them, by bytes, which is the order of their characters."""
        size_n = np.diff(self._end_n, prepend=0)
        padded = np.zeros((len(self), int(size_n.max(initial=1))), np.uint8)
        padded[np.arange(padded.shape[1]) < size_n[:, None]] = np.frombuffer(self._content, np.uint8)
        return np.argsort(padded.view(f"S{padded.shape[1]}")[:, 0], kind="stable")

    def take(self, order: NDArray[np.int64]) -> "Names":
        """These, in another order."""
        size_n = np.diff(self._end_n, prepend=0)[order]
        start_n = np.concatenate([[0], self._end_n[:-1]])[order]
        out = bytearray()
        for start, size in zip(start_n.tolist(), size_n.tolist(), strict=True):
            out += self._content[start : start + size]
        return Names(out, np.cumsum(size_n))


class Listing:
    """Images as they are found. label: of the class in `classes`, in the order of appearance; size −1: not looked at.

    left_out: how many files of which kind are no images; barren: first-level directories that hold only such files.
    """

    def __init__(self) -> None:
        self._names, self._ends = bytearray(), array("q")
        self._labels, self._sizes, self._offsets = array("i"), array("q"), array("q")
        self._captions = array("q")  # offset and size of each, −1 and 0 where there is none
        self.classes: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()
        self.barren: list[str] = []

    def add(self, name: str, class_: str, size: int = -1, offset: int = 0, caption: tuple[int, int] = (-1, 0)) -> None:
        self._names += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._names))
        self._labels.append(self.classes.setdefault(class_, len(self.classes)))
        self._sizes.append(size)
        self._offsets.append(offset)
        self._captions.extend(caption)

    def leave_out(self, kind: str) -> None:
        self.left_out[kind] += 1

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def names(self) -> Names:
        return Names(self._names, np.array(self._ends, np.int64))

    @property
    def label_n(self) -> NDArray[np.int32]:
        return np.array(self._labels, np.int32)

    @property
    def size_n(self) -> NDArray[np.int64]:
        return np.array(self._sizes, np.int64)

    @property
    def offset_n(self) -> NDArray[np.int64]:
        return np.array(self._offsets, np.int64)

    @property
    def caption_n2(self) -> NDArray[np.int64]:
        return np.array(self._captions, np.int64).reshape(-1, 2)
