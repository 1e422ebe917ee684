"""A run directory has one owner: a second job is refused, a dead one replaced, a lost one stopped before it writes."""

import json
import os
import signal
import time

import forked
import pytest

from ldt.dist import discover
from ldt.errors import InputError, RunError
from ldt.run import owner
from ldt.run.owner import owned

HOLD = """
import sys, time
from pathlib import Path
from ldt.dist import discover
from ldt.run import owner
owner.HEARTBEAT_PERIOD_S = 0.2
with owner.owned(Path(sys.argv[1]), discover({})):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def world():
    return discover({})


@pytest.fixture
def holder(tmp_path):
    """Another process that owns the directory and lives."""
    process = forked.Forked("-c", HOLD, tmp_path)
    while process.said()[0] != "mine\n":
        assert process.poll() is None, process.said()[1]
        time.sleep(0.01)
    yield process
    process.kill()


def test_a_second_job_is_refused_and_told_who_has_it(tmp_path, holder, world):
    message = f"in use by process {holder.pid} on .*; wait for it, stop it, or choose another run_dir"
    with pytest.raises(InputError, match=message), owned(tmp_path, world):
        pass
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == holder.pid


def test_a_killed_process_of_this_machine_is_replaced_at_once(tmp_path, holder, world, monkeypatch):
    monkeypatch.setattr(owner, "SILENCE_TIMEOUT_S", 1e6)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path, world) as mine:
        mine.check()
    assert not (tmp_path / "owner.json").exists(), "it is given back"


def test_an_earlier_start_of_the_same_job_is_replaced_at_once(tmp_path, holder, world, monkeypatch):
    monkeypatch.setattr(owner, "SILENCE_TIMEOUT_S", 1e6)
    content = json.loads((tmp_path / "owner.json").read_text()) | {"job": "7", "restart": "0", "machine": "elsewhere"}
    (tmp_path / "owner.json").write_text(json.dumps(content))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owned(tmp_path, world) as mine:
        mine.check()


def test_a_silent_owner_of_another_machine_is_replaced_after_a_while(tmp_path, world, monkeypatch):
    monkeypatch.setattr(owner, "SILENCE_TIMEOUT_S", 1.0)
    (tmp_path / "owner.json").write_text(json.dumps({"token": "x", "host": "far", "machine": "elsewhere", "pid": 1}))
    started = time.monotonic()
    with owned(tmp_path, world) as mine:
        assert time.monotonic() - started >= 1.0
        mine.check()


def test_an_owner_that_was_replaced_may_not_commit(tmp_path, world):
    with owned(tmp_path, world) as mine:
        (tmp_path / "owner.json").write_text(json.dumps({"token": "another"}))
        with pytest.raises(RunError, match="was taken over by another job"):
            mine.check()
    assert (tmp_path / "owner.json").exists(), "the new owner's file stays"


def test_the_file_is_touched_while_it_is_owned(tmp_path, world, monkeypatch):
    monkeypatch.setattr(owner, "HEARTBEAT_PERIOD_S", 0.05)
    with owned(tmp_path, world):
        os.utime(tmp_path / "owner.json", (0, 0))
        end = time.monotonic() + 30
        while (tmp_path / "owner.json").stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / "owner.json").stat().st_mtime > 0
