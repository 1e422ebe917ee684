"""The scheduler job that this process belongs to, and how it goes back into the queue."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ldt.log import get_logger

logger = get_logger(__name__)


ENDED_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class Job(NamedTuple):
    """SLURM's job id, how often that job was restarted, and its nodes; all empty outside of a job."""

    id: str = ""
    restart: str = ""
    nodes: str = ""


def this_job(env: Mapping[str, str] = os.environ) -> Job:
    """The job that this process runs in."""
    if "SLURM_JOB_ID" not in env:
        return Job()
    return Job(env["SLURM_JOB_ID"], env.get("SLURM_RESTART_COUNT", "0"), env.get("SLURM_JOB_NODELIST", ""))


def is_alive(job_id: str) -> bool | None:
    """Whether a job runs or waits in the queue; None where nobody can say.

    Inside of a SLURM job its number is SLURM's, elsewhere it is that of a process of this machine, as submitit's are.
    """
    if not this_job().id:
        return Path(f"/proc/{job_id}").exists()
    try:
        told = subprocess.run(["squeue", "-h", "-j", job_id, "-o", "%T"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if told.returncode:
        return False if "Invalid job id" in told.stderr else None
    return any(state not in ENDED_STATES for state in told.stdout.split())


def requeue(job: Job, max_restarts: int) -> None:
    """Put the job back into the queue, once for all its tasks, and wait for SLURM to end it.

    submitit's own checkpointing asks rank 0 alone, in a signal handler; here all ranks have saved together by now.
    """
    if int(job.restart) >= max_restarts:
        logger.warning("stopped on request, but not requeued: the job was already restarted %s times", job.restart)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ["SLURM_PROCID"] == "0":
        subprocess.run(["scontrol", "requeue", job.id], check=True)
    time.sleep(60)
