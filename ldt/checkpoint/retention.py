"""Which checkpoints stay, and how the others are deleted: those of a rule, of killed writers, and replaced ones."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ldt.checkpoint.manifest import listed
from ldt.log import get_logger
from ldt.run.claims import pinned

logger = get_logger(__name__)


@dataclass(frozen=True)
class Retention:
    """Keep the newest `last` (≥ 1) and each first one at or after a multiple of `every` samples (0: no others)."""

    last: int
    every: int = 0


def remove_leftovers(root: Path) -> None:
    """Delete what killed writers left under `root`; only for the owner of the run directory."""
    for leftover in (*root.glob(".*.tmp"), *root.glob(".*.deleted")):
        remove(leftover)


def remove_old(root: Path, retention: Retention) -> None:
    """Delete the checkpoints that the rule doesn't keep and that nobody has claimed or waits for.

    Each is renamed first, so that none is ever seen half deleted.
    """
    periods: set[int] = set()
    for path in listed(root)[: -retention.last]:
        if retention.every:
            period = int(path.name) // retention.every
            if period > 0 and period not in periods:
                periods.add(period)
                continue
        if not pinned(path):
            try:
                delete(path)
            except OSError as error:
                logger.warning("%s is too old to keep but could not be deleted (%s)", path, error)


def delete(path: Path) -> None:
    """Rename a checkpoint away at once, then delete its files. What a symbolic link points to is not ours and stays."""
    if path.is_symlink():
        logger.info("%s was a symbolic link and is removed; what it leads to stays: %s", path, os.readlink(path))
        path.unlink()
        return
    doomed = path.with_name(f".{path.name}.deleted")
    path.rename(doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Delete a directory or a symbolic link; one that can't be deleted is reported and left, the run goes on."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be deleted (%s); remove it by hand", path, error)
