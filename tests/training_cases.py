"""Cases for a pool: a tiny model trained by the trainer itself, or what it says when it refuses to."""

from pathlib import Path

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
