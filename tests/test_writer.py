"""Saving behind the training: what is saved is the state at the copy, a failure anywhere fails it everywhere."""

import resource
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import forked
import pytest
import torch

from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.load import load_denoiser
from ldt.checkpoint.manifest import TrainState, listed, read_manifest
from ldt.checkpoint.restore import verify_together
from ldt.checkpoint.retention import Retention, remove_leftovers, remove_old
from ldt.checkpoint.tensors import Reader
from ldt.checkpoint.writer import Content, Writer
from ldt.data.latent_spec import LatentSpec
from ldt.dist import World, all_gather, all_reduce_sum
from ldt.engine.config import EngineConfig, OptimizerConfig
from ldt.engine.engine import Engine
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.run.claims import want

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
    expected = ["the checkpoint at 200 samples could not be saved on 1 rank(s)"] * 2
    expected[rank] += " (File too large)"
    assert problems == expected
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
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == kept


def test_what_somebody_waits_for_is_kept(tmp_path):
    for samples_seen in (10, 20, 30):
        (tmp_path / f"{samples_seen:012d}").mkdir()
    want(tmp_path / f"{10:012d}", "a")
    remove_old(tmp_path, Retention(1))
    assert [int(p.name) for p in listed(tmp_path)] == [10, 30]


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    for name in (".000000000100.tmp", ".000000000050.deleted", "000000000070", "000000000060.damaged"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000060.damaged", "000000000070"]


def test_a_failed_last_save_leaves_nothing_behind(pool, tmp_path):
    pool(2).run(last_case, directory=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["000000000100"]


def last_case(world: World, directory: str) -> None:
    """The last save of a run fails: nothing comes after it that would clear away what it left."""
    engine, limits = make_engine(world), resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(engine.partition, world) as writer:
        begin(writer, Path(directory), engine, 100)
        writer.finish()
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        begin(writer, Path(directory), engine, 200)
        writer.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writer.problem


def linked(path: Path, elsewhere: Path) -> Path:
    """A checkpoint that was moved to another disk, with a link in its place."""
    elsewhere.mkdir(parents=True, exist_ok=True)
    (elsewhere / path.name).mkdir()
    (elsewhere / path.name / "manifest.json").write_text("{}")
    path.symlink_to(elsewhere / path.name)
    return path


def test_links_are_unlinked_and_what_they_lead_to_stays(tmp_path, caplog):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    root.mkdir()
    for samples_seen in (10, 20, 30):
        linked(root / f"{samples_seen:012d}", elsewhere)
    linked(root / ".000000000005.deleted", elsewhere)
    linked(root / ".000000000040.tmp", elsewhere)
    with caplog.at_level("INFO", "ldt"):
        remove_old(root, Retention(1))
    assert caplog.text.count("what it leads to stays") == 2, "where its gigabytes still lie"
    remove_leftovers(root)
    assert [p.name for p in root.iterdir()] == ["000000000030"]
    assert len(list(elsewhere.glob("*/manifest.json"))) == 5


@pytest.mark.parametrize("dangling", [False, True])
def test_a_save_takes_the_place_of_a_link(pool, tmp_path, dangling):
    (tmp_path / "checkpoints").mkdir()
    path = linked(tmp_path / "checkpoints" / "000000000100", tmp_path / "elsewhere")
    if dangling:
        shutil.rmtree(tmp_path / "elsewhere")
    pool(1).run(repeated_case, directory=str(path.parent))
    assert not path.is_symlink() and Checkpoint.read(path).verify()
    assert dangling or (tmp_path / "elsewhere" / path.name / "manifest.json").read_text() == "{}"


KEEP_ONE = """
import sys
from pathlib import Path
from ldt import log
from ldt.checkpoint.retention import Retention, remove_leftovers, remove_old
log.configure(0)
remove_old(Path(sys.argv[1]), Retention(1))
remove_leftovers(Path(sys.argv[1]))
"""


def test_a_deletion_that_fails_is_told_and_ends_nothing(tmp_path):
    """Of a checkpoint that somebody made read-only; the rest is deleted, and the next start is not blocked either."""
    for samples_seen in (10, 20, 30):
        (tmp_path / f"{samples_seen:012d}" / "inner").mkdir(parents=True)
        (tmp_path / f"{samples_seen:012d}" / "inner" / "file").touch()
    (tmp_path / "000000000010" / "inner").chmod(0o555)
    done = forked.run("-c", KEEP_ONE, tmp_path, unprivileged=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not be deleted") == 2 and "Permission denied" in done.stderr
    assert [p.name for p in listed(tmp_path)] == ["000000000030"]
    assert not (tmp_path / ".000000000020.deleted").exists()
    (tmp_path / ".000000000010.deleted" / "inner").chmod(0o755)


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
