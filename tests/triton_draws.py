"""Run as a program: the Triton kernel's normals.

`interpret` compares them with the CPU's, bit for bit, by Triton's interpreter. `compile` compiles the kernel for an
H100, which needs none, and shows the arithmetic of what came out.

Triton lives in a directory of its own (`make .venv/triton`), which only this process sees: beside a CPU torch it would
change what torch.compile does.
"""

import os
import re
import sys
from pathlib import Path

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parents[1] / ".venv" / "triton"))

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ldt.data import philox, philox_triton
from ldt.rng import Purpose

CASES = [
    (0, Purpose.NOISE, [0], 1),
    (0, Purpose.POSTERIOR, [0], 2),
    (2**63 + 5, Purpose.NOISE, [(1 << 62) + 9, 7], 3),
    (7, Purpose.NOISE, list(range(6)), 33),
    (7, Purpose.POSTERIOR, [3, 2**33], 4096),
    (2**64 - 1, Purpose.NOISE, [5], 10_001),
]


def interpret() -> None:
    for seed, purpose, index, n in CASES:
        host, device = np.empty((len(index), n), np.float32), torch.full((len(index), n), torch.nan)
        philox.fill_normal(seed, purpose, index, host)
        philox_triton.fill_normal(seed, purpose, torch.tensor(index), device)
        equal = (host.view(np.uint32) == device.numpy().view(np.uint32)).all()
        assert equal, (seed, purpose, index, n, host, device)
    print("equal")


def compile() -> None:
    types = {"out": "*fp32", "index": "*i64", "seed": "i64", "purpose": "i32", "n": "i32", "blocks": "i32"}
    constants = {"BLOCK": philox_triton.BLOCK}
    source = ASTSource(philox_triton._kernel, types | {"BLOCK": "constexpr"}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=philox_triton.EXACT)
    operations = set(re.findall(r"\b([a-z]+\.[a-z.]*f32(?:\.[a-z]+32)?)\b", made.asm["ptx"]))
    print(*sorted(o for o in operations if not o.startswith(("st.", "ld.", "mov."))))


compile() if sys.argv[1] == "compile" else interpret()
