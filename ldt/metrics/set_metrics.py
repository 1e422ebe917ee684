"""Scores of whole sets of features: Inception Score, kernel distances, MIND, precision and recall. All in float64.

Rows are images in the order of their ids; nothing is shuffled by hidden state, so a score belongs to its images.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ldt import rng
from ldt.errors import InputError

Array = NDArray[np.float64]
Kernel = Callable[[Array, Array], Array]
CHUNK = 4096
DIRECTIONS = 1000


class Score(NamedTuple):
    """Mean and standard deviation over splits or subsets."""

    mean: float
    std: float


def inception_score(logit_NC: ArrayLike, splits: int = 10) -> Score:
    """exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 1606.03498) over contiguous splits in id order, as ADM does."""
    logit_NC = torch.as_tensor(np.asarray(logit_NC)).double()
    if len(logit_NC) < splits:
        raise InputError(f"an Inception Score over {splits} splits needs at least as many images, not {len(logit_NC)}")
    bounds = [i * len(logit_NC) // splits for i in range(splits + 1)]
    scores = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        log_p = logit_NC[start:stop].log_softmax(1)
        log_marginal = torch.logsumexp(log_p, 0) - np.log(stop - start)
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def cubic(a: Array, b: Array) -> Array:
    """KID's kernel (x·y/D + 1)³ of all pairs of rows."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Array, b: Array, sigma: float = 10.0) -> Array:
    """CMMD's kernel exp(−‖x − y‖² / 2σ²) of all pairs of rows."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
    return np.exp(-squared / (2 * sigma**2))


def kernel_distance(
    one_ND: ArrayLike,
    other_MD: ArrayLike,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    kernel: Kernel = cubic,
) -> Score:
    """Unbiased squared MMD over keyed subsets: KID with the cubic kernel (Bińkowski et al. 1801.01401).

    With the Gaussian one it is CMMD's distance (Jayasumana et al. 2401.09603), of this detector's features as they are.
    """
    one, other = (np.asarray(x, np.float64) for x in (one_ND, other_MD))
    if min(len(one), len(other)) < subset_size:
        raise InputError(
            f"a kernel distance over subsets of {subset_size} needs at least as many images on both sides, "
            f"not {len(one)} and {len(other)}; take smaller subsets or more images"
        )
    first = np.arange(subset_size)
    values = []
    for k in range(subsets):
        x = one[rng.permute(first, len(one), seed, rng.Purpose.SAMPLE_SUBSET, k, 0)]
        y = other[rng.permute(first, len(other), seed, rng.Purpose.SAMPLE_SUBSET, k, 1)]
        values.append(_squared_mmd(x, y, kernel))
    return Score(float(np.mean(values)), float(np.std(values)))


def _squared_mmd(x: Array, y: Array, kernel: Kernel) -> float:
    n = len(x)
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
    return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


def monge_distance(one_ND: ArrayLike, other_MD: ArrayLike, seed: int = 0) -> float:
    """MIND (Berthet et al. 2605.06797): 3 D times the squared Wasserstein distance of projections on 1,000 directions.

    In one dimension that is the mean squared difference of the sorted numbers. Directions are keyed, and of the larger
    set a keyed subset is taken, as large as the other.
    """
    one, other = (np.asarray(x, np.float64) for x in (one_ND, other_MD))
    ids, width = np.arange(min(len(one), len(other))), one.shape[1]
    x, y = (z[rng.permute(ids, len(z), seed, rng.Purpose.SAMPLE_SUBSET, 0, 3)] for z in (one, other))
    total = 0.0
    for start in range(0, DIRECTIONS, 50):  # a hundred megabytes at a time
        direction_KD = rng.normal(seed, rng.Purpose.SAMPLE_DIRECTION, range(start, start + 50), width).astype(float)
        direction_KD /= np.linalg.norm(direction_KD, axis=1, keepdims=True)
        difference_NK = np.sort(x @ direction_KD.T, axis=0) - np.sort(y @ direction_KD.T, axis=0)
        total += float((difference_NK**2).mean(0).sum())
    return 3 * width * total / DIRECTIONS


class PrecisionRecall(NamedTuple):
    """The fraction of generated images inside the real manifold, and of real ones inside the generated."""

    precision: float
    recall: float


def precision_recall(generated_ND: ArrayLike, real_MD: ArrayLike, neighbours: int = 3) -> PrecisionRecall:
    """Kynkäänniemi et al. 1904.06991: a manifold is the union of balls that reach to each point's k-th neighbour."""
    generated, real = (torch.as_tensor(np.asarray(x)).float() for x in (generated_ND, real_MD))
    if min(len(generated), len(real)) <= neighbours:
        raise InputError(
            f"precision and recall with {neighbours} neighbours need more images on both sides than that, "
            f"not {len(generated)} and {len(real)}"
        )
    return PrecisionRecall(_inside(generated, real, neighbours), _inside(real, generated, neighbours))


def _inside(point_ND: Tensor, centre_MD: Tensor, neighbours: int) -> float:
    """The fraction of the points that lie in some centre's ball."""
    radius_M = torch.cat([_distance(c, centre_MD).kthvalue(neighbours + 1).values for c in centre_MD.split(CHUNK)])
    return float(
        torch.cat([(_distance(p, centre_MD) <= radius_M).any(1) for p in point_ND.split(CHUNK)]).double().mean()
    )


def _distance(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    return torch.cdist(a_ND, b_MD)
