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
from contextlib import ExitStack
from pathlib import Path

from ldt import rng
from ldt.errors import by_reason
from ldt.files import replacing
from ldt.log import read_jsonl
from ldt.progress import pluralize
from ldt.run.provenance import environment, git, without_secrets

OWNER = "owner.json"
SAMPLES = "samples"  # previews: one PNG each
NEWEST_CELLS = "samples/newest.npz"  # the images of the newest preview


def prepare(run_dir: Path, config_yaml: str, world_size: int, rng_version: int = rng.VERSION) -> int:
    """Make the directory and record what this attempt is, all of it or nothing; returns its number, from 0."""
    attempts = [*read_jsonl(run_dir / "environment.jsonl"), environment(world_size) | {"rng_version": rng_version}]
    content = {
        "config.yaml": config_yaml,
        # written anew: a torn last line must not swallow the next one
        "environment.jsonl": "".join(json.dumps(a, separators=(",", ":")) + "\n" for a in attempts),
        "source.diff": without_secrets(git("diff", "HEAD") or ""),
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            for name, text in content.items():
                files.enter_context(replacing(run_dir / name)).write_text(text, "utf-8")
    except OSError as error:
        raise by_reason(
            f"run_dir={run_dir} can't be written ({error.strerror}); choose another run_dir", error
        ) from None
    return len(attempts) - 1


def what_is_there(run_dir: Path) -> str:
    """A summary for people of what a training run has written."""
    parts = ["metrics.jsonl"]
    if checkpoints := [p for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit() and p.is_dir()]:
        size = sum(p.stat().st_size for p in max(checkpoints).iterdir()) / 1e6
        parts.append(f"{pluralize(len(checkpoints), 'checkpoint', 'checkpoints')} of {size:,.1f} MB")
    if grids := len(list((run_dir / "samples").glob("*.png"))):
        parts.append(f"{pluralize(grids, 'sample grid', 'sample grids')}")
    return ", ".join(parts)
