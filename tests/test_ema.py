"""Averages: the profiles they claim, and the reconstruction of others from stored ones."""

import numpy as np
import pytest
import torch

from ldt.engine import ema as averaging
from ldt.engine.config import EMAConfig
from ldt.engine.ema import Profile, ShardedEMA
from ldt.errors import InputError


def test_power_average_is_the_weighted_mean_it_claims():
    """After n equal steps the weight of step i is proportional to i^γ up to the discretisation (2312.02696, eq. 9)."""
    profile = Profile(width=0.1)
    gamma = averaging.power_exponent(0.1)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.01)
    n = 20_000
    weight = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        keep = profile.decay(i + 1, 1)
        weight *= keep
        weight[i] = 1 - keep
    position = torch.arange(1, n + 1, dtype=torch.float64) / n
    mean = (weight * position).sum()
    width = ((weight * (position - mean) ** 2).sum()).sqrt()
    assert weight.sum() == pytest.approx(1)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)
    assert width == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_a_width_has_its_exponent_and_the_exponent_its_decay(width):
    """Against 2312.02696, eqs. 126 and 10, at a step from 270 to 300 samples; the first step keeps nothing."""
    gamma = averaging.power_exponent(width)
    assert gamma > 0 and (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2, rel=1e-9)
    assert Profile(width=width).decay(300, 30) == pytest.approx(0.9 ** (gamma + 1), rel=1e-12)
    assert Profile(width=width).decay(30, 30) == 0


def test_averages_of_a_rank_follow_its_weights_by_their_decay():
    config = EMAConfig(widths=[0.05, 0.1])
    weights = [torch.full((3,), 1.0), torch.full((2,), 5.0)]
    ema = ShardedEMA(config, weights)
    assert ema.tensors["ema"][0] is not weights[0]
    weights[0].fill_(2.0)
    ema.update(300, 30)
    for name, width in (("ema", 0.05), ("ema_0.1", 0.1)):
        kept = Profile(width=width).decay(300, 30)
        torch.testing.assert_close(ema.tensors[name][0], torch.full((3,), kept * 1.0 + (1 - kept) * 2.0))
        assert torch.equal(ema.tensors[name][1], weights[1])
    assert ema.describe() == {"ema": {"kind": "power", "width": 0.05}, "ema_0.1": {"kind": "power", "width": 0.1}}
    ema.reset()
    assert all(torch.equal(a, w) for tensors in ema.tensors.values() for a, w in zip(tensors, weights, strict=True))
    assert all(a is not w for tensors in ema.tensors.values() for a, w in zip(tensors, weights, strict=True))


def test_a_rank_without_weights_has_empty_averages():
    """Stages 1 to 3 may leave a rank nothing of a small model."""
    ema = ShardedEMA(EMAConfig(), [])
    ema.update(300, 30)
    assert ema.tensors == {"ema": [], "ema_0.1": []}


def test_a_half_life_is_described_by_itself():
    assert Profile(half_life=1000).describe() == {"kind": "half_life", "half_life": 1000}


def test_coefficients_are_the_least_squares_of_profiles():
    """The profiles on a fine grid of times, and numpy's solver on them, instead of integrals in closed form."""
    stored, width = [(700, 0.1), (700, 0.25), (1000, 0.1), (1000, 0.25)], 0.15
    time = (np.arange(200_000) + 0.5) / 200_000

    def profile(end: float, width: float) -> np.ndarray:
        gamma = averaging.power_exponent(width)
        return np.where(time < end, (gamma + 1) * (time / end) ** gamma / end, 0.0)

    columns = np.stack([profile(seen / 1000, w) for seen, w in stored], axis=1)
    expected = np.linalg.lstsq(columns, profile(1.0, width), rcond=None)[0]
    assert averaging.reconstruction(stored, 1000, width) == pytest.approx(expected, rel=1e-3)
    assert averaging.reconstruction(stored, 1000, 0.25) == pytest.approx([0, 0, 0, 1], abs=1e-9)


def test_half_life_forgets_half():
    profile = Profile(half_life=1000)
    assert profile.decay(10, 10) ** 100 == pytest.approx(0.5)


def test_the_averages_of_a_run_have_names():
    assert averaging.profiles(EMAConfig()) == {"ema": Profile(width=0.05), "ema_0.1": Profile(width=0.1)}
    assert averaging.profiles(EMAConfig(kind="half_life")) == {"ema": Profile(half_life=500_000)}


def track(widths, steps):
    """Power averages of a random walk at every step: {width: [steps, 64]}, float64."""
    walk = torch.randn(steps, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    out = {}
    for width in widths:
        weights, seen = torch.zeros(64, dtype=torch.float64), []
        ema = ShardedEMA(EMAConfig(widths=[width]), [weights])
        for i in range(steps):
            weights.copy_(walk[i])
            ema.update(i + 1, 1)
            seen.append(ema.tensors["ema"][0].clone())
        out[width] = torch.stack(seen)
    return out


@pytest.mark.parametrize("width", [0.05, 0.06, 0.075, 0.09, 0.10])
def test_any_width_between_is_reconstructed_from_snapshots(width):
    """Against the average that was really tracked; far closer than the nearer of the two stored ones."""
    steps, every = 4000, 250
    tracked = track([0.05, 0.10, width], steps)
    stored = [(t, w) for t in range(every, steps + 1, every) for w in (0.05, 0.10)]
    coefficients = averaging.reconstruction(stored, steps, width)
    made = sum(c * tracked[w][t - 1] for c, (t, w) in zip(coefficients, stored, strict=True))
    wanted = tracked[width][-1]
    scale = (tracked[0.05][-1] - tracked[0.10][-1]).norm()
    assert (made - wanted).norm() < 0.02 * scale
    assert sum(coefficients) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": []}, "one or several different widths"),
        ({"widths": [0.1, 0.1]}, "one or several different widths"),
        ({"widths": [0.1, 0.3]}, "between 0 and 0.28"),
        ({"half_life": 0}, "at least 1 sample"),
        ({"snapshot_every_samples": -1}, "can't be negative"),
    ],
)
def test_wrong_averages_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        EMAConfig(**settings)
