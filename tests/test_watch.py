"""Following a run: every checkpoint scored once by whoever comes first, kept until then, whatever is killed."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest
from run_data import shared_run

from ldt.checkpoint.retention import Retention, remove_old
from ldt.evaluation import follow
from ldt.log import read_jsonl
from ldt.run import claims
from ldt.run.claims import Claim, forget, pinned, want
from ldt.run.outcome import DONE, FAILED, STOPPED, WRONG_INPUT, begin, write_outcome

FAST = ["evaluate.images=16", "evaluate.sampler=euler", "evaluate.steps=2", "evaluate.block=4"]


@pytest.fixture
def run_dir(tmp_path_factory, tmp_path):
    return Path(shutil.copytree(shared_run(tmp_path_factory), tmp_path / "run"))


@pytest.fixture
def watcher(run_dir, tmp_path):
    """Starts watchers of the run; none outlives the test."""
    code = "import sys; from ldt import cli; from ldt.run import claims; claims.WATCH_PERIOD_S = 3.0; "
    command = ["-c", f"{code}sys.exit(cli.main(sys.argv[1:]))", "evaluate", run_dir, "--watch", *FAST]
    command.append(f"evaluate.cache_dir={tmp_path}/cache")
    started = []

    def start():
        started.append(forked.Forked(*command))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def test_an_old_outcome_does_not_end_the_watching_of_a_new_job(run_dir, tmp_path):
    """A run that is done is trained on by a job that still waits in its queue."""
    begin(run_dir)
    write_outcome(run_dir, DONE, 2000)
    job = subprocess.Popen(["sleep", "600"])
    command = ["-m", "ldt", "evaluate", run_dir, "--watch", f"watch_job={job.pid}", *FAST]
    watcher = forked.Forked(*command, f"evaluate.cache_dir={tmp_path}/cache")
    try:
        wait_for(lambda: len(results(run_dir)) == 2)
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(timeout=2 * follow.POLL_PERIOD_S)
        job.kill()
        job.wait()
        assert watcher.wait(timeout=60) == 0
    finally:
        watcher.kill()
        job.kill()
        job.wait()


def results(run_dir):
    return list((run_dir / "evaluations").glob("0*.json"))


def test_watchers_share_a_run_and_survive_a_kill(run_dir, watcher):
    """One watcher is killed at work; two others finish everything, each checkpoint once, and end with the run."""
    root = run_dir / "checkpoints"
    later = (root / "000000002000").rename(run_dir / "later")
    first = watcher()
    wait_for(lambda: list((run_dir / "evaluations").glob(".*.work/block-*.safetensors")))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert results(run_dir) == [], "killed before it was done"
    (left,) = root.glob("*.claim-*")
    assert pinned(root / "000000001000"), "a fresh claim is believed"
    os.utime(left, (0, 0))  # as after ten minutes without a sign of life

    watchers = [watcher(), watcher()]
    wait_for(lambda: len(results(run_dir)) == 1)
    later.rename(root / "000000002000")
    wait_for(lambda: len(results(run_dir)) == 2)
    begin(run_dir)
    write_outcome(run_dir, DONE, 2000)
    printed = []
    for w in watchers:
        done = w.finish(timeout=120)
        assert done.returncode == 0, done.stderr
        printed += [line for line in done.stdout.splitlines() if " at " in line]
    assert len(printed) == 2, "each once"
    assert [r["samples_seen"] for r in read_jsonl(run_dir / "evaluations.jsonl")] == [1000, 2000]
    assert not [p for p in root.iterdir() if p.is_file()], "claims are given back"
    assert not list((run_dir / "evaluations").glob(".*.work"))


@pytest.mark.parametrize(("code", "ends"), [(DONE, True), (FAILED, True), (WRONG_INPUT, True), (STOPPED, False)])
def test_a_watcher_ends_with_its_run_and_waits_for_one_that_is_requeued(run_dir, code, ends):
    assert not follow._has_ended(run_dir, ""), "it may not have begun"
    begin(run_dir)
    assert not follow._has_ended(run_dir, "")
    write_outcome(run_dir, code, 2000)
    assert follow._has_ended(run_dir, "") == ends


def test_what_is_wanted_or_claimed_is_not_deleted(run_dir):
    root = run_dir / "checkpoints"
    old = root / "000000001000"
    want(old, "a")
    remove_old(root, Retention(1))
    assert old.exists()
    claim = Claim.take(old, "a")
    assert claim is not None
    with claim:
        forget(old, "a")
        remove_old(root, Retention(1))
        assert old.exists()
    remove_old(root, Retention(1))
    assert [p.name for p in root.iterdir()] == ["000000002000"]


def test_a_claim_is_exclusive_until_its_owner_is_dead(tmp_path, monkeypatch):
    checkpoint = tmp_path / "000000001000"
    first = Claim.take(checkpoint, "a")
    assert first is not None
    assert Claim.take(checkpoint, "a") is None
    other = Claim.take(checkpoint, "b")
    assert other is not None, "other work is not affected"
    (file,) = tmp_path.glob("*.claim-a")
    os.utime(file, (time.time() - claims.STALE_TIMEOUT_S - 1,) * 2)
    assert Claim.take(checkpoint, "a") is None, "it may be that a clock was set"
    monkeypatch.setattr(claims, "WATCH_PERIOD_S", 0.0)
    assert Claim.take(checkpoint, "a") is not None
    assert not list(tmp_path.glob(".*")), "the dead owner's claim is buried"


@pytest.mark.parametrize("hours", [-1, 1, 5])
def test_a_clock_that_is_set_takes_no_claim_from_the_living(tmp_path, monkeypatch, hours):
    """Every check of age is off by hours, on the machine that looks or on the one that holds the claim."""
    checkpoint, now = tmp_path / "000000001000", [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    real = time.time
    monkeypatch.setattr(claims.time, "time", lambda: real() + 3600 * hours)
    claim = Claim.take(checkpoint, "a")
    want(checkpoint, "b")
    for beat in range(1, 30):
        now[0] += claims.HEARTBEAT_PERIOD_S
        for file in tmp_path.iterdir():
            os.utime(file, (real() + beat,) * 2)
        assert Claim.take(checkpoint, "a") is None and pinned(checkpoint), "it is touched every minute"
        assert claims.is_in_doubt(checkpoint, "a"), "which keeps a watcher from leaving"
    now[0] += claims.WATCH_PERIOD_S
    assert not pinned(checkpoint) and Claim.take(checkpoint, "a") is not None, "its owner is silent for good"
    assert claim is not None


def test_a_dead_claim_whose_time_looks_fresh_is_taken_over_in_the_end(tmp_path, monkeypatch):
    """The clock of the file system is ahead: by this machine's it has just been touched."""
    checkpoint, now = tmp_path / "000000001000", [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(claims.time, "time", lambda: (tmp_path / "000000001000.claim-a").stat().st_mtime)
    with (tmp_path / "000000001000.claim-a").open("x"):
        assert Claim.take(checkpoint, "a") is None and not claims.is_in_doubt(checkpoint, "a")
    now[0] += claims.STALE_TIMEOUT_S - 1
    assert Claim.take(checkpoint, "a") is None
    now[0] += 1
    monkeypatch.setattr(claims.time, "time", time.perf_counter)
    assert Claim.take(checkpoint, "a") is not None


def test_a_claim_taken_over_meanwhile_is_not_taken_over_again(tmp_path, monkeypatch):
    """Two find the same dead claim; the slower one must not take what the faster one has just written for dead."""
    checkpoint = tmp_path / "000000000001"
    Claim.take(checkpoint, "a")
    file = tmp_path / "000000000001.claim-a"
    os.utime(file, (time.time() - claims.STALE_TIMEOUT_S - 1,) * 2)
    monkeypatch.setattr(claims, "WATCH_PERIOD_S", 0.0)
    look = claims._stale

    def slow(path):
        stale = look(path)
        path.write_text("other-host 7 7\n")  # the faster one, right after this one has looked
        return stale

    monkeypatch.setattr(claims, "_stale", slow)
    assert Claim.take(checkpoint, "a") is None
    assert file.read_text() == "other-host 7 7\n"


def test_a_stale_wish_pins_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "WATCH_PERIOD_S", 0.0)
    checkpoint = tmp_path / "000000001000"
    want(checkpoint, "a")
    assert pinned(checkpoint)
    (file,) = tmp_path.iterdir()
    os.utime(file, (time.time() - claims.STALE_TIMEOUT_S - 1,) * 2)
    assert not pinned(checkpoint)
