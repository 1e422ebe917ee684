"""Images below a directory, of this machine or at an fsspec address.

A class is a first-level sub-directory, as in torchvision's ImageFolder; images directly under the root form one class
called `images`. A sub-directory without images is no class. Files of one name but for their ending are one sample, as
in archives. Three layouts of other tools are known by their files: `dataset.json` (StyleGAN's and edm2's) names each
image's label, `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder) has its columns, and in a directory of
img2dataset's the sub-directories are its shards and no classes.
"""

from collections.abc import Iterator

import numpy as np

from ldt.data.images.labels_file import LABELS
from ldt.data.images.listed import ListedImages
from ldt.data.images.listing import Ints, Names
from ldt.data.images.members import JSON_VALUE, USUAL, Fields, Members, captions_in, check_captions
from ldt.data.images.metadata import SEPARATOR, described
from ldt.data.images.names import READABLE_METADATA, is_hidden, stem
from ldt.data.images.tree import Tree
from ldt.errors import InputError


class ImageFolder(ListedImages):
    """Images below a directory, in the order of their names."""

    def __init__(self, tree: Tree, fields: Fields = USUAL) -> None:
        self._tree, self._fields, self._described_by = tree, fields, Names(b"", np.zeros(0, np.int64))
        self._endings: list[str] = []  # of captions, as they are written
        metadata = next((name for name in READABLE_METADATA if tree.holds(name)), "")
        members = Members(tree.where, USUAL if metadata else fields)
        self._list("", frozenset(), members)
        table = members.table()
        if metadata and len(table):
            table, self._described_by = described(tree, metadata, table, fields)
        else:
            check_captions(table, tree.where, fields)
        super().__init__(tree.where, table, tree.where)

    def _list(self, inside: str, above: frozenset[str], members: Members) -> None:
        """Add all files below; a link to a directory above it would never end and is an error."""
        tree, real = self._tree, self._tree.identity(inside)
        if real in above:
            raise InputError(f"{tree.where}/{inside.rstrip('/')} links back to {real}, which holds it; remove the link")
        directories = []
        for name, is_directory, size in tree.entries(inside):
            path = f"{inside}{name}"
            if is_directory and not is_hidden(name):
                directories.append(path)
            elif not is_directory and (inside or name not in ("classes.txt", *READABLE_METADATA)):
                members.add(path, 0, size, self._number_of(members.split(path)[1]), self._reader(path))
        for path in sorted(directories):
            self._list(f"{path}/", above | {real}, members)

    def _number_of(self, written: str) -> int:
        """The number of an ending that may be a caption's, which may have letters of both cases; −1 for others."""
        if written.lower() not in (self._fields.caption_ending, ".json"):
            return -1
        if written not in self._endings:
            self._endings.append(written)
        return self._endings.index(written)

    def _reader(self, path: str):  # type: ignore[no-untyped-def]
        def read(limit: int) -> bytes:
            if limit >= 0 and not self._tree.holds(path):  # a pipe, a socket, a link to nowhere: no image
                return b""
            return self._tree.read(path, "file", limit)

        return read

    def size(self, i: int) -> int:
        return self._tree.size(self.names[i], super().size(i))

    def caption_size(self, i: int) -> int:
        if self.table.numbers["caption_offset"][i] < 0:
            return -1
        if not len(self._described_by):
            return self._tree.size(self._caption_file(i), super().caption_size(i))
        start = int(self._described_by.end_n[i - 1]) if i else 0
        return int(self._described_by.end_n[i]) - start

    def content(self, i: int) -> bytes:
        return self._tree.read(self.names[i], "image")

    def _captions(self, i: int) -> list[bytes]:
        if len(self._described_by):
            return self._described_by[i].encode().split(SEPARATOR.encode())
        content = self._tree.read(self._caption_file(i), "caption")
        is_json = int(self.table.numbers["caption_form"][i]) % 2 == JSON_VALUE
        return captions_in(content, self._fields.caption, self.name(i)) if is_json else [content]

    def _caption_file(self, i: int) -> str:
        return stem(self.names[i]) + self._endings[int(self.table.numbers["caption_form"][i]) // 2 - 1]

    def _labels_files(self) -> Iterator[tuple[Ints, bytes, str]]:
        content = self._tree.read(LABELS, "file")
        yield np.arange(len(self.names)), content, f"{self._tree.where}/{LABELS}"
