"""Files that are either whole or absent."""

import os
import socket
from pathlib import Path

from ldt.errors import InputError

UNFINISHED = ".unfinished"  # suffix of what a killed writer leaves; never a final name


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write, fsync, rename, fsync the directory: a crash at any point leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{UNFINISHED}")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({error.strerror}); make room or choose another place") from None
    sync_directory(path.parent)


def write_synced(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts one after another and fsync."""
    with path.open("wb") as f:
        for part in parts:
            f.write(part)
        f.flush()
        os.fsync(f.fileno())


def sync_directory(path: Path) -> None:
    """Make renames within a directory survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_unfinished(directory: Path) -> None:
    """Delete what killed writers left behind; only when nobody writes there any more."""
    for leftover in directory.glob(f"*{UNFINISHED}"):
        leftover.unlink(missing_ok=True)
