"""Requests to stop: a signal or the clock sets a flag, the training loop agrees on it at a step boundary.

SIGTERM, SIGUSR1 (sent before a time limit), SIGHUP (the terminal was closed; ignored under nohup) and the first Ctrl-C
ask for a checkpoint and exit code 75. Further signals of the first three kinds change nothing; a second Ctrl-C aborts
at once. A launcher that is gone is such a request too: nobody would ever end its ranks otherwise.
"""

import signal
import time
from types import FrameType
from typing import Self

from ldt.cluster.launchers import processes_above

_early = ""  # a signal that came before there was a loop to stop
_launcher: tuple[int, ...] = ()


def early_requests() -> list[signal.Signals]:
    """The signals that are requests from the start of the process on."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGUSR1] + ([] if ignored else [signal.SIGHUP])


def listen() -> None:
    """Remember requests that arrive before `StopRequests` is active instead of ending, and note who launched us."""
    global _launcher
    _launcher = processes_above()
    for number in early_requests():
        signal.signal(number, _remember)


def was_asked() -> bool:
    """Whether a request to stop has arrived since `listen` was called."""
    return bool(_early)


def _remember(number: int, frame: FrameType | None) -> None:
    global _early
    _early = _early or signal.Signals(number).name


class StopRequests:
    """While active, catches the signals and watches the time limit and the launcher; a `limit_s` of 0 is no limit."""

    def __init__(self, limit_s: float = 0.0) -> None:
        self._signal, self._launcher = _early, _launcher or processes_above()
        self._end = time.monotonic() + limit_s if limit_s else float("inf")

    @property
    def received(self) -> str:
        """The first reason to stop that has arrived; empty if there is none."""
        if self._signal:
            return self._signal
        if time.monotonic() > self._end:
            return "time limit"
        return "" if processes_above() == self._launcher else "the launcher is gone"

    def __enter__(self) -> Self:
        requests = [*early_requests(), signal.SIGINT]
        self._previous = {s: signal.signal(s, self._handle) for s in requests}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number).name
