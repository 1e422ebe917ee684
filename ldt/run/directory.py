"""The run directory: what a run is (config, environment), how it ended, and whether a restart is still the same run.

config.yaml        resolved config of the newest attempt
environment.jsonl  one line an attempt: command, versions, git state, world
source.diff        what the source tree of the newest attempt had beyond its commit
metrics.jsonl      written by training
outcome.json       whether the newest attempt runs or how it ended: the word behind its exit code
owner.json         who writes here now
checkpoints/  samples/  evaluations/  evaluations.jsonl  report.html
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldt import __version__
from ldt.config import flatten
from ldt.errors import InputError
from ldt.files import parse_json, write_atomic
from ldt.log import read_jsonl
from ldt.progress import counted

PLACEMENT = (
    "run_dir",
    "data.path",
    "data.cache_",
    "data.threads",
    "model.attention",
    "model.activation_checkpointing",
    "train.micro_batch",
    "train.total_samples",
    "train.init_from",
    "train.time_limit_minutes",
    "train.accept_changes",
    "engine.",
    "ema.snapshot_every_samples",
    "checkpoint.",
    "log.",
    "evaluate.",
)
"""Keys that may change at every restart; all others define the run."""

_SOURCE_PATH = re.compile(r"data\.sources\..*\.path")  # as data.path

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75
RUNNING = "running"
SECRET = re.compile("key|token|secret|password|credential", re.I)
LITERAL = re.compile(rf"((?:{SECRET.pattern})\w*[\"']?\s*[=:]\s*[\"']?)(?=[\w./+-]*\d)[\w./+-]{{20,}}", re.I)
WORDS = {DONE: "done", FAILED: "failed", WRONG_INPUT: "wrong_input", STOPPED: "stopped"}
"""Exit codes of `ldt train` and the words for them in outcome.json."""


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The flattened keys of a config that define its run."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(PLACEMENT) and not _SOURCE_PATH.fullmatch(k)}


def check_identity(saved: dict[str, Any], config: dict[str, Any], where: Path, accepted: Collection[str] = ()) -> None:
    """`InputError` with the list of differences if `config` would continue another run than the saved one.

    Keys that are `accepted` may differ.
    """
    old, new = identity(json.loads(json.dumps(saved))), identity(json.loads(json.dumps(config)))
    changed = [k for k in sorted(old | new) if old.get(k) != new.get(k) and k not in accepted]
    if changed:
        differences = "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} here" for k in changed)
        raise InputError(
            f"{where} belongs to a run with another config ({differences}); restore these keys to resume it, choose "
            f"another run_dir, or go on with the changes by train.accept_changes=[{','.join(changed)}]"
        )


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def prepare(run_dir: Path, config_yaml: str, world_size: int) -> int:
    """Make the directory and record what this attempt is; returns its number, from 0."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / "config.yaml", config_yaml.encode())  # `ldt evaluate` may be reading it
        attempts = [*read_jsonl(run_dir / "environment.jsonl"), environment(world_size)]
        lines = "".join(json.dumps(a, separators=(",", ":")) + "\n" for a in attempts)
        write_atomic(run_dir / "environment.jsonl", lines.encode())  # a torn last line must not swallow the next one
        (run_dir / "source.diff").write_text(without_secrets(_git("diff", "HEAD") or ""))
    except OSError as error:
        raise InputError(f"run_dir={run_dir} can't be written ({error.strerror}); choose another run_dir") from None
    return len(attempts) - 1


def begin(run_dir: Path) -> None:
    """Say that this start of the job is at work; whatever an earlier one said is over."""
    write_json(run_dir / "outcome.json", {"outcome": RUNNING, **this_start(), "time": time.time()})


def write_outcome(run_dir: Path, code: int, samples_seen: int | None = None, message: str = "") -> None:
    """Say in a file what the exit code says: launchers lose codes. The first word on a start is the last.

    Any rank may speak; a rank that fails because another one is gone doesn't talk over that one's reason.
    """
    if read_outcome(run_dir).get("outcome") == RUNNING:
        outcome = {"outcome": WORDS[code], "code": code, "samples_seen": samples_seen, "message": message}
        write_json(run_dir / "outcome.json", outcome | this_start() | {"time": time.time()})


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """What outcome.json says; empty where there is none yet."""
    try:
        outcome = parse_json((run_dir / "outcome.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return outcome if isinstance(outcome, dict) else {}


def what_is_there(run_dir: Path) -> str:
    """What a training has written, in words."""
    parts = ["metrics.jsonl"]
    if checkpoints := [p for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit() and p.is_dir()]:
        size = sum(p.stat().st_size for p in max(checkpoints).iterdir()) / 1e6
        parts.append(f"{counted(len(checkpoints), 'checkpoint', 'checkpoints')} of {size:,.1f} MB")
    if grids := len(list((run_dir / "samples").glob("*.png"))):
        parts.append(f"{counted(grids, 'sample grid', 'sample grids')}")
    return ", ".join(parts)


def this_start() -> dict[str, str]:
    """Which start of which scheduler job this is; empty outside of one."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"job": job, "restart": os.environ.get("SLURM_RESTART_COUNT", "0") if job else ""}


def verdict(run_dir: Path, launcher_code: int) -> int:
    """The exit code that this start of the job has earned, from its outcome rather than from its launcher.

    A start that still says "running" after its launcher has ended was a crash.
    """
    outcome = read_outcome(run_dir)
    if {k: outcome.get(k) for k in ("job", "restart")} != this_start():
        return WRONG_INPUT if launcher_code == WRONG_INPUT else FAILED
    code = outcome.get("code")
    return code if code in (DONE, FAILED, WRONG_INPUT, STOPPED) else FAILED


def environment(world_size: int) -> dict[str, Any]:
    """What this attempt runs with: command line, versions, host, scheduler job and git state."""
    return {
        "time": time.time(),
        "command": [without_secrets(word) for word in sys.argv],
        "world_size": world_size,
        "host": platform.node(),
        "python": platform.python_version(),
        "ldt": __version__,
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "git": _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),  # the commit, not a tag
    }


def without_secrets(text: str) -> str:
    """A text without the values of secrets in the environment, and without long literals that are named like one."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "<removed>")
    return LITERAL.sub(r"\1<removed>", text)


def _git(*words: str) -> str | None:
    """What git says of the source tree; None for an installed package, also in somebody's repository."""
    here, said = Path(__file__), ""
    for command in (["ls-files", "--error-unmatch", here.name], words):
        try:  # a diff may show text that is no UTF-8
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, errors="replace", timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        said = done.stdout.strip()
    return said or None
