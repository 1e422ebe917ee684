"""Images in a directory or in one tar file, by their relative paths.

A class is a first-level sub-directory, as in torchvision's ImageFolder; images directly under the root form one class
called `images`. A sub-directory without images is no class. Links in a directory are followed, as image sets are often
put together from them. Archives are read in place: nothing is extracted; links and members that point outside are
refused. Two layouts of other tools are known by their files: `dataset.json` (StyleGAN's and edm2's) names each image's
label, and in a directory of img2dataset's the sub-directories are its shards and no classes.
"""

import os
import re
import tarfile
import weakref
from abc import abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ldt.data.images.decode import decode
from ldt.data.images.listing import Listing
from ldt.data.images.names import HEAD, SUFFIXES, begins_like_an_image, is_hidden, stem, suffix
from ldt.data.images.source import ImageSource
from ldt.errors import InputError, file_error
from ldt.files import MOST_CLASSES, class_names, natural, parse_json

SINGLE_CLASS = "images"
LABELS = "dataset.json"
IMG2DATASET = re.compile(r"\d{5,}(_stats\.json|\.parquet)")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
NOTES = (".txt", ".json")  # beside an image of the same name


class FileImages(ImageSource):
    """Images named by relative paths `class/…/file`, or `file` for a single class, in the order of these names."""

    def __init__(self, where: Path, listing: Listing, at_root: list[str]) -> None:
        self.where = where
        if not len(listing):
            _refuse_nothing(where, at_root, listing)
        order = listing.names.order()
        self.names = listing.names.take(order)
        self.size_n, self.offset_n = listing.size_n[order], listing.offset_n[order]
        self.caption_n2 = listing.caption_n2[order]
        self.captioned = int((self.caption_n2[:, 0] >= 0).sum())
        self.left_out, self.barren = listing.left_out, tuple(sorted(listing.barren))
        self.classes = tuple(sorted(listing.classes))
        number = {c: k for k, c in enumerate(self.classes)}
        renumber = np.array([number[c] for c in listing.classes], np.int32)
        self._labels = renumber[listing.label_n[order]]
        if LABELS in at_root:
            self._read_labels()
        elif any(IMG2DATASET.fullmatch(n) for n in at_root):
            self.classes, self._labels, self.barren = (SINGLE_CLASS,), np.zeros(len(self.names), np.int32), ()
        elif SINGLE_CLASS in self.classes:
            self._refuse_strays()

    def _refuse_strays(self) -> None:
        """Images outside of the class directories would be of a class that nobody named."""
        ours = np.flatnonzero(self._labels == self.classes.index(SINGLE_CLASS)).tolist()
        outside = [i for i in ours if "/" not in self.names[i]]
        if 0 < len(outside) < len(self.names):
            raise InputError(
                f"{self.where} has images both in class directories and outside of them, such as "
                f"{self.names[outside[0]]}; move these"
            )

    def _read_labels(self) -> None:
        """From `dataset.json`: {"labels": [[file, class number], …]}, or null for images of one class."""
        file = f"{self.where}/{LABELS}"
        try:
            labels = parse_json(self._text(LABELS) or b"")["labels"]
            known = None if labels is None else dict(labels)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f'{file} is not readable ({error}); it needs {{"labels": [[file, class number], …]}}, or remove it'
            ) from None
        if not known:
            self.classes, self._labels = (SINGLE_CLASS,), np.zeros(len(self.names), np.int32)
            return
        self._labels = np.array([_label_in(known, name, file) for name in self.names], np.int32)
        self.classes = tuple(class_names(self.where, int(self._labels.max())))
        self.barren = ()

    def __len__(self) -> int:
        return len(self.names)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def key(self, i: int) -> str:
        return self.names[i]

    def name(self, i: int) -> str:
        return f"{self.where}/{self.names[i]}"

    def image(self, i: int) -> Image.Image:
        return decode(self._content(i), self.name(i))

    def caption(self, i: int) -> str:
        """The text file beside the image, of the same name but for `.txt`."""
        try:
            return (self._caption(i) or b"").decode().strip()
        except UnicodeDecodeError:
            raise InputError(
                f"caption {self.where}/{stem(self.names[i])}.txt is not UTF-8 text; write it again"
            ) from None

    def remarks(self) -> list[str]:
        """Also of an image that lies deeper than the directory of its class."""
        by_directory = self.classes[self.label(0)] == self.names[0].partition("/")[0]
        nested = next((n for n in self.names if n.count("/") > 1), "") if by_directory else ""
        if not nested:
            return super().remarks()
        return [
            *super().remarks(),
            f"images lie deeper than the directory of their class, such as {nested}: they are of class "
            f"{nested.partition('/')[0]}; if the classes are further down, stop and give the directory right above "
            "them as images.path",
        ]

    @abstractmethod
    def _content(self, i: int) -> bytes:
        """The bytes of file i."""

    @abstractmethod
    def _caption(self, i: int) -> bytes | None:
        """The bytes of the caption of image i, None where it has none."""

    @abstractmethod
    def _text(self, name: str) -> bytes | None:
        """The bytes of another file, None where it is not there."""


class ImageFolder(FileImages):
    """Images below a directory."""

    def __init__(self, where: Path) -> None:
        listing, at_root = Listing(), _entries(where)
        for _, name, is_directory in at_root:
            if is_directory and not is_hidden(name):
                before, left_out = len(listing), listing.left_out.total()
                _list_directory(where / name, f"{name}/", frozenset({os.path.realpath(where)}), listing)
                if len(listing) == before and listing.left_out.total() > left_out:
                    listing.barren.append(name)
        files = [name for _, name, is_directory in at_root if not is_directory]
        _list_files(where, "", files, listing)
        super().__init__(where, listing, files)

    def size(self, i: int) -> int:
        return _size_of(self.where / self.names[i])

    def caption_size(self, i: int) -> int:
        if self.caption_n2[i, 0] < 0:
            return -1
        return _size_of(self.where / f"{stem(self.names[i])}.txt")

    def _content(self, i: int) -> bytes:
        return _read(self.where / self.names[i], "image")

    def _caption(self, i: int) -> bytes | None:
        return self._text(f"{stem(self.names[i])}.txt") if self.caption_n2[i, 0] >= 0 else None

    def _text(self, name: str) -> bytes | None:
        return _read(self.where / name, "caption" if name.endswith(".txt") else "file")


class ImageTar(FileImages):
    """Images in a tar file, read by their offsets."""

    def __init__(self, where: Path) -> None:
        self._others: dict[str, tuple[int, int]] = {}
        try:
            self._fd = os.open(where, os.O_RDONLY)
            weakref.finalize(self, os.close, self._fd)
            with tarfile.open(where, "r:") as archive:
                members = [_checked(where, member) for member in archive]
                _check_end(where, archive.offset)
        except tarfile.TarError as error:
            raise InputError(f"{where} is not a whole, uncompressed tar file ({error}); make it again") from None
        except OSError as error:
            raise file_error(f"tar file {where}", error, "make it again") from None
        listing = self._listed([m for m in members if m.isfile()])
        super().__init__(where, listing, [n for n in self._others if "/" not in n])

    def _listed(self, members: list[tarfile.TarInfo]) -> Listing:
        listing = Listing()
        place = {PurePosixPath(m.name).as_posix(): (m.offset_data, m.size) for m in members}
        tops: dict[str, bool] = {}
        for name, (offset, size) in place.items():
            if is_hidden(name):
                listing.leave_out("hidden")
                continue
            image = suffix(name) in SUFFIXES
            image = image or (not suffix(name) and begins_like_an_image(os.pread(self._fd, min(size, HEAD), offset)))
            top, inside, _ = name.partition("/")
            if inside:
                tops[top] = tops.get(top, False) or image
            if image:
                caption = place.get(f"{stem(name)}.txt", (-1, 0))
                listing.add(name, top if inside else SINGLE_CLASS, size, offset, caption)
            else:
                self._others[name] = (offset, size)
        images = {stem(name) for name in listing.names}
        for name in self._others:
            if not (suffix(name) in NOTES and stem(name) in images) and not _is_layout(name):
                listing.leave_out(suffix(name) or "without an ending")
        listing.barren += [top for top, has_image in tops.items() if not has_image]
        return listing

    def size(self, i: int) -> int:
        return int(self.size_n[i])

    def caption_size(self, i: int) -> int:
        return int(self.caption_n2[i, 1]) if self.caption_n2[i, 0] >= 0 else -1

    def _content(self, i: int) -> bytes:
        return self._read(int(self.offset_n[i]), int(self.size_n[i]), self.names[i])

    def _caption(self, i: int) -> bytes | None:
        offset, size = self.caption_n2[i].tolist()
        return self._read(offset, size, f"{stem(self.names[i])}.txt") if offset >= 0 else None

    def _text(self, name: str) -> bytes | None:
        return self._read(*self._others[name], name) if name in self._others else None

    def _read(self, offset: int, size: int, name: str) -> bytes:
        content = os.pread(self._fd, size, offset)
        if len(content) != size:
            raise InputError(f"{self.where} ends inside of {name}; make the tar file again")
        return content


def _refuse_nothing(where: Path, at_root: list[str], listing: Listing) -> None:
    archive = next((n for n in sorted(at_root) if n.lower().endswith(ARCHIVES)), "")
    if archive:
        raise InputError(f"{where} holds archives such as {archive}, no images; unpack each as its class directory")
    there = ", ".join(f"{n:,} {kind}" for kind, n in listing.left_out.most_common(5))
    raise InputError(
        f"{where} holds no images ({', '.join(sorted(SUFFIXES))}){f', but {there}' if there else ''}; put images into "
        "a sub-directory a class"
    )


def _is_layout(name: str) -> bool:
    """Whether a file at the root says how the others lie, rather than being one of them."""
    return name in (LABELS, "classes.txt") or IMG2DATASET.fullmatch(name) is not None


def _label_in(known: dict[str, Any], name: str, file: str) -> int:
    if name not in known:
        raise InputError(f"{file} has no label for {name}; add it, or remove the image")
    if not natural(known[name]) or known[name] >= MOST_CLASSES:
        raise InputError(f"{file} has {known[name]!r} as the label of {name}; labels are class numbers from 0")
    return int(known[name])


def _entries(directory: Path) -> list[tuple[str, str, bool]]:
    """What is in a directory, so sorted that the paths of all files below come in their order."""
    try:
        found = [(entry.name, entry.is_dir()) for entry in os.scandir(directory)]
    except OSError as error:
        raise file_error(f"directory {directory}", error, "check it") from None
    return sorted((f"{name}/" if is_directory else name, name, is_directory) for name, is_directory in found)


def _list_directory(directory: Path, prefix: str, above: frozenset[str], listing: Listing) -> None:
    """All images below; a link to a directory above it would never end and is an error."""
    real = os.path.realpath(directory)
    if real in above:
        raise InputError(f"{directory} links back to {real}, which holds it; remove the link")
    entries = _entries(directory)
    for _, name, is_directory in entries:
        if is_directory and not is_hidden(name):
            _list_directory(directory / name, f"{prefix}{name}/", above | {real}, listing)
    _list_files(directory, prefix, [name for _, name, is_directory in entries if not is_directory], listing)


def _list_files(directory: Path, prefix: str, files: list[str], listing: Listing) -> None:
    """Add the images among the files of one directory. A dangling link is listed: reading it names it."""
    there, images = set(files), set()
    for name in files:
        if is_hidden(name):
            continue
        if suffix(name) in SUFFIXES or (not suffix(name) and begins_like_an_image(_head(directory / name))):
            caption = (0, 0) if f"{stem(name)}.txt" in there else (-1, 0)
            listing.add(prefix + name, prefix.partition("/")[0] or SINGLE_CLASS, caption=caption)
            images.add(name if name == stem(name) else stem(name))
    for name in there:
        if is_hidden(name):
            listing.leave_out("hidden")
        elif not (suffix(name) in SUFFIXES or stem(name) in images or (not prefix and _is_layout(name))):
            listing.leave_out(suffix(name) or "without an ending")


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


def _checked(where: Path, member: tarfile.TarInfo) -> tarfile.TarInfo:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where} has a member outside of the archive, {member.name}; make it with relative names")
    if member.issym() or member.islnk():
        raise InputError(f"{where} has a link, {member.name}; make it with the files themselves (tar --dereference)")
    return member


def _check_end(where: Path, offset: int) -> None:
    """A tar ends with blocks of zeros; where a header is cut or damaged, `tarfile` just stops there, silently."""
    with where.open("rb") as f:
        f.seek(offset)
        block = f.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise InputError(f"{where} is cut or damaged at byte {offset}; make the tar file again")
