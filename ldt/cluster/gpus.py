"""Which GPU belongs to this process, and which settings CUDA and NCCL get before they start.

Launchers show a task all GPUs of its node or its own alone, so a local rank is no ordinal. Two ranks that got the same
GPU, or nodes of which only some see one, are found when the ranks meet: see `conflict`.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ldt.cluster.launchers import Place

HEARTBEAT_TIMEOUT_S = 7 * 24 * 3600
"""Of torch's own monitor, which would abort a process without our stacks after 480 s; engine.stall_seconds decides."""

CUDA_SETTINGS = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(HEARTBEAT_TIMEOUT_S)}
"""Environment variables that torch reads when it makes a group; those that are set already stay."""

DETERMINISTIC_SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What cuBLAS must find when it starts, or torch refuses matrix products under deterministic algorithms."""


class Occupant(NamedTuple):
    """A rank as it is compared with the others: its host, its kind of device and, on CUDA, which GPU it is."""

    host: str
    kind: str
    gpu: str = ""


def device_of(place: Place) -> torch.device:
    """The GPU of the local rank, the only one if a task is shown no other, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place.local_rank % torch.cuda.device_count())


def use_device(device: torch.device) -> None:
    """Select the device for the calling thread: in a new thread CUDA starts with GPU 0 and would take memory on it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_arithmetic(deterministic: bool = False, tf32: bool = False) -> None:
    """What float32 means in this process, and whether sums are added in the same order every time.

    tf32: products of 10 bits in matrix products and convolutions, several times as fast; training's choice. Everything
    else computes in true float32: torch's own default has TF32 in convolutions. To be called before the first product.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        for name, value in DETERMINISTIC_SETTINGS.items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)


def occupant(device: torch.device, env: Mapping[str, str] = os.environ) -> Occupant:
    """What this rank tells the others about its device."""
    if device.type != "cuda":
        return Occupant(socket.gethostname(), device.type)
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    part = visible if visible.startswith("MIG-") else ""  # parts of a GPU may share its number
    return Occupant(socket.gethostname(), "cuda", f"{torch.cuda.get_device_properties(device).uuid}{part}")


def conflict(ranks: Sequence[Occupant]) -> str:
    """Why these ranks can't work together, in a sentence; empty if they can."""
    without = [r for r in ranks if r.kind == "cpu"]
    if without and len(without) < len(ranks):
        hosts = ", ".join(sorted({r.host for r in without}))
        return (
            f"{len(without)} of {len(ranks)} ranks see no GPU, on {hosts}; free the GPUs there (nvidia-smi), or leave "
            "the nodes out"
        )
    seen: dict[tuple[str, str], int] = {}
    for rank, r in enumerate(ranks):
        other = seen.setdefault((r.host, r.gpu), rank)
        if r.gpu and other != rank:
            return (
                f"ranks {other} and {rank} on {r.host} have the same GPU; start at most one process a GPU "
                "(srun --ntasks-per-node, torchrun --nproc_per_node)"
            )
    return ""
