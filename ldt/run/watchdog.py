"""Ends a job that hangs, and says where: on every rank a thread waits for signs of progress.

After `limit_s` without one, the rank writes the stacks of all its threads into `RUN/stalls/`, a moment later names
which rank waits where and which has not reported at all, and the process ends with code 1. A rank whose interpreter is
stuck too is ended by a timer in C.
"""

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ldt.dist import World
from ldt.log import get_logger

logger = get_logger(__name__)

GRACE_PERIOD_S = 5.0  # seconds for the other ranks to report too


class Watchdog:
    """While active, `at` must be called at least every `limit_s` seconds; 0 turns it off.

    on_stall: given the summary, before the process ends; only the lowest rank that can still report calls it.
    """

    def __init__(self, directory: Path, limit_s: float, world: World, on_stall: Callable[[str], None]) -> None:
        self._directory, self._limit, self._world, self._on_stall = directory, limit_s, world, on_stall
        self._where, self._since = "starting", time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def at(self, where: str) -> None:
        """A sign of progress: what this rank does from now on."""
        self._where, self._since = where, time.monotonic()

    def __enter__(self) -> Self:
        if self._limit:
            self._directory.mkdir(parents=True, exist_ok=True)
            for old in (self._dump, self._report(self._world.rank)):
                old.unlink(missing_ok=True)
            self._stacks = self._dump.open("w")
            self.at(self._where)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit:
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._dump.unlink()

    @property
    def _dump(self) -> Path:
        return self._directory / f"rank-{self._world.rank:05d}.stacks.txt"

    def _report(self, rank: int) -> Path:
        return self._directory / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        while not self._done.wait(min(self._limit / 4, 1.0)):
            faulthandler.dump_traceback_later(2 * self._limit + GRACE_PERIOD_S, exit=True, file=self._stacks)
            waited = time.monotonic() - self._since
            if waited > self._limit:
                self._end(waited)

    def _end(self, waited: float) -> None:
        try:
            faulthandler.dump_traceback(self._stacks)
            report = {"rank": self._world.rank, "where": self._where, "seconds": round(waited, 1)}
            self._report(self._world.rank).write_text(json.dumps(report))
            time.sleep(GRACE_PERIOD_S)
            reports = [r for r in map(self._read, range(self._world.size)) if r]
            summary = self._summary(reports)
            logger.error("%s", summary)
            if reports and reports[0]["rank"] == self._world.rank:
                self._on_stall(summary)
        finally:
            os._exit(1)

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            report: dict[str, Any] = json.loads(self._report(rank).read_text())
        except (OSError, ValueError):
            return {}
        return report

    def _summary(self, reports: list[dict[str, Any]]) -> str:
        places: dict[str, list[int]] = {}
        for r in reports:
            places.setdefault(r["where"], []).append(r["rank"])
        silent = sorted(set(range(self._world.size)) - {r["rank"] for r in reports})
        parts = [f"rank {_numbers(ranks)} in {where}" for where, ranks in places.items()]
        parts += [f"rank {_numbers(silent)} says nothing (stopped, or its node is gone)"] if silent else []
        return f"no progress for {self._limit:g} s: {'; '.join(parts)}; stacks are in {self._directory}"


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
