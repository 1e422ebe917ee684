"""The Fréchet distance of two Gaussians, the arithmetic behind FID (Heusel et al. 1706.08500, eq. 6)."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def frechet_distance(mean1_D: Array, covariance1_DD: Array, mean2_D: Array, covariance2_DD: Array) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), in float64.

    The last trace is the sum of the roots of the eigenvalues of a symmetric positive matrix, so no general matrix
    square root is taken: nothing turns complex or fails to converge when the covariances are singular.
    """
    for mean_D, covariance_DD in ((mean1_D, covariance1_DD), (mean2_D, covariance2_DD)):
        assert covariance_DD.shape == 2 * mean_D.shape == 2 * mean1_D.shape, (mean_D.shape, covariance_DD.shape)
    root_DD = _symmetric_root(covariance1_DD)
    middle_DD = root_DD @ covariance2_DD @ root_DD
    eigenvalue_D = np.linalg.eigvalsh((middle_DD + middle_DD.T) / 2)
    cross = np.sqrt(np.clip(eigenvalue_D, 0, None)).sum()
    difference_D = mean1_D - mean2_D
    return float(difference_D @ difference_D + np.trace(covariance1_DD) + np.trace(covariance2_DD) - 2 * cross)


def _symmetric_root(matrix_DD: Array) -> Array:
    eigenvalue_D, vector_DD = np.linalg.eigh(matrix_DD)
    return (vector_DD * np.sqrt(np.clip(eigenvalue_D, 0, None))) @ vector_DD.T
