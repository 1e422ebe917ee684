"""A validation loss that is the same quantity whatever a model predicts and whatever its schedule is.

Sample i of the held-out split is noised at τ = (i mod K)/K, as MLPerf's FLUX.1 benchmark does for K = 8. τ is the time
of the rectified flow: another schedule is asked at the time at which its σ/α is τ/(1 − τ), so that every network sees
the same mixture of data and noise, up to a factor. What it predicts is turned into clean latent and noise, and the loss
is the mean squared error of the velocity ε − x0, unweighted.

At τ = 0 a network sees the data themselves. The noise can't be told from them, so the best answer there is 0 and its
loss 1, the variance of the noise; predictions that leave the noise open there (x, and flow on a schedule whose slope is
unbounded at 0) are taken to answer 0.
"""

import math

import torch
from torch import Tensor

from ldt.diffusion.condition import Condition
from ldt.diffusion.objectives import SINGULAR, Denoiser, Objective, Prediction
from ldt.errors import InputError

HALVINGS = 60  # of an interval, to the last bit of float64


class FixedTimes:
    """K fixed times of an objective; `t_K` are those of its schedule, float64 on the CPU."""

    def __init__(self, objective: Objective, count: int) -> None:
        self.objective, self.count = objective, count
        self.t_K = torch.tensor([_time_of_ratio(objective, k / count) for k in range(count)], dtype=torch.float64)
        reach = float(_ratio(objective, torch.tensor(1.0, dtype=torch.float64)))
        if count - 1 > reach:
            raise InputError(
                f"log.validation_times={count} asks for more noise than objective.schedule={objective.config.schedule} "
                f"ends with; give at most {math.floor(reach) + 1}, such as 8"
            )
        determinant = float(objective.determinant(torch.zeros(1)))
        self._open = not (math.isfinite(determinant) and abs(determinant) > SINGULAR)

    def loss(
        self, denoiser: Denoiser, x0_BCHW: Tensor, eps_BCHW: Tensor, number_B: Tensor, condition: Condition
    ) -> Tensor:
        """Of each sample, by its number in the split: float32 [B]."""
        k_B = number_B.clamp(min=0) % self.count
        t_B = self.t_K.to(k_B.device)[k_B].float()
        xt_BCHW = self.objective.noised(x0_BCHW, eps_BCHW, t_B)
        y_BCHW = denoiser(xt_BCHW, t_B, condition).float()
        guess = self.objective.predict(y_BCHW, xt_BCHW, t_B)
        if self._open:
            guess = self._at_zero(guess, y_BCHW, xt_BCHW, k_B[:, None, None, None] == 0)
        error_BCHW = guess.eps_BCHW - guess.x0_BCHW - (eps_BCHW - x0_BCHW)
        return error_BCHW.square().mean((1, 2, 3))

    def _at_zero(self, guess: Prediction, y_BCHW: Tensor, xt_BCHW: Tensor, zero_B111: Tensor) -> Prediction:
        x0_BCHW = y_BCHW if self.objective.config.prediction == "x" else xt_BCHW
        return Prediction(torch.where(zero_B111, x0_BCHW, guess.x0_BCHW), torch.where(zero_B111, 0.0, guess.eps_BCHW))


def _ratio(objective: Objective, t: Tensor) -> Tensor:
    return objective.schedule.sigma(t) / objective.schedule.alpha(t)


def _time_of_ratio(objective: Objective, tau: float) -> float:
    """The time at which σ/α of the objective's schedule is τ/(1 − τ); it rises from 0 with t."""
    low, high, wanted = 0.0, 1.0, tau / (1 - tau)
    if wanted == 0:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = float(_ratio(objective, torch.tensor(middle, dtype=torch.float64))) < wanted
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2
