"""Counter-based random numbers: every draw is a function of (seed, purpose, index) and of nothing else.

The bits here are Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) under the key
(seed, purpose), at counters that belong to one index alone. The order of the samples and the images of a checkpoint are
drawn of them, and what training draws about a sample in runs of version 2; `ldt.data.philox` is version 3. Bits become
uniforms and normals by operations that IEEE 754 defines exactly (+, ×, ÷, √, scaling by powers of two), so that no
library upgrade, thread count or CPU type can change a single one of them. Golden tests pin the results; the version
that a run began with stands in its checkpoints.
"""

import math
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

VERSION = 3
VERSIONS = (2, 3)
"""Those that a run may have begun with, and goes on with."""


class Purpose(IntEnum):
    """What a draw is for. The values are part of the format of a run: append, never renumber."""

    NOISE = 1
    TIMESTEP = 2
    POSTERIOR = 3
    FLIP = 4
    CONDITION_DROP = 5
    TOKEN_ROUTING = 6
    ORDER_SHARDS = 7
    ORDER_WINDOW = 8
    SPLIT = 9
    INIT = 10
    SAMPLE_NOISE = 11
    SAMPLE_LABEL = 12
    SAMPLE_STEP = 13
    SOURCE = 14
    SAMPLE_SUBSET = 15
    MEAN_FLOW = 16
    CAPTION = 17
    BUCKET = 20
    SAMPLE_DIRECTION = 24
    TOKEN_NOISE = 25


def _words(seed: int, purpose: int, key: tuple[int, ...], n: int) -> NDArray[np.uint64]:
    counter = np.zeros(4, np.uint64)  # word 0 counts blocks; words 1-3 name the stream
    counter[1 : 1 + len(key)] = key
    return np.random.Philox(key=np.array([seed, int(purpose)], np.uint64), counter=counter).random_raw(n)


def bits(seed: int, purpose: int, index_B: ArrayLike, n: int) -> NDArray[np.uint64]:
    """`n` raw 64-bit words for each index, those of `_words` under the key (index,): uint64 [B, n]."""
    index_B = np.asarray(index_B, np.int64)
    assert index_B.ndim == 1, index_B.shape
    out = np.empty((len(index_B), n), np.uint64)
    generator = np.random.Philox(key=np.array([seed, int(purpose)], np.uint64))
    state = generator.state  # setting it takes a fifth of the time that a new generator takes
    for row, index in zip(out, index_B.tolist(), strict=True):
        state["state"]["counter"][1] = index
        generator.state = state
        row[:] = generator.random_raw(n)
    return out


def uniform(seed: int, purpose: int, index_B: ArrayLike, n: int) -> NDArray[np.float64]:
    """`n` numbers for each index, uniform on [0, 1) in steps of 2⁻⁵³: float64 [B, n]."""
    words: NDArray[np.uint64] = bits(seed, purpose, index_B, n) >> np.uint64(11)
    return words.astype(np.float64) * 2.0**-53


def normal(seed: int, purpose: int, index_B: ArrayLike, n: int) -> NDArray[np.float32]:
    """`n` standard normal numbers for each index: float32 [B, n]. Tails reach ±6.7."""
    words = bits(seed, purpose, index_B, (n + 1) // 2)
    out = np.empty((*words.shape, 2), np.float32)
    rows = max(1, 8192 // max(1, words.shape[1]))  # a block at a time stays in the cache
    for i in range(0, len(words), rows):
        _box_muller(words[i : i + rows], out[i : i + rows])
    return out.reshape(len(words), 2 * words.shape[1])[:, :n]


def fill_normal(seed: int, purpose: int, index_B: ArrayLike, out_BN: NDArray[np.float32]) -> None:
    """`normal`, written into the rows of an array."""
    out_BN[...] = normal(seed, purpose, index_B, out_BN.shape[1])


LOG = [2 / (2 * k + 1) for k in range(5)]  # of atanh, twice; |s| < 0.172: five terms leave 2e-9
COS = [(-1) ** k / math.factorial(2 * k) for k in range(5)]  # |x| < π/4: five terms leave 2e-8
SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(5)]  # and 2e-9
LN_2, SQRT_HALF, TURN = np.log(2.0), np.sqrt(0.5), np.pi / 4 * 2.0**-31
_SIGN = np.uint32(0x80000000)


def _box_muller(words: NDArray[np.uint64], out: NDArray[np.float32]) -> None:
    """Two independent normals a word (Box and Muller 1958), into [..., 2]: the high half is the radius, the low half
    the angle. All in float32, whose four operations and root IEEE 754 defines as well.

    An angle a within ±π/4 is turned by π/4 into the first quadrant: cos(a + π/4) = (cos a − sin a) / √2, and likewise
    the sine; that root cancels the one in the radius, √(−2 ln u). The two lowest bits then choose the quadrant.
    """
    halves = words.astype("<u8", copy=False).view("<u4")
    low, u = halves[..., 0::2].copy(), halves[..., 1::2].astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-32)  # never 0
    radius = _log(u)
    np.negative(radius, out=radius)
    np.sqrt(radius, out=radius)
    cos, sin = _cos_sin((low & ~np.uint32(3)).view(np.int32).astype(np.float32) * np.float32(TURN))
    for place, sign, value in ((0, low << np.uint32(31), cos - sin), (1, low << np.uint32(30) & _SIGN, cos + sin)):
        value *= radius
        value.view(np.uint32)[...] ^= sign
        out[..., place] = value


def _log(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural logarithm on (0, 1] by the atanh series; np.log differs in the last bit between CPUs."""
    bits = x.view(np.int32)
    exponent = (bits - np.float32(SQRT_HALF).view(np.int32)) >> np.int32(23)
    s = (bits - (exponent << np.int32(23))).view(np.float32)  # the mantissa m, between √½ and √2
    above = s + np.float32(1)
    s -= np.float32(1)
    s /= above
    out = _polynomial(s * s, LOG)
    out *= s
    out += exponent.astype(np.float32) * np.float32(LN_2)
    return out


def _cos_sin(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine on [-π/4, π/4] by their Taylor series."""
    square = x * x
    sin = _polynomial(square, SIN)
    sin *= x
    return _polynomial(square, COS), sin


def _polynomial(x: NDArray[np.float32], coefficients: list[float]) -> NDArray[np.float32]:
    """Horner's rule; numpy never contracts the two steps into a fused multiply-add."""
    out = x * np.float32(coefficients[-1])
    for c in coefficients[-2:0:-1]:
        out += np.float32(c)
        out *= x
    out += np.float32(coefficients[0])
    return out


ROUNDS = 12


def permute(position: ArrayLike, size: int, seed: int, purpose: int, *key: int) -> NDArray[np.int64]:
    """Images of `position` (any shape, values in [0, size)) under a pseudo-random permutation of range(size).

    The permutation belongs to (seed, purpose, key) with up to three key words. Nothing of length `size` is made: it
    is an alternating Feistel network over the grid a × b ⊇ range(size) with modular addition (FE1 of Bellare et al.,
    "Format-preserving encryption", SAC 2009); results outside the range walk on until they fall inside.
    """
    x = np.array(position, np.int64)
    assert size > 0 and (x.size == 0 or (x.min() >= 0 and x.max() < size)), (size, x)
    a = int(np.ceil(np.sqrt(size)))
    b = -(-size // a)
    round_keys = _words(seed, purpose, key, ROUNDS)
    todo = np.ones(x.shape, bool)
    while todo.any():
        x[todo] = _feistel(x[todo], a, b, round_keys)
        todo = x >= size
    return x


def _feistel(x: NDArray[np.int64], a: int, b: int, round_keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    left, right = np.divmod(x.astype(np.uint64), np.uint64(b))
    for i, round_key in enumerate(round_keys):
        if i % 2 == 0:
            left = (left + mix(right, round_key) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + mix(left, round_key) % np.uint64(b)) % np.uint64(b)
    return (left * np.uint64(b) + right).astype(np.int64)


def mix(x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014) over x combined with the key."""
    z = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
