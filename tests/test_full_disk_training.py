"""A full disk under each part of a run directory while a training goes on, and under what other commands write by the
way: logs, temporary files, mirrors."""

import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import forked
import pytest
from shard_data import write_shards
from small_disk import FULL, disk, mounted

from ldt.checkpoint.manifest import listed
from ldt.config import load
from ldt.dist import World
from ldt.errors import RunError
from ldt.log import append_jsonl, read_jsonl
from ldt.run.outcome import read_outcome
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob

__all__ = ["disk"]
SETTINGS = [
    "seed=5", "model={width: 32, depth: 1, heads: 2}", "train.global_batch=8", "log.every_samples=8",
    "train.total_samples=32", "checkpoint.every_samples=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [40, 23])
    return path


def case(world: World, settings: list[str]) -> list:
    """Train in this pool: how it ended, and what was logged as an error on the way."""
    config, said, end = load(TrainJob, None, SETTINGS + settings), [], "done"
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ldt").addHandler(handler)
    try:
        attempt(config, world)
    except RunError as error:
        end = str(error)
    finally:
        logging.getLogger("ldt").removeHandler(handler)
    return [end, said]


@pytest.fixture
def train(pool, data):
    return lambda run_dir, *more: pool(1).run(case, settings=[f"run_dir={run_dir}", f"data.path={data}", *more])


def forked_train(data: Path, run_dir: Path, *settings: str, **keys):
    return forked.run("-m", "ldt", "train", *SETTINGS, f"run_dir={run_dir}", f"data.path={data}", *settings, **keys)


def losses(run_dir: Path) -> list[int]:
    return [line["samples_seen"] for line in read_jsonl(run_dir / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", ["checkpoints", "ema"])
def test_a_checkpoint(train, tmp_path, name):
    """The training goes on; at its end it says what is missing. The same command then only saves."""
    run_dir, averages = tmp_path / "run", ["ema.widths=[0.05,0.1]", "ema.snapshot_every_samples=16"]
    with mounted(run_dir / name) as disk:
        disk.leave(1)
        end, said = train(run_dir, *averages)
        assert end.startswith(f"the checkpoint at 32 samples could not be saved on 1 rank(s) ({FULL}); make room")
        assert f"could not write {run_dir}/{name}/.000000000032.tmp/rank-00000-of-00001.safetensors: {FULL}" in said[-2]
        assert losses(run_dir) == [8, 16, 24, 32] and read_outcome(run_dir)["outcome"] == "failed"
        assert [p.name for p in disk.path.iterdir()] == [".ballast"], "nothing half-written is left"
        disk.make_room()
        assert train(run_dir, *averages)[0] == "done"
        assert [p.name for p in listed(run_dir / "checkpoints")] == ["000000000016", "000000000032"]
        assert losses(run_dir) == [8, 16, 24, 32]


def test_the_log(train, tmp_path, disk):
    """On a disk of its own, as through a link."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to(disk.path / "metrics.jsonl")
    disk.leave(0)
    end, _ = train(run_dir)
    assert end.startswith(f"the disk of {run_dir}/metrics.jsonl is full ({FULL}); make room")
    assert read_outcome(run_dir)["message"] == end
    disk.make_room()
    assert train(run_dir)[0] == "done" and losses(run_dir) == [8, 16, 24, 32]


def test_the_whole_run_directory(train, disk):
    run_dir = disk.path / "run"
    assert train(run_dir)[0] == "done"
    before = disk.files()
    outcome = before.pop("run/outcome.json")
    for pages in range(3):
        disk.leave(pages)
        end, _ = train(run_dir, "train.total_samples=64")
        disk.make_room()
        assert "make room" in end and str(run_dir) in end
        after = disk.files()
        assert after.pop("run/outcome.json") == outcome or read_outcome(run_dir)["outcome"] in ("failed", "running")
        assert after == before
    assert train(run_dir, "train.total_samples=64")[0] == "done"
    assert losses(run_dir) == list(range(8, 65, 8))


ALONE = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
ALONE |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def test_mirrors_and_stacks(data, tmp_path):
    """Neither wandb nor TensorBoard nor the watchdog's directory is worth the end of a run."""
    run_dir, places = tmp_path / "run", [tmp_path / "run" / name for name in ("wandb", "tensorboard", "stalls")]
    with ExitStack() as disks:
        for place in places:
            disks.enter_context(mounted(place)).leave(0)
        mirrored = ["log.wandb=true", "log.tensorboard=true"]
        done = forked_train(data, run_dir, *mirrored, env=ALONE | {"HOME": str(tmp_path)})
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert losses(run_dir) == [8, 16, 24, 32] and "ldt replay" in done.stderr


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_a_log_that_is_replayed(disk, tmp_path, to):
    run_dir = disk.path / "run"
    run_dir.mkdir()
    for i in range(1, 400):
        append_jsonl(run_dir / "metrics.jsonl", {"samples_seen": 8 * i, "loss": 1 / i})
    disk.leave(0)
    done = forked.run("-m", "ldt", "replay", run_dir, f"to={to}", env=ALONE | {"HOME": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"{run_dir}/{to}" in done.stderr and FULL in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_run_that_is_verified(train, tmp_path, disk):
    """In output=; a full directory of temporary files is passed over by Python itself."""
    assert train(tmp_path / "run")[0] == "done"
    disk.leave(0)
    done = forked.run("-m", "ldt", "verify", tmp_path / "run", "samples=16", f"output={disk.path}/again")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"the disk of {disk.path}/again/owner.json is full ({FULL})" in done.stderr


@pytest.mark.parametrize("buffered", ["", "1"])
def test_what_is_printed(train, tmp_path, disk, buffered):
    """Python would say it at its very end, with a traceback and the code 120."""
    assert train(tmp_path / "run")[0] == "done"
    disk.leave(0)
    with (disk.path / "said").open("w") as full:
        command = [sys.executable, "-m", "ldt", "status", tmp_path / "run"]
        env = os.environ | {"PYTHONUNBUFFERED": buffered}
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("ldt status: failed: the disk of the standard output is full")
