"""Who am I among how many: what torchrun, deepspeed, srun and submitit say in environment variables.

They differ only in the variables they set; the rest of the code sees a `Place`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ldt.errors import InputError

FIRST_PORT, PORTS = 20000, 12000  # below the ports of outgoing connections
DEEPSPEED_PORT = 29500  # unless it is told another one


class Place(NamedTuple):
    """Which of the job's processes this one is, according to its launcher."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place(env: Mapping[str, str] = os.environ) -> Place:
    """Read the launcher's variables: torchrun's and deepspeed's RANK, an srun task's, submitit's local ones, or none.

    Where an srun task has RANK too, set by neither torchrun nor deepspeed, both must say the same.
    """
    slurm = _slurm_place(env)
    if "RANK" in env:
        rank, size = integer(env, "RANK"), integer(env, "WORLD_SIZE")
        local_rank = integer(env, "LOCAL_RANK", str(rank))
        found = Place(rank, size, local_rank, integer(env, "LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(size))))
        nested = "TORCHELASTIC_RUN_ID" in env or "LOCAL_SIZE" in env
        if slurm and slurm.size > 1 and not nested and slurm[:2] != found[:2]:
            raise InputError(
                f"RANK and WORLD_SIZE say rank {rank} of {size}, but SLURM says task {slurm.rank} of {slurm.size}; "
                "unset RANK and WORLD_SIZE in the job, or start one torchrun a node (srun --ntasks-per-node=1)"
            )
    elif slurm:
        found = slurm
    elif "SUBMITIT_LOCAL_GLOBALID" in env:
        size = integer(env, "SUBMITIT_LOCAL_NTASKS")
        found = Place(integer(env, "SUBMITIT_LOCAL_GLOBALID"), size, integer(env, "SUBMITIT_LOCAL_LOCALID"), size)
    else:
        found = Place(0, 1, 0, 1)
    if not 0 <= found.rank < found.size:
        raise InputError(
            f"the launcher set rank {found.rank} of world size {found.size}; a rank is from 0 to world size - 1"
        )
    return found


def processes_above(env: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """The launcher's processes among this one's ancestors; the list changes once one of them has ended.

    torchrun and submitit start ranks themselves. `deepspeed` starts a process that starts them, and is the first to go
    when somebody ends it; its child has no handler for that. SLURM looks after its tasks itself.
    """
    parent = os.getppid()
    if _is_deepspeed(env):
        try:
            status = Path(f"/proc/{parent}/stat").read_text()
        except OSError:  # it has ended just now
            return (parent,)
        return parent, int(status.rpartition(")")[2].split()[1])
    if "TORCHELASTIC_RUN_ID" in env or "SUBMITIT_LOCAL_GLOBALID" in env:
        return (parent,)
    return ()


def another_port(env: Mapping[str, str] = os.environ) -> str:
    """What gives the ranks another port to meet at, in words: every launcher has its own way."""
    if _is_deepspeed(env):
        return "start deepspeed with --master_port=PORT and a free one"
    if "TORCHELASTIC_RUN_ID" in env:
        return "start torchrun with --master_port=PORT and a free one"
    return "set MASTER_ADDR, and MASTER_PORT to a free one"


def _is_deepspeed(env: Mapping[str, str]) -> bool:
    return "CROSS_SIZE" in env and "LOCAL_SIZE" in env


def _slurm_place(env: Mapping[str, str]) -> Place | None:
    """What SLURM says about an srun task; None outside of one (the batch script itself is none)."""
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or env.get("SLURM_STEP_ID") == "4294967291":
        return None
    size = integer(env, "SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    nodes = _tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    node = integer(env, "SLURM_NODEID", "0")
    local_size = nodes[node] if node < len(nodes) else size
    return Place(integer(env, "SLURM_PROCID"), size, integer(env, "SLURM_LOCALID"), local_size)


def _tasks_of_nodes(text: str) -> list[int]:
    """SLURM's `2(x3),1` as [2, 2, 2, 1]."""
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise InputError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form 2(x3),1")
        out += [int(match[1])] * int(match[2] or 1)
    return out


def first_node(nodes: str) -> str:
    """The first name of a SLURM node list such as `gpu[07-09,12],login1`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise InputError(f"SLURM's node list {nodes!r} names no node")
    return match[1] + (match[2] or "") + (match[3] or "")


def integer(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None or not text.lstrip("-").isdigit():
        raise InputError(f"the launcher set {name}={text!r}, which is not a whole number")
    return int(text)


def master(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the ranks meet: MASTER_ADDR and MASTER_PORT, else made from SLURM's or submitit's job.

    `deepspeed` gives every job the same port unless it is told one; on a single node it is made from the launcher's
    process, so that two jobs on one machine don't collide.
    """
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        port = integer(env, "MASTER_PORT")
        if port == DEEPSPEED_PORT and _is_deepspeed(env) and env["CROSS_SIZE"] == "1":
            port = FIRST_PORT + os.getppid() % PORTS
        return env["MASTER_ADDR"], port
    if "SLURM_STEP_NODELIST" in env and "SLURM_JOB_ID" in env:
        number = 31 * integer(env, "SLURM_JOB_ID") + integer(env, "SLURM_STEP_ID", "0")
        return first_node(env["SLURM_STEP_NODELIST"]), FIRST_PORT + number % PORTS
    if "SUBMITIT_LOCAL_JOB_ID" in env:
        return "127.0.0.1", FIRST_PORT + integer(env, "SUBMITIT_LOCAL_JOB_ID") % PORTS
    raise InputError(
        "several processes but no MASTER_ADDR and MASTER_PORT; start them with torchrun, deepspeed, srun or "
        "tools/submit.py"
    )
