"""Filling an engine from a checkpoint, whatever the ranks and the ZeRO stage that wrote it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldt import rng
from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.manifest import Damaged, listed, read_manifest, verify_file
from ldt.checkpoint.tensors import Reader
from ldt.dist import World, all_gather, broadcast
from ldt.engine.ema import ShardedEMA
from ldt.engine.partition import MOMENTS, Partition
from ldt.errors import InputError
from ldt.log import get_logger

logger = get_logger(__name__)


def newest_whole(root: Path, world: World) -> tuple[Path | None, list[Path]]:
    """The newest undamaged checkpoint, the same on all ranks, and the damaged newer ones; None if there is none at all.

    Nothing is changed: `set_aside` does that. If all are damaged this is an error, never a fresh start.
    """
    candidates: list[Path] = broadcast(listed(root))
    damaged: list[Path] = []
    for path in reversed(candidates):
        try:
            verify_together(path, world)
            return path, damaged
        except Damaged as error:
            logger.warning("checkpoint %s is damaged: %s", path.name, error)
            damaged.append(path)
    aside = broadcast(sorted(root.glob("*.damaged"))) if root.is_dir() or candidates else []
    if damaged or aside:
        raise InputError(
            f"no checkpoint under {root} is whole ({len(damaged) + len(aside)} damaged); restore one of them, "
            "or remove the directory to start again from nothing"
        )
    return None, []


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints to `<name>.damaged`, so that no later start looks at them; on one rank."""
    for path in damaged:
        logger.warning("the damaged checkpoint %s is set aside as %s.damaged", path.name, path.name)
        path.rename(path.with_name(f"{path.name}.damaged"))


def verify_together(path: Path, world: World) -> dict[str, Any]:
    """`verify`, whose reading the ranks share; all raise what any of them finds (collective)."""
    problem: Exception | None = None
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(path)
        for name, entry in list(manifest["files"].items())[world.rank :: world.size]:
            verify_file(path / name, entry)
    except (Damaged, InputError) as error:
        problem = error
    problems = [p for p in all_gather(problem) if p]
    if problems:
        raise problems[0]
    return manifest


def restore(checkpoint: Checkpoint, partition: Partition, ema: ShardedEMA) -> None:
    """Fill the engine and the averages from a checkpoint of the same model (collective)."""
    manifest = checkpoint.manifest
    _check_draws(checkpoint.path, manifest["rng_version"])
    _check_shapes(
        checkpoint.path, manifest["parameters"], partition, "use the config it was trained with, or another run_dir"
    )
    _check_kinds(checkpoint.path, manifest["tensors"], ["master", *MOMENTS])
    stored = {name: stored_average(checkpoint, profile) for name, profile in ema.describe().items()}
    reader = Reader(checkpoint.path, manifest)
    partition.init_optimizer_state(manifest["optimizer_steps"])
    for f in partition.load_targets():
        f.master.copy_(reader.read("master", f.name, f.start, f.count))
        for kind, value in partition.moments(f).items():
            value.copy_(reader.read(kind, f.name, f.start, f.count))
    for name, tensors in ema.tensors.items():
        for f, average in zip(partition.owned, tensors, strict=True):
            average.copy_(reader.read(stored[name], f.name, f.start, f.count))
    partition.sync_model_weights()


def stored_average(checkpoint: Checkpoint, profile: dict[str, Any]) -> str:
    """The kind of tensors that were averaged by this profile, as the manifest says; its name does not tell."""
    averages = checkpoint.manifest.get("averages", {})
    for kind, stored in averages.items():
        if stored == profile and kind in checkpoint.manifest["tensors"]:
            return str(kind)
    there = ", ".join(f"{kind} {stored}" for kind, stored in averages.items()) or "none"
    raise InputError(
        f"checkpoint {checkpoint.path} holds no average like {profile}, but {there}; use the ema keys it was trained "
        "with, or start a new run with train.init_from"
    )


def _check_draws(path: Path, saved: int) -> None:
    if saved not in rng.VERSIONS:
        drawn = " or ".join(map(str, rng.VERSIONS))
        raise InputError(
            f"checkpoint {path} was trained with random numbers of version {saved}, this ldt draws version "
            f"{drawn}: the run can't go on with the same noise; use the ldt that wrote it "
            "(environment.jsonl has its commit), or start a new run with train.init_from"
        )


def _check_shapes(path: Path, saved: dict[str, list[int]], partition: Partition, advice: str) -> None:
    ours: dict[str, Any] = {k: list(v) for k, v in partition.shapes().items()}
    for name in [*ours, *saved]:
        if saved.get(name) != ours.get(name):
            raise InputError(
                f"checkpoint {path} holds another model: parameter {name} has shape {saved.get(name, 'none')} there "
                f"and {ours.get(name, 'none')} here; {advice}"
            )


def _check_kinds(path: Path, saved: list[str], ours: list[str]) -> None:
    missing = [kind for kind in ours if kind not in saved]
    if missing:
        raise InputError(
            f"checkpoint {path} holds {', '.join(saved)} but not {', '.join(missing)}: it was written with another "
            "optimizer or other averages; use the config it was trained with, or start a new run with train.init_from"
        )
