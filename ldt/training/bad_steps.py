"""Steps that must not change the weights: a loss or gradient that is not finite, or a loss spike."""

import math
from dataclasses import dataclass

import numpy as np

from ldt.checkpoint.manifest import TrainState
from ldt.engine.engine import FLOAT32_MAX, StepResult
from ldt.errors import RunError

RECENT_LOSSES = 100
REMEDY = "the run has diverged: lower optimizer.lr, set optimizer.clip, or look at these samples (metrics.jsonl)"


class BadSteps:
    """Which losses are spikes, how many bad steps in a row are too many, and which positions to pass over.

    in_a_row: bad steps that roll the run back; spike_factor: robust standard deviations above the recent median from
    which on a loss is a spike, 0 for never. What must survive a restart stands in the run's `TrainState`.
    """

    def __init__(self, in_a_row: int, spike_factor: float) -> None:
        self._in_a_row, self._spike_factor = in_a_row, spike_factor
        self._row: list[int] = []

    @property
    def exhausted(self) -> bool:
        """Whether the run has to be rolled back."""
        return len(self._row) >= self._in_a_row

    def loss_limit(self, first: int, state: TrainState) -> float:
        """Above which the step at `first` must not change the weights.

        Median + factor · 1.4826 · median absolute deviation of the recent losses, which are robust to spikes: 1.4826
        makes the deviation that of a normal distribution. Nothing passes at a position to avoid.
        """
        if first in state.avoid:
            return -math.inf
        recent = state.recent_losses
        if not self._spike_factor or len(recent) < RECENT_LOSSES:
            return math.inf
        median = float(np.median(recent))
        deviation = 1.4826 * float(np.median(np.abs(np.array(recent) - median)))
        return median + self._spike_factor * deviation

    def passed(self, loss: float, state: TrainState) -> None:
        """Record a step that changed the weights."""
        self._row.clear()
        if self._spike_factor:
            state.recent_losses.append(loss)
            del state.recent_losses[:-RECENT_LOSSES]

    def judge(self, first: int, result: StepResult, state: TrainState) -> str:
        """Note the skipped step at `first`; returns why it was skipped."""
        state.skipped.append(first)
        if first in state.avoid:
            return "passed over after a roll-back"
        self._row.append(first)
        if not math.isfinite(result.loss):
            return "the loss is not finite"
        if not result.grad_norm < math.sqrt(FLOAT32_MAX):
            return "the gradient is not finite"
        return "loss spike"

    def begin_roll_back(self, state: TrainState, batch: int) -> "RollBack":
        """Describe the roll-back that is to be made; `RunError` if the run was rolled back before."""
        what = f"{len(self._row)} bad steps in a row at positions {self._row[0]} to {self._row[-1] + batch - 1}"
        if state.rolled_back:
            raise RunError(f"{what}, after a roll-back had passed over earlier ones; {REMEDY}")
        roll_back = RollBack(what, tuple(self._row))
        self._row.clear()
        return roll_back


@dataclass(frozen=True)
class RollBack:
    """Why a run returns to its checkpoint, in words, and the first positions of the steps to pass over."""

    reason: str
    avoid: tuple[int, ...]

    def mark_for_skipping(self, state: TrainState) -> None:
        """Record the roll-back in the restored state, so that no restart rolls back again."""
        state.rolled_back = True
        state.avoid = sorted({*state.avoid, *self.avoid})
