"""For job scripts: the exit code that this start of the job has earned, whatever its launcher returned.

`ldt verdict CONFIG [key=value ...] launcher_code=N` takes the arguments of `ldt train`. Launchers lose codes (srun,
pdsh and torchrun return what a killed rank had), so the run's outcome.json decides: 0 done, 75 stopped on request
(requeue), 2 wrong input, 1 failed. A start that its launcher has left behind as "running" is noted as a crash.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from ldt.run import outcome
from ldt.training.config import TrainJob


@dataclass
class VerdictJob(TrainJob):
    """The keys of a training run, and `launcher_code`: what the launcher returned."""

    launcher_code: int = 1


def run(config: VerdictJob) -> int:
    """Return the exit code that this start earned, and record a crash in outcome.json."""
    run_dir = Path(config.run_dir)
    code = outcome.verdict(run_dir, config.launcher_code)
    if code == outcome.FAILED and outcome.read_outcome(run_dir).get("outcome") == outcome.RUNNING:
        message = f"crashed: its launcher ended with code {config.launcher_code}{meaning(config.launcher_code)}"
        outcome.write_outcome(run_dir, code, message=message)
    return code


def meaning(launcher_code: int) -> str:
    """How a process ended, where its exit code is a shell's code for a signal; empty for other codes."""
    if launcher_code == 128 + signal.SIGABRT:
        return " (SIGABRT: so NCCL's watchdog ends the other ranks when one is gone or hangs; look for the one that is)"
    if launcher_code == 128 + signal.SIGKILL:
        return " (SIGKILL: a node without memory, or somebody's kill -9)"
    return ""
