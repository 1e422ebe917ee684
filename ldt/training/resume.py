"""Where a run begins: at its newest checkpoint, at other weights or at nothing; and what a changed config means."""

from collections.abc import Iterator
from pathlib import Path

from ldt import log
from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.manifest import TrainState
from ldt.checkpoint.restore import newest_whole, restore, set_aside
from ldt.config import from_dict, to_dict
from ldt.data.latent_spec import LatentSpec
from ldt.dist import World
from ldt.engine.ema import ShardedEMA
from ldt.engine.learning_rate import learning_rate
from ldt.engine.partition import Partition
from ldt.errors import InputError
from ldt.progress import pluralize
from ldt.run.identity import check_identity, differences
from ldt.training.config import TrainJob
from ldt.training.data import other_data
from ldt.training.init_from import start_from

logger = log.get_logger(__name__)

ORDER = ("seed", "data.streams", "data.window", "data.sources", "train.global_batch")
"""Keys that decide which sample a global index means."""


def resume(
    config: TrainJob, fingerprint: str, spec: LatentSpec, partition: Partition, ema: ShardedEMA, world: World
) -> tuple[TrainState, int, list[Path]]:
    """The state to go on from, with the engine and the averages filled to match; the version of the random numbers
    that the run began with, 0 for a new run; and which checkpoints are damaged.

    Nothing in the run directory is changed; `cut_back` does that once the start is accepted. `fingerprint` identifies
    the data, which must be those of the checkpoint (collective).
    """
    found, damaged = newest_whole(Path(config.run_dir) / "checkpoints", world)
    if found is None:
        if config.train.init_from:
            start_from(Path(config.train.init_from), config, spec, partition, ema)
        return TrainState(samples_seen=0, data_fingerprint=fingerprint), 0, damaged
    checkpoint = Checkpoint.read(found)
    state = _continue(checkpoint, config, fingerprint, partition, ema)
    logger.info("resuming at %s samples from %s", f"{state.samples_seen:,}", found)
    if config.train.init_from:
        logger.info("train.init_from=%s is not read: the run has checkpoints of its own", config.train.init_from)
    return state, checkpoint.manifest["rng_version"], damaged


def cut_back(run_dir: Path, state: TrainState, damaged: list[Path]) -> None:
    """Leave the log and the checkpoints as they were at the state's clock; on rank 0."""
    cut = log.keep_jsonl_until(run_dir / "metrics.jsonl", "samples_seen", state.samples_seen)
    if cut:
        lines = pluralize(cut, "log line", "log lines")
        logger.info("%s of later than %s samples set aside", lines, f"{state.samples_seen:,}")
    set_aside(damaged)


def _continue(
    checkpoint: Checkpoint, config: TrainJob, fingerprint: str, partition: Partition, ema: ShardedEMA
) -> TrainState:
    saved = from_dict(TrainJob, checkpoint.config)  # keys that are new since then take their defaults
    check_identity(to_dict(saved), to_dict(config), checkpoint.path, config.train.accept_changes)
    state = checkpoint.state
    if state.data_fingerprint != fingerprint:
        raise InputError(other_data(config.data, state.data_fingerprint, fingerprint, str(checkpoint.path)))
    restore(checkpoint, partition, ema)
    for line in describe_changes(saved, config, state.samples_seen):
        logger.warning("%s", line)
    return state


def describe_changes(saved: TrainJob, config: TrainJob, samples_seen: int) -> Iterator[str]:
    """What changes with the config at this point of a run, a line each."""
    changed = differences(to_dict(saved), to_dict(config))
    for key, (before, now) in changed.items():
        yield f"changed at {samples_seen:,} samples: {key} from {before} to {now}"
    if any(key.startswith(ORDER) for key in changed):
        yield (
            "the samples come in another order from here on: in the epoch in progress some come twice and some not at "
            "all, from the next epoch on each comes once again"
        )
    next_sample = samples_seen + config.train.global_batch
    before_lr = learning_rate(saved.optimizer, next_sample, saved.train.total_samples)
    now_lr = learning_rate(config.optimizer, next_sample, config.train.total_samples)
    if abs(now_lr - before_lr) > 0.01 * max(now_lr, before_lr):
        yield f"the learning rate goes from {before_lr:.3g} to {now_lr:.3g} here{_way_to_keep(config, before_lr)}"


def _way_to_keep(config: TrainJob, rate: float) -> str:
    """How to go on at the rate that the run had, where that is a rate to train at."""
    if rate <= 0:
        return "; optimizer.decay=constant with another optimizer.lr would go on evenly"
    keys = {"optimizer.decay": "constant", "optimizer.lr": f"{rate:.6g}"}
    if config.optimizer.muon_lr:
        keys["optimizer.muon_lr"] = f"{config.optimizer.muon_lr * rate / config.optimizer.lr:.6g}"
    settings = " ".join(f"{key}={value}" for key, value in keys.items())
    return f"; to keep it: {settings} train.accept_changes=[{','.join(keys)}]"
