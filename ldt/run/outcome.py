"""How a start of a run ended: the word behind its exit code, in outcome.json because launchers lose exit codes."""

import time
from pathlib import Path
from typing import Any

from ldt.cluster.job import this_job
from ldt.files import parse_json, write_atomic, write_json

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75
RUNNING = "running"
WORDS = {DONE: "done", FAILED: "failed", WRONG_INPUT: "wrong_input", STOPPED: "stopped"}
"""Exit codes of `ldt train` and the words for them in outcome.json."""


def begin(run_dir: Path) -> bytes | None:
    """Record that this start of the job is running; returns the previous content, for `take_back`."""
    file = run_dir / "outcome.json"
    before = file.read_bytes() if file.exists() else None
    write_json(file, {"outcome": RUNNING, **this_start(), "time": time.time()})
    return before


def take_back(run_dir: Path, before: bytes | None) -> None:
    """Undo `begin`: this start was refused, so the outcome of the start before it still holds."""
    if before is None:
        (run_dir / "outcome.json").unlink(missing_ok=True)
    else:
        write_atomic(run_dir / "outcome.json", before)


def write_outcome(run_dir: Path, code: int, samples_seen: int | None = None, message: str = "") -> None:
    """Record the outcome of this start, because launchers lose exit codes. The first outcome that is written stays.

    Any rank may write it, and a rank that fails only because another one is gone does not overwrite that one's reason.
    """
    if read_outcome(run_dir).get("outcome") == RUNNING:
        outcome = {"outcome": WORDS[code], "code": code, "samples_seen": samples_seen, "message": message}
        write_json(run_dir / "outcome.json", outcome | this_start() | {"time": time.time()})


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """The content of outcome.json; empty if the file is missing or unreadable."""
    try:
        outcome = parse_json((run_dir / "outcome.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return outcome if isinstance(outcome, dict) else {}


def this_start() -> dict[str, str]:
    """Which start of which scheduler job this is; empty outside of one."""
    job = this_job()
    return {"job": job.id, "restart": job.restart}


def verdict(run_dir: Path, launcher_code: int) -> int:
    """The exit code that this start of the job has earned, from its outcome rather than from its launcher.

    A start that still says "running" after its launcher has ended was a crash.
    """
    outcome = read_outcome(run_dir)
    if {k: outcome.get(k) for k in ("job", "restart")} != this_start():
        return WRONG_INPUT if launcher_code == WRONG_INPUT else FAILED
    code = outcome.get("code")
    return code if code in (DONE, FAILED, WRONG_INPUT, STOPPED) else FAILED
