"""Files that hold many images, wherever they are: read by offset, from a disk or through fsspec.

Each image is read once, so nothing of a remote file is kept on this machine: its index is made in one pass from its
beginning to its end, and the encoding reads each image by its place. Failures are tried again and time limits kept as
for remote shards.
"""

import glob
import io
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path

import fsspec

from ldt.data.shards.remote import STALLED, persist, within
from ldt.errors import InputError, file_error
from ldt.files import regular
from ldt.paths import is_remote

AHEAD = 1 << 22  # bytes read at once while an index is made
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
CHOICE = re.compile(r"\{([^{},]*,[^{}]*)\}")


class Blob(ABC):
    """A file of `size` bytes; `stamp` changes when its content does, as far as that can be told without reading it."""

    name: str
    size: int
    stamp: str

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from an offset; `InputError` where there are fewer."""
        content = self._read(offset, size) if size else b""
        if len(content) != size:
            raise InputError(f"{self.name} ends inside of an image, at byte {offset + len(content):,}; make it again")
        return content

    def stream(self) -> io.BufferedReader:
        """The file from its beginning, read in large pieces; it can be sought in."""
        return io.BufferedReader(_Stream(self), AHEAD)

    @abstractmethod
    def _read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from an offset, fewer where the file ends before."""


class LocalBlob(Blob):
    """A file on a disk of this machine, opened for each read: there may be more shards than a process may open."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            with open(path, "rb", opener=regular) as file:
                stat = os.fstat(file.fileno())
        except OSError as error:
            raise file_error(f"file {path}", error, "check it") from None
        self.size, self.stamp = stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with open(self.name, "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise file_error(f"file {self.name}", error, "check its disk") from None


class RemoteBlob(Blob):
    """A file at an fsspec address."""

    def __init__(self, address: str) -> None:
        self.name = address
        self._fs, self._path = filesystem(address)
        try:
            facts = ask(lambda: self._fs.info(self._path), address)
        except FileNotFoundError:
            raise InputError(f"{address} does not exist; check the address") from None
        if not isinstance(facts.get("size"), int):
            raise InputError(f"{address} does not tell its size, so that images in it can't be found; copy it here")
        self.size = facts["size"]
        self.stamp = " ".join(str(facts[k]) for k in ("size", "ETag", "etag", "mtime", "LastModified") if k in facts)

    def _read(self, offset: int, size: int) -> bytes:
        stop = min(offset + size, self.size)
        if stop <= offset:
            return b""
        return bytes(ask(lambda: self._fs.cat_file(self._path, start=offset, end=stop), self.name))


class _Stream(io.RawIOBase):
    """A blob as Python's file."""

    def __init__(self, blob: Blob) -> None:
        self._blob, self._at = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blob.size}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        content = self._blob._read(self._at, min(len(buffer), max(self._blob.size - self._at, 0)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def open_blob(path: str) -> Blob:
    """The file at a local path or an address."""
    return RemoteBlob(path) if is_remote(path) else LocalBlob(Path(path))


def filesystem(address: str):  # type: ignore[no-untyped-def]
    """fsspec's file system of an address, and the path in it."""
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise InputError(f"{address} can't be opened ({error}); install fsspec's back-end for it") from None


def without_query(path: str) -> str:
    """An http address without what follows its `?`, as presigned ones have it."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def is_pattern(path: str) -> bool:
    """Whether a path stands for several: `*`, `?`, `[…]`, `{00000..00999}` or `{train,test}`."""
    if os.path.lexists(path):
        return False
    named = without_query(path)
    return RANGE.search(named) is not None or CHOICE.search(named) is not None or glob.has_magic(named)


def expand(pattern: str) -> list[str]:
    """The paths that a pattern stands for, sorted; `InputError` where one of a range is not there."""
    counted, listed = RANGE.search(pattern), CHOICE.search(pattern)
    if counted or listed:
        found = [path for part in _parts(pattern) for path in (expand(part) if is_pattern(part) else [part])]
    elif is_remote(pattern):
        fs, path = filesystem(pattern)
        found = [fs.unstrip_protocol(p) for p in ask(lambda: fs.glob(path), pattern)]
    else:
        found = glob.glob(pattern, recursive=True)
    if not found:
        raise InputError(f"{pattern} stands for no file; check the path")
    if directory := next((p for p in found if not is_remote(p) and os.path.isdir(p)), ""):
        raise InputError(
            f"{pattern} stands for directories such as {directory}; give the one that holds them as images.path"
        )
    return found if counted or listed else sorted(found)


def _parts(pattern: str) -> list[str]:
    """What the first braces of a pattern stand for."""
    if listed := CHOICE.search(pattern):
        return [f"{pattern[: listed.start()]}{part}{pattern[listed.end() :]}" for part in listed[1].split(",")]
    counted = RANGE.search(pattern)
    assert counted is not None
    first, last = counted.groups()
    if int(last) < int(first):
        raise InputError(f"{pattern} counts down; write the smaller number first")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    numbers = range(int(first), int(last) + 1)
    return [f"{pattern[: counted.start()]}{n:0{width}d}{pattern[counted.end() :]}" for n in numbers]


def ask(action, what: str):  # type: ignore[no-untyped-def]
    """What the other side answers: failures are tried again, and what stays is said in a sentence."""
    return persist(lambda: within(STALLED, action), what)
