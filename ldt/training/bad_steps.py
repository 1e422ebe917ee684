"""Steps that must not change the weights: a loss or gradient that is not finite, or a loss spike."""

import math

import numpy as np

from ldt.engine.engine import FLOAT32_MAX, StepResult
from ldt.errors import RunError

RECENT_LOSSES = 100
REMEDY = "the run has diverged: lower optimizer.lr, set optimizer.clip, or look at these samples (metrics.jsonl)"


class BadSteps:
    """Which losses are spikes, how many bad steps in a row are too many, and which positions to pass over.

    in_a_row: bad steps that roll the run back; spike_factor: robust standard deviations above the recent median from
    which on a loss is a spike, 0 for never.
    """

    def __init__(self, in_a_row: int, spike_factor: float) -> None:
        self._in_a_row, self._spike_factor = in_a_row, spike_factor
        self._row: list[int] = []
        self._rolled_back = False
        self.avoid: set[int] = set()  # first positions of steps to pass over

    @property
    def exhausted(self) -> bool:
        """Whether the run has to be rolled back."""
        return len(self._row) >= self._in_a_row

    def loss_limit(self, recent: list[float]) -> float:
        """Median + factor · 1.4826 · median absolute deviation of the recent losses, which are robust to spikes."""
        if not self._spike_factor or len(recent) < RECENT_LOSSES:
            return math.inf
        median = float(np.median(recent))
        deviation = 1.4826 * float(np.median(np.abs(np.array(recent) - median)))
        return median + self._spike_factor * deviation

    def passed(self, loss: float, recent: list[float]) -> None:
        """A good step."""
        self._row.clear()
        if self._spike_factor:
            recent.append(loss)
            del recent[:-RECENT_LOSSES]

    def judge(self, first: int, result: StepResult) -> str:
        """Why the step at `first` was skipped."""
        if first in self.avoid:
            return "passed over after a roll-back"
        self._row.append(first)
        if not math.isfinite(result.loss):
            return "the loss is not finite"
        if not result.grad_norm < math.sqrt(FLOAT32_MAX):
            return "the gradient is not finite"
        return "loss spike"

    def mark_for_skipping(self, batch: int) -> str:
        """Avoid the bad steps from now on; says which positions they are. `RunError` the second time."""
        what = f"{len(self._row)} bad steps in a row at positions {self._row[0]} to {self._row[-1] + batch - 1}"
        if self._rolled_back:
            raise RunError(f"{what}, after a roll-back had passed over earlier ones; {REMEDY}")
        self._rolled_back = True
        self.avoid.update(self._row)
        self._row.clear()
        return what
