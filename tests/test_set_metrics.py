"""Scores of whole sets against closed forms and independent references; tests/test_peers.py has other evaluators'."""

from collections.abc import Callable

import numpy as np
import pytest
from peers import peer

from ldt import rng
from ldt.errors import InputError
from ldt.metrics.set_metrics import (
    DIRECTIONS,
    Kernel,
    cubic,
    gaussian,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
)

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


@pytest.mark.parametrize(
    ("kernel", "formula"),
    [
        (gaussian, lambda a, b: np.exp(-((a - b) ** 2).sum() / 200)),
        (cubic, lambda a, b: (a @ b / 3 + 1) ** 3),
    ],
)
def test_a_kernel_distance_is_the_sum_over_pairs(kernel: Kernel, formula: Callable[..., float]) -> None:
    x, y = generator.standard_normal((2, 7, 3)) * 5
    within = sum(formula(z[i], z[j]) for z in (x, y) for i in range(7) for j in range(7) if i != j) / 42
    across = sum(formula(a, b) for a in x for b in y) / 49
    result = kernel_distance(x, y, subsets=3, subset_size=7, kernel=kernel)
    assert result.mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert result.std == pytest.approx(0, abs=1e-12 * max(1, abs(across)))


def test_subsets_of_a_kernel_distance_are_keyed() -> None:
    """Each side draws its own from the seed, the number of the subset and the side."""
    x, y = generator.standard_normal((20, 3)), generator.standard_normal((30, 3))
    values = []
    for k in range(4):
        chosen = [
            z[rng.permute(np.arange(6), len(z), 5, rng.Purpose.SAMPLE_SUBSET, k, side)] for side, z in ((0, x), (1, y))
        ]
        values.append(kernel_distance(*chosen, subsets=1, subset_size=6).mean)
    result = kernel_distance(x, y, subsets=4, subset_size=6, seed=5)
    assert result == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    usual = kernel_distance(x, y, subsets=100, subset_size=6, seed=0, kernel=cubic)
    assert kernel_distance(x, y, subset_size=6) == usual, "as everybody takes them"
    with pytest.raises(InputError, match="subsets of 1000 needs at least as many images on both sides, not 20 and 30"):
        kernel_distance(x, y)
    with pytest.raises(InputError, match="subsets of 21 needs at least as many"):
        kernel_distance(x, y, subset_size=21)


def test_the_inception_score_is_its_formula() -> None:
    """exp of the mean divergence of p(y|x) from its mean, over 7, 8 and 8 of 23 images."""
    logit = 3 * generator.standard_normal((23, 5))
    p = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:7], p[7:15], p[15:])]
    assert inception_score(logit, splits=3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_the_inception_score_counts_classes_that_are_seen_alike() -> None:
    sure = 1e3 * np.eye(10)
    assert inception_score(np.tile(sure, (10, 1))) == pytest.approx((10, 0)), "ten splits, as everybody has them"
    assert inception_score(np.zeros((10, 7))) == pytest.approx((1, 0))
    with pytest.raises(InputError, match="over 11 splits needs at least as many images, not 10"):
        inception_score(sure, splits=11)


def test_precision_and_recall_of_points_on_a_line() -> None:
    """Balls to the nearest neighbour, their surface included: of 0, 1, 2 from −1 to 3; of the others see below."""
    real, generated = np.array([[0.0], [1.0], [2.0]]), np.array([[3.0], [3.5], [-1.0], [-2.0], [-9.0]])
    result = precision_recall(generated, real, neighbours=1)
    assert result.precision == 2 / 5, "3 and −1 lie just on it"
    assert result.recall == pytest.approx(1 / 3), "0 alone, on the ball of −1; that of −9 reaches to −2"
    with pytest.raises(InputError, match="with 3 neighbours need more images on both sides than that, not 5 and 3"):
        precision_recall(generated, real)


def test_precision_and_recall_are_their_definition() -> None:
    """The third neighbour of each point by sorting all distances, in float64."""
    own = np.random.default_rng(0)
    generated, real = own.standard_normal((60, 3)), own.standard_normal((50, 3)) + 1.6

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radius = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), axis=1)[:, 3]
        return float((np.linalg.norm(points[:, None] - centres, axis=2) <= radius).any(1).mean())

    result = precision_recall(generated, real)
    assert result == pytest.approx((inside(generated, real), inside(real, generated)))
    assert min(result) > 0 and max(result) < 1
