"""A real disk of some megabytes that can be filled to the page: a tmpfs, mounted for one test."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ldt.cli import main

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


@pytest.fixture
def fill(disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """`fill(names, *command)`: try `ldt COMMAND` at every room there can be; `names` are patterns of files without any
    then. What was on the disk before is there again each time.

    A command may begin with a function, which is called with the other words and returns an exit code.
    """

    def check(names: list[str], *command: Any) -> None:
        shutil.copytree(disk.path, tmp_path / "before", symlinks=True)
        call, words, found = ldt, command, {}
        if callable(command[0]):
            call, *words = command

        def attempt(pages: int) -> str:
            """The file that had no room; empty if all had."""
            if pages in found:
                return found[pages]
            disk.empty()
            shutil.copytree(tmp_path / "before", disk.path, symlinks=True, dirs_exist_ok=True)
            before = disk.files()
            disk.leave(pages)
            code, said = call(*words), capsys.readouterr().err
            found[pages] = "" if code == 0 else name_in(said, disk)
            if code == 0:
                return ""
            assert code == 1 and "Traceback" not in said, said
            after = disk.files()
            assert {name: after.get(name) for name in before} == before, f"{said}\nchanged what was there"
            assert not [name for name in after if "unfinished" in name], "nothing half-written is left"
            disk.make_room()
            assert call(*words) == 0, f"{said}\nthen: {capsys.readouterr().err}"
            assert not [name for name in disk.files() if "unfinished" in name or ".work" in name]
            return found[pages]

        high = 1
        while attempt(high):
            high *= 2
        ranges = [(0, high)]
        while ranges:
            low, high = ranges.pop()
            if attempt(low) != attempt(high) and high - low > 1:
                middle = (low + high) // 2
                ranges += [(low, middle), (middle, high)]
        named = {name for name in found.values() if name}
        assert not [n for n in named if not any(re.fullmatch(p, n) for p in names)], found
        assert not [p for p in names if not any(re.fullmatch(p, n) for n in named)], found

    return check


def ldt(*words: object) -> int:
    return main([*map(str, words), "--quiet"])


def name_in(said: str, disk: SmallDisk) -> str:
    """The file that the last line names, which is to be one sentence about a full disk."""
    last = said.strip().split("\n")[-1]
    assert FULL in last and "make room" in last, said
    (name,) = set(re.findall(rf"{re.escape(str(disk.path))}/([^\s;,:'\")]+)", last))
    return str(name)
