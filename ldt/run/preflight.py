"""Before the first step: do all ranks run the same thing on working machines? The odd one out is named in seconds.

Compared: versions, resolved config, kind of device and number of GPUs, clock, room on the disk, sight of the run
directory, and a small all-reduce. Without this a mismatch shows up as a hang or, worse, as a result.
"""

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
import uuid
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ldt import __version__, log
from ldt.dist import World, all_gather, all_reduce_sum, broadcast, on_rank_zero, together
from ldt.errors import NO_ROOM, InputError, RunError, by_reason
from ldt.progress import si_format

logger = log.get_logger(__name__)

CLOCK_SECONDS = 60.0
VISIBLE_SECONDS = 90.0  # attribute caches of network file systems
WRITTEN_INTO = ("checkpoints", "ema", "samples", "stalls")
APPENDED_TO = ("metrics.jsonl", "metrics.cut.jsonl")


def compare_ranks(config_yaml: str, world: World) -> None:
    """`InputError` on all ranks if one of them runs other software or another config than most (collective).

    `RunError` if they agree but their all-reduce gives a wrong sum.
    """
    facts = all_gather(about_this_rank(config_yaml, world))
    problems = differences(facts)
    if problems:
        raise InputError("; ".join(problems))
    ones = torch.ones(1, device=world.device)
    if (total := int(all_reduce_sum(ones))) != world.size:
        raise RunError(  # on other nodes it may be right
            f"an all-reduce of ones over {world.size} ranks gave {total}: the network or a device is faulty"
        )


def about_this_rank(config_yaml: str, world: World) -> dict[str, Any]:
    """What has to be the same on all ranks, and the clock; `host` is for the message."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return {
        "host": socket.gethostname(),
        "ldt": __version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "device": device,
        "config": hashlib.sha256(config_yaml.encode()).hexdigest()[:12],
        "clock": time.time(),
    }


def differences(facts: list[dict[str, Any]]) -> list[str]:
    """One clause for each fact in which ranks differ from the most common value."""
    out = []
    for key in facts[0]:
        if key in ("host", "clock"):
            continue
        common, _ = Counter(f[key] for f in facts).most_common(1)[0]
        odd = [(rank, f) for rank, f in enumerate(facts) if f[key] != common]
        if odd:
            rank, f = odd[0]
            more = f" and {len(odd) - 1} more ranks" if len(odd) > 1 else ""
            out.append(f"rank {rank} on {f['host']}{more} has {key} {f[key]}, the others {common}; make them the same")
    clocks = sorted(f["clock"] for f in facts)
    middle = clocks[len(clocks) // 2]
    rank = max(range(len(facts)), key=lambda r: abs(facts[r]["clock"] - middle))
    off = facts[rank]["clock"] - middle
    if abs(off) > CLOCK_SECONDS:
        out.append(f"the clock of rank {rank} on {facts[rank]['host']} is {off:+.0f} s off; synchronise it")
    return out


def check_shared(run_dir: Path, world: World, seconds: float = VISIBLE_SECONDS) -> None:
    """`InputError` if a rank doesn't see what rank 0 writes into the run directory (collective)."""
    token = broadcast(uuid.uuid4().hex)
    file = run_dir / f".seen-{token}"
    on_rank_zero(world, file.touch)
    end = time.monotonic() + seconds
    while not (seen := file.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [host for host, sees in all_gather((socket.gethostname(), seen)) if not sees]
    if world.rank == 0:
        file.unlink()
    if blind:
        raise InputError(
            f"run_dir={run_dir} is not shared: {', '.join(sorted(set(blind)))} did not see a file that rank 0 wrote "
            f"there within {seconds:g} s; put it on a file system that all nodes share"
        )


def check_writable(run_dir: Path, world: World) -> None:
    """`InputError` if a rank may not write where the run will; else it might learn so only at the end (collective)."""
    together(lambda: _try_to_write(run_dir))


def _try_to_write(run_dir: Path) -> None:
    for path in (run_dir, *(run_dir / name for name in (*WRITTEN_INTO, *APPENDED_TO))):
        try:
            if path.name in APPENDED_TO and path.exists():
                path.open("ab").close()
            elif path.name not in APPENDED_TO and os.path.lexists(path):
                tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            if error.errno not in NO_ROOM:  # which passes, and is said elsewhere
                reason = f"{path} can't be written ({error.strerror})"
                raise by_reason(f"{reason}; correct that or choose another run_dir", error) from None


def check_room(run_dir: Path, parameters: int, kinds: int, world: World) -> None:
    """`RunError` if the disk has no room for one more checkpoint of `kinds` float32 numbers a parameter.

    Collective.
    """
    needed, free = 4 * parameters * kinds, shutil.disk_usage(run_dir).free
    if broadcast(free) < needed:
        raise RunError(  # there may be room later
            f"run_dir={run_dir} has {si_format(free)}B free, but a checkpoint takes {si_format(needed)}B; make room"
        )
