"""Following a run: each of its checkpoints goes to one of the watchers, once, and is kept until then."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from ldt.checkpoint.manifest import MANIFEST, MANIFEST_HASH, listed
from ldt.cluster.job import is_alive
from ldt.dist import World, broadcast
from ldt.errors import InputError
from ldt.run.claims import Claim, forget, is_in_doubt, want
from ldt.run.outcome import read_outcome

POLL_PERIOD_S = 5.0
ENDED = ("done", "failed", "wrong_input")  # a stopped run continues after its requeue


def follow(run_dir: Path, key: str, world: World, job: str = "") -> Iterator[Path]:
    """The checkpoints of a run as they appear, each claimed while it is worked on; ends when the run has ended.

    `key` names the work, so that several kinds of it may follow the same run. All ranks iterate together.
    job: the training; while it runs or waits in a queue, the run has not ended, whatever an earlier start has said.
    """
    if not broadcast(run_dir.is_dir()):
        raise InputError(f"{run_dir} is not a run directory to follow; start the training first")
    while True:
        claimed = _next(run_dir, key) if world.rank == 0 else None
        over = claimed is None and _has_ended(run_dir, job) and not _anything_in_doubt(run_dir, key)
        path, over = broadcast((claimed[0] if claimed else None, over))
        if path is not None:
            with claimed[1] if claimed else contextlib.nullcontext():
                yield path
                if world.rank == 0:
                    _mark(run_dir, path, key).touch()
                    forget(path, key)
        elif over:
            return
        else:
            time.sleep(POLL_PERIOD_S)


def _next(run_dir: Path, key: str) -> tuple[Path, Claim] | None:
    """The oldest checkpoint that nobody has worked on or is working on; all that wait are kept from deletion."""
    waiting = [p for p in listed(run_dir / "checkpoints") if _waits(run_dir, p, key)]
    for path in waiting:
        want(path, key)
    for path in waiting:
        claim = Claim.take(path, key)
        if claim is not None:
            if _waits(run_dir, path, key):
                return path, claim
            with claim:  # somebody was faster, or it was deleted before it was wanted
                forget(path, key)
    return None


def _anything_in_doubt(run_dir: Path, key: str) -> bool:
    """Whether a checkpoint is claimed by somebody who may be dead: then it is ours in a while."""
    waiting = [p for p in listed(run_dir / "checkpoints") if _waits(run_dir, p, key)]
    return any(is_in_doubt(path, key) for path in waiting)


def _waits(run_dir: Path, path: Path, key: str) -> bool:
    try:
        return (path / MANIFEST).exists() and not _mark(run_dir, path, key).exists()
    except FileNotFoundError:  # deleted meanwhile
        return False


def _mark(run_dir: Path, path: Path, key: str) -> Path:
    """The file that says that this very checkpoint is done with."""
    directory = run_dir / "evaluations"
    directory.mkdir(exist_ok=True)
    return directory / f".{path.name}-{(path / MANIFEST_HASH).read_text()[:8]}.done-{key}"


def _has_ended(run_dir: Path, job: str) -> bool:
    alive = is_alive(job) if job else None
    return not alive if alive is not None else read_outcome(run_dir).get("outcome") in ENDED
