"""Keyed random numbers, version 3: Philox-4x32-10 and Box-Muller in 32-bit arithmetic, compiled for the CPU by numba.

As in `ldt.rng`, a draw is a function of (seed, purpose, index) alone. The bits are Philox-4x32-10 (Salmon et al., SC
2011) under the key `seed`, at the counters (block, index, purpose); a block is four words, and word j of block b is
number j·blocks + b of its row. Normals are made of them by the formulas of version 2, in operations that IEEE 754
defines exactly and in one stated order: the compiler may neither reorder them nor contract them into fused
multiply-adds, so that every CPU and `ldt/data/philox_triton.py` on a GPU draw the same bits.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import ArrayLike, NDArray

from ldt.rng import COS, LN_2, LOG, SIN, SQRT_HALF, TURN

CHUNK = 1024  # blocks; what is made of them stays in the first-level cache

_LOG, _COS, _SIN = ([np.float32(c) for c in series] for series in (LOG, COS, SIN))
_L0, _L1, _L2, _L3, _L4 = _LOG
_C0, _C1, _C2, _C3, _C4 = _COS
_S0, _S1, _S2, _S3, _S4 = _SIN
_ONE, _HALF, _ULP = np.float32(1), np.float32(0.5), np.float32(2.0**-32)
_LN_2, _TURN, _SQRT_HALF = np.float32(LN_2), np.float32(TURN), np.float32(SQRT_HALF).view(np.uint32)
_SIGN = np.uint32(0x80000000)


def words(seed: int, purpose: int, index_B: ArrayLike, n: int) -> NDArray[np.uint32]:
    """`n` raw words for each index: uint32 [B, n]."""
    index_B = np.asarray(index_B, np.int64)
    out = np.empty((len(index_B), n), np.uint32)
    _fill(seed, purpose, index_B, False, out)
    return out


def uniform(seed: int, purpose: int, index_B: ArrayLike, n: int) -> NDArray[np.float64]:
    """`n` numbers for each index, uniform on [0, 1) in steps of 2⁻³²: float64 [B, n]."""
    return words(seed, purpose, index_B, n).astype(np.float64) * 2.0**-32


def fill_normal(seed: int, purpose: int, index_B: ArrayLike, out_BN: NDArray[np.float32]) -> None:
    """A row of standard normal numbers for each index, written into contiguous rows. Tails reach ±6.7."""
    assert out_BN.dtype == np.float32 and out_BN.flags.c_contiguous, (out_BN.dtype, out_BN.strides)
    _fill(seed, purpose, index_B, True, out_BN.view(np.uint32))


def _fill(seed: int, purpose: int, index_B: ArrayLike, normal: bool, out_BN: NDArray[np.uint32]) -> None:
    scratch_4W = np.empty((4, CHUNK), np.uint32)
    _rows(np.uint64(seed), np.uint32(purpose), np.asarray(index_B, np.int64), normal, scratch_4W, out_BN)


def _reinterpret(source: types.Type, target: types.Type) -> Any:
    """A function of compiled code: the same 32 bits read as another type. Arrays' views would not be vectorised."""

    @intrinsic
    def reinterpret(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return reinterpret


_bits, _from_bits = _reinterpret(types.float32, types.uint32), _reinterpret(types.uint32, types.float32)


@njit(nogil=True, error_model="numpy")
def _rows(seed, purpose, index_B, normal, scratch_4W, out_BN):  # type: ignore[no-untyped-def]
    """A row of words for each index, or of normals as their bits: one function, as each takes a second to compile."""
    blocks = (out_BN.shape[1] + 3) // 4
    for row in range(len(index_B)):
        for start in range(0, blocks, CHUNK):
            size = min(CHUNK, blocks - start)
            _philox(seed, purpose, np.uint64(index_B[row]), start, size, scratch_4W)
            if normal:
                _box_muller(scratch_4W[0], scratch_4W[1], size)
                _box_muller(scratch_4W[2], scratch_4W[3], size)
            _place(scratch_4W, start, size, blocks, out_BN[row])


@njit(nogil=True, error_model="numpy")
def _place(made_4W, start, size, blocks, out_N):  # type: ignore[no-untyped-def]
    """The words of blocks [start, start + size) to their places; what lies beyond the row is dropped."""
    for j in range(4):
        first = j * blocks + start
        count = min(size, len(out_N) - first)
        for i in range(count):
            out_N[first + i] = made_4W[j, i]


@njit(nogil=True, error_model="numpy")
def _philox(seed, purpose, index, start, size, out_4W):  # type: ignore[no-untyped-def]
    low, high, seed_low, seed_high = np.uint32(index), np.uint32(index >> 32), np.uint32(seed), np.uint32(seed >> 32)
    for b in range(size):
        c0, c1, c2, c3 = np.uint32(start + b), low, high, np.uint32(purpose)
        k0, k1 = seed_low, seed_high
        for _ in range(10):
            p0, p1 = np.uint64(c0) * np.uint64(0xD2511F53), np.uint64(c2) * np.uint64(0xCD9E8D57)
            c0, c1 = np.uint32(np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0), np.uint32(p1)
            c2, c3 = np.uint32(np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1), np.uint32(p0)
            k0, k1 = np.uint32(k0 + np.uint32(0x9E3779B9)), np.uint32(k1 + np.uint32(0xBB67AE85))
        out_4W[0, b], out_4W[1, b], out_4W[2, b], out_4W[3, b] = c0, c1, c2, c3


@njit(nogil=True, error_model="numpy")
def _box_muller(radius_W, angle_W, size):  # type: ignore[no-untyped-def]
    """The bits of two normals in place of two words; `ldt.rng` says how."""
    for i in range(size):
        u = _bits((np.float32(radius_W[i]) + _HALF) * _ULP)
        exponent = np.int32(np.int32(u - _SQRT_HALF) >> np.int32(23))
        mantissa = _from_bits(np.uint32(u - (np.uint32(exponent) << np.uint32(23))))
        s = (mantissa - _ONE) / (mantissa + _ONE)
        q = s * s
        log = ((((q * _L4 + _L3) * q + _L2) * q + _L1) * q + _L0) * s + np.float32(exponent) * _LN_2
        radius = np.sqrt(-log)
        low = angle_W[i]
        x = np.float32(np.int32(low & np.uint32(0xFFFFFFFC))) * _TURN
        q = x * x
        cos = (((q * _C4 + _C3) * q + _C2) * q + _C1) * q + _C0
        sin = ((((q * _S4 + _S3) * q + _S2) * q + _S1) * q + _S0) * x
        radius_W[i] = np.uint32(_bits((cos - sin) * radius) ^ low << np.uint32(31))
        angle_W[i] = np.uint32(_bits((cos + sin) * radius) ^ low << np.uint32(30) & _SIGN)
