"""A list of images as arrays: 64 bytes for an image besides its name, so that ten million fit into memory.

No image has a Python object of its own: names lie one after another in one block of bytes, numbers in arrays.
"""

import io
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt.files import beside_threads

Ints = NDArray[np.int64]
NUMBERS = ("size", "offset", "stored", "caption_offset", "caption_size", "caption_form", "part")
"""size: bytes of an image; offset: where it begins in its file; stored: how many bytes it has there where it is
deflated, −1 where it lies as it is; caption_*: the same of its caption, offset −1 where there is none, form: as its
source defines it; part: in which of several files. Parquet has row groups for offsets and rows for `stored`,
directories there the numbers of captions' endings."""
CHUNK = 1 << 16
FEW = 1 << 12  # names at a time where each of their letters takes several numbers


class Names:
    """Names in one block of bytes: UTF-8, and bytes that are not UTF-8 as they are."""

    def __init__(self, content: bytes | bytearray, end_n: Ints) -> None:
        self.content, self.end_n = content, end_n

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        return cls(b"".join(encoded), np.cumsum([len(e) for e in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.end_n)

    def __getitem__(self, i: int) -> str:
        start = int(self.end_n[i - 1]) if i else 0
        return bytes(self.content[start : int(self.end_n[i])]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def order(self) -> Ints:
        """The permutation that sorts them, by bytes, which is the order of their characters."""
        return np.argsort(self._padded(), kind="stable")

    def repeated(self) -> Ints:
        """The positions of names that have occurred before."""
        padded = self._padded()
        order = np.argsort(padded, kind="stable")
        padded = padded[order]
        return np.sort(order[1:][padded[1:] == padded[:-1]])

    def depths(self) -> Ints:
        """How many directories each name, as a path, lies below."""
        slash_n = np.flatnonzero(np.frombuffer(self.content, np.uint8) == ord("/"))
        return np.bincount(np.searchsorted(self.end_n, slash_n, "right"), minlength=len(self))

    def _padded(self, start: int = 0, stop: int | None = None) -> NDArray[np.bytes_]:
        """The names from one to another, each as long as the longest of all."""
        size_n = np.diff(self.end_n, prepend=0)
        width = max(int(size_n.max(initial=1)), 1)
        size_n, end_n = size_n[start:stop], self.end_n[start:stop]
        padded = np.zeros((len(size_n), width), np.uint8)
        content = np.frombuffer(self.content, np.uint8)
        for first in range(0, len(size_n), CHUNK):  # a mask of all at once would be as large again
            sizes = size_n[first : first + CHUNK]
            begin = int(end_n[first] - size_n[first])
            mask = np.arange(width) < sizes[:, None]
            padded[first : first + CHUNK][mask] = content[begin : begin + int(sizes.sum())]
        return padded.view(f"S{width}")[:, 0]

    def take(self, order: Ints) -> "Names":
        """The names at these positions, in this order."""
        size_n = np.diff(self.end_n, prepend=0)[order]
        start_n = np.concatenate([[0], self.end_n[:-1]])[order] if len(self) else self.end_n
        content, out = np.frombuffer(self.content, np.uint8), bytearray()
        for first in range(0, len(order), FEW):
            sizes, starts = size_n[first : first + FEW], start_n[first : first + FEW]
            within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            out += content[np.repeat(starts, sizes) + within].tobytes()
        return Names(out, np.cumsum(size_n))

    def positions(self, wanted: "Names") -> Ints:
        """Where each of other names is among these, −1 where it is not; of equal ones it is the last."""
        if self.content == wanted.content and np.array_equal(self.end_n, wanted.end_n):
            return np.arange(len(self))
        out = np.full(len(wanted), -1)
        if not len(self):
            return out
        padded = self._padded()
        order = np.argsort(padded, kind="stable")
        for first in range(0, len(wanted), CHUNK):
            others = wanted._padded(first, first + CHUNK)
            found = order[np.searchsorted(padded, others, "right", order) - 1]
            out[first : first + CHUNK] = np.where(padded[found] == others, found, -1)
        return out

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """One after another. The parts are used up: all of them twice would be the most memory of an index."""
        starts = np.cumsum([0, *(len(p.content) for p in parts)])
        end_n = np.concatenate([p.end_n + start for p, start in zip(parts, starts.tolist(), strict=False)])
        content = bytearray()
        for part in parts:
            content += part.content
            part.content, part.end_n = b"", part.end_n[:0]
        return cls(content, end_n)


class NameList:
    """`Names` in the making."""

    def __init__(self) -> None:
        self._content, self._ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, name: str) -> None:
        self._content += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._content))

    def names(self) -> Names:
        """The names that were appended; no more can be."""
        return Names(self._content, _array(self._ends, np.int64))


def numbers_of(order: Ints) -> Iterator[int]:
    """The numbers in an array as Python's, a few at a time."""
    return (i for first in range(0, len(order), CHUNK) for i in order[first : first + CHUNK].tolist())


@dataclass
class Table:
    """Images that were found. label_n: of the class in `classes`; numbers: arrays named by `NUMBERS`.

    left_out: how many files of which kind are no images; barren: first-level directories that hold only such files;
    facts: whatever else the finder has to say.
    """

    names: Names
    label_n: NDArray[np.int32]
    classes: list[str]
    numbers: dict[str, NDArray[Any]]
    left_out: Counter[str] = field(default_factory=Counter)
    barren: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, order: Ints) -> "Table":
        """The images at these positions, in this order."""
        numbers = {name: column[order] for name, column in self.numbers.items()}
        rest = (self.left_out, self.barren, self.facts)
        return Table(self.names.take(order), self.label_n[order], self.classes, numbers, *rest)

    def sorted(self) -> "Table":
        """The same images in the order of their names."""
        order = self.names.order()
        return self if np.array_equal(order, np.arange(len(order))) else self.take(order)

    def to_bytes(self) -> bytes:
        """As an .npz, which `from_bytes` reads."""
        out = io.BytesIO()
        rest = {"classes": self.classes, "left_out": self.left_out, "barren": self.barren, "facts": self.facts}
        np.savez(
            out,
            names=np.frombuffer(self.names.content, np.uint8),
            ends=self.names.end_n,
            labels=self.label_n,
            rest=np.frombuffer(json.dumps(rest).encode(), np.uint8),
            **self.numbers,  # type: ignore[arg-type]
        )
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Table":
        """ValueError, KeyError or the like for what `to_bytes` did not write."""

        def read() -> dict[str, NDArray[Any]]:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                return dict(archive)

        held = beside_threads(read)
        rest = json.loads(held["rest"].tobytes())
        numbers = {name: held[name] for name in NUMBERS}
        names = Names(held.pop("names").tobytes(), held["ends"])
        left_out = Counter(rest["left_out"])
        return cls(names, held["labels"], rest["classes"], numbers, left_out, rest["barren"], rest["facts"])

    @classmethod
    def joined(cls, parts: Sequence["Table"]) -> "Table":
        """The images of several files, one after another; `part` says which file each comes from.

        The parts are used up, column by column, so that no more than one of those is in memory twice.
        """
        if len(parts) == 1:
            return parts[0]
        classes: dict[str, int] = {}
        labels, counts = [], [len(p) for p in parts]
        for part in parts:
            renumber = np.array([classes.setdefault(c, len(classes)) for c in part.classes] or [0], np.int32)
            labels.append(renumber[part.label_n])
            part.label_n = part.label_n[:0]
        numbers = {name: np.concatenate([p.numbers.pop(name) for p in parts]) for name in NUMBERS}
        numbers["part"] = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        left_out: Counter[str] = sum((p.left_out for p in parts), Counter())
        barren = sorted({name for p in parts for name in p.barren} - {*classes})
        names = Names.joined([p.names for p in parts])
        return cls(names, np.concatenate(labels), [*classes], numbers, left_out, barren)


class Listing:
    """A `Table` in the making."""

    def __init__(self) -> None:
        self._names, self._labels = NameList(), array("i")
        self._numbers = {name: array("q") for name in NUMBERS}
        self._classes: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()
        self.barren: list[str] = []

    def add(
        self, name: str, class_: str, size: int = -1, offset: int = 0, stored: int = -1,
        caption: tuple[int, int, int] = (-1, 0, 0),
    ) -> None:  # fmt: skip
        self._names.append(name)
        self._labels.append(self._classes.setdefault(class_, len(self._classes)))
        for column, value in zip(NUMBERS, (size, offset, stored, *caption, 0), strict=True):
            self._numbers[column].append(value)

    def table(self) -> Table:
        """The images that were added, in the order in which they came; no more can be added."""
        numbers: dict[str, NDArray[Any]] = {name: _array(column, np.int64) for name, column in self._numbers.items()}
        numbers["part"] = numbers["part"].astype(np.int32)
        return Table(
            self._names.names(),
            _array(self._labels, np.int32),
            [*self._classes],
            numbers,
            self.left_out,
            sorted(self.barren),
        )


def _array(column: "array[int]", dtype: type[np.signedinteger]) -> NDArray[Any]:
    """An array's numbers, in the memory where they are."""
    return np.frombuffer(column, dtype) if column else np.zeros(0, dtype)
