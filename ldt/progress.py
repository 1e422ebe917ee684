"""Shows the progress of a piece of work: one line that renews itself on a terminal, else a line now and then.

All numbers are of the last half minute, so that the line is calm. Log lines go above it.
"""

import contextlib
import logging
import math
import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import Self, TextIO

WINDOW = 30.0  # seconds that speeds and losses are averaged over
SURE = 2.0  # seconds after which a speed tells how long the rest takes: the first piece of work is slow
RENEW = 0.5  # seconds between two looks of the line on a terminal
PLAIN = 60.0  # seconds between two lines elsewhere
FIRST = 10.0  # seconds until the first of these, so that a log soon shows that something is done

_shown: "list[ProgressLine]" = []  # those that have a line on the terminal; the last one's is visible


class ProgressLine:
    """`update` after each piece of work. `show` false: silent."""

    def __init__(self, total: int, unit: str, what: str, done: int = 0, show: bool = True) -> None:
        self._total, self._unit, self._what, self._show = total, unit, what, show
        self._stream: TextIO = sys.stderr
        self._terminal = show and self._stream.isatty()
        self._done, self._waited, self._losses, self._steps = done, 0.0, 0.0, 0
        now = time.monotonic()
        self._drawn = now if self._terminal else now - PLAIN + FIRST
        self._past = deque([(now, done, 0.0, 0.0, 0)])

    def update(self, done: int = 1, loss: float | None = None, waited: float = 0.0) -> None:
        """Add work that is done. loss: that of a training step; waited: seconds of it spent waiting for data."""
        self._done, self._waited = self._done + done, self._waited + waited
        if loss is not None and loss == loss:
            self._losses, self._steps = self._losses + loss, self._steps + 1
        now = time.monotonic()
        self._past.append((now, self._done, self._waited, self._losses, self._steps))
        while len(self._past) > 2 and self._past[1][0] < now - WINDOW:
            self._past.popleft()
        if self._show and now - self._drawn >= (RENEW if self._terminal else PLAIN):
            self._drawn = now
            if self._terminal:
                self.draw()
            else:
                self._say(f"{self.line()}\n")

    def go_back(self, done: int) -> None:
        """Set the work that is done back to `done`; speeds are measured anew."""
        self._done = done
        self._past = deque([(time.monotonic(), done, self._waited, self._losses, self._steps)])

    def line(self, width: float = math.inf) -> str:
        """Such as `train  3,200 of 6,400 img (50%)  1,890 img/s  12 min to go  loss 1.3540  data wait 2%`.

        What does not fit into `width` characters is left out from the end.
        """
        then, now = self._past[0], self._past[-1]
        seconds, steps = max(now[0] - then[0], 1e-9), now[4] - then[4]
        rate = (now[1] - then[1]) / seconds
        parts = [f"{self._what}  {self._done:,} of {self._total:,} {self._unit}"]
        parts[0] += f" ({self._done / self._total:.0%})" if self._total else ""
        parts.append(f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s")
        if rate > 0 and self._done < self._total and seconds >= SURE:
            parts.append(f"{duration((self._total - self._done) / rate)} to go")
        if steps:
            parts.append(f"loss {(now[3] - then[3]) / steps:.4f}")
            parts.append(f"data wait {(now[2] - then[2]) / seconds:.0%}")
        while len("  ".join(parts)) > width and len(parts) > 1:
            parts.pop()
        return "  ".join(parts)

    def draw(self) -> None:
        """Renew the line on the terminal."""
        width = 80
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(self._stream.fileno()).columns or 80  # 0 where it is not known
        self._say(f"\r\x1b[K{self.line(width - 1)[: width - 1]}")

    def erase(self) -> None:
        """Clear the line on the terminal, so that other output can be written."""
        self._say("\r\x1b[K")

    def _say(self, words: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone; the work goes on
            self._stream.write(words)
            self._stream.flush()

    def __enter__(self) -> Self:
        if self._terminal:
            _shown.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            _shown.remove(self)
            self.draw()
            self._say("\n")


class Handler(logging.StreamHandler):
    """Log lines above the line of progress, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if _shown:
            _shown[-1].erase()
        super().emit(record)
        if _shown:
            _shown[-1].draw()


def si_format(number: float) -> str:
    """A number with three digits and a unit, such as 74.0 k, 330 M or 5.57 G."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    digits = max(2 - len(f"{abs(number):.0f}") + 1, 0) if unit else 0
    return f"{number:.{digits}f} {unit}"


def pluralize(number: int, one: str, more: str) -> str:
    """A number with its noun, such as 1 class or 1,000 classes."""
    return f"{number:,} {one if number == 1 else more}"


def duration(seconds: float) -> str:
    """A duration in the units that read best, such as 45 s, 12 min, 3 h 20 min or 2 d 4 h."""
    minutes = int(max(seconds, 0)) // 60
    if minutes < 2:
        return f"{max(seconds, 0):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
