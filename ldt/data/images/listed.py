"""Images of a `Table`: their names, classes and captions, whatever holds them."""

import re
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ldt import rng
from ldt.data.images.bucket_rule import Size
from ldt.data.images.decode import decode, shape_of, upright
from ldt.data.images.labels_file import LABELS, labels_in
from ldt.data.images.listing import Ints, Table
from ldt.data.images.names import READABLE_METADATA, SUFFIXES
from ldt.data.images.source import ImageSource
from ldt.data.shards.remote import Remote
from ldt.errors import InputError
from ldt.files import MOST_CLASSES, class_names, named_classes
from ldt.paths import is_remote

SINGLE_CLASS = "images"
IMG2DATASET = re.compile(r"\d{5,}(_stats\.json|\.parquet)")
VALUE = "value"
"""Of a table's facts `labels`: the classes are values given for each image, not the directories that they lie in."""


class ListedImages(ImageSource):
    """Images of a table, in its order. where: what the table is of; beside: the directory that may hold classes.txt."""

    def __init__(self, where: str, table: Table, beside: str) -> None:
        self.where, self.beside, self.table = where, beside, table
        if not len(table):
            there = ", ".join(f"{n:,} {kind}" for kind, n in table.left_out.most_common(5))
            raise InputError(
                f"{where} holds no images ({', '.join(sorted(SUFFIXES))}){f', but {there}' if there else ''}; put "
                "images into a sub-directory a class"
            )
        self.names, self.left_out, self.barren = table.names, table.left_out, tuple(table.barren)
        self.captioned = int((table.numbers["caption_offset"] >= 0).sum())
        if table.facts.get("labels") == VALUE:
            self._take_values()
        elif table.facts.get(LABELS):
            self._take_labels_file()
        else:
            self._take_directories()

    def _take_directories(self) -> None:
        """Each directory is a class, in the order of their names."""
        self.classes = tuple(sorted(self.table.classes))
        self._number([self.classes.index(c) for c in self.table.classes])
        if SINGLE_CLASS in self.classes:  # which images outside of class directories are of, if there are no others
            outside = np.flatnonzero(self.names.depths() == 0)
            outside = outside[self._labels[outside] == self.classes.index(SINGLE_CLASS)]
            if 0 < len(outside) < len(self.names):
                raise InputError(
                    f"{self.where} has images both in class directories and outside of them, such as "
                    f"{self.names[int(outside[0])]}; move these"
                )

    def _take_values(self) -> None:
        """The labels are class numbers, or class names in alphabetical order."""
        given = self.table.classes
        self.barren = ()
        if all(c.isascii() and c.isdigit() for c in given):
            for c in given:
                if int(c) >= MOST_CLASSES:
                    raise InputError(f"{self.where} has the label {c}; labels are class numbers from 0")
            self._name_numbers(max(map(int, given)))
            self._number([int(c) for c in given])
            return
        if all(c.lstrip("-").isdigit() for c in given):
            wrong = next(c for c in given if not c.isdigit())
            raise InputError(f"{self.where} has the label {wrong}; labels are class numbers from 0, or names")
        self.classes = tuple(sorted(given))
        self._number([self.classes.index(c) for c in given])

    def _take_labels_file(self) -> None:
        """Read labels from `dataset.json`, of which each of several archives has its own."""
        self.barren = ()
        self._labels = np.zeros(len(self.names), np.int32)
        labelled = False
        for number_n, content, file in self._labels_files():
            found = labels_in(content, self.names.take(number_n), file)
            if found is not None:
                self._labels[number_n], labelled = found, True
        if labelled:
            self._name_numbers(int(self._labels.max()))
        else:
            self.classes = (SINGLE_CLASS,)

    def _number(self, numbers: list[int]) -> None:
        """Set the labels of all images: `numbers` are those of the table's classes."""
        self._labels = np.array(numbers, np.int32)[self.table.label_n]

    def _name_numbers(self, largest: int) -> None:
        if not is_remote(self.beside):
            self.classes = tuple(class_names(Path(self.beside), largest))
            return
        try:
            content = Remote(self.beside).read("classes.txt")
        except FileNotFoundError:
            self.classes = tuple(str(i) for i in range(largest + 1))
        else:
            self.classes = tuple(named_classes(content, f"{self.beside}/classes.txt", largest))

    def __len__(self) -> int:
        return len(self.names)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def key(self, i: int) -> str:
        return self.names[i]

    def name(self, i: int) -> str:
        return f"{self.where}/{self.names[i]}"

    def size(self, i: int) -> int:
        return int(self.table.numbers["size"][i])

    def caption_size(self, i: int) -> int:
        has_one = self.table.numbers["caption_offset"][i] >= 0
        return int(self.table.numbers["caption_size"][i]) if has_one else -1

    def image(self, i: int) -> Image.Image:
        image = decode(self.content(i), self.name(i))
        return upright(image) if self.turn else image

    def shape(self, i: int) -> Size:
        return shape_of(self.content(i), self.name(i), self.turn)

    def caption(self, i: int) -> str:
        if self.table.numbers["caption_offset"][i] < 0:
            return ""
        try:
            texts = self._captions(i)
            number = 0
            if len(texts) > 1:
                number = int(rng.bits(self.seed, rng.Purpose.CAPTION, np.array([i]), 1)[0, 0] % np.uint64(len(texts)))
            return texts[number].decode().strip() if texts else ""
        except UnicodeDecodeError:
            raise InputError(f"the caption of {self.name(i)} is not UTF-8 text; write it again") from None

    def remarks(self) -> list[str]:
        """Also warns of an image that lies deeper than the directory of its class."""
        by_directory = self.classes[self.label(0)] == self.names[0].partition("/")[0]
        nested_n = np.flatnonzero(self.names.depths() > 1) if by_directory else np.zeros(0, np.int64)
        unread = self.table.facts.get("unread")
        return [
            *super().remarks(),
            *(
                [f"{unread[0]} is not read: {' and '.join(READABLE_METADATA)} are, in the directory images.path itself"]
                if unread
                else []
            ),
            *([self._nested(self.names[int(nested_n[0])])] if len(nested_n) else []),
        ]

    @staticmethod
    def _nested(name: str) -> str:
        return (
            f"images lie deeper than the directory of their class, such as {name}: they are of class "
            f"{name.partition('/')[0]}; if the classes are further down, stop and give the directory right above "
            "them as images.path"
        )

    @abstractmethod
    def content(self, i: int) -> bytes:
        """The bytes of the file of image i."""

    @abstractmethod
    def _captions(self, i: int) -> list[bytes]:
        """The captions of image i, which has one or several."""

    def _labels_files(self) -> Iterator[tuple[Ints, bytes, str]]:
        """The content of every `dataset.json`, its name, and the numbers of the images that it is about.

        Parquet files and MDS shards hold none.
        """
        return iter(())
