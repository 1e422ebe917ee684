"""Images below a directory of this machine.

A class is a first-level sub-directory, as in torchvision's ImageFolder; images directly under the root form one class
called `images`. A sub-directory without images is no class. Links are followed, as image sets are often put together
from them. Three layouts of other tools are known by their files: `dataset.json` (StyleGAN's and edm2's) names each
image's label, `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder) has its columns, and in a directory of
img2dataset's the sub-directories are its shards and no classes.
"""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldt.data.images.listed import IMG2DATASET, LABELS, SINGLE_CLASS, VALUE, ListedImages
from ldt.data.images.listing import Listing, Names
from ldt.data.images.members import USUAL, Fields, texts_of
from ldt.data.images.names import HEAD, SUFFIXES, begins_like_an_image, is_hidden, stem, suffix
from ldt.errors import InputError, file_error
from ldt.files import parse_json

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("caption", "text")  # usual names of a column
SEPARATOR = b"\0"  # of several captions of an image


class ImageFolder(ListedImages):
    """Images below a directory, in the order of their names."""

    def __init__(self, where: Path, fields: Fields = USUAL) -> None:
        self._root, self._fields, self._described_by = where, fields, Names(b"", np.zeros(0, np.int64))
        listing, at_root = Listing(), _entries(where)
        files = [name for _, name, is_directory in at_root if not is_directory]
        for _, name, is_directory in at_root:
            if is_directory and not is_hidden(name):
                before, left_out = len(listing), listing.left_out.total()
                self._list_directory(where / name, f"{name}/", frozenset({os.path.realpath(where)}), listing)
                if len(listing) == before and listing.left_out.total() > left_out:
                    listing.barren.append(name)
        self._list_files(where, "", files, listing)
        table = listing.table().sorted()
        table.facts = {LABELS: LABELS in files}
        metadata = next((name for name in METADATA if name in files), "")
        if metadata and len(table):
            table = self._described(table, metadata)
        elif fields.label:
            raise InputError(f"{where} has no images.label={fields.label}: there is no {' or '.join(METADATA)}")
        elif any(IMG2DATASET.fullmatch(name) for name in files):
            table.classes, table.label_n, table.barren = [SINGLE_CLASS], np.zeros_like(table.label_n), []
        super().__init__(str(where), table, str(where))

    def size(self, i: int) -> int:
        return _size_of(self._root / self.names[i])

    def caption_size(self, i: int) -> int:
        if not super().caption(i) if len(self._described_by) else self.table.numbers["caption_offset"][i] < 0:
            return -1
        return len(self._described_by[i]) if len(self._described_by) else _size_of(self._caption_file(i))

    def content(self, i: int) -> bytes:
        return _read(self._root / self.names[i], "image")

    def _captions(self, i: int) -> list[bytes]:
        if len(self._described_by):
            return self._described_by[i].encode().split(SEPARATOR)
        return [_read(self._caption_file(i), "caption")]

    def _caption_file(self, i: int) -> Path:
        return self._root / f"{stem(self.names[i])}{self._fields.caption_ending}"

    def _labels_file(self) -> bytes:
        return _read(self._root / LABELS, "file")

    def _described(self, table: Any, file: str) -> Any:
        """The table with the labels and captions of a metadata file."""
        rows = {str(row["file_name"]): row for row in _rows(self._root / file)}
        for name in rows:
            if not (self._root / name).is_file():
                raise InputError(
                    f"{self._root / file} names {name}, which is not there; restore it, or remove its line"
                )
        columns = [c for c in next(iter(rows.values()), {}) if c != "file_name"]
        label, caption = self._fields.label, self._fields.caption
        for key, column in (("images.label", label), ("images.caption", caption)):
            if column and column not in columns:
                raise InputError(f"{self._root / file} has no {key}={column}; columns there: {', '.join(columns)}")
        label = label or ("label" if "label" in columns else "")
        caption = caption or next((c for c in CAPTIONS if c in columns), "")
        keep = [i for i, name in enumerate(table.names) if name in rows]
        if len(keep) < len(table):
            table.left_out[f"images that {file} does not name"] = len(table) - len(keep)
        table = table.take(np.array(keep, np.int64))
        if label:
            values = [str(rows[name].get(label, "")).strip() for name in table.names]
            if "" in values:
                raise InputError(f"{self._root / file} has no {label} for {table.names[values.index('')]}; add it")
            table.classes = sorted(set(values))
            number = {c: k for k, c in enumerate(table.classes)}
            table.label_n, table.facts = np.array([number[v] for v in values], np.int32), {"labels": VALUE}
        if caption:
            texts = [SEPARATOR.decode().join(texts_of(rows[name].get(caption))) for name in table.names]
            self._described_by = Names.of(texts)
            table.numbers["caption_offset"] = np.where([bool(t) for t in texts], 0, -1)
        return table

    def _list_directory(self, directory: Path, prefix: str, above: frozenset[str], listing: Listing) -> None:
        """All images below; a link to a directory above it would never end and is an error."""
        real = os.path.realpath(directory)
        if real in above:
            raise InputError(f"{directory} links back to {real}, which holds it; remove the link")
        entries = _entries(directory)
        for _, name, is_directory in entries:
            if is_directory and not is_hidden(name):
                self._list_directory(directory / name, f"{prefix}{name}/", above | {real}, listing)
        self._list_files(directory, prefix, [name for _, name, is_directory in entries if not is_directory], listing)

    def _list_files(self, directory: Path, prefix: str, files: list[str], listing: Listing) -> None:
        """Add the images among the files of one directory. A dangling link is listed: reading it names it."""
        there, images, ending = set(files), set(), self._fields.caption_ending
        for name in files:
            if is_hidden(name):
                continue
            if suffix(name) in SUFFIXES or (not suffix(name) and begins_like_an_image(_head(directory / name))):
                caption = (0, 0, 0) if f"{stem(name)}{ending}" in there else (-1, 0, 0)
                listing.add(prefix + name, prefix.partition("/")[0] or SINGLE_CLASS, caption=caption)
                images.add(stem(name))
        for name in there:
            if is_hidden(name):
                listing.left_out["hidden"] += 1
            elif not (suffix(name) in SUFFIXES or stem(name) in images or (not prefix and _is_layout(name))):
                listing.left_out[suffix(name) or "without an ending"] += 1


def _is_layout(name: str) -> bool:
    """Whether a file at the root says how the others lie, rather than being one of them."""
    return name in (LABELS, "classes.txt", *METADATA) or IMG2DATASET.fullmatch(name) is not None


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file, each with a `file_name`."""
    try:
        text = _read(file, "file").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; write it again") from None
    lines: Iterator[Any]
    if file.suffix == ".csv":
        lines = csv.DictReader(io.StringIO(text, newline=""))
    else:
        lines = (line for line in text.splitlines() if line.strip())
    for number, line in enumerate(lines, 1):
        try:
            row = line if isinstance(line, dict) else parse_json(line)
            if not isinstance(row["file_name"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}: row {number} has no readable file_name; write it again") from None
        if row["file_name"].startswith("/") or ".." in row["file_name"].split("/"):
            raise InputError(f"{file}: row {number} names {row['file_name']}, which is outside of its directory")
        yield row


def _entries(directory: Path) -> list[tuple[str, str, bool]]:
    """What is in a directory, so sorted that the paths of all files below come in their order."""
    try:
        found = [(entry.name, entry.is_dir()) for entry in os.scandir(directory)]
    except OSError as error:
        raise file_error(f"directory {directory}", error, "check it") from None
    return sorted((f"{name}/" if is_directory else name, name, is_directory) for name, is_directory in found)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(HEAD)
    except OSError:  # a pipe, a socket, a link to nowhere: no image
        return b""


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # it can't be what it was


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error(f"{what} {path}", error, "check the file") from None
