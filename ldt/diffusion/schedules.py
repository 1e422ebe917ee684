"""Noise schedules: x_t = α(t)·x0 + σ(t)·ε for t in [0, 1], 0 = data, 1 = noise.

`slope` gives (dα/dt, dσ/dt), from which the probability-flow velocity dx/dt = α'·x0 + σ'·ε follows.
All functions are elementwise over tensors of any shape.
"""

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


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


def shift_time(t: Number, shift: float) -> Number:
    """s·t / (1 + (s − 1)·t): on the rectified flow, the time at which σ/α is s times what it is at t.

    Esser et al. 2403.03206, eq. 23; shifts multiply.
    """
    return shift * t / (1 + (shift - 1) * t)


STEPS = 1000


def time_of_step(k: Tensor) -> Tensor:
    """t = (k + 1)/1000 of the steps k = 0 ... 999 of a discrete schedule, float64: t = 0 stays the data themselves."""
    return (k.double() + 1) / STEPS


def step_of_time(t: Tensor) -> Tensor:
    """k = 1000·t − 1, exact where t is on the grid, whatever its precision; between the steps the fraction stays."""
    position = STEPS * t
    nearest = position.round()
    return torch.where((position - nearest).abs() < 1e-3, nearest, position) - 1


class DiscreteVP:
    """DDPM's chain of 1000 steps, α² = ∏(1 − β_i) up to step k at t = (k + 1)/1000 (Ho et al. 2006.11239).

    Between the steps log α is linear in t, so that samplers may take any time. β runs from the first to the last value
    evenly, or with `scaled` evenly in its square root, as latent diffusion has it.
    """

    def __init__(self, first: float, last: float, scaled: bool = False) -> None:
        if scaled:
            betas = torch.linspace(first**0.5, last**0.5, STEPS, dtype=torch.float64) ** 2
        else:
            betas = torch.linspace(first, last, STEPS, dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        self.betas = betas
        self._log_alphas = torch.cat([zero, 0.5 * torch.log1p(-betas).cumsum(0)])
        self._tables: dict[torch.device, Tensor] = {}

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log α and its slope, float64."""
        position = step_of_time(t).double() + 1
        table = self._tables.get(t.device)
        if table is None:  # once: a copy to the GPU makes the host wait
            table = self._tables[t.device] = self._log_alphas.to(t.device)
        low = position.floor().clamp(0, STEPS - 1).long()
        rise = table[low + 1] - table[low]
        return table[low] + (position - low) * rise, STEPS * rise

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._segment(t)[0]).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._segment(t)[0])).to(t.dtype)

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha, rise = self._segment(t)
        alpha2 = torch.exp(2 * log_alpha)
        d_sigma = -alpha2 * rise / torch.sqrt(-torch.expm1(2 * log_alpha))  # α² + σ² = 1; unbounded at t = 0
        return (rise * torch.exp(log_alpha)).to(t.dtype), d_sigma.to(t.dtype)


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "rectified_flow": RectifiedFlow,
    "cosine": Cosine,
    "linear_vp": LinearVP,
    "ddpm": lambda: DiscreteVP(1e-4, 0.02),  # DDPM, ADM, DiT
    "scaled_linear": lambda: DiscreteVP(0.00085, 0.012, scaled=True),  # Stable Diffusion, U-ViT
    "ldm": lambda: DiscreteVP(0.0015, 0.0195, scaled=True),  # latent-diffusion's ImageNet models
}


def make_schedule(name: str) -> Schedule:
    """The schedule of that name, one of those of `ObjectiveConfig.schedule`."""
    return SCHEDULES[name]()
