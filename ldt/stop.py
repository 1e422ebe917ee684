"""Requests to stop: a signal sets a flag, the training loop agrees on it at a step boundary.

SIGTERM, SIGUSR1 (sent before a time limit) and the first Ctrl-C ask for a checkpoint and exit code 75. Further signals
of the first two kinds change nothing; a second Ctrl-C aborts at once.
"""

import signal
from types import FrameType
from typing import Self

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequests:
    """While active, catches the signals; `received` names the first one."""

    def __init__(self) -> None:
        self.received: str = ""

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._handle) for s in REQUESTS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
