"""What accelerators can do by their makers' data sheets: dense matrix products, without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """bf16, tf32: operations a second; memory: bytes; bandwidth: bytes a second of that memory.

    link: bytes a second to the other GPUs of the node, one way.
    """

    bf16: float
    tf32: float
    memory: float
    bandwidth: float
    link: float


DEVICES = {
    "a100-40g": Device(312e12, 156e12, 40e9, 1.555e12, 300e9),
    "a100": Device(312e12, 156e12, 80e9, 2.039e12, 300e9),
    "h100": Device(989e12, 494e12, 80e9, 3.35e12, 450e9),
    "h200": Device(989e12, 494e12, 141e9, 4.8e12, 450e9),
    "l40s": Device(362e12, 183e12, 48e9, 0.864e12, 32e9),
}
"""NVIDIA's data sheets; SXM versions, the L40S on PCIe 4."""
