"""Requests to stop: a signal or the clock sets a flag, the training loop agrees on it at a step boundary.

SIGTERM, SIGUSR1 (sent before a time limit) and the first Ctrl-C ask for a checkpoint and exit code 75. Further signals
of the first two kinds change nothing; a second Ctrl-C aborts at once.
"""

import signal
import time
from types import FrameType
from typing import Self

EARLY = (signal.SIGTERM, signal.SIGUSR1)
REQUESTS = (*EARLY, signal.SIGINT)

_early = ""  # a signal that came before there was a loop to stop


def listen() -> None:
    """From now on remember SIGTERM and SIGUSR1 for the `StopRequests` to come, instead of dying of them."""
    for number in EARLY:
        signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    global _early
    _early = _early or signal.Signals(number).name


class StopRequests:
    """While active, catches the signals and watches the clock; `limit_s` of 0 is no limit."""

    def __init__(self, limit_s: float = 0.0) -> None:
        self._signal = _early
        self._end = time.monotonic() + limit_s if limit_s else float("inf")

    @property
    def received(self) -> str:
        """The first reason to stop, empty for none."""
        return self._signal or ("time limit" if time.monotonic() > self._end else "")

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._handle) for s in REQUESTS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number).name
