"""Who am I among how many: ranks, devices and the few collectives that everything else needs.

The launchers (torchrun, deepspeed, srun, none) differ only in the environment variables they set; `discover` reads
them and the rest of the code sees a `World`. Without a process group the collectives are the identity.
"""

import datetime
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ldt.errors import InputError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process's place: rank of size, local_rank of local_size on this node, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def discover(env: Mapping[str, str] = os.environ) -> World:
    """Read the launcher's variables: torchrun's and deepspeed's RANK, or those of an srun task, or neither."""
    if "RANK" in env:
        rank, size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        local_rank = _integer(env, "LOCAL_RANK", str(rank))
        local_size = _integer(env, "LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(size)))
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        rank, size = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_NTASKS")
        local_rank = _integer(env, "SLURM_LOCALID")
        local_size = -(-size // _integer(env, "SLURM_NNODES", "1"))
    else:
        rank, size, local_rank, local_size = 0, 1, 0, 1
    if not 0 <= rank < size:
        raise InputError(f"the launcher set rank {rank} of world size {size}; a rank is from 0 to world size - 1")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
                "start one process a GPU"
            )
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    return World(rank, size, local_rank, local_size, device)


def _integer(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None or not text.lstrip("-").isdigit():
        raise InputError(f"the launcher set {name}={text!r}, which is not a whole number")
    return int(text)


@contextmanager
def process_group() -> Iterator[World]:
    """Join the other processes (gloo on CPU, NCCL on CUDA) for the length of the block."""
    world = discover()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    # whatever the launcher was, DeepSpeed and torch look for these
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.size == 1:  # an in-memory store: a lone process needs no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    else:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise InputError(f"{world.size} processes but no {name}; start them with torchrun or deepspeed")
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield world
        barrier()  # leave together: a connection that closes early aborts whoever still listens
    finally:
        dist.destroy_process_group()


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def barrier() -> None:
    """Return when every rank has come here."""
    if not _alone():
        dist.barrier()


def all_gather(value: T) -> list[T]:
    """Every rank's (small, picklable) value, in rank order. Between our own processes only, never from files."""
    if _alone():
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast(value: T) -> T:
    """Rank 0's value on every rank."""
    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place; returns the tensor."""
    if not _alone():
        dist.all_reduce(tensor)
    return tensor


def in_block_order(blocks: int, produce: Callable[[int], T], world: World) -> Iterator[T]:
    """`produce(k)` for every block k, in order, on every rank; rank r makes blocks r, r + size, r + 2·size, …

    What is produced and its order are the same for any number of processes.
    """
    for first in range(0, blocks, world.size):
        k = first + world.rank
        mine = [produce(k)] if k < blocks else []
        yield from (result for results in all_gather(mine) for result in results)


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
