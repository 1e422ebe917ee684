"""Training objectives: what the network predicts, what the loss compares, and how either becomes (x0, ε).

Every prediction is a known combination y = a(t)·x0 + b(t)·ε:

    eps    (0, 1)           Ho et al. 2006.11239
    x      (1, 0)           the clean latent
    v      (−σ, α)          Salimans and Ho 2202.00512
    flow   (α', σ')         the velocity dx/dt; ε − x0 on the rectified flow

With x_t = α·x0 + σ·ε this is a 2×2 linear system, so one formula converts all of them. Its determinant α·b − σ·a
vanishes where a prediction says nothing: eps where α = 0 (t = 1, though α ends at 0.006 and more in the discrete
schedules), x where σ = 0 (t = 0). There it is kept at `SINGULAR` = 10⁻³ from zero: what is converted stays finite but
is no longer exact; on the rectified flow that is eps at t > 0.999 and x at t < 0.001. v and flow have no such place.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.schedules import STEPS, DiscreteVP, Schedule, make_schedule, shift_time, time_of_step

SINGULAR = 1e-3

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


class Prediction(NamedTuple):
    """The network's opinion of the clean latent and of the noise, both [B, C, H, W]."""

    x0_BCHW: Tensor
    eps_BCHW: Tensor


class Objective:
    """The loss of a denoiser, and the view of its output that samplers need.

    time_shift: s of `objective.shift_base` for this latent shape, 1 where it is off.
    """

    def __init__(self, config: ObjectiveConfig, latent_shape: Sequence[int] = ()) -> None:
        assert latent_shape or not config.shift_base, "a shift by the latent's size needs its size"
        self.config = config
        self.time_shift = math.sqrt(math.prod(latent_shape) / config.shift_base) if config.shift_base else 1.0
        self.schedule: Schedule = make_schedule(config.schedule)
        self.loss_space = config.prediction if config.loss == "same" else config.loss

    def at(self, latent_shape: Sequence[int]) -> "Objective":
        """The same for latents of another shape."""
        return Objective(self.config, latent_shape) if self.config.shift_base else self

    def timesteps(self, uniform_B: Tensor) -> Tensor:
        """Training times in (0, 1) from uniform numbers (float32 [B], taken in float64): float32 [B].

        `logit_normal`: t = sigmoid(m + s·z), z normal (Esser et al. 2403.03206, eq. 19).
        """
        inside_B = uniform_B.double().clamp(1e-7, 1 - 1e-7)
        if self.config.timesteps == "uniform":
            t_B = inside_B
        else:
            t_B = torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(inside_B))
        if self.time_shift != 1:
            t_B = shift_time(t_B, self.time_shift).clamp(max=1 - 2**-24)  # float32 would round it up to 1
        if isinstance(self.schedule, DiscreteVP):
            t_B = time_of_step((t_B * STEPS).floor())  # with uniform numbers every step is as likely
        return t_B.float()

    def weight(self, t_B: Tensor) -> Tensor:
        """What the squared error in the loss's space counts at each time with min-SNR weighting: [B].

        It is min(α², γσ²) / (αb − σa)², because an error δ in x0 is one of −δ·(αb − σa)/σ in a·x0 + b·ε at a
        given x_t. For eps, v and x that is the paper's min(SNR, γ)/SNR, min(SNR, γ)/(SNR + 1) and min(SNR, γ).
        """
        alpha, sigma = self.schedule.alpha(t_B), self.schedule.sigma(t_B)
        a, b = self._coefficients(self.loss_space, t_B)
        determinant = (alpha * b - sigma * a).abs().clamp(min=SINGULAR)
        return torch.minimum(alpha**2, self.config.min_snr_gamma * sigma**2) / determinant**2

    def loss(
        self,
        denoiser: Denoiser,
        x0_BCHW: Tensor,
        eps_BCHW: Tensor,
        t_B: Tensor,
        condition: Condition,
        inner: bool = False,
    ) -> Tensor:
        """Mean squared error of each sample, weighted by its time, in float32: [B].

        inner: add the same of the inner head's prediction (2512.24176, eq. 6 with λ = 1).
        """
        xt_BCHW = self.noised(x0_BCHW, eps_BCHW, t_B)
        if not inner:
            return self.error(denoiser(xt_BCHW, t_B, condition).float(), xt_BCHW, x0_BCHW, eps_BCHW, t_B)
        outputs = denoiser(xt_BCHW, t_B, condition, inner=True)  # type: ignore[call-arg]
        errors = [self.error(y_BCHW.float(), xt_BCHW, x0_BCHW, eps_BCHW, t_B) for y_BCHW in outputs]
        return errors[0] + errors[1]

    def noised(self, x0_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t = α·x0 + σ·ε, at a time for each sample."""
        t_B111 = t_B[:, None, None, None]
        return self.schedule.alpha(t_B111) * x0_BCHW + self.schedule.sigma(t_B111) * eps_BCHW

    def error(self, y_BCHW: Tensor, xt_BCHW: Tensor, x0_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The loss of a network's output y at x_t: [B]."""
        t_B111 = t_B[:, None, None, None]
        if self.config.time_floor:
            return ((y_BCHW - x0_BCHW) / t_B111.clamp(min=self.config.time_floor)).square().mean((1, 2, 3))
        if self.loss_space != self.config.prediction:
            y_BCHW = self._combine(self.loss_space, self.predict(y_BCHW, xt_BCHW, t_B), t_B111)
        target_BCHW = self._combine(self.loss_space, Prediction(x0_BCHW, eps_BCHW), t_B111)
        loss_B = (y_BCHW - target_BCHW).square().mean((1, 2, 3))
        return loss_B if self.config.weighting == "constant" else self.weight(t_B) * loss_B

    def predict(self, y_BCHW: Tensor, xt_BCHW: Tensor, t_B: Tensor) -> Prediction:
        """(x0, ε) from the network's output at x_t."""
        t_B111 = t_B[:, None, None, None]
        a, b = self._coefficients(self.config.prediction, t_B111)
        alpha, sigma = self.schedule.alpha(t_B111), self.schedule.sigma(t_B111)
        determinant = self.determinant(t_B111)
        determinant = torch.where(determinant < 0, -1.0, 1.0) * determinant.abs().clamp(min=SINGULAR)
        x0 = (b * xt_BCHW - sigma * y_BCHW) / determinant
        eps = (alpha * y_BCHW - a * xt_BCHW) / determinant
        return Prediction(x0, eps)

    def determinant(self, t: Tensor) -> Tensor:
        """Of the system that `predict` solves: 0 or not finite where a prediction leaves something open."""
        a, b = self._coefficients(self.config.prediction, t)
        return self.schedule.alpha(t) * b - self.schedule.sigma(t) * a

    def _combine(self, kind: str, p: Prediction, t: Tensor) -> Tensor:
        a, b = self._coefficients(kind, t)
        return a * p.x0_BCHW + b * p.eps_BCHW

    def _coefficients(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "eps":
            return torch.zeros_like(t), torch.ones_like(t)
        if kind == "x":
            return torch.ones_like(t), torch.zeros_like(t)
        if kind == "v":
            return -self.schedule.sigma(t), self.schedule.alpha(t)
        return self.schedule.slope(t)
