"""MIND and the Gaussian MMD against closed forms and independent references."""

import numpy as np
import pytest
from peers import peer

from ldt import rng
from ldt.metrics.set_metrics import DIRECTIONS, gaussian, kernel_distance, monge_distance

generator = np.random.default_rng(0)


def directions(width: int, seed: int = 0) -> np.ndarray:
    """The unit vectors that MIND projects on."""
    drawn = rng.normal(seed, rng.Purpose.SAMPLE_DIRECTION, range(DIRECTIONS), width).astype(float)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_mind_of_a_shift_is_three_times_its_square() -> None:
    """E (δ·u)² = |δ|² / D over unit directions; with the drawn ones exactly their mean."""
    x, shift = generator.standard_normal((300, 16)), generator.standard_normal(16)
    value = monge_distance(x, x + shift)
    assert value == pytest.approx(3 * 16 * ((directions(16) @ shift) ** 2).mean(), rel=1e-12)
    assert value == pytest.approx(3 * shift @ shift, rel=0.15)


def test_mind_of_a_scaled_set_has_a_closed_form() -> None:
    """Sorted numbers stay sorted: each moves by (c − 1) times itself, so (c − 1)² E |x|² is left, three times."""
    x = generator.standard_normal((300, 16))
    assert monge_distance(x, 1.5 * x) == pytest.approx(3 * 0.25 * (x * x).sum(1).mean(), rel=0.02)


def test_mind_of_two_gaussians() -> None:
    """Isotropic, of deviations 1 and 2 and means apart by δ: 3 (|δ|² + D (2 − 1)²), but for the sets' finite size."""
    x, y = generator.standard_normal((4000, 8)), 2 * generator.standard_normal((4000, 8)) + 1
    assert monge_distance(x, y) == pytest.approx(3 * (8 + 8), rel=0.05)


def test_sorting_is_the_best_assignment() -> None:
    """Each direction again by scipy's solver of assignments."""
    x, y = generator.standard_normal((2, 20, 5))
    solve, total = peer("scipy.optimize").linear_sum_assignment, 0.0
    for u in directions(5):
        cost = (x @ u)[:, None] - (y @ u)[None]
        total += (cost**2)[solve(cost**2)].mean()
    assert monge_distance(x, y) == pytest.approx(3 * 5 * total / DIRECTIONS, rel=1e-9)


def test_mind_is_keyed_symmetric_and_nothing_of_equals() -> None:
    x, y = generator.standard_normal((2, 50, 6))
    assert monge_distance(x, y) == monge_distance(x, y) == pytest.approx(monge_distance(y, x), rel=1e-12)
    assert monge_distance(x, y, seed=1) != monge_distance(x, y, seed=0)
    assert monge_distance(x, x[::-1]) == pytest.approx(0, abs=1e-12), "the order of images does not matter"


def test_mind_takes_a_keyed_subset_of_the_larger_set() -> None:
    x, y = generator.standard_normal((50, 6)), generator.standard_normal((30, 6)) + 1
    chosen = rng.permute(np.arange(30), 50, 0, rng.Purpose.SAMPLE_SUBSET, 0, 3)
    assert len({*chosen.tolist()}) == 30
    assert monge_distance(x, y) == pytest.approx(monge_distance(x[np.sort(chosen)], y), rel=1e-12)


def test_the_gaussian_mmd_has_a_closed_form() -> None:
    """Of N(0, I) and N(δ, I): 2 (1 + 2/σ²)^(−D/2) (1 − exp(−|δ|² / (2 (σ² + 2)))), here by 100 subsets of 400."""
    sigma, width = 10.0, 12
    shift = np.full(width, 1.5)
    x, y = generator.standard_normal((2, 4000, width))
    expected = 2 * (1 + 2 / sigma**2) ** (-width / 2) * (1 - np.exp(-shift @ shift / (2 * (sigma**2 + 2))))
    result = kernel_distance(x, y + shift, subset_size=400, kernel=gaussian)
    assert result.mean == pytest.approx(expected, rel=0.02) and result.std > 0
    none = kernel_distance(x, y, subset_size=400, kernel=gaussian)
    assert abs(none.mean) < 4 * none.std / 10, "unbiased: around zero where nothing differs"


def test_the_gaussian_mmd_is_the_sum_over_pairs() -> None:
    x, y = generator.standard_normal((2, 7, 3)) * 5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / 200))

    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(7) for j in range(7) if i != j) / 42
    across = sum(k(a, b) for a in x for b in y) / 49
    result = kernel_distance(x, y, subsets=3, subset_size=7, kernel=gaussian)
    assert result.mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert result.std == pytest.approx(0, abs=1e-12)
