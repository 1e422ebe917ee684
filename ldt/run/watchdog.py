"""Ends a job that hangs, and says where: on every rank a thread waits for signs of progress.

After `limit_s` without one, the rank writes the stacks of all its threads into `RUN/stalls/`, a moment later names
which rank waits where and which has not reported at all, and the process ends with code 1, unless it has gone on
meanwhile. A rank whose interpreter is stuck too is ended by a small process beside it (`ldt.run.guard`).

Time in which the whole process stood still (SIGSTOP, a suspended job, a paused container, a closed laptop) is no stall.
"""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ldt.dist import World
from ldt.log import get_logger
from ldt.run import guard

logger = get_logger(__name__)

GRACE_PERIOD_S = 5.0  # seconds for the other ranks to report too


class Watchdog:
    """While active, `at` must be called at least every `limit_s` seconds; 0 turns it off.

    on_stall: given the summary, before the process ends; only the lowest rank that can still report calls it.
    """

    def __init__(self, directory: Path, limit_s: float, world: World, on_stall: Callable[[str], None]) -> None:
        self._directory, self._limit, self._world, self._on_stall = directory, limit_s, world, on_stall
        self._awake = 0.0  # seconds that this process has run while it was watched
        self._where, self._since, self._allowed = "starting", 0.0, limit_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def at(self, where: str, limits: float = 1.0) -> None:
        """Note progress: what this rank does from now on, for which it may take `limits` times the usual limit."""
        self._where, self._since, self._allowed = where, self._awake, limits * self._limit

    def __enter__(self) -> Self:
        if self._limit:
            self._directory.mkdir(parents=True, exist_ok=True)
            for old in (self._dump, self._report(self._world.rank)):
                old.unlink(missing_ok=True)
            self._stacks = self._dump.open("a")
            faulthandler.register(guard.DUMP_SIGNAL, self._stacks)
            seconds = 2 * self._limit + GRACE_PERIOD_S
            command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(seconds)]
            self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit:
            self._done.set()
            self._thread.join()
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
            faulthandler.unregister(guard.DUMP_SIGNAL)
            self._stacks.close()
            self._dump.unlink()
            with contextlib.suppress(OSError):  # the last rank, if none has anything to say
                self._directory.rmdir()

    @property
    def _dump(self) -> Path:
        return self._directory / f"rank-{self._world.rank:05d}.stacks.txt"

    def _report(self, rank: int) -> Path:
        return self._directory / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        while self._tick():
            since = self._since
            if self._awake - since > self._allowed:
                try:
                    self._give_up(since)
                except BaseException:
                    os._exit(1)

    def _tick(self) -> bool:
        """Wait a moment, unless it is all over, and note how long this process has been running."""
        period, before = min(self._limit / 4, 1.0), time.monotonic()
        over = self._done.wait(period)
        self._awake += min(time.monotonic() - before, 2 * period)  # longer only if it stood still
        with contextlib.suppress(OSError):  # somebody has killed the guard
            assert self._guard.stdin is not None
            self._guard.stdin.write(b".")
        return not over

    def _give_up(self, since: float) -> None:
        """Report where this rank waits, see whether it goes on after all, and if not, end the process."""
        stacks_are_in = self._write_stacks()
        mine = {"rank": self._world.rank, "where": self._where, "seconds": round(self._awake - since, 1)}
        with contextlib.suppress(OSError):  # on a full disk an empty file says at least that this rank reports
            self._report(self._world.rank).write_text(json.dumps(mine))
        end = self._awake + GRACE_PERIOD_S
        while self._since == since and self._awake < end and self._tick():
            pass
        if self._since != since or self._done.is_set():
            logger.warning("rank %d went on after %.0f s in %s", self._world.rank, self._awake - since, mine["where"])
            self._report(self._world.rank).unlink(missing_ok=True)
            return
        try:
            ranks = range(self._world.size)
            reports = [r for r in (mine if k == self._world.rank else self._read(k) for k in ranks) if r]
            summary = f"{self._summary(reports)}; stacks are in {stacks_are_in}"
            logger.error("%s", summary)
            if reports and reports[0]["rank"] == self._world.rank:
                self._on_stall(summary)
        finally:
            os._exit(1)

    def _write_stacks(self) -> str:
        """Write the stacks of all threads, to stderr if the disk is full; returns where they are."""
        with open(os.memfd_create("stacks"), "r+b") as memory:  # faulthandler passes over what it can't write
            faulthandler.dump_traceback(memory)
            memory.seek(0)
            stacks = memory.read()
        try:
            self._dump.write_bytes(stacks)
        except OSError:
            with contextlib.suppress(OSError):  # where that is on a full disk too
                print(stacks.decode(errors="replace"), file=sys.stderr, flush=True)
            return f"the lines before this one, as {self._directory} has no room"
        return str(self._directory)

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            content = self._report(rank).read_text()
            if not content:
                return {"rank": rank, "where": "what its own lines name, as the disk is full"}
            report: dict[str, Any] = json.loads(content)
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
        return f"no progress for {self._allowed:g} s: {'; '.join(parts)}"


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
