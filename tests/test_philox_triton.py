"""Draws on a GPU are the CPU's, as far as a machine without one can prove it."""

import subprocess
import sys
from pathlib import Path


def triton_draws(how: str) -> str:
    program = Path(__file__).with_name("triton_draws.py")
    done = subprocess.run([sys.executable, program, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_kernel_draws_the_cpu_s_bits():
    assert triton_draws("interpret") == "equal"


def test_compiled_for_a_gpu_every_operation_rounds_as_on_the_cpu():
    """`rn` is to the nearest and never fused with another; nothing flushes small numbers or approximates."""
    operations = triton_draws("compile").split()
    assert {"add.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32", "cvt.rn.f32.u32", "cvt.rn.f32.s32"} <= set(
        operations
    )
    allowed = ("add.rn.", "sub.rn.", "mul.rn.", "div.rn.", "sqrt.rn.", "cvt.rn.", "neg.")
    assert not [o for o in operations if not o.startswith(allowed)]
