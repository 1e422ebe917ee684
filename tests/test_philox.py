"""Random numbers of version 3: golden values, an independent Philox, version 2's formulas, the normal distribution."""

import math

import numpy as np
import philox_reference as reference
import pytest

from ldt import rng
from ldt.data import philox
from ldt.rng import Purpose

MASK = (1 << 32) - 1
GOLDEN_WORDS = [3279568651, 3205924115, 2909046789, 1598618004, 2845545973]
GOLDEN_NORMAL = [
    "-0x1.179d640000000p-2", "0x1.c9c9a60000000p+0", "-0x1.86abce0000000p-2",
    "-0x1.34beb20000000p-2", "-0x1.2a8a500000000p-3",
]  # fmt: skip


def normal(seed: int, index: list[int] | range, n: int) -> np.ndarray:
    out = np.empty((len(index), n), np.float32)
    philox.fill_normal(seed, Purpose.NOISE, index, out)
    return out


def planes(words_BN: np.ndarray) -> np.ndarray:
    """Words of whole blocks as [B, 4, blocks]: word j of block b stands at j·blocks + b."""
    return words_BN.reshape(len(words_BN), 4, -1)


def test_philox_matches_the_known_answers_of_its_authors():
    """Random123's kat_vectors, philox4x32 10."""
    assert reference.philox(32, [0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.philox(32, [MASK] * 4, [MASK] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (7, 123_456_789_012), (2**63 + 5, (1 << 62) + 9)])
def test_words_are_philox_at_counters_of_the_index(seed, index):
    expected = [
        reference.philox(32, [b, index & MASK, index >> 32, Purpose.NOISE], [seed & MASK, seed >> 32])
        for b in range(3000)
    ]
    words = philox.words(seed, Purpose.NOISE, [index], 12_000)
    assert planes(words)[0].T.tolist() == expected


def test_golden_values_never_change():
    """If this fails, old runs can't be continued: raise rng.VERSION instead of editing the numbers."""
    assert rng.VERSION == 3
    assert philox.words(1, Purpose.TIMESTEP, [5], 5)[0].tolist() == GOLDEN_WORDS
    assert [x.hex() for x in normal(1, [5], 5)[0].astype(float).tolist()] == GOLDEN_NORMAL


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 33, 4097, 10_000])
def test_a_row_depends_on_its_index_alone(n):
    assert (normal(3, [7, 42, 9], n)[1] == normal(3, [42], n)[0]).all()
    whole, words = 4 * -(-n // 4), philox.words(3, Purpose.NOISE, [42], n)
    assert (philox.words(3, Purpose.NOISE, [42], whole)[:, :n] == words).all()
    assert (normal(3, [42], whole)[:, :n] == normal(3, [42], n)).all()
    assert (philox.uniform(3, Purpose.NOISE, [42], n) == words / 2.0**32).all()


def test_seed_purpose_and_index_all_matter():
    keys = [(0, 1, 0), (1, 1, 0), (2**32, 1, 0), (0, 4, 0), (0, 1, 1), (0, 1, 2**32)]
    draws = [philox.words(seed, purpose, [index], 8) for seed, purpose, index in keys]
    assert len({d.tobytes() for d in draws}) == len(draws)


def test_normals_are_the_bits_of_version_2_s_numpy():
    """Compiled code and numpy's own loops: no fused multiply-add, no other order, on any CPU."""
    words = planes(philox.words(5, Purpose.NOISE, range(40), 4096)).astype(np.uint64)
    pairs = words[:, 0::2] << np.uint64(32) | words[:, 1::2]
    expected = np.empty((*pairs.shape, 2), np.float32)
    rng._box_muller(pairs, expected)
    drawn = planes(normal(5, range(40), 4096)).view(np.uint32)
    assert (drawn == expected.transpose(0, 1, 3, 2).reshape(drawn.shape).view(np.uint32)).all()


def test_normals_have_the_normal_distribution():
    """Kolmogorov-Smirnov over four million numbers, moments, tails, and no correlation within a block or a row."""
    z_BN = normal(11, range(1000), 4000).astype(np.float64)
    z, count = np.sort(z_BN.ravel()), z_BN.size
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z[::200]])
    assert np.abs(cdf - np.arange(0, count, 200) / count).max() < 1.63 / math.sqrt(count)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / count), power
    for bound in (3.0, 4.0, 4.5):
        expected = count * math.erfc(bound / math.sqrt(2))
        assert abs((np.abs(z) > bound).sum() - expected) < 5 * math.sqrt(expected), bound
    limit = 5 / math.sqrt(count / 4)
    z_BPJ = planes(z_BN)
    for i in range(4):
        for j in range(i):
            assert abs((z_BPJ[:, i] * z_BPJ[:, j]).mean()) < limit, (i, j)
            assert abs((z_BPJ[:, i] ** 2 * z_BPJ[:, j] ** 2).mean() - 1) < 9 * limit, (i, j)
    for lag in (1, 2, 16):
        assert abs((z_BN[:, lag:] * z_BN[:, :-lag]).mean()) < limit, lag
        assert abs((z_BN[lag:] * z_BN[:-lag]).mean()) < limit, lag
