"""Samplers: plain functions from noise to data over any denoiser.

A sampler sees the network only as `predict(x_BCHW, t) -> Prediction`, its opinion of (x0, ε) at one time for the whole
batch, and the schedule x_t = α(t)·x0 + σ(t)·ε. It walks through `times`, decreasing from 1 (noise) to 0 (data).
Coefficients are computed in float64; x keeps its dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldt.diffusion.objectives import Denoiser, Objective, Prediction
from ldt.diffusion.schedules import Schedule
from ldt.errors import InputError
from ldt.nn.condition import Condition
from ldt.options import choice

Predict = Callable[[Tensor, float], Prediction]
Sampler = Callable[[Predict, Schedule, Tensor, Sequence[float]], Tensor]


@dataclass
class SamplerConfig:
    """How to go from noise to data.

    `guidance` 1 is none. Outside (`guidance_low`, `guidance_high`] of t the conditional prediction is used alone.
    `shift` s moves the times to s·t / (1 + (s − 1)·t): above 1 spends more steps where there is more noise.
    """

    sampler: str = choice("heun", "euler")
    steps: int = 25
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be at least 1")
        if self.shift <= 0:
            raise InputError(f"shift={self.shift} must be positive; 1 leaves the times as they are")
        if not 0 <= self.guidance_low < self.guidance_high <= 1:
            raise InputError(
                f"guidance_low={self.guidance_low} and guidance_high={self.guidance_high} must be "
                "two times in increasing order between 0 (data) and 1 (noise)"
            )


def sampling_times(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 to 0: even, then shifted (Esser et al. 2403.03206, eq. 23)."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def euler(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float]) -> Tensor:
    """First-order steps of the probability-flow ODE dx/dt = α'·x0 + σ'·ε (Song et al. 2011.13456). One call a step."""
    for t, s in zip(times, times[1:], strict=False):
        x_BCHW = x_BCHW + (s - t) * _velocity(schedule, predict(x_BCHW, t), t)
    return x_BCHW


def heun(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float]) -> Tensor:
    """Second-order steps (Karras et al. 2206.00364, algorithm 1), of which the last, to t = 0, is Euler's.

    Two calls a step but for the last: 2·steps − 1.
    """
    for t, s in zip(times, times[1:], strict=False):
        slope_BCHW = _velocity(schedule, predict(x_BCHW, t), t)
        trial_BCHW = x_BCHW + (s - t) * slope_BCHW
        if s == 0:  # the slope at 0 is unbounded under some schedules and never trained under the others
            return trial_BCHW
        slope_BCHW = (slope_BCHW + _velocity(schedule, predict(trial_BCHW, s), s)) / 2
        x_BCHW = x_BCHW + (s - t) * slope_BCHW
    return x_BCHW


SAMPLERS: dict[str, Sampler] = {"heun": heun, "euler": euler}


def sample(
    denoiser: Denoiser,
    objective: Objective,
    noise_BCHW: Tensor,
    condition: Condition,
    null_label: int,
    config: SamplerConfig,
) -> Tensor:
    """Clean latents [B, C, H, W] (whitened, as the denoiser knows them) from standard normal noise."""
    predict = as_predict(denoiser, objective, condition, null_label, config)
    times = sampling_times(config.steps, config.shift)
    x_BCHW = noise_BCHW * _number(objective.schedule.sigma, times[0])
    return SAMPLERS[config.sampler](predict, objective.schedule, x_BCHW, times)


def as_predict(
    denoiser: Denoiser, objective: Objective, condition: Condition, null_label: int, config: SamplerConfig
) -> Predict:
    """The sampler's view of a denoiser under a condition, with guidance where its interval says so.

    The interval is Kynkäänniemi et al. 2404.07724.
    """
    guided = guide(denoiser, null_label, config.guidance)

    def predict(x_BCHW: Tensor, t: float) -> Prediction:
        t_B = x_BCHW.new_full((len(x_BCHW),), t)
        inside = config.guidance != 1 and config.guidance_low < t <= config.guidance_high
        y_BCHW = (guided if inside else denoiser)(x_BCHW, t_B, condition)
        return objective.predict(y_BCHW.to(x_BCHW.dtype), x_BCHW, t_B)

    return predict


def guide(denoiser: Denoiser, null_label: int, scale: float) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2207.12598): null + scale · (conditional − null), on all channels.

    One call of the denoiser on twice the batch. `scale` 1 is the conditional prediction, 0 the unconditional one.
    """

    def guided(x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        null_B = torch.full_like(condition.label_B, null_label)
        both = Condition(label_B=torch.cat([condition.label_B, null_B]))
        y_BCHW, null_BCHW = denoiser(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), both).chunk(2)
        return null_BCHW + scale * (y_BCHW - null_BCHW)

    return guided


def _velocity(schedule: Schedule, prediction: Prediction, t: float) -> Tensor:
    d_alpha, d_sigma = (float(d) for d in schedule.slope(torch.tensor(t, dtype=torch.float64)))
    return d_alpha * prediction.x0_BCHW + d_sigma * prediction.eps_BCHW


def _number(function: Callable[[Tensor], Tensor], t: float) -> float:
    return float(function(torch.tensor(t, dtype=torch.float64)))
