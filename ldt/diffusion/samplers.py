"""Samplers: plain functions from noise to data over any denoiser.

A sampler sees the network only as `predict(x_BCHW, t) -> Prediction`, its opinion of (x0, ε) at one time for the whole
batch, and the schedule x_t = α(t)·x0 + σ(t)·ε. It walks through `times`, decreasing from 1 (noise) to 0 (data).
Stochastic samplers draw from `noise(step)`, standard normal of the shape of x, so that their draws can be keyed by
image. Coefficients are computed in float64; x keeps its dtype.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldt.diffusion.condition import Condition
from ldt.diffusion.config import SamplerConfig
from ldt.diffusion.guidance import Guide, Predict, as_predict
from ldt.diffusion.objectives import Denoiser, Objective, Prediction
from ldt.diffusion.schedules import Schedule, shift_time

Noise = Callable[[int], Tensor]
Sampler = Callable[[Predict, Schedule, Tensor, Sequence[float], Noise], Tensor]


def sampling_times(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 to 0: even, then shifted (Esser et al. 2403.03206, eq. 23)."""
    return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]


def euler(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """First-order steps of the probability-flow ODE dx/dt = α'·x0 + σ'·ε (Song et al. 2011.13456). One call a step."""
    for t, s in pairwise(times):
        x_BCHW = x_BCHW + (s - t) * _velocity(schedule, predict(x_BCHW, t), t)
    return x_BCHW


def heun(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Second-order steps (Karras et al. 2206.00364, algorithm 1), of which the last, to t = 0, is Euler's.

    Two calls a step but for the last: 2·steps − 1.
    """
    for t, s in pairwise(times):
        slope_BCHW = _velocity(schedule, predict(x_BCHW, t), t)
        trial_BCHW = x_BCHW + (s - t) * slope_BCHW
        if s == 0:  # the slope at 0 is unbounded under some schedules and never trained under the others
            return trial_BCHW
        slope_BCHW = (slope_BCHW + _velocity(schedule, predict(trial_BCHW, s), s)) / 2
        x_BCHW = x_BCHW + (s - t) * slope_BCHW
    return x_BCHW


def sde(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Euler-Maruyama steps of the reverse SDE with diffusion w(t) = σ(t) (Ma et al. 2401.08740, eq. 4).

    dx = (v − ½·w·score)·dt + √w·dW with score = −ε/σ, so the drift's extra term is ½·ε. The last step is the ODE's.
    """
    for step, (t, s) in enumerate(pairwise(times)):
        p = predict(x_BCHW, t)
        x_BCHW = x_BCHW + (s - t) * _velocity(schedule, p, t)
        if s > 0:
            width = ((t - s) * _number(schedule.sigma, t)) ** 0.5
            x_BCHW = x_BCHW + (s - t) * 0.5 * p.eps_BCHW + width * noise(step)
    return x_BCHW


def ddim(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Deterministic DDIM (Song et al. 2010.02502, eq. 12 with η = 0): the same (x0, ε), at the next time."""
    for t, s in pairwise(times):
        p = predict(x_BCHW, t)
        x_BCHW = _number(schedule.alpha, s) * p.x0_BCHW + _number(schedule.sigma, s) * p.eps_BCHW
    return x_BCHW


def ddpm(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Ancestral steps: draws of q(x_s | x_t, x0) (Ho et al. 2006.11239, eqs. 6-7; Kingma et al. 2107.00630, eq. 25)."""
    for step, (t, s) in enumerate(pairwise(times)):
        alpha_t, sigma_t, alpha_s, sigma_s = _coefficients(schedule, t, s)
        ratio = alpha_t / alpha_s
        added = sigma_t**2 - ratio**2 * sigma_s**2  # variance of q(x_t | x_s)
        mean_BCHW = (ratio * sigma_s**2 * x_BCHW + alpha_s * added * predict(x_BCHW, t).x0_BCHW) / sigma_t**2
        x_BCHW = mean_BCHW + (sigma_s * added**0.5 / sigma_t) * noise(step) if s > 0 else mean_BCHW
    return x_BCHW


def dpmpp_2m(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2211.01095, algorithm 2): second order with one call a step; the last of order 1."""
    x0 = _Extrapolation(schedule)
    for t, s in pairwise(times):
        alpha_t, sigma_t, alpha_s, sigma_s = _coefficients(schedule, t, s)
        mixed_BCHW = x0.at(predict(x_BCHW, t).x0_BCHW, t, s)
        x_BCHW = (sigma_s / sigma_t) * (x_BCHW - alpha_t * mixed_BCHW) + alpha_s * mixed_BCHW
    return x_BCHW


def dpmpp_2m_sde(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """The same for the reverse SDE: SDE-DPM-Solver++(2M) (2211.01095, appendix B)."""
    x0 = _Extrapolation(schedule)
    for step, (t, s) in enumerate(pairwise(times)):
        alpha_t, sigma_t, alpha_s, sigma_s = _coefficients(schedule, t, s)
        decay = (alpha_t * sigma_s) / (sigma_t * alpha_s)  # exp(−h), h the step in log-signal-to-noise ratio / 2
        mixed_BCHW = x0.at(predict(x_BCHW, t).x0_BCHW, t, s)
        x_BCHW = (sigma_s / sigma_t * decay) * x_BCHW + alpha_s * (1 - decay**2) * mixed_BCHW
        if s > 0:
            x_BCHW = x_BCHW + sigma_s * (1 - decay**2) ** 0.5 * noise(step)
    return x_BCHW


def mean_flow(predict: Predict, schedule: Schedule, x_BCHW: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Steps by the mean velocity, x_s = x_t − (t − s)·u(x_t, t, s): each is exact if u is (2505.13447, eq. 12)."""
    for t, s in pairwise(times):
        x_BCHW = x_BCHW + (s - t) * _velocity(schedule, predict(x_BCHW, t, s), t)
    return x_BCHW


class _Extrapolation:
    """x0 at the middle of a step in λ = log(α/σ), from this prediction and the one before."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._last: tuple[Tensor, float] | None = None

    def at(self, x0_BCHW: Tensor, t: float, s: float) -> Tensor:
        before, self._last = self._last, (x0_BCHW, t)
        if before is None or s == 0:  # a step to pure data is infinitely long in λ
            return x0_BCHW
        past_BCHW, past = before  # after one from pure noise, as long, the ratio is infinite and x0 stays what it is
        ratio = (self._log_snr(t) - self._log_snr(past)) / (self._log_snr(s) - self._log_snr(t))
        return x0_BCHW + (x0_BCHW - past_BCHW) / (2 * ratio)

    def _log_snr(self, t: float) -> float:
        alpha, sigma = _number(self._schedule.alpha, t), _number(self._schedule.sigma, t)
        return math.log(alpha) - math.log(sigma) if alpha > 0 else -math.inf


SAMPLERS: dict[str, Sampler] = {
    "heun": heun,
    "euler": euler,
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "sde": sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "mean_flow": mean_flow,
}


def sample(
    denoiser: Denoiser,
    objective: Objective,
    noise_BCHW: Tensor,
    condition: Condition,
    null_label: int,
    config: SamplerConfig,
    step_noise: Noise,
    guide: Guide | None = None,
) -> Tensor:
    """Clean latents [B, C, H, W] (whitened, as the denoiser knows them) from standard normal noise.

    step_noise: what a stochastic sampler adds at each step; guide: the worse model of autoguidance. The times are
    shifted by `config.shift` and by the objective's own shift.
    """
    predict = as_predict(denoiser, objective, condition, null_label, config, guide)
    times = sampling_times(config.steps, config.shift * objective.time_shift)
    x_BCHW = noise_BCHW * _number(objective.schedule.sigma, times[0])
    return SAMPLERS[config.sampler](predict, objective.schedule, x_BCHW, times, step_noise)


def _velocity(schedule: Schedule, prediction: Prediction, t: float) -> Tensor:
    d_alpha, d_sigma = (float(d) for d in schedule.slope(torch.tensor(t, dtype=torch.float64)))
    return d_alpha * prediction.x0_BCHW + d_sigma * prediction.eps_BCHW


def _coefficients(schedule: Schedule, t: float, s: float) -> tuple[float, float, float, float]:
    """α and σ at t and at s."""
    return (
        _number(schedule.alpha, t),
        _number(schedule.sigma, t),
        _number(schedule.alpha, s),
        _number(schedule.sigma, s),
    )


def _number(function: Callable[[Tensor], Tensor], t: float) -> float:
    return float(function(torch.tensor(t, dtype=torch.float64)))
