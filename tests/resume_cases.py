"""A case for a pool: a run that is continued with a changed config, and all that it says."""

import logging
from pathlib import Path

from ldt.config import load
from ldt.dist import World, broadcast
from ldt.errors import InputError
from ldt.log import read_jsonl
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob

SETTINGS = [
    "seed=5",
    "model={width: 32, depth: 2, heads: 2}",
    "train.global_batch=8",
    "optimizer.lr=3e-3",
    "log.every_samples=8",
    "train.total_samples=40",
]


def resume_case(world: World, settings: list[str]) -> list:
    """Train in this pool: the sentence of a refusal, the losses by samples seen, and what was said on the way."""
    config, said, end = load(TrainJob, None, SETTINGS + settings), [], ""
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger("ldt")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        attempt(config, world)
    except InputError as error:
        end = str(error)
    finally:
        root.removeHandler(handler)
    lines = [r for r in read_jsonl(Path(config.run_dir) / "metrics.jsonl") if "loss" in r]
    return broadcast([end, {r["samples_seen"]: [r["loss"], r["lr"], r["digest"]] for r in lines}, said])
