"""Moments and the Fréchet distance against closed forms and independent references."""

import numpy as np
import pytest

from ldt.errors import InputError
from ldt.metrics.frechet import frechet_distance
from ldt.metrics.moments import Moments, MomentStream

rng = np.random.default_rng(0)


def random_covariance(d: int, seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((d, 2 * d))
    return a @ a.T / d


def test_diagonal_gaussians_have_a_closed_form() -> None:
    m1, m2 = rng.standard_normal((2, 50))
    s1, s2 = rng.uniform(0.1, 3, (2, 50))
    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum()
    assert frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


def test_rotated_gaussians_have_the_same_distance() -> None:
    m1, m2 = rng.standard_normal((2, 50))
    s1, s2 = rng.uniform(0.1, 3, (2, 50))
    q, _ = np.linalg.qr(rng.standard_normal((50, 50)))
    d = frechet_distance(q @ m1, q @ np.diag(s1**2) @ q.T, q @ m2, q @ np.diag(s2**2) @ q.T)
    assert d == pytest.approx(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum(), rel=1e-12)


def test_agrees_with_the_eigenvalues_of_the_product() -> None:
    """tr (Σ₁Σ₂)^½ from the general eigenvalues: the other formula in use."""
    a, b = random_covariance(40, 1), random_covariance(40, 2)
    roots = np.sqrt(np.linalg.eigvals(a @ b)).real.sum()
    zero = np.zeros(40)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(np.trace(a + b) - 2 * roots, rel=1e-9)


def test_symmetric_and_zero_for_equal() -> None:
    a, b = random_covariance(30, 3), random_covariance(30, 4)
    m1, m2 = rng.standard_normal((2, 30))
    assert frechet_distance(m1, a, m2, b) == pytest.approx(frechet_distance(m2, b, m1, a), rel=1e-10)
    assert abs(frechet_distance(m1, a, m1, a)) < 1e-9


def test_singular_covariances_stay_finite_and_right() -> None:
    """Fewer images than features: the nuclear norm of the data gives the exact answer."""
    x, y = rng.standard_normal((2, 10, 64))
    m = [Moments.of(f) for f in (x, y)]
    cross = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T / 9, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * cross
    d = frechet_distance(m[0].mean_D, m[0].covariance_DD, m[1].mean_D, m[1].covariance_DD)
    assert d == pytest.approx(expected, rel=1e-5)


def test_moments_merge_to_those_of_all() -> None:
    x = rng.standard_normal((103, 7)) + 1e6  # a mean that a difference of large sums would not survive
    merged = Moments.empty(7)
    for part in np.split(x, [1, 50, 51, 90]):
        merged = merged.merge(Moments.of(part))
    assert merged.count == 103
    np.testing.assert_allclose(merged.mean_D, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance_DD, np.cov(x - 1e6, rowvar=False), atol=1e-8)


def test_stream_does_not_depend_on_the_pieces() -> None:
    x = np.random.default_rng(5).standard_normal((2345, 6)).astype(np.float32)
    results = []
    for size in (7, 50, 1000, 2345):
        stream = MomentStream(6)
        for i in range(0, len(x), size):
            stream.add(x[i : i + size])
        results.append(stream.moments())
    assert results[0].count == 2345
    np.testing.assert_allclose(results[0].covariance_DD, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    for other in results[1:]:
        assert np.array_equal(other.scatter_DD, results[0].scatter_DD)
        assert np.array_equal(other.mean_D, results[0].mean_D)


def test_bad_features_are_refused() -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        Moments.of([[0.0, np.nan]])
    with pytest.raises(InputError, match="at least 2 images"):
        _ = Moments.of([[0.0, 1.0]]).covariance_DD
