"""What a run is doing now, from its files alone: also from a login node, and while it runs.

Exit codes: 0 it runs or is done, 1 it failed or says nothing any more, 2 there is no run.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldt.checkpoint.checkpoint import checkpoints_of
from ldt.checkpoint.manifest import MANIFEST
from ldt.config_fields import required_path_field
from ldt.errors import InputError
from ldt.files import natural, real, schema_error
from ldt.log import read_jsonl
from ldt.progress import duration, pluralize
from ldt.run.directory import OWNER
from ldt.run.outcome import RUNNING, read_outcome

_ATTEMPT = {"time": real, "host": str, "world_size": natural}
_STEP = dict.fromkeys(("loss", "images_per_second", "data_wait_fraction", "time"), real) | {"samples_seen": natural}
QUIET_STEPS = 20  # a run that has logged nothing for so many of its usual intervals is called silent
OWNER_TIMEOUT_S = 180.0  # and so is one whose owner, which touches its file every few seconds, has not done so for this


@dataclass
class StatusJob:
    """`run`: a run directory; `json`: print the facts as JSON."""

    run: str = required_path_field()
    json: bool = False


def run(config: StatusJob) -> int:
    """Print the status; returns 1 if the run failed or has fallen silent."""
    facts = read_status(Path(config.run), time.time())
    if config.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            if value not in (None, ""):
                print(f"{name.replace('_', ' '):20} {value}")
    return int(facts["state"] in ("failed", "wrong_input", "silent"))


def read_status(run_dir: Path, now: float) -> dict[str, Any]:
    """What the run directory says, as facts by name; times in seconds before `now` are given in words."""
    if not (run_dir / "environment.jsonl").is_file():
        raise InputError(
            f"{run_dir} is not a run directory: it has no environment.jsonl; give the run_dir of a training run"
        )
    attempts, outcome = list(read_jsonl(run_dir / "environment.jsonl")), read_outcome(run_dir)
    steps = [r for r in read_jsonl(run_dir / "metrics.jsonl") if not schema_error(r, _STEP)]
    total = _total_samples(run_dir)
    facts: dict[str, Any] = {"state": outcome.get("outcome", "unknown"), "message": outcome.get("message", "")}
    if not attempts or (wrong := schema_error(attempts[-1], _ATTEMPT, "its last line")):
        wrong = wrong if attempts else "it is empty"
        raise InputError(f"{run_dir / 'environment.jsonl'} is damaged: {wrong}; start the training again to repair it")
    newest = attempts[-1]
    facts["job"] = " ".join(
        str(part)
        for part in (newest.get("job") and f"job {newest['job']}", f"on {newest.get('nodes') or newest['host']}")
        if part
    )
    processes = pluralize(newest["world_size"], "process", "processes")
    facts["starts"] = f"{len(attempts)}, the newest {_ago(now - newest['time'])} on {processes}"
    if steps:
        last = steps[-1]
        seen, rate = last["samples_seen"], last["images_per_second"]
        facts["samples_seen"] = f"{seen:,} of {total:,} ({seen / total:.0%})" if total else f"{seen:,}"
        facts["last_step"] = _ago(now - last["time"])
        facts["loss"] = f"{last['loss']:.4g}"
        facts["images_per_second"] = f"{rate:.4g}"
        facts["waiting_for_data"] = f"{last['data_wait_fraction']:.1%} of the time"
        if facts["state"] == RUNNING:
            interval = (last["time"] - steps[0]["time"]) / max(len(steps) - 1, 1)
            if now - max(last["time"], newest["time"]) > max(QUIET_STEPS * interval, 600):
                facts["state"] = "silent"
                facts["message"] = "it says it runs, but has logged nothing for long: look at its job and at stalls/"
            elif total and rate > 0:
                facts["to_go"] = duration((total - seen) / rate)
    if facts["state"] == RUNNING and now - max(_touched(run_dir / OWNER), newest["time"]) > OWNER_TIMEOUT_S:
        facts |= {
            "state": "silent",
            "message": "it says it runs, but by this machine's clock its process is gone: look at its job",
            "to_go": "",
        }
    whole = checkpoints_of(run_dir)
    if whole:
        age = now - (whole[-1] / MANIFEST).stat().st_mtime
        facts["last_checkpoint"] = f"{int(whole[-1].name):,} samples, {_ago(age)}; {len(whole)} there"
    return facts


def _total_samples(run_dir: Path) -> int:
    """`train.total_samples` of the newest attempt's config; 0 if it can't be read."""
    for line in (
        (run_dir / "config.yaml").read_text(errors="replace").splitlines() if (run_dir / "config.yaml").exists() else []
    ):
        key, _, value = line.strip().partition(": ")
        if key == "total_samples" and value.isdecimal():
            return int(value)
    return 0


def _touched(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"
