"""Cases for a pool: a tiny model trained by the trainer itself, or what it says when it refuses to."""

from pathlib import Path

import pytest

from ldt.config import load
from ldt.dist import World, broadcast
from ldt.errors import InputError
from ldt.log import read_jsonl
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob

BATCH = 8
SETTINGS = [
    "seed=5",
    "model={width: 32, depth: 2, heads: 2}",
    f"train.global_batch={BATCH}",
    "optimizer.lr=3e-3",
    f"log.every_samples={BATCH}",
    "checkpoint.every_samples=80",
    "checkpoint.keep=9",
]


def train_case(world: World, settings: list[str]) -> list[dict]:
    """Train in this pool; the training lines of metrics.jsonl."""
    config = load(TrainJob, None, SETTINGS + settings)
    attempt(config, world)
    return broadcast([r for r in read_jsonl(Path(config.run_dir) / "metrics.jsonl") if "loss" in r])


def trained_in_parts(pool, ranks: int, settings: list[str], first: int, total: int) -> list[dict]:
    """The training lines of a run that so many ranks begin, up to `first` samples, and a single one ends."""
    pool(ranks).run(train_case, settings=[*settings, f"train.total_samples={first}"])
    return pool(1).run(train_case, settings=[*settings, f"train.total_samples={total}"])


def assert_same_run(ours: list[dict], theirs: list[dict], rel: float = 1e-4) -> None:
    """Two runs had the same samples and draws at each step, and the same losses up to rounding."""
    assert [r["samples_seen"] for r in ours] == [r["samples_seen"] for r in theirs]
    assert [r["digest"] for r in ours] == [r["digest"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=rel)


def config_case(world: World, path: str, settings: list[str]) -> None:
    """Train a config in this pool."""
    attempt(load(TrainJob, path, settings), world)


def refused_case(world: World, settings: list[str]) -> str:
    """The sentence with which the trainer refuses these settings."""
    try:
        attempt(load(TrainJob, None, SETTINGS + settings), world)
    except InputError as error:
        return str(error)
    return ""
