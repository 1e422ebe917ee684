"""Averages: the profiles they claim, and the reconstruction of others from stored ones."""

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
