"""Claims on checkpoints: files beside them that say who is using them, so that none is deleted or scored twice.

    checkpoints/<samples_seen>.wanted-<key>    somebody will need it; any number of processes may say so
    checkpoints/<samples_seen>.claim-<key>     exactly one process is at work on it

`key` names the work. A file counts as long as its owner touches it; after `STALE_TIMEOUT_S` without that, its owner is
presumed dead. Clocks differ between machines and may be set, so an owner whose file looks old is presumed dead only
once this process has seen the file unchanged for `WATCH_PERIOD_S`. Exclusive creation and rename decide, not locks,
which network file systems forget.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Self

from ldt.files import write_new

STALE_TIMEOUT_S = 600.0
HEARTBEAT_PERIOD_S = 60.0
WATCH_PERIOD_S = 2 * HEARTBEAT_PERIOD_S

_unchanged: dict[Path, tuple[float, float]] = {}
"""Files that were looked at: when they were touched by their own clock, and since when this process has seen that."""


class Heartbeat:
    """Touches an existing file every `seconds` seconds while active; it never creates the file."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self._seconds = file, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self._done.wait(self._seconds):
            with contextlib.suppress(OSError):  # somebody took it over, or the file system is away for a while
                os.utime(self.file)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def want(checkpoint: Path, key: str) -> None:
    """Keep the checkpoint from deletion for the work named `key`; call again every minute while that is pending."""
    _beside(checkpoint, "wanted", key).touch()


def forget(checkpoint: Path, key: str) -> None:
    """Withdraw `want`: the work named `key` no longer needs the checkpoint."""
    _beside(checkpoint, "wanted", key).unlink(missing_ok=True)


def pinned(checkpoint: Path) -> bool:
    """Whether a live process wants the checkpoint or has claimed it, so that it must not be deleted."""
    files = [p for p in checkpoint.parent.glob(f"{checkpoint.name}.*-*") if p.is_file()]
    dead = [_stale(p) for p in files]  # look at all of them, as only what is looked at is watched
    return not all(dead)


def is_in_doubt(checkpoint: Path, key: str) -> bool:
    """Whether the owner of the claim looks dead, but has not been watched for long enough to be sure."""
    file = _beside(checkpoint, "claim", key)
    touched = _touched(file)
    return touched is not None and _looks_old(touched) and not _stale(file)


class Claim:
    """The exclusive right to work on a checkpoint; a thread keeps it alive until the `with` block ends."""

    def __init__(self, file: Path, content: str) -> None:
        self._file, self._content = file, content
        self._heartbeat = Heartbeat(file, HEARTBEAT_PERIOD_S)

    @classmethod
    def take(cls, checkpoint: Path, key: str) -> Self | None:
        """The claim, or None while another live process holds it. A dead owner's claim is taken over."""
        file = _beside(checkpoint, "claim", key)
        content = _read(file)  # before its age is looked at: who takes it over in between writes something else
        if file.exists() and _stale(file) and not remove_dead(file, content):
            return None
        mine = f"{platform.node()} {os.getpid()} {time.time():.0f} {uuid.uuid4().hex}\n"
        try:
            write_new(file, mine)
        except FileExistsError:
            return None
        return cls(file, mine)

    def __enter__(self) -> Self:
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.__exit__()
        remove_dead(self._file, self._content)  # unless somebody else, who took us for dead, has it now


def remove_dead(file: Path, content: str) -> bool:
    """Remove a dead owner's file that said `content`; False if somebody else was faster or it says something new."""
    grave = file.with_name(f".{file.name}.{platform.node()}-{os.getpid()}.dead")
    try:
        file.rename(grave)  # only one of several can
    except FileNotFoundError:
        return False
    dead = _read(grave) == content
    if not dead:  # a new owner had come in between
        with contextlib.suppress(FileExistsError):
            os.link(grave, file)
    grave.unlink()
    return dead


def _beside(checkpoint: Path, kind: str, key: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.{kind}-{key}")


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _stale(file: Path) -> bool:
    """Whether the owner of the file is dead, as far as this process can tell by now."""
    touched = _touched(file)
    if touched is None:
        return True
    if file not in _unchanged or _unchanged[file][0] != touched:
        _unchanged[file] = touched, time.monotonic()
    watched = time.monotonic() - _unchanged[file][1]
    return watched >= STALE_TIMEOUT_S or (_looks_old(touched) and watched >= WATCH_PERIOD_S)


def _looks_old(touched: float) -> bool:
    """By this machine's clock; a time far ahead of it is as much no sign of life as one far behind."""
    return abs(time.time() - touched) > STALE_TIMEOUT_S


def _touched(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        _unchanged.pop(file, None)
        return None
