"""Statistics of posterior draws by channel or by element, in closed form from the moments.

A draw of a posterior with mean μ and standard deviation σ has E[x] = μ and E[x²] = μ² + σ². Sums are float64, one per
shard, and are added in shard order, so the result does not depend on who encoded which shard.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt.data.latent_spec import pack_statistics
from ldt.errors import InputError


@dataclass(frozen=True)
class Sums:
    """first_C, second_C: sums of x and x² expected over draws; elements: how many per channel.

    By element, C stands for all C·H·W of them, and `elements` is the number of samples.
    """

    first_C: NDArray[np.float64]
    second_C: NDArray[np.float64]
    elements: int

    @classmethod
    def of(cls, moments_n2CHW: NDArray[np.float32], by_element: bool = False) -> "Sums":
        """The sums over a block of moments, with or without a deviation."""
        mean = moments_n2CHW[:, 0].astype(np.float64)
        square = mean**2
        if moments_n2CHW.shape[1] > 1:
            square += moments_n2CHW[:, 1].astype(np.float64) ** 2
        n, _, height, width = mean.shape
        if by_element:
            return cls(mean.sum(0).ravel(), square.sum(0).ravel(), n)
        return cls(mean.sum((0, 2, 3)), square.sum((0, 2, 3)), n * height * width)

    @classmethod
    def total(cls, parts: Iterable["Sums"]) -> "Sums":
        """The total of all parts, added from first to last."""
        parts = list(parts)
        first, second = np.zeros_like(parts[0].first_C), np.zeros_like(parts[0].second_C)
        for part in parts:
            first += part.first_C
            second += part.second_C
        return cls(first, second, sum(part.elements for part in parts))

    def facts(self, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        """The whitening statistics as `LatentSpec` has them: of each channel, and by element of each element too."""
        channels, height, width = latent_shape
        first, second = (x.reshape(channels, -1).sum(1) for x in (self.first_C, self.second_C))
        by_element = len(self.first_C) > channels
        mean, std = Sums(first, second, self.elements * (height * width if by_element else 1)).mean_std()
        facts: dict[str, Any] = {"mean_C": mean.tolist(), "std_C": std.tolist()}
        if by_element:
            mean, std = self.mean_std("element")
            facts |= {"mean_CHW": pack_statistics(mean), "std_CHW": pack_statistics(std)}
        return facts

    def mean_std(self, what: str = "channel") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each, to 7 digits: beyond them sums differ between kinds of CPU."""
        mean = self.first_C / self.elements
        std = np.sqrt(np.maximum(self.second_C / self.elements - mean**2, 0))
        if not (std > 0).all():
            raise InputError(
                f"latent {what} {int(std.argmin())} is constant over the whole data; check the autoencoder"
                + (", or use whitening=channel" if what == "element" else "")
            )
        return seven_digits(mean), seven_digits(std)


def seven_digits(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values rounded to 7 digits, so that nothing computed from them depends on the kind of CPU."""
    return np.array([float(f"{v:.7g}") for v in values.tolist()])
