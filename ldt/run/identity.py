"""Which keys of a config define a run, and whether a restart still is the same run."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldt.config import flatten
from ldt.errors import InputError

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
