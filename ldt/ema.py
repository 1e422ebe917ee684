"""Exponential moving averages of weights on the clock of samples seen. Tensors in, tensors out.

Two profiles. `power` weighs the past by a power of its age relative to the length of the run, so its width is a
fraction of the run whatever its length (Karras et al. 2312.02696, section 3.1 and appendix C). `half_life` forgets
half in a fixed number of samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldt.errors import InputError
from ldt.options import choice


@dataclass
class EMAConfig:
    """`width` is the relative standard deviation of the power profile; `half_life` is in samples."""

    kind: str = choice("power", "half_life")
    width: float = 0.05
    half_life: int = 500_000

    def __post_init__(self) -> None:
        if not 0 < self.width < 0.28:
            raise InputError(f"ema.width={self.width} must lie between 0 and 0.28, such as 0.05 or 0.10")
        if self.half_life < 1:
            raise InputError(f"ema.half_life={self.half_life} must be at least 1 sample")


def power_exponent(width: float) -> float:
    """γ of the power profile with relative standard deviation `width` (2312.02696, eqs. 126-127).

    width² = (γ + 1) / ((γ + 2)² (γ + 3)); its largest real root in γ.
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots[np.isreal(roots)].real.max())


def decay(config: EMAConfig, samples_seen: int, batch: int) -> float:
    """The factor that keeps the old average at the step that ends at `samples_seen` (2312.02696, eq. 10)."""
    if config.kind == "half_life":
        return 0.5 ** (batch / config.half_life)
    return (1 - batch / samples_seen) ** (power_exponent(config.width) + 1)


@torch.no_grad()
def update(average: Sequence[Tensor], weights: Sequence[Tensor], keep: float) -> None:
    """average ← keep·average + (1 − keep)·weights, in place, for lists of float32 tensors of equal shapes."""
    if average:
        torch._foreach_lerp_(list(average), list(weights), 1 - keep)
