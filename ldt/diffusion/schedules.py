"""Noise schedules: x_t = α(t)·x0 + σ(t)·ε for t in [0, 1], 0 = data, 1 = noise.

`slope` gives (dα/dt, dσ/dt), from which the probability-flow velocity dx/dt = α'·x0 + σ'·ε follows.
All functions are elementwise over tensors of any shape.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from ldt.errors import InputError


class Schedule(Protocol):
    """α, σ and their slopes as functions of t."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


class RectifiedFlow:
    """α = 1 − t, σ = t: straight lines between data and noise (Liu et al. 2209.03003, Lipman et al. 2210.02747)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)


class Cosine:
    """α = cos(πt/2), σ = sin(πt/2): Nichol and Dhariwal 2102.09672 in the form of 2202.00512, without offset."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)


class LinearVP:
    """α² = exp(−∫β), β(t) = 0.1 + 19.9·t: DDPM's linear schedule in continuous time.

    Song et al. 2011.13456, eq. 32.
    """

    beta_min, beta_max = 0.1, 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        d_alpha = -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t) * self.alpha(t)
        return d_alpha, -self.alpha(t) * d_alpha / self.sigma(t)  # α² + σ² = 1; σ' is unbounded at t = 0


SCHEDULES: dict[str, type[Schedule]] = {"rectified_flow": RectifiedFlow, "cosine": Cosine, "linear_vp": LinearVP}


def make_schedule(name: str) -> Schedule:
    """The schedule of that name."""
    if name not in SCHEDULES:
        raise InputError(f"schedule {name} is not one of {', '.join(SCHEDULES)}; choose one of these")
    return SCHEDULES[name]()
