"""Who am I among how many: ranks, devices and the few collectives that everything else needs.

The launchers (torchrun, deepspeed, srun, submitit, none) differ only in the environment variables they set; `discover`
reads them and the rest of the code sees a `World`. Without a process group the collectives are the identity.
"""

import contextlib
import datetime
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ldt.cluster.gpus import CUDA_SETTINGS, Occupant, conflict, device_of, occupant, use_device
from ldt.cluster.launchers import another_port, master, place
from ldt.errors import InputError, RunError, in_a_sentence
from ldt.log import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)
SLOWEST_RANK_TIMEOUT = datetime.timedelta(days=7)  # where ranks meet that may have hours of work of their own, or where
# a watchdog looks after them, which unlike this limit doesn't count the time in which all of them stood still
RENDEZVOUS_TIMEOUT_S = 300.0
MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
GOODBYE_TIMEOUT_S = 10.0  # for the others to read what rank 0 found
FREE_PORTS = (10_000, 16_800)  # the tests' SLURM clusters and then the jobs of launchers come next
FIRST_COLLECTIVE_TIMEOUT_S = 180.0  # connecting 1,000 GPUs takes NCCL about a minute


@dataclass(frozen=True)
class World:
    """This process's place: rank of size, local_rank of local_size on this node, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def discover(env: Mapping[str, str] = os.environ) -> World:
    """This process's `place` and its device: the GPU of its local rank, or the CPU where there is none."""
    here = place(env)
    return World(*here, device_of(here))


@contextmanager
def process_group(
    rendezvous_s: float = RENDEZVOUS_TIMEOUT_S, timeout: datetime.timedelta | None = None
) -> Iterator[World]:
    """Join the other processes for the length of the block: gloo for objects and on the CPU, NCCL for CUDA tensors.

    `RunError` that names who is missing when not all ranks have come after `rendezvous_s` seconds; `InputError` that
    names who has no GPU of its own.
    timeout: how long a rank waits for the others wherever they meet, `TIMEOUT` unless given.
    """
    world = discover()
    use_device(world.device)
    before = dict(os.environ)
    # whatever the launcher was, DeepSpeed and torch look for these; DeepSpeed takes LOCAL_RANK for the GPU's ordinal
    ordinal = world.local_rank if world.device.index is None else world.device.index
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(ordinal))
    if world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does: ranks that each take all cores stand in each other's way
    try:
        store = _meet(world, rendezvous_s) if world.size > 1 else dist.HashStore()  # a lone process needs no port
        with _ends_within(FIRST_COLLECTIVE_TIMEOUT_S, world):
            dist.init_process_group(
                store=store, rank=world.rank, world_size=world.size, timeout=timeout or TIMEOUT, **_backend(world)
            )
            _connect(world)
        try:
            yield world
            barrier()  # leave together: a connection that closes early aborts whoever still listens
        finally:
            dist.destroy_process_group()
    finally:
        for name in MEETING:  # what this process starts later is no rank of this group
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _backend(world: World) -> dict[str, Any]:
    """The backends of the group; also sets the environment variables that torch reads when it makes one."""
    if world.device.type == "cpu":
        return {"backend": "gloo"}
    for name, value in CUDA_SETTINGS.items():
        os.environ.setdefault(name, value)
    return {"backend": "cpu:gloo,cuda:nccl", "device_id": world.device}


def _connect(world: World) -> None:
    """Make one all-reduce on the device: NCCL connects during it, and a broken network shows here."""
    all_reduce_sum(torch.ones(1, device=world.device)).item()


@contextmanager
def _ends_within(seconds: float, world: World) -> Iterator[None]:
    """End the process, with a sentence, if the block takes longer: nothing can interrupt a library that waits."""

    def end() -> None:
        message = (
            f"the first all-reduce over {world.size} ranks on {world.device.type} has not ended after {seconds:g} s; "
            "look at the network between the nodes (NCCL_DEBUG=INFO says what NCCL tried, NCCL_SOCKET_IFNAME chooses "
            "the interface)"
        )
        logger.error("rank %d on %s: %s", world.rank, socket.gethostname(), message)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _meet(world: World, seconds: float) -> dist.Store:
    """The store that all ranks share, once all have come to it and can work together.

    Meanwhile a signal ends the process as it would any other: there is nothing to save, and a launcher that lost a
    rank would wait for this one.
    """
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)} if _in_main_thread() else {}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        return _meet_there(*master(), world, seconds)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Refusal(NamedTuple):
    """Why ranks that have met go apart again: some did not come, or they can't work together; empty if neither."""

    absent: str
    conflict: str


def _meet_there(host: str, port: int, world: World, seconds: float) -> dist.Store:
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has opened it already
    limit = datetime.timedelta(seconds=seconds)
    try:
        tcp = dist.TCPStore(host, port, None, world.rank == 0 and not served, limit, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError, ValueError) as error:
        if world.rank == 0 and "EADDRINUSE" in str(error):
            raise RunError(f"port {port} of {host} is taken; {another_port()}") from None
        raise RunError(
            f"rank {world.rank} on {socket.gethostname()} can't reach rank 0 at {host}:{port} within {seconds:g} s; is "
            "rank 0 alive, is the name right, and does no firewall stand between the nodes?"
        ) from None
    store = dist.PrefixStore(f"ldt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    store.set(f"here-{world.rank}", json.dumps(occupant(world.device)))
    if world.rank == 0:
        missing = _missing(store, "here", range(world.size), seconds)
        absent = _absent(missing, seconds, world)
        refusal = Refusal("", conflict(_occupants(store, world.size))) if not absent else Refusal(absent, "")
        store.set("refusal", json.dumps(refusal))
        _missing(store, "read", [r for r in range(1, world.size) if r not in missing], GOODBYE_TIMEOUT_S)
    try:
        store.wait(["refusal"], limit + datetime.timedelta(seconds=GOODBYE_TIMEOUT_S))
        refusal = Refusal(*json.loads(store.get("refusal")))
        store.set(f"read-{world.rank}", "")
    except (dist.DistStoreError, RuntimeError):
        refusal = Refusal(_absent(["rank 0, which came but went away"], seconds, world), "")
    if refusal.absent:  # their nodes may be back when the job is started again
        raise RunError(refusal.absent)
    if refusal.conflict:
        raise InputError(refusal.conflict)
    store.set_timeout(TIMEOUT)
    return store


def _absent(missing: Sequence[int | str], seconds: float, world: World) -> str:
    if not missing:
        return ""
    names = ", ".join(map(str, missing))
    return f"after {seconds:g} s these of {world.size} ranks had not come: {names}; look at what their nodes wrote"


def _occupants(store: dist.Store, size: int) -> list[Occupant]:
    return [Occupant(*json.loads(store.get(f"here-{rank}"))) for rank in range(size)]


def _missing(store: dist.Store, key: str, ranks: Sequence[int], seconds: float) -> list[int]:
    """The ranks that have not set `<key>-<rank>` in time."""
    try:
        store.wait([f"{key}-{rank}" for rank in ranks], datetime.timedelta(seconds=seconds))
    except (dist.DistStoreError, RuntimeError):
        return [rank for rank in ranks if not store.check([f"{key}-{rank}"])]
    return []


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


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


def on_rank_zero(world: World, action: Callable[[], T]) -> T:
    """Rank 0 acts; every rank gets the result or raises the same error in a sentence (collective)."""
    result, error = None, None
    if world.rank == 0:
        try:
            with in_a_sentence():
                result = action()
        except (InputError, RunError) as caught:
            error = caught
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def together(action: Callable[[], T]) -> T:
    """Every rank acts and waits for all others; then all raise the first rank's error, if any (collective)."""
    result, error = None, None
    try:
        with in_a_sentence():
            result = action()
    except (InputError, RunError) as caught:
        error = caught
    errors = [e for e in all_gather(error) if e is not None]
    if errors:
        raise errors[0]
    return result  # type: ignore[return-value]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place; returns the tensor."""
    if not _alone():
        dist.all_reduce(tensor)
    return tensor


def all_gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Every rank's tensor, flat and equally long everywhere: [ranks, numbers]."""
    if _alone():
        return tensor.view(1, -1)
    out = tensor.new_empty(dist.get_world_size() * tensor.numel())
    dist.all_gather_into_tensor(out, tensor.view(-1))
    return out.view(-1, tensor.numel())


def exchange(
    pieces: Sequence[Sequence[torch.Tensor]], sizes: Sequence[Sequence[int]], like: torch.Tensor
) -> list[list[torch.Tensor]]:
    """What every rank has for this one: 1-D `pieces[r]` go to rank r, as many as come from it have `sizes[r]` numbers.

    What a rank has for itself is not copied. like: a tensor of their type and device.
    """
    if _alone():
        return [list(pieces[0])]
    rank = dist.get_rank()
    going = [[] if r == rank else list(of_rank) for r, of_rank in enumerate(pieces)]
    coming = [[] if r == rank else list(of_rank) for r, of_rank in enumerate(sizes)]
    sent = torch.cat([like.new_empty(0), *(piece for of_rank in going for piece in of_rank)])
    received = like.new_empty(sum(map(sum, coming)))
    counts = [sum(map(len, of_rank)) for of_rank in going]
    dist.all_to_all_single(received, sent, list(map(sum, coming)), counts)
    parts = iter(received.split([size for of_rank in coming for size in of_rank]))
    return [list(pieces[r]) if r == rank else [next(parts) for _ in of_rank] for r, of_rank in enumerate(coming)]


def in_block_order(blocks: int, produce: Callable[[int], T], world: World) -> Iterator[T]:
    """`produce(k)` for every block k, in order, on every rank; rank r makes blocks r, r + size, r + 2·size, …

    What is produced and its order are the same for any number of processes.
    """
    for first in range(0, blocks, world.size):
        k = first + world.rank
        mine = [produce(k)] if k < blocks else []
        yield from (result for results in all_gather(mine) for result in results)


def free_port() -> int:
    """A TCP port that nobody listens on right now, and that the system gives to nobody in the seconds until it is used.

    Those it gives away by itself, to gloo's connections among others, are above 32,767.
    """
    while True:
        port = random.SystemRandom().randrange(*FREE_PORTS)  # programs and tests seed the usual generator
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return port
