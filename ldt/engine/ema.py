"""Exponential moving averages of weights on the clock of samples seen. Tensors in, tensors out.

Two profiles. `power` weighs the past by a power of its age relative to the length of the run, so its width is a
fraction of the run whatever its length (Karras et al. 2312.02696, section 3.1 and appendix C). `half_life` forgets
half in a fixed number of samples. From stored averages of two widths, those of any width in between can be
reconstructed afterwards (appendix C.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldt.engine.config import EMAConfig


@dataclass(frozen=True)
class Profile:
    """How one average weighs the past: by a `width` (power) or a `half_life` in samples."""

    width: float = 0.0
    half_life: int = 0

    def decay(self, samples_seen: int, batch: int) -> float:
        """The factor that keeps the old average at the step that ends at `samples_seen` (2312.02696, eq. 10)."""
        if self.half_life:
            return float(0.5 ** (batch / self.half_life))
        return float((1 - batch / samples_seen) ** (power_exponent(self.width) + 1))

    def describe(self) -> dict[str, Any]:
        """The profile as a checkpoint's manifest holds it."""
        if self.half_life:
            return {"kind": "half_life", "half_life": self.half_life}
        return {"kind": "power", "width": self.width}


def profiles(config: EMAConfig) -> dict[str, Profile]:
    """The averages of a run by the name of their tensors: `ema`, then `ema_<width>` for each further width."""
    if config.kind == "half_life":
        return {"ema": Profile(half_life=config.half_life)}
    first, *others = config.widths
    return {"ema": Profile(width=first)} | {f"ema_{width:g}": Profile(width=width) for width in others}


def power_exponent(width: float) -> float:
    """γ of the power profile with relative standard deviation `width` (2312.02696, eqs. 126-127).

    width² = (γ + 1) / ((γ + 2)² (γ + 3)); its largest real root in γ.
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots[np.isreal(roots)].real.max())


class ShardedEMA:
    """The averages of a run. Each rank keeps those of its own partition, in float32, and never has to communicate.

    tensors: by the name of the average, one for each of the rank's fragments, shaped like `masters`.
    """

    def __init__(self, config: EMAConfig, masters: Sequence[Tensor]) -> None:
        self.profiles = profiles(config)
        self._masters = list(masters)
        self.tensors = {name: [m.detach().clone() for m in masters] for name in self.profiles}

    @torch.no_grad()
    def update(self, samples_seen: int, batch: int) -> None:
        """average ← keep·average + (1 − keep)·weights, at the step of `batch` samples that ends at `samples_seen`."""
        for name, profile in self.profiles.items():
            if self._masters:
                weight = 1 - profile.decay(samples_seen, batch)
                torch._foreach_lerp_(self.tensors[name], self._masters, weight)

    @torch.no_grad()
    def reset(self) -> None:
        """Set every average to the present weights, as at the start of a run."""
        for tensors in self.tensors.values():
            for average, master in zip(tensors, self._masters, strict=True):
                average.copy_(master)

    def describe(self) -> dict[str, dict[str, Any]]:
        """The profile of each average, as a checkpoint's manifest has it."""
        return {name: profile.describe() for name, profile in self.profiles.items()}


def reconstruction(stored: Sequence[tuple[int, float]], samples_seen: int, width: float) -> list[float]:
    """Coefficients that combine stored power averages, each (samples_seen, width), into another one.

    Least squares between the profiles as functions of time: with A the inner products of the stored ones and b those
    with the one asked for, the solution of A x = b (2312.02696, eqs. 14-16, algorithm 3).
    """
    times = np.array([t for t, _ in stored], np.float64) / samples_seen
    gammas = np.array([power_exponent(w) for _, w in stored])
    a = _inner(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    b = _inner(times, gammas, np.ones(1), np.array([power_exponent(width)]))
    return [float(x) for x in np.linalg.lstsq(a, b, rcond=1e-14)[0]]


def _inner(t: np.ndarray, g: np.ndarray, u: np.ndarray, h: np.ndarray) -> np.ndarray:
    """∫ p_tg(τ) p_uh(τ) dτ of power profiles p_tg(τ) = (g + 1) τᵍ / tᵍ⁺¹ on [0, t]."""
    log_integral = (g + h + 1) * np.log(np.minimum(t, u)) - (g + 1) * np.log(t) - (h + 1) * np.log(u)
    out: np.ndarray = (g + 1) * (h + 1) / (g + h + 1) * np.exp(log_integral)
    return out
