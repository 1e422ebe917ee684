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
    "train.init_",
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


def differences(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that define a run and differ between two configs: (saved value, present value)."""
    old, new = identity(json.loads(json.dumps(saved))), identity(json.loads(json.dumps(config)))
    return {k: (old.get(k), new.get(k)) for k in sorted(old | new) if old.get(k) != new.get(k)}


def check_identity(saved: dict[str, Any], config: dict[str, Any], where: Path, accepted: Collection[str] = ()) -> None:
    """`InputError` with the list of differences if `config` would continue another run than the saved one.

    Keys that are `accepted` may differ, unless nobody could carry the change out.
    """
    changed = differences(saved, config)
    for key, (old, new) in changed.items():
        if reason := _impossible(key, old, new, config):
            raise InputError(f"{where}: {key} can't change from {old} to {new} in the middle of a run, {reason}")
    unexpected = [key for key in changed if key not in accepted]
    if unexpected:
        shown = "; ".join(f"{k}: {changed[k][0]} there, {changed[k][1]} here" for k in unexpected)
        raise InputError(
            f"{where} belongs to a run with another config ({shown}); restore these keys to resume it, choose "
            f"another run_dir, or accept the changes with train.accept_changes=[{','.join(unexpected)}]"
        )


def _impossible(key: str, old: Any, new: Any, config: dict[str, Any]) -> str:
    """Why the change of a key cannot be made in the middle of a run; empty where it can."""
    untracked = "for an average can't begin there; restore the key (ldt export --ema-width makes others afterwards)"
    kind = config["ema"]["kind"]
    if key == "ema.kind" or (key == "ema.half_life" and kind == "half_life"):
        return untracked
    if key == "ema.widths" and kind == "power" and set(new) - set(old):
        return untracked
    if key == "optimizer.muon_lr" and bool(old) != bool(new):
        return "for the two optimizers keep different moments; start a new run from these weights by train.init_from"
    return ""
