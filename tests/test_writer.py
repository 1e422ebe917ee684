"""Saving behind the training: what is saved is the state at the copy, a failure anywhere fails it everywhere."""

import resource
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.load import load_denoiser
from ldt.checkpoint.manifest import TrainState, listed, read_manifest
from ldt.checkpoint.restore import verify_together
from ldt.checkpoint.tensors import Reader
from ldt.checkpoint.writer import Content, Retention, Writer, remove_leftovers, remove_old
from ldt.data.latent_spec import LatentSpec
from ldt.dist import World, all_gather, all_reduce_sum
from ldt.engine.config import EngineConfig, OptimizerConfig
from ldt.engine.engine import Engine
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import ModelConfig

SAMPLING = LatentSpec((4, 2, 2), ["a", "b", "c"], [0.0] * 4, [1.0] * 4, "", "", 0, 0)
FACTS = {"sampling": asdict(SAMPLING), "config": {"model": {}, "objective": {}}}


def make_engine(world: World) -> Engine:
    denoiser = build(ModelConfig(width=32, depth=1, heads=2), (4, 2, 2), 3, seed=0)
    return Engine(denoiser, EngineConfig(1), OptimizerConfig(), world, 1)


def begin(writer: Writer, root: Path, engine: Engine, samples_seen: int, retention: Retention | None = None) -> None:
    contents = [Content(root, {"master": [f.master for f in engine.partition.owned]}, retention)]
    writer.begin(contents, FACTS | {"progress": asdict(TrainState(samples_seen, "data"))})


def settle(writer: Writer) -> None:
    """What the training loop does at every step."""
    writer.settle(*all_reduce_sum(torch.tensor(writer.vote())).tolist())


def behind_case(world: World, directory: str) -> None:
    """With a disk that stands still the training goes on; what lands in the file is the state of the copy."""
    root, engine, disk = Path(directory), make_engine(world), threading.Event()
    before = [f.master.clone() for f in engine.partition.owned]
    with Writer(engine.partition, world) as writer:
        writer._pool.submit(disk.wait)
        begin(writer, root, engine, 100)
        for _ in range(3):  # steps meanwhile
            for f in engine.partition.owned:
                f.master.fill_(7.0)
            settle(writer)
            assert listed(root) == []
        disk.set()
        begin(writer, root, engine, 200)  # waits for the first
        assert [p.name for p in listed(root)] == ["000000000100"]
        writer.finish()
    first, second = (Reader(path, verify_together(path, world)) for path in listed(root))
    for f, value in zip(engine.partition.owned, before, strict=True):
        assert torch.equal(first.read("master", f.name, f.start, f.count), value)
        assert (second.read("master", f.name, f.start, f.count) == 7.0).all()


def full_case(world: World, directory: str, rank: int) -> list[str]:
    """One rank can't write: that save fails on every rank, leaves nothing, and the next one works."""
    root, engine = Path(directory), make_engine(world)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(engine.partition, world) as writer:
        begin(writer, root, engine, 100)
        writer.finish()
        if world.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        begin(writer, root, engine, 200)
        writer.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        problems = all_gather(writer.problem)
        begin(writer, root, engine, 300)
        writer.finish()
        assert not writer.problem
    return problems


def test_training_goes_on_while_it_is_written(pool, tmp_path):
    pool(2).run(behind_case, directory=str(tmp_path))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_fails_the_save_on_all(pool, tmp_path, rank):
    problems = pool(2).run(full_case, directory=str(tmp_path), rank=rank)
    assert problems == ["the checkpoint at 200 samples could not be saved on 1 rank(s)"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000100", "000000000300"], "and nothing half-written"
    for path in listed(tmp_path):
        assert Checkpoint.read(path).verify().samples_seen == int(path.name)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(2), [80, 90]),
        (Retention(1, every=30), [30, 60, 90]),
        (Retention(2, every=25), [30, 50, 80, 90]),
    ],
)
def test_what_is_kept(tmp_path, retention, kept):
    """The newest, and the first at or after each multiple; deciding after every save ends the same."""
    for samples_seen in range(10, 100, 10):
        (tmp_path / f"{samples_seen:012d}").mkdir()
        remove_old(tmp_path, retention)
    assert [int(p.name) for p in listed(tmp_path)] == kept


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    for name in (".000000000100.tmp", ".000000000050.deleted", "000000000070", "000000000060.damaged"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000060.damaged", "000000000070"]


def test_a_repeated_save_replaces_the_old_one(pool, tmp_path):
    pool(1).run(repeated_case, directory=str(tmp_path))
    (path,) = listed(tmp_path)
    assert read_manifest(path)["progress"]["attempt"] == 7
    with pytest.raises(InputError, match="holds no ema weights, but master"):
        load_denoiser(path)


def repeated_case(world: World, directory: str) -> None:
    engine = make_engine(world)
    with Writer(engine.partition, world) as writer:
        for attempt in (1, 7):
            contents = [Content(Path(directory), {"master": [f.master for f in engine.partition.owned]})]
            writer.begin(contents, FACTS | {"progress": asdict(TrainState(100, "data", attempt=attempt))})
            writer.finish()
