"""A hung rank ends the job in bounded time, and the files say which rank waits where."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from ranks import start_ranks
from shard_data import write_shards

from ldt.dist import barrier, process_group
from ldt.run import watchdog
from ldt.run.watchdog import Watchdog

SETTINGS = ["seed=5", "model={width: 32, depth: 2, heads: 2}", "train.global_batch=8", "log.every_samples=8"]


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
            if world.rank == 1:
                time.sleep(60)
            barrier()


def test_it_says_which_rank_waits_where(tmp_path):
    ranks = start_ranks(2, __file__, tmp_path, stderr=subprocess.PIPE)
    errors = [p.communicate(timeout=60)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [1, 1], errors
    summary = (tmp_path / "outcome").read_text()
    assert "no progress for 2 s: rank 0 in the step at 8 samples" in summary
    assert "rank 1 in loading the data of the step at 8 samples" in summary and "says nothing" not in summary
    assert "in barrier" in (tmp_path / "rank-00000.stacks.txt").read_text()
    assert "in main" in (tmp_path / "rank-00001.stacks.txt").read_text()


def test_a_stopped_rank_ends_the_training(tmp_path):
    """SIGSTOP to one of two ranks of a real run: the other one ends with code 1 and says who is missing."""
    write_shards(tmp_path / "data", [40, 23])
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, f"run_dir={run_dir}", f"data.path={tmp_path}/data", "train.total_samples=8000000"]
    ranks = start_ranks(2, "-m", "ldt", "train", *settings, "engine.stall_seconds=3", stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 90
        while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=60) == 1
    finally:
        for p in ranks:
            p.kill()
            p.wait()
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["outcome"] == "failed"
    assert "rank 0 in the step at" in outcome["message"] and "rank 1 says nothing" in outcome["message"]
    assert "all_reduce" in (run_dir / "stalls" / "rank-00000.stacks.txt").read_text()


if __name__ == "__main__":
    main(sys.argv[1])
