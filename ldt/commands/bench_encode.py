"""How fast each stage of encoding is on this machine, alone, and which one holds it up: `ldt bench encode`.

A number of threads read and decode, while one thread runs the autoencoder and another one writes shards.
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldt.commands.bench_data import check_measures
from ldt.data.images.listed import ListedImages
from ldt.data.stages import Action, rate, table
from ldt.dist import SLOWEST_RANK_TIMEOUT, process_group
from ldt.encoding.config import EncodeJob
from ldt.encoding.encoder import Encoder
from ldt.encoding.plan import Unit
from ldt.errors import InputError

MOST_WRITTEN = 1024  # images in the shard that is written again and again


@dataclass
class BenchEncodeJob(EncodeJob):
    """The keys of `ldt encode`; nothing is left in `output`.

    `measured_threads`: how many at a time, one column each; `seconds`: that each number takes.
    """

    measured_threads: list[int] = field(default_factory=lambda: [1, 2, 4])
    seconds: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_measures(self.measured_threads, self.seconds)


def run(config: BenchEncodeJob) -> int:
    """Print the table and the name of the bottleneck."""
    if config.index:
        raise InputError(f"index={config.index} encodes nothing; give images.path or latents")
    if config.images.buckets:
        raise InputError(
            "images.buckets are measured one by one; give images.size of one of them, and images.fit, in their place"
        )
    beside = Path(config.output).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=beside, prefix=".bench-") as directory,
        process_group(timeout=SLOWEST_RANK_TIMEOUT) as world,
    ):
        encoder = Encoder(replace(config, output=directory), world)
        rates: dict[str, dict[int, float]] = {}
        for name, (make, samples, many) in _stages(encoder).items():
            counts = sorted(set(config.measured_threads)) if many else [1]
            rates[name] = {n: rate(make, samples, n, config.seconds) for n in counts}
    print(table(rates, "images a second"))
    print(describe(rates, config.threads))
    place = config.latents or config.images.path
    print(f"measured on {place} in batches of {config.batch}; nothing is left in {config.output}")
    return 0


def _stages(encoder: Encoder) -> dict[str, tuple[Callable[[], Action], int, bool]]:
    """Each stage, how many images it handles at a time, and whether several threads share it."""
    plan, total = encoder.plan, encoder.plan.split.training_samples
    batch = min(encoder.config.batch, total)
    places, unit = itertools.count(0, batch), Unit("", 0, 0, total)
    loaded = plan.load((unit, 0, batch))
    encoded, repeats = plan.encode(loaded), max(1, min(encoder.config.shard_samples, MOST_WRITTEN, total) // batch)
    shard = Unit("", 0, 0, repeats * batch)

    def part() -> tuple[Unit, int, int]:
        start = next(places) % max(1, total - batch + 1)
        return unit, start, start + batch

    def read() -> object:
        assert isinstance(plan.source, ListedImages)
        return [plan.source.content(i) for i in plan.image_numbers(*part())]

    stages: dict[str, tuple[Callable[[], Action], int, bool]] = {}
    if isinstance(plan.source, ListedImages):
        stages["read"] = (lambda: read, batch, True)
    stages["read and decode"] = (lambda: lambda: plan.load(part()), batch, True)
    if not encoder.config.latents:
        stages["autoencoder"] = (lambda: lambda: plan.encode(loaded), batch, False)
    stages["write"] = (lambda: lambda: encoder.write_shard(shard, [encoded] * repeats), shard.stop, False)
    return stages


def describe(rates: Mapping[str, Mapping[int, float]], threads: int) -> str:
    """The slowest of those that work side by side, with as many threads decoding as the config says."""
    columns = rates["read and decode"]
    decoding = columns[min(columns, key=lambda n: abs(n - threads))]
    beside = {name: row[1] for name, row in rates.items() if 1 in row and name in ("autoencoder", "write")}
    beside["read and decode"] = decoding
    slowest = min(beside, key=lambda name: beside[name])
    return f"bottleneck: {slowest}, {beside[slowest]:,.0f} images a second with threads={threads}"
