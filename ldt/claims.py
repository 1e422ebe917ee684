"""Claims on checkpoints: files beside them that say who is using them, so that none is deleted or scored twice.

    checkpoints/<samples_seen>.wanted-<key>    somebody will need it; any number of processes may say so
    checkpoints/<samples_seen>.claim-<key>     exactly one process is at work on it

`key` names the work. A file speaks as long as its owner touches it; after `STALE` seconds without that its owner is
taken for dead. Exclusive creation and rename decide, not locks, which network file systems forget.
"""

import os
import platform
import threading
import time
from pathlib import Path
from typing import Self

STALE = 600.0
BEAT = 60.0


def want(checkpoint: Path, key: str) -> None:
    """Keep the checkpoint for work named `key`; again every minute or so while that holds."""
    _beside(checkpoint, "wanted", key).touch()


def forget(checkpoint: Path, key: str) -> None:
    """The work named `key` needs the checkpoint no more."""
    _beside(checkpoint, "wanted", key).unlink(missing_ok=True)


def pinned(checkpoint: Path) -> bool:
    """Whether somebody alive wants or has claimed the checkpoint."""
    files = (p for p in checkpoint.parent.glob(f"{checkpoint.name}.*-*") if p.is_file())
    return any(not _stale(p) for p in files)


class Claim:
    """Exclusive work on a checkpoint, kept alive by a thread until it is left."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @classmethod
    def take(cls, checkpoint: Path, key: str) -> Self | None:
        """The claim, or None while another live process holds it. A dead owner's claim is taken over."""
        file = _beside(checkpoint, "claim", key)
        if file.exists() and _stale(file):
            grave = file.with_name(f".{file.name}.{os.getpid()}.stale")
            try:
                file.rename(grave)  # only one of several can
            except FileNotFoundError:
                return None
            grave.unlink()
        try:
            with file.open("x") as f:
                f.write(f"{platform.node()} {os.getpid()} {time.time():.0f}\n")
        except FileExistsError:
            return None
        return cls(file)

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            self._file.touch()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)


def _beside(checkpoint: Path, kind: str, key: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.{kind}-{key}")


def _stale(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_mtime > STALE
    except FileNotFoundError:
        return True
