"""How fast each stage of loading is on this machine, alone, and which one holds the loader up: `ldt bench data`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ldt.checkpoint.checkpoint import saved_config
from ldt.config import from_dict
from ldt.config_fields import required_path_field
from ldt.data.batch import SampleDraws
from ldt.data.bucket_order import BucketOrder
from ldt.data.buffer import RankSlice
from ldt.data.loader import make_order
from ldt.data.shards import BucketShards
from ldt.data.stages import WHOLE, loader_stages, rate, table
from ldt.dist import SLOWEST_RANK_TIMEOUT, process_group
from ldt.errors import InputError
from ldt.training.config import TrainJob
from ldt.training.data import open_data


@dataclass
class BenchDataJob:
    """`path`: a run, whose data and batch are taken, or a directory of latent shards.

    `batch`: samples that a process takes in a step, 0 for the run's global batch; `threads`: how many at a time, one
    column each; `seconds`: that each number takes.
    """

    path: str = required_path_field()
    batch: int = 0
    threads: list[int] = field(default_factory=lambda: [1, 2, 4])
    seconds: float = 0.5

    def __post_init__(self) -> None:
        if self.batch < 0:
            raise InputError(f"batch={self.batch} must be positive, or 0 for the run's global batch")
        check_measures(self.threads, self.seconds)


def check_measures(threads: list[int], seconds: float) -> None:
    if not threads or min(threads) < 1:
        raise InputError(f"threads={threads} must be one or more positive numbers, such as [1,2,4]")
    if not 0 < seconds <= 600:
        raise InputError(f"seconds={seconds} must be above 0 and at most 600")


def run(config: BenchDataJob) -> int:
    """Print the table and the name of the bottleneck."""
    job = job_of(config.path)
    with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:
        shards = open_data(job.data, world)
    if isinstance(shards, BucketShards):
        raise InputError(
            f"path={config.path} is on buckets, which are measured one by one; give the directory of one, such as "
            f"{shards.path}/{shards.names[0]}"
        )
    batch = config.batch or job.train.global_batch
    order = make_order(shards, job.seed, batch, job.data.streams, job.data.window)
    assert not isinstance(order, BucketOrder)
    draws = SampleDraws(job.seed, job.objective.condition_drop, job.model.condition_on, shards.manifest.flips)
    stages = loader_stages(shards, order, RankSlice.of(batch, 0, 1, 0), draws)
    rates = {
        name: {n: rate(make, batch, n, config.seconds) for n in sorted(set(config.threads))}
        for name, make in stages.items()
    }
    print(table(rates, "samples a second"))
    for line in describe(rates, job.data.threads):
        print(line)
    print(f"measured on {job.data.path or ', '.join(job.data.sources)} in batches of {batch}: {config.path}")
    return 0


def job_of(path: str) -> TrainJob:
    """The training whose data are measured: a run's own, or the defaults on a directory of shards."""
    saved = saved_config(Path(path))
    if "run_dir" in saved:
        return from_dict(TrainJob, saved, f"the config of {path}")
    return from_dict(TrainJob, {"run_dir": path, "data": {"path": path}})


def describe(rates: Mapping[str, Mapping[int, float]], threads: int) -> list[str]:
    """The stage that takes most of a sample's time in one thread, and what more threads bring."""
    fewest, most = min(rates[WHOLE]), max(rates[WHOLE])
    times = {name: 1 / row[fewest] for name, row in rates.items() if name != WHOLE}
    slowest = max(times, key=lambda name: times[name])
    share = times[slowest] / sum(times.values())
    lines = [f"bottleneck: {slowest}, {share:.0%} of a sample's time"]
    if most > fewest:
        gain = rates[WHOLE][most] / rates[WHOLE][fewest]
        lines.append(f"{most} threads do {gain:.1f} times what {fewest} does; the loader has data.threads={threads}")
    return lines
