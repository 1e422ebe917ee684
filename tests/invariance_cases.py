"""The run that placement must not change: two epochs of 80 samples, with validation, as a case for a pool."""

from pathlib import Path

from ldt.config import load
from ldt.dist import World, broadcast
from ldt.log import read_jsonl
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob

STEPS, BATCH = 20, 8  # 3 ranks do not divide the batch; 80 samples: two epochs
SETTINGS = [
    "seed=5",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    f"train.global_batch={BATCH}",
    f"train.total_samples={BATCH * STEPS}",
    "optimizer.lr=3e-3",
    "optimizer.warmup_samples=40",
    "optimizer.decay=cosine",
    f"log.every_samples={BATCH}",
    "log.validation_every_samples=80",
    "data.streams=3",
    "data.window=16",
]


def train_case(world: World, settings: list[str]) -> list[dict]:
    """Train in this pool; the lines of metrics.jsonl."""
    config = load(TrainJob, None, SETTINGS + settings)
    attempt(config, world)
    return broadcast(list(read_jsonl(Path(config.run_dir) / "metrics.jsonl")))
