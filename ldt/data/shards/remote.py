"""Shards that live elsewhere: any fsspec address, with a cache on this node shared by all its processes.

A shard is downloaded once a node (one flock a shard), hashed on the way, and appears in the cache only when its size
and hash are the manifest's. Files are named by their content, so several runs and data sets share one cache. Beyond
its limit the least recently opened files go; readers that still hold them open are not disturbed.
"""

import contextlib
import fcntl
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import xxhash

from ldt.errors import NO_ROOM, InputError, RunError, by_reason, file_error
from ldt.files import UNFINISHED

ATTEMPTS = 5
FIRST_WAIT = 0.2  # seconds before the second attempt; doubles, with jitter
CHUNK = 1 << 22
STALLED = 60.0  # seconds without an answer after which a request or a piece of a file counts as failed
DENIED = re.compile(
    r"\b(401|403)\b|Access ?Denied|Forbidden|Unauthorized|NoCredentials|credentials|"
    r"ProfileNotFound|SSOToken|TokenRetrieval|provided token",  # botocore's names, and S3's words for InvalidToken
    re.IGNORECASE,
)
ABANDONED = 3600  # seconds after which an untouched partial download is a dead process's

T = TypeVar("T")


class Remote:
    """A directory behind an fsspec address: its small files, read whole."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if self.url.startswith("http") and "?" in self.url:
            raise InputError(
                f"data path {url} is the address of one file (presigned, perhaps), and a data set is a directory of "
                "many; give the address of the directory, and credentials by the back-end's own means"
            )
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
    """Repeat an action until it succeeds, waiting longer each time; after the last attempt its failure is a sentence.

    A network may come back, so its failures are `RunError`s; what credentials or an address forbid stays forbidden.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (InputError, RunError, _Gone):
            raise
        except Exception as raised:  # every fsspec back-end has exceptions of its own
            error = _behind(raised)
            if isinstance(error, FileNotFoundError):
                raise
            if _is_denied(error):
                raise by_reason(
                    f"{what} may not be read ({type(error).__name__}: {error}); check the credentials of this machine",
                    error,
                ) from error
            if attempt == ATTEMPTS - 1:
                if isinstance(error, _Damaged):
                    raise
                raise RunError(
                    f"{what} could not be read in {ATTEMPTS} attempts (last: {type(error).__name__}: {error}); "
                    "check the address and the network, and run the same command again"
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt * (0.5 + random.random()))
    raise AssertionError("unreachable")


def _behind(error: Exception) -> Exception:
    """The answer that a `FileNotFoundError` hides: HTTP's back-end raises one whatever a question about a file met."""
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp")
    return cause if hidden and isinstance(cause, Exception) and getattr(cause, "status", 0) not in (404, 410) else error


def _is_denied(error: Exception) -> bool:
    """Whether the other side has said no; back-ends say it in their own types and words."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    words = f"{type(error).__name__} {error}"
    return isinstance(error, PermissionError) or status in (401, 403) or DENIED.search(words) is not None


class Cache:
    """Downloaded files of one remote directory in a local one of at most `limit` bytes.

    Users may share it: what is made there can be used by whoever can write into the directory.
    """

    def __init__(self, remote: Remote, directory: str | Path, limit: int) -> None:
        self.remote, self.directory, self.limit = remote, Path(directory), limit
        self._make_directory()

    def path(self, xxh64: int, size: int) -> Path:
        """Where a file of this content is kept."""
        return self.directory / f"{xxh64:016x}-{size}"

    def fetch(self, name: str, xxh64: int, size: int) -> Path:
        """The file's place in the cache, downloaded if it is not there yet. Safe among threads and processes."""
        if size > self.limit:
            raise InputError(
                f"shard {name} has {size:,} bytes, more than the whole cache of {self.limit:,}; raise data.cache_gb"
            )
        for _ in range(ATTEMPTS):
            try:
                return self._fetch(name, xxh64, size)
            except _Gone:  # somebody has cleaned up
                self._make_directory()
        raise RunError(f"data.cache_dir={self.directory} keeps vanishing; keep it, and run the same command again")

    def drop(self, xxh64: int, size: int) -> None:
        """Forget a file that turned out to be damaged on this node's disk."""
        with self._on_disk():
            self.path(xxh64, size).unlink(missing_ok=True)

    def _fetch(self, name: str, xxh64: int, size: int) -> Path:
        path, what = self.path(xxh64, size), f"shard {self.remote.url}/{name}"
        with self._lock(path.name):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size == size:
                    with contextlib.suppress(PermissionError):  # another user's: its age is then when it came
                        os.utime(path)
                    return path
            try:
                persist(lambda: self._download(name, xxh64, size, path), what)
            except FileNotFoundError:
                raise InputError(f"{what} is missing; restore it or encode the data again") from None
            except _Damaged as error:
                raise InputError(f"{what} is damaged: {error}; restore it or encode the data again") from None
        return path

    def _download(self, name: str, xxh64: int, size: int, path: Path) -> None:
        partial = path.with_name(path.name + UNFINISHED)
        digest, received = xxhash.xxh64(), 0
        try:
            self._make_room(partial, size)
            with self._on_disk():
                file = partial.open("r+b")
            with file as f:
                for chunk in self.remote.chunks(name):
                    digest.update(chunk)
                    received += len(chunk)
                    with self._on_disk():
                        f.write(chunk)
                with self._on_disk():
                    f.truncate(received)
            if received != size or digest.intdigest() != xxh64:
                raise _Damaged(f"{received:,} of {size:,} bytes came, hash {digest.hexdigest()} of {xxh64:016x}")
            with self._on_disk():
                self._share(partial)
                partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, size: int) -> None:
        """Evict by last use until `size` more bytes fit, and reserve them."""
        with self._lock("room"), self._on_disk():
            files, total = [], 0
            for entry in os.scandir(self.directory):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    if not entry.is_file():
                        continue
                    if entry.name.endswith(UNFINISHED):
                        if time.time() - stat.st_mtime > ABANDONED:
                            self._evict(entry.path)
                            continue
                    else:
                        files.append((stat.st_mtime_ns, stat.st_size, entry.path))
                    total += stat.st_size
            for _, bytes_, path in sorted(files):
                if total + size <= self.limit:
                    break
                total -= bytes_ if self._evict(path) else 0
            with partial.open("wb") as f:
                f.truncate(size)  # counts from now on, also for the other processes of this node

    @staticmethod
    def _evict(path: str) -> bool:
        """Delete a file; returns whether it is gone. Another user's may have to stay."""
        with contextlib.suppress(PermissionError):
            Path(path).unlink(missing_ok=True)
            return True
        return False

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with self._on_disk():
            fd: Any = os.open(self.directory / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._share(fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)  # releases the lock as well, as does the death of the process

    def _make_directory(self) -> None:
        locks = self.directory / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            self._share(locks, 0o777)
        except OSError as error:
            raise by_reason(
                f"data.cache_dir={self.directory} can't be made ({error.strerror}); choose another", error
            ) from None

    def _share(self, file: Path | int, most: int = 0o666) -> None:
        """Give a file the permissions of the cache's directory, so that all its users can use it."""
        with contextlib.suppress(PermissionError, FileNotFoundError):  # another user's, who did so
            os.chmod(file, self.directory.stat().st_mode & most)

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Turns errors of the cache's own disk into sentences about the cache, so that the remote is not blamed."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise _Gone from None
        except OSError as error:
            what = f"data.cache_dir={self.directory}"
            if error.errno in NO_ROOM:
                raise RunError(f"{what} is full ({error.strerror}); lower data.cache_gb or make room") from None
            raise file_error(what, error, "choose another") from None


class _Gone(Exception):
    """The directory of the cache, or a file that was in it a moment ago, is not there any more."""


class _Damaged(Exception):
    """A download that is not what the manifest says; worth another attempt."""
