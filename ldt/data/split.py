"""Which images are held out for validation, and which image is the j-th training sample."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldt import rng
from ldt.rng import Purpose

Ints = NDArray[np.int64]


class Split:
    """One image out of each of `round(total · fraction)` equal stretches is held out, chosen by the seed.

    Sorted data thus lose the same share of every class. Memory is O(held-out images).
    """

    def __init__(self, total: int, fraction: float, seed: int) -> None:
        held_out = round(total * fraction)
        bounds = np.arange(held_out + 1) * total // max(held_out, 1)
        word = rng.bits(seed, Purpose.SPLIT, [0], held_out)[0]
        self._held_out = bounds[:-1] + (word % np.diff(bounds).astype(np.uint64)).astype(np.int64)
        self._training_before = self._held_out - np.arange(held_out)
        self.validation_samples = held_out
        self.training_samples = total - held_out

    def training(self, sample_n: ArrayLike) -> Ints:
        """Image numbers of training samples."""
        sample_n = np.asarray(sample_n, np.int64)
        return sample_n + np.searchsorted(self._training_before, sample_n, "right")

    def validation(self, sample_n: ArrayLike) -> Ints:
        """Image numbers of held-out samples."""
        return self._held_out[np.asarray(sample_n, np.int64)]
