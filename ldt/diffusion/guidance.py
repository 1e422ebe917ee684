"""Guidance: ways to go further than a denoiser's own prediction. Each wraps one and is one itself, so they compose.

All extrapolate from a worse prediction through a better one, worse + scale · (better − worse); a scale of 1 is off:

    inner    from the inner head to the last layer          2512.24176; no second forward pass
    class    from no condition to the condition             Ho and Salimans 2207.12598; twice the batch
    auto     from a smaller or younger model to this one    Karras et al. 2406.02070; a pass of the other model

Each is used inside the interval (guidance_low, guidance_high] of times alone (Kynkäänniemi et al. 2404.07724).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldt.diffusion.condition import Condition
from ldt.diffusion.config import SamplerConfig
from ldt.diffusion.objectives import Denoiser, Objective, Prediction


class Predict(Protocol):
    """The network's opinion of (x0, ε) at t; with r, in terms of the mean velocity over [r, t]."""

    def __call__(self, x_BCHW: Tensor, t: float, r: float | None = None, /) -> Prediction: ...


def inner_guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """The denoiser with what its last layer adds to its inner head's prediction multiplied by `scale`."""

    def guided(x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        full_BCHW, inner_BCHW = denoiser(x_BCHW, t_B, condition, inner=True)  # type: ignore[call-arg]
        return inner_BCHW + scale * (full_BCHW - inner_BCHW)

    return guided


def averaged_to(denoiser: Denoiser, r: float) -> Denoiser:
    """The denoiser's mean velocity from r to the time it is asked for (`ldt.diffusion.mean_flow`)."""

    def averaged(x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        return denoiser(x_BCHW, t_B, condition, r_B=torch.full_like(t_B, r))  # type: ignore[call-arg]

    return averaged


def class_guided(denoiser: Denoiser, null_label: int, scale: float) -> Denoiser:
    """null + scale · (conditional − null) on all channels, by one call of the denoiser on twice the batch.

    `scale` 1 is the conditional prediction, 0 the unconditional one.
    """

    def guided(x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        both = condition.followed_by(condition.unconditional(null_label))
        y_BCHW, null_BCHW = denoiser(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), both).chunk(2)
        return null_BCHW + scale * (y_BCHW - null_BCHW)

    return guided


class Guide:
    """Another model of the same latents and classes, whose prediction is the worse one."""

    def __init__(self, denoiser: Denoiser, objective: Objective, scale: float, hash: str) -> None:
        self._denoiser, self._objective, self._scale, self.hash = denoiser, objective, scale, hash

    def at(self, latent_shape: Sequence[int]) -> "Guide":
        """The same for latents of another shape."""
        return Guide(self._denoiser, self._objective.at(latent_shape), self._scale, self.hash)

    def seen_as(self, view: Callable[[Denoiser], Denoiser]) -> "Guide":
        """The same with another view of its denoiser."""
        return Guide(view(self._denoiser), self._objective, self._scale, self.hash)

    def extrapolate(self, better: Prediction, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Prediction:
        """worse + scale · (better − worse) of x0 and of ε, for the two models may predict different things."""
        y_BCHW = self._denoiser(x_BCHW, t_B, condition)
        worse = self._objective.predict(y_BCHW.to(x_BCHW.dtype), x_BCHW, t_B)
        return Prediction(
            worse.x0_BCHW + self._scale * (better.x0_BCHW - worse.x0_BCHW),
            worse.eps_BCHW + self._scale * (better.eps_BCHW - worse.eps_BCHW),
        )


def as_predict(
    denoiser: Denoiser,
    objective: Objective,
    condition: Condition,
    null_label: int,
    config: SamplerConfig,
    guide: Guide | None = None,
) -> Predict:
    """The sampler's view of a denoiser under a condition, with guidance where its interval says so.

    The inner head's guidance acts on the prediction with and without the condition, then that of the class between
    the two, then that of the guide on the result. Of mean velocities that of the class extrapolates just so.
    """

    def guided(net: Denoiser) -> Denoiser:
        net = net if config.guidance_inner == 1 else inner_guided(net, config.guidance_inner)
        return net if config.guidance == 1 else class_guided(net, null_label, config.guidance)

    def predict(x_BCHW: Tensor, t: float, r: float | None = None) -> Prediction:
        t_B = x_BCHW.new_full((len(x_BCHW),), t)
        inside = config.guidance_low < t <= config.guidance_high
        net = denoiser if r is None else averaged_to(denoiser, r)
        y_BCHW = (guided(net) if inside else net)(x_BCHW, t_B, condition)
        prediction = objective.predict(y_BCHW.to(x_BCHW.dtype), x_BCHW, t_B)
        if inside and guide is not None:
            return guide.extrapolate(prediction, x_BCHW, t_B, condition)
        return prediction

    return predict
