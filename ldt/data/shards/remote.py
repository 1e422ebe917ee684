"""Shards that live elsewhere: any fsspec address, with a cache on this node shared by all its processes.

A shard is downloaded once a node (one flock a shard), hashed on the way, and appears in the cache only when its size
and hash are the manifest's. Files are named by their content, so several runs and data sets share one cache. Beyond
its limit the least recently opened files go; readers that still hold them open are not disturbed.
"""

import contextlib
import errno
import fcntl
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import xxhash

from ldt.errors import InputError
from ldt.files import UNFINISHED

ATTEMPTS = 5
FIRST_WAIT = 0.2  # seconds before the second attempt; doubles, with jitter
CHUNK = 1 << 22
STALLED = 60.0  # seconds without an answer after which a request or a piece of a file counts as failed
ABANDONED = 3600  # seconds after which an untouched partial download is a dead process's

T = TypeVar("T")


class Remote:
    """A directory behind an fsspec address: its small files, read whole."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"data path {url} can't be opened ({error}); install fsspec's back-end for it") from None

    def read(self, name: str) -> bytes:
        """A whole file; FileNotFoundError where there is none."""
        return persist(lambda: within(STALLED, lambda: bytes(self._fs.cat_file(self._at(name)))), self._say(name))

    def exists(self, name: str) -> bool:
        return persist(lambda: within(STALLED, lambda: bool(self._fs.exists(self._at(name)))), self._say(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's content, piece by piece; TimeoutError where one does not come."""
        file = within(STALLED, lambda: self._fs.open(self._at(name), "rb"))
        while chunk := within(STALLED, lambda: file.read(CHUNK)):
            yield chunk
        file.close()  # only at its end: closing may wait for what does not come

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _say(self, name: str) -> str:
        return f"{self.url}/{name}"


def within(seconds: float, action: Callable[[], T]) -> T:
    """What the action returns or raises; TimeoutError if that takes longer.

    Not all of fsspec's back-ends have timeouts. A thread that never comes back is left alone: it is a daemon, which no
    exit waits for.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((action(), None))
        except BaseException as error:  # raised again where it is waited for
            answers.put((None, error))

    threading.Thread(target=work, name="ldt-remote", daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def persist(action: Callable[[], T], what: str) -> T:
    """Do it again after a failure, waiting longer each time; InputError when all attempts have failed."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, InputError):
            raise
        except Exception as error:  # every fsspec back-end has exceptions of its own
            if attempt == ATTEMPTS - 1:
                if isinstance(error, _Damaged):
                    raise
                raise InputError(
                    f"{what} could not be read in {ATTEMPTS} attempts (last: {type(error).__name__}: {error}); "
                    "check the address and the network"
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt * (0.5 + random.random()))
    raise AssertionError("unreachable")


class Cache:
    """Downloaded files of one remote directory in a local one of at most `limit` bytes."""

    def __init__(self, remote: Remote, directory: str | Path, limit: int) -> None:
        self.remote, self.directory, self.limit = remote, Path(directory), limit
        try:
            (self.directory / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"data.cache_dir={directory} can't be made ({error.strerror}); choose another") from None

    def path(self, xxh64: int, size: int) -> Path:
        """Where a file of this content is kept."""
        return self.directory / f"{xxh64:016x}-{size}"

    def fetch(self, name: str, xxh64: int, size: int) -> Path:
        """The file's place in the cache, downloaded if it is not there yet. Safe among threads and processes."""
        path = self.path(xxh64, size)
        if size > self.limit:
            raise InputError(
                f"shard {name} has {size:,} bytes, more than the whole cache of {self.limit:,}; raise data.cache_gb"
            )
        with self._lock(path.name):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size == size:
                    os.utime(path)
                    return path
            what = f"shard {self.remote.url}/{name}"
            try:
                persist(lambda: self._download(name, xxh64, size, path), what)
            except FileNotFoundError:
                raise InputError(f"{what} is missing; restore it or encode the data again") from None
            except _Damaged as error:
                raise InputError(f"{what} is damaged: {error}; restore it or encode the data again") from None
        return path

    def drop(self, xxh64: int, size: int) -> None:
        """Forget a file that turned out to be damaged on this node's disk."""
        self.path(xxh64, size).unlink(missing_ok=True)

    def _download(self, name: str, xxh64: int, size: int, path: Path) -> None:
        partial = path.with_name(path.name + UNFINISHED)
        digest, received = xxhash.xxh64(), 0
        try:
            self._make_room(partial, size)
            with partial.open("r+b") as f:
                for chunk in self.remote.chunks(name):
                    f.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                f.truncate(received)
            if received != size or digest.intdigest() != xxh64:
                raise _Damaged(f"{received:,} of {size:,} bytes came, hash {digest.hexdigest()} of {xxh64:016x}")
            partial.replace(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise InputError(
                    f"data.cache_dir={self.directory} is full while caching shard {name}; "
                    "lower data.cache_gb or make room"
                ) from None
            raise
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, size: int) -> None:
        """Evict by last use until `size` more bytes fit, and reserve them."""
        with self._lock("room"):
            files, total = [], 0
            for entry in os.scandir(self.directory):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    if not entry.is_file():
                        continue
                    if entry.name.endswith(UNFINISHED):
                        if time.time() - stat.st_mtime > ABANDONED:
                            Path(entry.path).unlink(missing_ok=True)
                            continue
                    else:
                        files.append((stat.st_mtime_ns, stat.st_size, entry.path))
                    total += stat.st_size
            for _, bytes_, path in sorted(files):
                if total + size <= self.limit:
                    break
                Path(path).unlink(missing_ok=True)
                total -= bytes_
            with partial.open("wb") as f:
                f.truncate(size)  # counts from now on, also for the other processes of this node

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        fd: Any = os.open(self.directory / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)  # releases the lock as well, as does the death of the process


class _Damaged(Exception):
    """A download that is not what the manifest says; worth another attempt."""
