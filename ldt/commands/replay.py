"""Send a run's metrics.jsonl and evaluations.jsonl to Weights & Biases or TensorBoard afterwards.

Always as a run of its own, named `<run> replay`, so that a training run in progress is left alone. What a mirror
missed (it was off, offline, or on another machine) is in the files.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ldt import log, tracking
from ldt.config import to_dict
from ldt.config_fields import choice, required_path_field
from ldt.errors import InputError, by_reason
from ldt.files import naming, natural


@dataclass
class ReplayJob:
    """`run`: a run directory; `to`: wandb (offline without a key), or tensorboard (into RUN/tensorboard-replay)."""

    run: str = required_path_field()
    to: str = choice("wandb", "tensorboard")


def run(config: ReplayJob) -> int:
    """Send the log to the tracker, and print where it went."""
    run_dir = Path(config.run)
    lines = [r for name in ("metrics.jsonl", "evaluations.jsonl") for r in log.read_jsonl(run_dir / name)]
    lines = sorted((r for r in lines if natural(r.get("samples_seen"))), key=lambda r: r["samples_seen"])
    if not lines:
        raise InputError(f"{run_dir} has no lines in metrics.jsonl to replay; give the run_dir of a training run")
    where = run_dir / ("wandb" if config.to == "wandb" else "tensorboard-replay")
    with naming(where):
        tracker, failed = _start(config, run_dir, where), True
        try:
            for line in lines:
                tracker.log(line)
            failed = False
        finally:
            tracker.close(failed)
    print(f"{len(lines)} lines replayed to {config.to}: {where}")
    return 0


def _start(config: ReplayJob, run_dir: Path, where: Path) -> tracking.Tracker:
    try:
        if config.to == "wandb":
            return tracking.Wandb(run_dir, to_dict(config), "replay")
        shutil.rmtree(where, ignore_errors=True)
        return tracking.TensorBoard(where)
    except InputError:
        raise
    except Exception as error:
        said = tracking.said_by(error)
        raise by_reason(
            f"{config.to} can't start in {where} ({said}); correct that and run ldt replay again", error
        ) from None
