"""The normals of `ldt.data.philox` drawn on a GPU, bit for bit: a Triton kernel, in the same operations and order.

Division and root are the correctly rounded ones, and the compiler is told not to fuse multiplications with additions.
Under TRITON_INTERPRET=1 the kernel runs on the CPU, which is how the tests compare it with numpy.
"""

import triton
import triton.language as tl
from torch import Tensor

from ldt.rng import COS, LN_2, LOG, SIN, SQRT_HALF, TURN

BLOCK = 1024  # Philox blocks of a program
EXACT = {"enable_fp_fusion": False}

_L0, _L1, _L2, _L3, _L4 = (tl.constexpr(c) for c in LOG)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(c) for c in COS)
_S0, _S1, _S2, _S3, _S4 = (tl.constexpr(c) for c in SIN)
_LN_2, _TURN, _SQRT_HALF = tl.constexpr(float(LN_2)), tl.constexpr(float(TURN)), tl.constexpr(0x3F3504F3)
assert SQRT_HALF.astype("float32").view("int32") == _SQRT_HALF.value


def fill_normal(seed: int, purpose: int, index_B: Tensor, out_BN: Tensor) -> None:
    """A row of standard normal numbers for each index (int64 [B]), written into contiguous float32 rows."""
    assert out_BN.is_contiguous(), out_BN.stride()
    rows, n = out_BN.shape
    blocks = -(-n // 4)
    if rows and n:
        grid = (rows, triton.cdiv(blocks, BLOCK))
        signed = seed - 2**64 if seed >= 2**63 else seed
        _kernel[grid](out_BN, index_B, signed, int(purpose), n, blocks, BLOCK=BLOCK, **EXACT)


@triton.jit
def _kernel(out, index, seed, purpose, n, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(index + row)
    zero = tl.zeros((BLOCK,), tl.uint32)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    words = tl.philox(seed, b.to(tl.uint32), zero + low, zero + high, zero + purpose.to(tl.uint32))
    first, second = _box_muller(words[0], words[1])
    third, fourth = _box_muller(words[2], words[3])
    out += row * n
    tl.store(out + b, first, mask=b < tl.minimum(blocks, n))
    tl.store(out + blocks + b, second, mask=(b < blocks) & (blocks + b < n))
    tl.store(out + 2 * blocks + b, third, mask=(b < blocks) & (2 * blocks + b < n))
    tl.store(out + 3 * blocks + b, fourth, mask=(b < blocks) & (3 * blocks + b < n))


@triton.jit
def _box_muller(radius, low):  # type: ignore[no-untyped-def]
    u = ((radius.to(tl.float32) + 0.5) * 2.3283064365386963e-10).to(tl.int32, bitcast=True)  # 2⁻³²
    exponent = (u - _SQRT_HALF) >> 23
    mantissa = (u - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    q = s * s
    log = ((((q * _L4 + _L3) * q + _L2) * q + _L1) * q + _L0) * s + exponent.to(tl.float32) * _LN_2
    length = tl.sqrt_rn(-log)
    x = (low & 0xFFFFFFFC).to(tl.int32, bitcast=True).to(tl.float32) * _TURN
    q = x * x
    cos = (((q * _C4 + _C3) * q + _C2) * q + _C1) * q + _C0
    sin = ((((q * _S4 + _S3) * q + _S2) * q + _S1) * q + _S0) * x
    first = ((cos - sin) * length).to(tl.uint32, bitcast=True) ^ (low << 31)
    second = ((cos + sin) * length).to(tl.uint32, bitcast=True) ^ ((low << 30) & 0x80000000)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)
