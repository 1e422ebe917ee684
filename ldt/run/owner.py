"""One job owns a run directory: two that write into it would mix two runs.

`RUN/owner.json` is created exclusively and touched while its owner lives; before every commit the owner reads it
again. A dead owner's file is taken over: at once if it was an earlier start of the same scheduler job or a process of
this machine that is gone, else after it has not been touched for `SILENCE_TIMEOUT_S`. Changes are watched rather than
compared to this machine's clock, which need not agree with the file system's.
"""

import contextlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldt.cluster.job import this_job
from ldt.dist import World, on_rank_zero
from ldt.errors import InputError, RunError, by_reason
from ldt.files import parse_json, write_new
from ldt.log import get_logger
from ldt.run.claims import Heartbeat, remove_dead
from ldt.run.directory import OWNER

logger = get_logger(__name__)

HEARTBEAT_PERIOD_S = 10.0
SILENCE_TIMEOUT_S = 30.0


class Owner:
    """Proof that this job owns the run directory. Rank 0 holds the token; on the other ranks `check` does nothing."""

    def __init__(self, file: Path, token: str) -> None:
        self._file, self._token = file, token

    def check(self) -> None:
        """`RunError` if another job has taken the run directory over."""
        if self._token and _read(self._file).get("token") != self._token:
            raise RunError(
                f"{self._file.parent} was taken over by another job while this one was presumed dead; it writes "
                "nothing more there"
            )


@contextmanager
def owned(run_dir: Path, world: World) -> Iterator[Owner]:
    """Own the run directory for the length of the block, all ranks together; `InputError` if another job does."""
    file, is_new = run_dir / OWNER, not run_dir.exists()
    token = on_rank_zero(world, lambda: _take(file))
    token = token if world.rank == 0 else ""
    owner = Owner(file, token)
    with Heartbeat(file, HEARTBEAT_PERIOD_S) if token else contextlib.nullcontext():
        try:
            yield owner
        finally:
            if token and _read(file).get("token") == token:
                file.unlink()
                if is_new:
                    with contextlib.suppress(OSError):  # unless something was written, as is usual
                        run_dir.rmdir()


def _take(file: Path) -> str:
    """Create the owner file; returns the token that proves it is ours."""
    token, job = uuid.uuid4().hex, this_job()
    me = {
        "token": token,
        "host": platform.node(),
        "pid": os.getpid(),
        "machine": _machine(),
        "born": _born(os.getpid()),
    }
    me |= {"job": job.id, "restart": job.restart, "time": time.time()}
    for _ in range(3):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_new(file, json.dumps(me))
            return token
        except FileExistsError:
            _bury(file)
        except OSError as error:
            raise by_reason(
                f"run_dir={file.parent} can't be written ({error.strerror}); choose another run_dir", error
            ) from None
    raise InputError(f"several jobs want run_dir={file.parent} at once; give each run a directory of its own")


def _bury(file: Path) -> None:
    """Remove the file of a dead owner; `InputError` if the owner is alive."""
    try:
        content = file.read_text(errors="replace")
    except FileNotFoundError:
        return
    owner = _read(file)
    if not _gone(owner) and _beats(file):
        job = f" as job {owner['job']}" if owner.get("job") else ""
        raise InputError(
            f"run_dir={file.parent} is in use by process {owner.get('pid')} on {owner.get('host')}{job}; "
            "wait for it, stop it, or choose another run_dir"
        )
    logger.info("taking %s over from a dead owner on %s", file.parent, owner.get("host"))
    remove_dead(file, content)


def _gone(owner: dict[str, Any]) -> bool:
    """Whether the owner is surely dead: an earlier start of this very job, or a process that is not there any more."""
    job = this_job()
    if job.id and owner.get("job") == job.id and owner.get("restart") != job.restart:
        return True
    return bool(owner.get("machine") == _machine() and owner.get("born") != _born(owner.get("pid")))


def _beats(file: Path) -> bool:
    """Whether the file is touched, or goes away, within `SILENCE_TIMEOUT_S` seconds."""
    first, end = _modified(file), time.monotonic() + SILENCE_TIMEOUT_S
    logger.warning("%s has an owner; waiting up to %.0f s to see whether it is alive", file.parent, SILENCE_TIMEOUT_S)
    while time.monotonic() < end:
        time.sleep(0.5)
        if _modified(file) != first:
            return file.exists()
    return False


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _read(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _machine() -> str:
    """One boot of one machine, as seen by one set of process numbers."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _born(pid: Any) -> str:
    """When a process started, in the kernel's ticks; empty if there is none of this number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
