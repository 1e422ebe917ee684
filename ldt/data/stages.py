"""The stages of loading, each alone, and how fast they are: what `ldt bench data` and tools/bench.py measure.

A stage is made once a thread, as each thread has its own buffer. What is measured is what the machine does now: shards
that were read a moment ago lie in memory, and other jobs take their part.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from ldt.data.batch import Batch, SampleDraws
from ldt.data.buffer import RankSlice
from ldt.data.digest import digest
from ldt.data.loader import LocationCache
from ldt.data.mixture import MixedOrder
from ldt.data.order import Order
from ldt.data.shards import Shards

Action = Callable[[], object]
WHOLE = "all of it"


def loader_stages(
    shards: Shards, order: Order | MixedOrder, share: RankSlice, draws: SampleDraws
) -> dict[str, Callable[[], Action]]:
    """What a loader's thread does about a step's samples, in its order, and all of it together.

    Each walks on through the steps, so that `read` meets samples as training does.
    """
    locations, steps = LocationCache(order, share), itertools.count()

    def located():  # type: ignore[no-untyped-def]
        return locations.of(order.batch * next(steps))

    def fixed():  # type: ignore[no-untyped-def]
        """One step's samples, its buffer and what was read."""
        batch = Batch.padding(share.rows, shards.manifest, pin=False, text=draws.uses_text)
        samples = located()
        draws.fill(batch, shards, samples)
        return samples, batch, draws.read(shards, samples, text=batch.text is not None)

    def read() -> Action:
        return lambda: draws.read(shards, located(), text=draws.uses_text)

    def draw() -> Action:
        samples, batch, records = fixed()
        return lambda: draws.draw(batch, shards.manifest, records, samples.key_n)

    def sum_up() -> Action:
        samples, batch, _ = fixed()
        return lambda: digest(batch, samples.sample_n, draws.version)

    def everything() -> Action:
        _, batch, _ = fixed()

        def step() -> None:
            samples = located()
            draws.fill(batch, shards, samples)
            digest(batch, samples.sample_n, draws.version)

        return step

    return {"locate": lambda: located, "read": read, "draws": draw, "digest": sum_up, WHOLE: everything}


def rate(make: Callable[[], Action], samples: int, threads: int, seconds: float) -> float:
    """Samples a second of an action that handles `samples` of them, done again and again by so many threads."""
    actions = [make() for _ in range(threads)]
    actions[0]()
    start = time.perf_counter()

    def repeat(action: Action) -> int:
        done = 0
        while not done or time.perf_counter() - start < seconds:
            action()
            done += samples
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(repeat, actions))
    return done / (time.perf_counter() - start)


def table(rates: Mapping[str, Mapping[int, float]], unit: str) -> str:
    """Stages down, threads across; empty where a stage has but one thread."""
    threads = sorted({n for row in rates.values() for n in row})
    width = max(len(unit), *map(len, rates))
    lines = [f"{unit:{width}}" + "".join(f"{f'{n} thread' + 's' * (n > 1):>12}" for n in threads)]
    for stage, row in rates.items():
        cells = "".join(f"{format(row[n], ',.0f') if n in row else '':>12}" for n in threads)
        lines.append(f"{stage:{width}}{cells}")
    return "\n".join(lines)
