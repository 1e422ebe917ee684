"""A directory of files, on a disk of this machine or at an fsspec address: what is in it, and reading a file of it."""

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ldt.data.images.blobs import ask, filesystem
from ldt.errors import InputError, file_error
from ldt.files import regular
from ldt.paths import is_remote


class Entry(NamedTuple):
    """What a directory holds. size: bytes of a file where listing tells them, else −1."""

    name: str
    is_directory: bool
    size: int = -1


class Tree(ABC):
    """Files below a directory; those are named by their paths in it, the directory itself by an empty one."""

    where: str

    @abstractmethod
    def entries(self, inside: str = "") -> Iterator[Entry]:
        """What is directly in a directory, in no order."""

    @abstractmethod
    def read(self, name: str, what: str, limit: int = -1) -> bytes:
        """A file, or its first `limit` bytes; `InputError` names it by what it is."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file, to be read from its beginning to its end."""

    @abstractmethod
    def holds(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def size(self, name: str, listed: int) -> int:
        """Bytes of a file as it is now, −1 where it is gone; listed: those of the time when it was listed."""
        return listed

    def identity(self, inside: str) -> str:
        """What a directory is known by whatever links lead to it."""
        return inside


class LocalTree(Tree):
    """A directory of this machine. Links are followed, as image sets are often put together from them."""

    def __init__(self, where: Path) -> None:
        self.where, self._root = str(where), where

    def entries(self, inside: str = "") -> Iterator[Entry]:
        try:
            with os.scandir(self._root / inside) as found:
                for entry in found:
                    yield Entry(entry.name, entry.is_dir())
        except OSError as error:
            raise file_error(f"directory {self._root / inside}", error, "check it") from None

    def read(self, name: str, what: str, limit: int = -1) -> bytes:
        try:
            with open(self._root / name, "rb", opener=regular) as file:
                return file.read(limit)
        except OSError as error:
            raise file_error(f"{what} {self._root / name}", error, "check the file") from None

    def open(self, name: str) -> BinaryIO:
        try:
            return open(self._root / name, "rb", opener=regular)
        except OSError as error:
            raise file_error(f"file {self._root / name}", error, "check the file") from None

    def holds(self, name: str) -> bool:
        try:
            return stat.S_ISREG((self._root / name).stat().st_mode)
        except OSError:  # a link to nowhere
            return False

    def size(self, name: str, listed: int) -> int:
        try:
            return (self._root / name).stat().st_size
        except OSError:
            return -1  # it can't be what it was

    def identity(self, inside: str) -> str:
        return os.path.realpath(self._root / inside)


class RemoteTree(Tree):
    """A directory at an fsspec address. What it holds is asked for once."""

    def __init__(self, address: str) -> None:
        self.where = address.rstrip("/")
        self._fs, self._root = filesystem(self.where)

    def entries(self, inside: str = "") -> Iterator[Entry]:
        place = self._at(inside)
        try:
            found = ask(lambda: self._fs.ls(place, detail=True), f"{self.where}/{inside}".rstrip("/"))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in found:
            name = str(entry["name"]).rstrip("/")
            if name != place.rstrip("/"):  # a file lists itself
                size = entry.get("size")
                is_directory = entry.get("type") == "directory"
                yield Entry(name.rpartition("/")[2], is_directory, size if isinstance(size, int) else -1)

    def read(self, name: str, what: str, limit: int = -1) -> bytes:
        end = None if limit < 0 else limit
        try:
            content = ask(lambda: self._fs.cat_file(self._at(name), start=0, end=end), f"{what} {self.where}/{name}")
        except FileNotFoundError:
            raise InputError(f"{what} {self.where}/{name} is gone; restore it") from None
        return bytes(content)

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name, "file"))

    def holds(self, name: str) -> bool:
        return bool(ask(lambda: self._fs.isfile(self._at(name)), f"{self.where}/{name}"))

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


def open_tree(path: str) -> Tree:
    """The directory at a local path or an address."""
    return RemoteTree(path) if is_remote(path) else LocalTree(Path(path))
