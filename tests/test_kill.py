"""kill -9 of one of two ranks at random points of reading, resumed on 1, 2 and 3: the uninterrupted sequence."""

import itertools
import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from shard_data import make_loader, write_bucket_shards, write_shards

from ldt.data.shards import BucketShards, MixedShards, open_shards

COUNTS = [7, 12, 1, 10]  # epochs end within batches of 8
SETTINGS = {"batch": 8, "seed": 5, "streams": 3, "window": 6}
STEPS = 60  # 16 epochs
PROCESSES = multiprocessing.get_context("forkserver")  # has imported torch once and for all


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    PROCESSES.set_forkserver_preload(["ldt.data.loader"])


def open_data(path: Path):
    if path.name == "buckets":
        return BucketShards(path, {name: open_shards(path / name) for name in ("8x16", "8x8")})
    if path.name != "mixed":
        return open_shards(path)
    return MixedShards({name: open_shards(path / name) for name in ("tar", "mds")}, {"tar": 0.45, "mds": 0.55})


def main(path: Path, log: Path, rank: int, ranks: int, start: int) -> None:
    """One rank: append each step's real samples to a file of its own, as a training step would have used them."""
    with make_loader(open_data(path), rank=rank, ranks=ranks, **SETTINGS) as loader, log.open("a") as f:
        for step in itertools.islice(loader.steps(start), STEPS - start // 8):
            rows = [
                [int(i), float(v.double().sum()), int(label)]
                for b in step.micro_batches
                for i, v, label, w in zip(b.index_B, b.latent_BCHW, b.label_B, b.weight_B, strict=True)
                if w == 1
            ]
            f.write(json.dumps([step.first, rows]) + "\n")
            f.flush()
            time.sleep(0.005)


def start_ranks(path, logs, ranks, start):
    started = [PROCESSES.Process(target=main, args=(path, logs / f"{r}", r, ranks, start)) for r in range(ranks)]
    for p in started:
        p.start()
    return started


def steps_of(log: Path) -> dict[int, list]:
    lines = log.read_text().split("\n")[:-1] if log.exists() else []  # a torn line was not committed
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("kind", ["tar", "mds", "mixed", "buckets"])
def test_a_killed_rank_loses_and_repeats_nothing(tmp_path, kind):
    data = tmp_path / kind
    if kind == "mixed":
        write_shards(data / "tar", COUNTS, "tar")
        write_shards(data / "mds", COUNTS[::-1], "mds")
    elif kind == "buckets":
        write_bucket_shards(data, {"8x16": COUNTS, "8x8": [9, 5]})
    else:
        write_shards(data, COUNTS, kind)
    (tmp_path / "whole").mkdir()
    main(data, tmp_path / "whole" / "0", 0, 1, 0)
    expected = [row for rows in steps_of(tmp_path / "whole" / "0").values() for row in rows]
    assert [row[0] for row in expected] == list(range(STEPS * 8))
    chance, kept, position = random.Random(kind), [], 0
    for attempt, ranks in enumerate((2, 3, 2, 1)):
        logs = tmp_path / f"attempt{attempt}"
        logs.mkdir()
        processes = start_ranks(data, logs, ranks, position)
        if ranks > 1:  # at a random step, of a random rank; the others go when their peer is lost
            victim = chance.randrange(ranks)
            goal = chance.randint(3, 12)
            deadline = time.monotonic() + 60
            while len(steps_of(logs / str(victim))) < goal and time.monotonic() < deadline:
                time.sleep(0.005)
            processes[victim].kill()
            for p in processes:
                p.kill()
        for p in processes:
            p.join(60)
        codes = [p.exitcode for p in processes]
        assert codes == [0] if ranks == 1 else codes[victim] == -signal.SIGKILL
        done = [steps_of(logs / str(r)) for r in range(ranks)]
        while all(position in d for d in done):  # a step counts when every rank has done it
            kept += [row for d in done for row in d[position]]
            position += 8
    assert position == STEPS * 8
    assert kept == expected
