"""`ldt status` from files alone, and the verdict that job scripts act on."""

import json
import os
import time

import pytest

from ldt.cli import main
from ldt.commands.status import read_status
from ldt.log import append_jsonl
from ldt.run import outcome
from ldt.run.outcome import DONE, FAILED, STOPPED, WRONG_INPUT

NOW = 2e9


@pytest.fixture
def run_dir(tmp_path):
    """Files as a run leaves them: two starts, 100 steps of 64 samples, a checkpoint at half of 12,800 samples."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("train:\n  global_batch: 64\n  total_samples: 12800\n")
    for i, size in enumerate((4, 8)):
        append_jsonl(path / "environment.jsonl", {"time": NOW - 7200 + 3600 * i, "world_size": size, "host": "h"})
    for i in range(100):
        line = {"samples_seen": 64 * (i + 1), "loss": 0.5, "images_per_second": 64.0, "data_wait_fraction": 0.01}
        append_jsonl(path / "metrics.jsonl", line | {"time": NOW - 100 + i})
    (path / "checkpoints" / "000000006400").mkdir(parents=True)
    (path / "checkpoints" / "000000006400" / "manifest.json").touch()
    os.utime(path / "checkpoints" / "000000006400" / "manifest.json", (NOW - 300, NOW - 300))
    outcome.begin(path)
    (path / "owner.json").touch()
    os.utime(path / "owner.json", (NOW, NOW))
    return path


def test_a_running_run(run_dir):
    facts = read_status(run_dir, NOW)
    assert facts["state"] == "running"
    assert facts["samples_seen"] == "6,400 of 12,800 (50%)"
    assert facts["last_step"] == "1 s ago" and facts["to_go"] == "100 s"
    assert facts["starts"] == "2, the newest 1 h 0 min ago on 8 processes"
    assert facts["last_checkpoint"] == "6,400 samples, 5 min ago; 1 there"


def test_a_silent_run_is_called_so(run_dir, capsys):
    facts = read_status(run_dir, NOW + 3 * 86400)
    assert facts["state"] == "silent" and facts["last_step"] == "3 d 0 h ago"
    assert main(["status", str(run_dir)]) == int(time.time() > NOW + 600)
    assert "samples seen" in capsys.readouterr().out


def test_a_killed_run_is_called_silent_before_its_first_line_too(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    assert read_status(run_dir, NOW + 60)["state"] == "running", "a long start"
    facts = read_status(run_dir, NOW + 240)
    assert facts["state"] == "silent" and "its process is gone" in facts["message"]
    (run_dir / "owner.json").unlink()
    assert read_status(run_dir, NOW + 60)["state"] == "silent"


def test_ended_runs(run_dir, capsys):
    outcome.write_outcome(run_dir, FAILED, message="the disk is full")
    outcome.write_outcome(run_dir, DONE, message="the first word is the last")
    assert main(["status", str(run_dir), "json=true"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["message"]) == ("failed", "the disk is full")
    outcome.begin(run_dir)
    outcome.write_outcome(run_dir, STOPPED)
    assert main(["status", str(run_dir)]) == 0


def test_no_run(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "this_start", "launcher", "code"),
    [
        (DONE, ("7", "1"), 0, DONE),
        (STOPPED, ("7", "1"), 137, STOPPED),  # srun kills what is left when the first leaves with 75
        (WRONG_INPUT, ("7", "1"), 1, WRONG_INPUT),
        (None, ("7", "1"), 137, FAILED),  # still "running": a crash
        (DONE, ("7", "2"), 137, FAILED),  # an earlier start's word
        (STOPPED, ("8", "0"), 1, FAILED),  # another job's
        (DONE, ("8", "0"), 2, WRONG_INPUT),  # refused before it could say anything
    ],
)
def test_the_verdict_trusts_only_this_start(run_dir, monkeypatch, said, this_start, launcher, code):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    outcome.begin(run_dir)
    if said is not None:
        outcome.write_outcome(run_dir, said)
    monkeypatch.setenv("SLURM_JOB_ID", this_start[0])
    monkeypatch.setenv("SLURM_RESTART_COUNT", this_start[1])
    assert main(["verdict", f"run_dir={run_dir}", "data.path=x", f"launcher_code={launcher}"]) == code
    assert outcome.read_outcome(run_dir)["outcome"] == ("failed" if said is None else outcome.WORDS[said])


def test_job_scripts_know_the_numbers():
    """slurm/train.sh and the documentation; 75 is EX_TEMPFAIL of sysexits.h."""
    assert (DONE, FAILED, WRONG_INPUT, STOPPED) == (0, 1, 2, 75)


def test_a_start_that_is_refused_leaves_the_outcome_before_it(tmp_path):
    file = tmp_path / "outcome.json"
    before = outcome.begin(tmp_path)
    assert before is None and outcome.read_outcome(tmp_path)["outcome"] == outcome.RUNNING
    outcome.take_back(tmp_path, before)
    assert not file.exists()
    outcome.take_back(tmp_path, before)  # somebody has deleted it meanwhile

    outcome.begin(tmp_path)
    outcome.write_outcome(tmp_path, DONE, 2000)
    done = file.read_bytes()
    before = outcome.begin(tmp_path)
    assert outcome.read_outcome(tmp_path)["outcome"] == outcome.RUNNING
    outcome.take_back(tmp_path, before)
    assert file.read_bytes() == done


@pytest.mark.parametrize("content", ["[]", "7", "{", ""])
def test_an_outcome_that_says_nothing_is_none(tmp_path, content):
    (tmp_path / "outcome.json").write_text(content)
    assert outcome.read_outcome(tmp_path) == {}
    assert outcome.verdict(tmp_path, 0) == FAILED


@pytest.mark.parametrize(
    ("launcher", "words"),
    [(134, "(SIGABRT: so NCCL's watchdog ends"), (137, "(SIGKILL: a node without memory"), (1, "")],
)
def test_a_crash_is_told_by_its_signal(tmp_path, launcher, words):
    outcome.begin(tmp_path)
    assert main(["verdict", f"run_dir={tmp_path}", "data.path=x", f"launcher_code={launcher}"]) == outcome.FAILED
    message = outcome.read_outcome(tmp_path)["message"]
    assert message.startswith(f"crashed: its launcher ended with code {launcher}") and words in message
