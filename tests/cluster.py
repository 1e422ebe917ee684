"""A real SLURM cluster of four nodes on this machine, one a test session; the fixture cleans up after each test."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).parent / "slurm_cluster.sh"
NODES = 4
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
PATIENCE = 240.0


class Slurm:
    """Commands against the cluster, run from the repository's directory as a user would."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def sh(self, *command: Any, check: bool = True) -> str:
        """The command's output; its error text is in the exception."""
        done = subprocess.run([*map(str, command)], env=self.env, cwd=ROOT, text=True, timeout=60, capture_output=True)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def sbatch(self, *arguments: Any) -> str:
        """Submit; the job's id."""
        return self.sh("sbatch", "--parsable", *arguments).split(";")[0]

    def info(self, job: str) -> dict[str, str]:
        """What the controller knows of a job; unlike accounting it is up to date."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.sh("scontrol", "-o", "show", "job", job).splitlines()[0]))

    def until(self, condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
        """Poll until it is true."""
        end = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < end, f"no {what} within {seconds:g} s; queue:\n{self.sh('squeue', check=False)}"
            time.sleep(0.2)
        return result

    def wait(self, job: str) -> dict[str, str]:
        """The job's information once it has ended for good."""
        self.until(lambda: self.info(job)["JobState"] in ENDED, f"end of job {job}")
        return self.info(job)

    def wait_for_steps(self, run_dir: Path, steps: int) -> None:
        """Until the run's log has so many training lines."""
        metrics = run_dir / "metrics.jsonl"
        self.until(lambda: metrics.exists() and metrics.read_text().count('"digest"') >= steps, f"{steps} steps")

    def request_stop(self, job: str) -> None:
        """What SLURM does before the time limit."""
        self.sh("scancel", "--signal=USR1", "--batch", job)

    def kill_node(self, name: str) -> None:
        """Cut its power; SLURM is told, which it would find out by itself some 15 s later."""
        self.sh(SCRIPT, "kill-node", name)
        self.sh("scontrol", "update", f"nodename={name}", "state=down", "reason=test")


@contextlib.contextmanager
def free_ports() -> Iterator[int]:
    """The first of 100 TCP ports that nobody listens on, nor will: other suites of this machine leave them alone."""
    for first in range(16800 + os.getpid() % 50 * 200, 32000, 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            ours = stack.enter_context(Path(f"/tmp/ldt-slurm-port-{first}").open("w"))
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for port in (first, first + 11):
                with socket.socket() as s:
                    s.bind(("", port))
            kept = stack.pop_all()
            break
    else:
        raise AssertionError("no free ports for a cluster")
    with kept:
        yield first


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[Slurm]:
    """The cluster; its absence is a failure, never a skip."""
    number = os.getpid()
    directory = Path(f"/tmp/ldt-slurm-{number}")  # short: unix sockets
    with free_ports() as port:
        settings = {
            "SLURM_CLUSTER_DIR": str(directory),
            "SLURM_CLUSTER_PORT": str(port),
            "SLURM_CLUSTER_PREFIX": f"n{number}x",
        }
        env = os.environ | settings | {"OMP_NUM_THREADS": "1"}
        try:
            subprocess.run([SCRIPT, "start", str(NODES)], env=env, check=True, timeout=120)
            exported = subprocess.run(
                ["bash", "-c", f'eval "$({SCRIPT} env)" && env -0'], env=env, check=True, capture_output=True, text=True
            ).stdout
            yield Slurm(dict(pair.split("=", 1) for pair in exported.split("\0") if "=" in pair))
        finally:
            subprocess.run([SCRIPT, "stop"], env=env, check=False)
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def slurm(slurm_session: Slurm) -> Iterator[Slurm]:
    """The cluster with an empty queue and all nodes idle, again after the test."""
    yield slurm_session
    slurm_session.sh("scancel", "--user=root", check=False)
    for i in range(1, NODES + 1):
        name = f"{slurm_session.env['SLURM_CLUSTER_PREFIX']}{i}"
        slurm_session.sh(SCRIPT, "start-node", name)
        slurm_session.sh("scontrol", "update", f"nodename={name}", "state=resume", check=False)
    slurm_session.until(lambda: not slurm_session.sh("squeue", "-h"), "empty queue")
    slurm_session.until(lambda: set(slurm_session.sh("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "idle nodes")


def outcome(run_dir: Path) -> dict[str, Any]:
    """outcome.json of a run."""
    content: dict[str, Any] = json.loads((run_dir / "outcome.json").read_text())
    return content
