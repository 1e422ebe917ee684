"""Submitting runs through submitit: to SLURM, or as processes of this machine.

A submission is a config like any other; its keys say where and how, everything else on the command line goes to the
training. A value list such as `optimizer.lr=1e-4,2e-4` is a sweep: one run a value, as a job array, each in a run_dir
of its own.
"""

import contextlib
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import submitit

from ldt import config as configuration
from ldt.cli import main
from ldt.cluster.job import requeue, this_job
from ldt.config_fields import choice, path_field
from ldt.errors import InputError, file_error
from ldt.files import naming
from ldt.log import get_logger
from ldt.run.outcome import DONE, STOPPED
from ldt.training.config import TrainJob

logger = get_logger(__name__)

STOP_SIGNAL = "USR1"


@dataclass
class SubmitJob:
    """`cluster`: slurm, local, or a site's name or file under configs/cluster.

    `tasks`: processes a node, one a GPU. `gpus`: a node; empty for as many as tasks, 0 for a machine without.
    `evaluation`: after (one job when training is done), watch (one that follows it) or none. `slurm`: further flags of
    sbatch by their long names, such as {partition: a100, account: x, qos: high}.
    """

    cluster: str = "slurm"
    name: str = "ldt"
    nodes: int = 1
    tasks: int = 1
    gpus: str = ""
    cpus_per_task: int = 1
    minutes: int = 24 * 60
    stop_seconds: int = 120
    max_restarts: int = 100
    evaluation: str = choice("none", "after", "watch")
    evaluation_tasks: int = 1
    logs: str = path_field("runs/logs")
    slurm: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    def __post_init__(self) -> None:
        for key in ("nodes", "tasks", "cpus_per_task", "minutes", "evaluation_tasks"):
            if getattr(self, key) < 1:
                raise InputError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("stop_seconds", "max_restarts"):
            if getattr(self, key) < 0:
                raise InputError(f"{key}={getattr(self, key)} must not be negative")
        if self.gpus and not self.gpus.isdecimal():
            raise InputError(
                f"gpus={self.gpus} must be a number of GPUs a node, 0 for none; their kind goes into slurm="
            )
        if self.cluster == "local" and self.nodes > 1:
            raise InputError(f"cluster=local is this machine: nodes={self.nodes} must be 1; use tasks=")
        if self.cluster == "local" and self.evaluation == "after":
            raise InputError(
                "evaluation=after needs a scheduler that starts one job after another, which cluster=local is not; "
                "give evaluation=watch, or run ldt evaluate when the training is done"
            )


OWN_KEYS = tuple(f.name for f in fields(SubmitJob))


@dataclass(frozen=True)
class Train:
    """One task of a training job: what submitit pickles, starts on every rank, and starts again after a requeue."""

    arguments: tuple[str, ...]
    max_restarts: int

    def __call__(self) -> int:
        """The program's exit code; raises on failure, so that the job is one that failed."""
        code = main(["train", *self.arguments])
        if code == STOPPED and (job := this_job()).id:
            requeue(job, self.max_restarts)
        if code not in (DONE, STOPPED):
            raise SystemExit(code)
        return code


@dataclass(frozen=True)
class Evaluate:
    """One task of an evaluation job."""

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        if code := main(["evaluate", *self.arguments]):
            raise SystemExit(code)
        return 0


def submit(arguments: Sequence[str]) -> list[str]:
    """Submit what the command line asks for; returns lines about each job."""
    config, runs = plan(arguments)
    if config.dry_run:
        gpus = config.gpus or str(config.tasks)
        asked = f"{config.cluster}, nodes={config.nodes} tasks={config.tasks} gpus={gpus} minutes={config.minutes}"
        flags = "".join(f" --{k}={v}" for k, v in config.slurm.items())
        lines = [f"would submit: ldt train {shlex.join(run)}" for run in runs]
        lines += [f"to {asked}{flags}"]
        return lines + ([f"with an evaluation of each ({config.evaluation})"] if config.evaluation != "none" else [])
    if config.cluster != "local" and shutil.which("sbatch") is None:
        raise InputError("there is no sbatch on this machine; submit from a login node, or use cluster=local")
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = STOP_SIGNAL
    executor = _executor(config, config.tasks, config.nodes, config.name)
    jobs = _submit(executor, [Train(tuple(run), config.max_restarts) for run in runs])
    lines = []
    for run, job in zip(runs, jobs, strict=True):
        run_dir = run_dir_of(run)
        lines.append(
            f"job {job.job_id}: {run_dir} (log {Path(config.logs) / job.job_id}_0_log.out; ldt status {run_dir})"
        )
        if config.evaluation != "none":
            lines.append(_chain(config, run_dir, job.job_id))
    return lines


def _chain(config: SubmitJob, run_dir: str, job_id: str) -> str:
    """Submit the evaluation of a run as a job of its own."""
    executor = _executor(config, config.evaluation_tasks, 1, f"{config.name}-evaluate")
    if config.evaluation == "after":
        more = {"dependency": f"afterok:{job_id}", **config.slurm}
        executor.update_parameters(slurm_additional_parameters=more)
    else:
        with contextlib.suppress(OSError):  # which the training will explain
            Path(run_dir).mkdir(parents=True, exist_ok=True)  # the evaluation may start before the training
    watch = ["--watch", f"watch_job={job_id}"] if config.evaluation == "watch" else []
    job = _submit(executor, [Evaluate((run_dir, *watch))])[0]
    return f"job {job.job_id}: evaluation of {run_dir} ({run_dir}/evaluations.jsonl)"


def plan(arguments: Sequence[str]) -> tuple[SubmitJob, list[list[str]]]:
    """The submission, and for each run of the sweep the arguments of `ldt train`; every config is checked."""
    own = [a for a in arguments if (key := a.partition("=")[0]) in OWN_KEYS or key.startswith("slurm.")]
    others = [a for a in arguments if a not in own]
    flags = [a for a in others if a.startswith("-")]
    if unknown := [f for f in flags if f != "--dry-run"]:
        raise InputError(f"unknown flag {unknown[0]}; settings are given as key=value, the flag is --dry-run")
    own += ["dry_run=true"] if flags else []
    site = next((a.partition("=")[2] for a in reversed(own) if a.startswith("cluster=")), "slurm")
    config = configuration.load(SubmitJob, _site_file(site), own)
    words = [a for a in others if a not in flags]
    runs = [_with_own_directory(run, words) for run in configuration.sweep(words)]
    for run in runs:
        _load(run)
    return config, runs


def _site_file(site: str) -> Path | None:
    """A site's YAML file, by path or name; None for the two that need none."""
    if site in ("slurm", "local"):
        return None
    for path in (Path(site), Path("configs/cluster") / f"{site}.yaml"):
        if path.is_file():
            return path
    there = ", ".join(sorted(p.stem for p in Path("configs/cluster").glob("*.yaml")))
    raise InputError(f"cluster={site} is neither slurm, local, a file, nor one of configs/cluster: {there}")


def _with_own_directory(run: list[str], words: Sequence[str]) -> list[str]:
    """In a sweep, add the swept values to the run_dir."""
    swept = [w for w in run if w not in words]
    if not swept:
        return run
    return [*run, f"run_dir={run_dir_of(run)}/{','.join(swept)}"]


def _load(run: Sequence[str]) -> TrainJob:
    files = [w for w in run if "=" not in w]
    if len(files) > 1:
        raise InputError(f"one config at a time, not {' and '.join(files)}")
    return configuration.load(TrainJob, files[0] if files else None, [w for w in run if "=" in w])


def run_dir_of(run: Sequence[str]) -> str:
    """The run directory that these arguments of `ldt train` mean."""
    return _load(run).run_dir


def _executor(config: SubmitJob, tasks: int, nodes: int, name: str) -> submitit.AutoExecutor:
    cluster = "local" if config.cluster == "local" else "slurm"
    try:
        executor = submitit.AutoExecutor(folder=config.logs, cluster=cluster)
    except OSError as error:
        raise file_error(f"logs={config.logs}", error, "give another directory") from None
    parameters: dict[str, Any] = {"name": name, "timeout_min": config.minutes, "tasks_per_node": tasks, "nodes": nodes}
    parameters["cpus_per_task"] = config.cpus_per_task
    gpus = int(config.gpus or tasks)
    if config.cluster != "local":
        if gpus:
            parameters["gpus_per_node"] = gpus
        parameters["slurm_signal_delay_s"] = config.stop_seconds
        parameters["slurm_additional_parameters"] = {"requeue": True, "open-mode": "append", **config.slurm}
    executor.update_parameters(**parameters)
    return executor


def _submit(executor: submitit.AutoExecutor, tasks: Sequence[Any]) -> list[Any]:
    """Submit the tasks, as a job array if there are several; SLURM's own words if it refuses."""
    try:
        with naming(executor.folder):
            if len(tasks) == 1:
                return [executor.submit(tasks[0])]
            with executor.batch():
                return [executor.submit(task) for task in tasks]
    except OSError as error:
        raise file_error(f"logs={executor.folder}", error, "give another directory") from None
    except submitit.core.utils.FailedJobError as error:
        raise InputError(f"SLURM refused the job: {' '.join(str(error).split())}") from None
