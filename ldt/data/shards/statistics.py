"""Per-channel statistics of posterior draws, in closed form from the moments.

A draw of a posterior with mean μ and standard deviation σ has E[x] = μ and E[x²] = μ² + σ². Sums are float64, one per
shard, and are added in shard order, so the result does not depend on who encoded which shard.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldt.errors import InputError


@dataclass(frozen=True)
class Sums:
    """first_C, second_C: sums of x and x² expected over draws; elements: how many per channel."""

    first_C: NDArray[np.float64]
    second_C: NDArray[np.float64]
    elements: int

    @classmethod
    def of(cls, moments_n2CHW: NDArray[np.float32]) -> "Sums":
        mean, std = moments_n2CHW[:, 0].astype(np.float64), moments_n2CHW[:, 1].astype(np.float64)
        n, _, height, width = mean.shape
        return cls(mean.sum((0, 2, 3)), (mean**2 + std**2).sum((0, 2, 3)), n * height * width)

    @classmethod
    def total(cls, parts: Iterable["Sums"]) -> "Sums":
        """Added from first to last."""
        parts = list(parts)
        first, second = np.zeros_like(parts[0].first_C), np.zeros_like(parts[0].second_C)
        for part in parts:
            first += part.first_C
            second += part.second_C
        return cls(first, second, sum(part.elements for part in parts))

    def mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation per channel, to 7 digits: beyond them sums differ between kinds of CPU."""
        mean = self.first_C / self.elements
        std = np.sqrt(np.maximum(self.second_C / self.elements - mean**2, 0))
        if not (std > 0).all():
            raise InputError(
                f"latent channel {int(std.argmin())} is constant over the whole data; check the autoencoder"
            )
        return seven_digits(mean), seven_digits(std)


def seven_digits(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded, so that what follows does not depend on the CPU."""
    return np.array([float(f"{v:.7g}") for v in values.tolist()])
