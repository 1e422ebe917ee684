"""A hung rank ends the job in bounded time, and the files say which rank waits where."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import forked
from shard_data import write_shards
from small_disk import disk, mounted

from ldt import cli
from ldt.dist import barrier, process_group
from ldt.run import watchdog
from ldt.run.watchdog import Watchdog

__all__ = ["disk"]
SETTINGS = ["seed=5", "model={width: 32, depth: 2, heads: 2}", "train.global_batch=8", "log.every_samples=8"]


def wait_for(condition: Callable[[], bool], processes: Sequence[forked.Forked]) -> None:
    """Until it holds; a process that ends before is a failure."""
    while not condition():
        ended = [p.said()[1] for p in processes if p.poll() is not None]
        assert not ended, ended
        time.sleep(0.01)


def main(directory: str) -> None:
    """Rank 0 waits for rank 1 in a collective, rank 1 for data that never come."""
    watchdog.GRACE_PERIOD_S = 2.0
    with process_group() as world:
        stalled = Path(directory) / "outcome"
        with Watchdog(Path(directory), 2.0, world, stalled.write_text) as dog:
            for i in range(8):  # longer than the limit in all, but with signs of progress
                dog.at(f"step {i}")
                time.sleep(0.4)
            dog.at(("the step at 8 samples", "loading the data of the step at 8 samples")[world.rank])
            if world.rank == 0:
                with contextlib.suppress(RuntimeError):  # rank 1 may leave a moment before
                    barrier()
            time.sleep(60)


def test_it_says_which_rank_waits_where(tmp_path):
    ranks = forked.run_ranks(
        2, "-c", "import sys, test_watchdog; test_watchdog.main(sys.argv[1])", tmp_path, timeout=60
    )
    assert [rank.returncode for rank in ranks] == [1, 1], [rank.stderr for rank in ranks]
    summary = (tmp_path / "outcome").read_text()
    assert "no progress for 2 s: rank 0 in the step at 8 samples" in summary
    assert "rank 1 in loading the data of the step at 8 samples" in summary and "says nothing" not in summary
    assert "in barrier" in (tmp_path / "rank-00000.stacks.txt").read_text()
    assert "in main" in (tmp_path / "rank-00001.stacks.txt").read_text()


def test_on_a_full_disk_it_says_so_all_the_same(tmp_path):
    """What the files have no room for stands in the lines of each rank: its stacks, and who waits where."""
    with mounted(tmp_path / "stalls") as disk:
        ranks = forked.start_ranks(2, "-c", "import sys, test_watchdog; test_watchdog.main(sys.argv[1])", disk.path)
        wait_for(lambda: len(list(disk.path.glob("*.stacks.txt"))) == 2, ranks)
        disk.leave(0)
        done = [rank.finish(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in done] == [1, 1], [rank.stderr for rank in done]
    own = ("rank 0 in the step at 8 samples", "rank 1 in loading the data of the step at 8 samples")
    for rank, where, stack in zip(done, own, ("in barrier", "in main"), strict=True):
        told = [line for line in rank.stderr.splitlines() if "no progress for 2 s" in line]
        assert len(told) == 1, rank.stderr
        line = told[0]
        assert where in line and "what its own lines name, as the disk is full" in line and "says nothing" not in line
        assert f"stacks are in the lines before this one, as {disk.path} has no room" in line
        assert stack in rank.stderr and "Traceback" not in rank.stderr


ALONE = """
import ctypes, os, signal, sys, time
from pathlib import Path
from ldt import log
from ldt.dist import discover
from ldt.run import watchdog
log.configure(0)
watchdog.GRACE_PERIOD_S, where, limit = 2.0, Path(sys.argv[1]), float(sys.argv[3])
report = where / "stalls" / "rank-00000.json"
with watchdog.Watchdog(where / "stalls", limit, discover({}), (where / "outcome").write_text) as dog:
    print("begun", flush=True)
    if sys.argv[2] == "goes on":
        while not report.exists():  # then it is in its grace
            time.sleep(0.05)
        dog.at("the next step")
        while report.exists():
            time.sleep(0.05)
    elif sys.argv[2] == "works":
        for i in range(100):
            dog.at(f"step {i}")
            time.sleep(0.05)
    else:
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock
"""


def alone(tmp_path, what, limit=1.0):
    return forked.Forked("-c", ALONE, tmp_path, what, limit)


def test_a_rank_that_goes_on_within_the_grace_is_left_alone(tmp_path):
    done = alone(tmp_path, "goes on").finish(timeout=60)
    assert done.returncode == 0, done.stderr
    assert "rank 0 went on after" in done.stderr and not list((tmp_path).iterdir()), "nothing is left of it"


def test_time_in_which_the_process_stood_still_is_no_stall(tmp_path):
    """SIGSTOP for longer than any limit, also that of the guard; and of the guard with it, as a suspended job."""
    process = alone(tmp_path, "works")
    wait_for(lambda: process.said()[0] == "begun\n", [process])
    (guard,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    for stopped in ([process.pid], [process.pid, guard]):
        time.sleep(0.5)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(8)
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
    done = process.finish(timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not list(tmp_path.iterdir()) and not Path(f"/proc/{guard}").exists()


def test_a_stuck_interpreter_is_ended_by_the_guard(tmp_path):
    done = alone(tmp_path, "holds the lock", 0.5).finish(timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "has run no Python code for 3 s and is killed" in done.stderr
    assert '<string>", line' in (tmp_path / "stalls" / "rank-00000.stacks.txt").read_text()


def test_a_checkpoint_that_can_not_be_read_ends_the_start(tmp_path):
    """Reading that never returns, as from a file server that is gone: here a pipe that nobody writes."""
    write_shards(tmp_path / "data", [40, 23])
    settings = [*SETTINGS, f"run_dir={tmp_path}/run", f"data.path={tmp_path}/data"]
    assert forked.run("-m", "ldt", "train", *settings, "train.total_samples=64").returncode == 0
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/*.safetensors")
    reader = (  # stat must say what the manifest says, so the pipe comes when the size is known
        "import os, sys\nfrom pathlib import Path\nfrom ldt.checkpoint import restore\n"
        "from ldt.cli import main\nos.mkfifo(sys.argv[1] + '.pipe')\n"
        "restore.verify_file = lambda path, entry: open(sys.argv[1] + '.pipe').read()\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    settings += ["train.total_samples=128", "engine.stall_seconds=1"]
    done = forked.run("-c", reader, file, "train", *settings, timeout=120)
    assert done.returncode == 1 and "no progress for 4 s: rank 0 in reading the checkpoint" in done.stderr, done.stderr
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "failed"


def test_a_stopped_rank_ends_the_training(tmp_path):
    """SIGSTOP to one of two ranks of a real run: the other one ends with code 1 and says who is missing."""
    write_shards(tmp_path / "data", [40, 23])
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, f"run_dir={run_dir}", f"data.path={tmp_path}/data", "train.total_samples=8000000"]
    ranks = forked.start_ranks(2, "-m", "ldt", "train", *settings, "engine.stall_seconds=6")
    try:
        wait_for((run_dir / "metrics.jsonl").exists, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=60) == 1
    finally:
        for rank in ranks:
            rank.kill()
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["outcome"] == "failed"
    assert "rank 0 in the step at" in outcome["message"] and "rank 1 says nothing" in outcome["message"]
    assert "torch/distributed" in (run_dir / "stalls" / "rank-00000.stacks.txt").read_text(), "in a collective"


def test_a_stopped_rank_on_a_full_disk_ends_the_training(disk):
    """The outcome can't be changed: it says running, from which `ldt verdict` makes a failure."""
    write_shards(disk.path / "data", [40, 23])
    run_dir = disk.path / "run"
    settings = [*SETTINGS, f"run_dir={run_dir}", f"data.path={disk.path}/data", "train.total_samples=8000000"]
    ranks = forked.start_ranks(2, "-m", "ldt", "train", *settings, "engine.stall_seconds=6")
    try:
        wait_for((run_dir / "metrics.jsonl").exists, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        disk.leave(0)
        assert ranks[0].wait(timeout=60) == 1
    finally:
        for rank in ranks:
            rank.kill()
    said = ranks[0].said()[1]
    assert "no progress for 6 s: rank 0 in the step at" in said and "rank 1 says nothing" in said
    assert "torch/distributed" in said and "Traceback" not in said
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "running"
    disk.make_room()
    assert cli.main(["verdict", *settings, "launcher_code=1"]) == 1
