"""The keyed random numbers: golden values, an independent Philox, and the distributions they claim."""

import math

import numpy as np
import philox_reference as reference
import pytest

from ldt import rng

GOLDEN_UNIFORM = [0.4030754275859193, 0.4941269389450781]
GOLDEN_NORMAL = ["0x1.66b37e0000000p-1", "-0x1.543dd40000000p+0", "-0x1.c895f60000000p-4", "0x1.c842920000000p-1"]
GOLDEN_PERMUTATION = [5, 3, 7, 4, 0, 2, 8, 9, 1, 6]


def test_philox_matches_the_known_answer_of_its_authors():
    """Random123's kat_vectors, philox4x64 10, all zero."""
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert reference.philox(64, [0, 0, 0, 0], [0, 0]) == expected


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (7, 123_456_789_012), (2**63 + 5, 1)])
def test_bits_are_philox_at_counters_of_the_index(seed, index):
    blocks = [reference.philox(64, [block, index, 0, 0], [seed, rng.Purpose.NOISE]) for block in (1, 2)]
    assert rng.bits(seed, rng.Purpose.NOISE, [index], 8)[0].tolist() == blocks[0] + blocks[1]


def test_golden_values_never_change():
    """Version 2. If this fails, old runs can't be continued: raise rng.VERSION instead of editing the numbers."""
    assert 2 in rng.VERSIONS
    assert rng.uniform(1, rng.Purpose.TIMESTEP, [5], 2)[0].tolist() == GOLDEN_UNIFORM
    assert [x.hex() for x in rng.normal(1, rng.Purpose.NOISE, [5], 4)[0].astype(float).tolist()] == GOLDEN_NORMAL
    assert rng.permute(np.arange(10), 10, 1, rng.Purpose.ORDER_SHARDS, 2, 3).tolist() == GOLDEN_PERMUTATION


def test_a_row_depends_on_its_index_alone():
    alone = rng.normal(3, rng.Purpose.NOISE, [42], 33)
    among = rng.normal(3, rng.Purpose.NOISE, [7, 42, 9], 33)
    assert (alone[0] == among[1]).all()
    assert (rng.normal(3, rng.Purpose.NOISE, [42], 5)[0] == alone[0, :5]).all()


def test_seed_purpose_and_index_all_matter():
    draws = [
        rng.bits(0, rng.Purpose.NOISE, [0], 4),
        rng.bits(1, rng.Purpose.NOISE, [0], 4),
        rng.bits(0, rng.Purpose.FLIP, [0], 4),
        rng.bits(0, rng.Purpose.NOISE, [1], 4),
    ]
    assert len({d.tobytes() for d in draws}) == len(draws)


def test_transcendentals_agree_with_float64():
    """To a unit or two in the last place of float32."""
    u = np.concatenate([2.0 ** np.linspace(-33, 0, 100_001), np.linspace(0.5, 1, 100_001)]).astype(np.float32)
    np.testing.assert_allclose(rng._log(u), np.log(u.astype(np.float64)), rtol=4e-7, atol=6e-8)
    x = np.linspace(-np.pi / 4, np.pi / 4, 100_001).astype(np.float32)
    cos, sin = rng._cos_sin(x)
    np.testing.assert_allclose(sin, np.sin(x.astype(np.float64)), rtol=3e-7)
    np.testing.assert_allclose(cos, np.cos(x.astype(np.float64)), rtol=3e-7)


def test_normals_are_box_and_muller_s():
    """Against the textbook formula in float64, with the angle and radius taken from the same bits."""
    word = rng.bits(5, rng.Purpose.NOISE, [8], 500)[0]
    low, high = word & np.uint64(0xFFFFFFFF), word >> np.uint64(32)
    radius = np.sqrt(-2 * np.log((high + 0.5) * 2.0**-32))
    turn = (low & ~np.uint64(3)).astype(np.uint32).view(np.int32) * 2.0**-31 * np.pi / 4 + np.pi / 4
    sign = 1 - 2 * np.stack([low & 1, low >> 1 & 1], 1).astype(np.float64)
    expected = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1) * sign
    np.testing.assert_allclose(rng.normal(5, rng.Purpose.NOISE, [8], 1000).reshape(500, 2), expected, atol=2e-6)


def test_normals_have_the_normal_distribution():
    """Kolmogorov-Smirnov over a million numbers, moments, and no correlation between the halves of a pair."""
    z = rng.normal(11, rng.Purpose.NOISE, np.arange(250), 4000).astype(np.float64)
    ordered = np.sort(z.ravel())
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in ordered[::50]])
    assert np.abs(cdf - np.arange(0, ordered.size, 50) / ordered.size).max() < 1.63 / math.sqrt(ordered.size)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / z.size)
    assert abs((z[:, ::2] * z[:, 1::2]).mean()) < 5 / math.sqrt(z.size / 2)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 65_537])
def test_permute_is_a_permutation(size):
    image = rng.permute(np.arange(size), size, 0, rng.Purpose.ORDER_WINDOW, 9)
    assert sorted(image.tolist()) == list(range(size))


def test_permute_sends_every_position_everywhere_equally_often():
    """Chi-square over the 7 × 7 table of 7000 keyed permutations."""
    counts = np.zeros((7, 7))
    for key in range(7000):
        counts[np.arange(7), rng.permute(np.arange(7), 7, 5, rng.Purpose.ORDER_SHARDS, key)] += 1
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 73.4  # 99.9 % of chi-square with 36 + margin for the dependent rows (42) degrees of freedom


def test_permute_leaves_no_neighbours_together():
    n = 100_000
    image = rng.permute(np.arange(n), n, 1, rng.Purpose.ORDER_WINDOW)
    correlation = np.corrcoef(np.arange(n), image)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)
    assert (np.abs(np.diff(image)) <= 10).mean() < 5 * 20 / n + 1e-3
