"""Mean and covariance of features that stream by, in float64 and in a fixed order.

Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1979): no difference of large sums, so the result
is good to rounding whatever the mean. Merging is not associative in the last bits: merge in block order and the result
belongs to the blocks alone.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldt.errors import InputError


@dataclass(frozen=True)
class Moments:
    """Count, mean [D] and scatter [D, D] (the sum of outer products of deviations), float64."""

    count: int
    mean_D: NDArray[np.float64]
    scatter_DD: NDArray[np.float64]

    @classmethod
    def empty(cls, width: int) -> "Moments":
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, feature_BD: ArrayLike) -> "Moments":
        """The moments of one block of features. Raises InputError where one is NaN or infinite."""
        feature_BD = np.asarray(feature_BD, np.float64)
        assert feature_BD.ndim == 2 and len(feature_BD), feature_BD.shape
        if not np.isfinite(feature_BD).all():
            raise InputError(
                "the detector gave NaN or infinite features; look at the images and at the detector's weights"
            )
        mean_D = feature_BD.mean(0)
        centred_BD = feature_BD - mean_D
        return cls(len(feature_BD), mean_D, centred_BD.T @ centred_BD)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of features together."""
        assert self.width == other.width, (self.width, other.width)
        count = self.count + other.count
        if count == 0:
            return self
        delta_D = other.mean_D - self.mean_D
        scatter_DD = self.scatter_DD + other.scatter_DD
        scatter_DD += np.outer(delta_D * (self.count * other.count / count), delta_D)
        return Moments(count, self.mean_D + delta_D * (other.count / count), scatter_DD)

    @property
    def width(self) -> int:
        return len(self.mean_D)

    @property
    def hash(self) -> str:
        """SHA-256 of all bits of count, mean and scatter matrix."""
        digest = hashlib.sha256(self.count.to_bytes(8, "little"))
        digest.update(self.mean_D.tobytes())
        digest.update(self.scatter_DD.tobytes())
        return digest.hexdigest()

    @property
    def covariance_DD(self) -> NDArray[np.float64]:
        """The unbiased estimate, scatter / (count − 1), as all published FID codes use."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, not {self.count}; ask for more images")
        return self.scatter_DD / (self.count - 1)


class MomentStream:
    """The moments of a long sequence of features, merged every `CHUNK` rows however they arrive.

    The chunks depend on the positions in the sequence alone, not on the sizes of the pieces added.
    """

    CHUNK = 1000

    def __init__(self, width: int) -> None:
        self._moments = Moments.empty(width)
        self._waiting: list[NDArray[np.float64]] = []
        self._rows = 0

    def add(self, feature_BD: ArrayLike) -> None:
        """Append features, in order of their ids."""
        rest_BD = np.asarray(feature_BD, np.float64)
        while len(rest_BD):
            piece_BD, rest_BD = np.split(rest_BD, [self.CHUNK - self._rows])
            self._waiting.append(piece_BD)
            self._rows += len(piece_BD)
            if self._rows == self.CHUNK:
                self._flush()

    def moments(self) -> Moments:
        """The moments of everything added; adding may go on only before this."""
        if self._rows:
            self._flush()
        return self._moments

    def _flush(self) -> None:
        self._moments = self._moments.merge(Moments.of(np.concatenate(self._waiting)))
        self._waiting, self._rows = [], 0
