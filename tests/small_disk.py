"""A real disk of some megabytes that can be filled to the page: a tmpfs, mounted for one test."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 16 << 20
FULL = "No space left on device"


class SmallDisk:
    """`path` is on the disk; `leave` fills it."""

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / ".ballast"

    def leave(self, pages: int) -> None:
        """Leave room for so many pages; a file takes one at least, a directory none."""
        with self._ballast.open("wb") as f:
            room = os.statvfs(self.path).f_bavail - pages
            assert room >= 0, "the disk is too small"
            if room:
                os.posix_fallocate(f.fileno(), 0, room * PAGE)

    def make_room(self) -> None:
        """Undo `leave`."""
        self._ballast.unlink()

    def empty(self) -> None:
        """Remove all that is on it."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def files(self) -> dict[str, bytes]:
        """The content of every file on it but the ballast."""
        found = (p for p in self.path.rglob("*") if p.is_file() and p != self._ballast)
        return {str(p.relative_to(self.path)): p.read_bytes() for p in found}


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[SmallDisk]:
    """A disk at `path`, which is made."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", path], check=True)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk at `tmp_path / "disk"`."""
    with mounted(tmp_path / "disk") as small:
        yield small
