"""Real launchers that are ended in every way people end them: the job saves, gives its run directory back, and ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_data import write_shards

from ldt.checkpoint.checkpoint import resolve
from ldt.checkpoint.manifest import listed
from ldt.dist import free_port
from ldt.log import read_jsonl

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [BIN / "deepspeed", "--num_accelerators=2", "--master_port={port}", "--module", "ldt"],
    "torchrun": [BIN / "torchrun", "--nproc_per_node=2", "--master_port={port}", "-m", "ldt"],
    "torchrun, restarting": [
        BIN / "torchrun",
        "--nproc_per_node=2",
        "--max-restarts=1",
        "--master_port={port}",
        "-m",
        "ldt",
    ],  # fmt: skip
    "plain": [sys.executable, "-m", "ldt"],
}
SETTINGS = ["seed=5", "model={width: 32, depth: 2, heads: 2}", "train.global_batch=8", "log.every_samples=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [40, 23])
    return path


@pytest.fixture
def launch(data, tmp_path):
    """Starts a training that does not end by itself, in a session of its own; nothing of it outlives the test."""
    started = []

    def start(launcher, *before, steps=3, settings=()):
        words = [*before, *(str(w).format(port=free_port()) for w in LAUNCHERS[launcher])]
        words += ["train", *SETTINGS, f"run_dir={tmp_path}/run", f"data.path={data}", "train.total_samples=8000000"]
        words += settings
        hup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite under nohup ignores it, and so would the launcher
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        signal.signal(signal.SIGHUP, hup)
        started.append(process)
        wait_for(lambda: len(lines(tmp_path / "run")) >= steps or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "log").read_text()
        return process

    yield start
    for pid in members(tmp_path / "run"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait()


def members(run_dir: Path) -> list[int]:
    """The processes of a run, its launchers among them; torchrun puts its ranks into sessions of their own."""
    pids = [int(p.name) for p in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if f"\0run_dir={run_dir}\0".encode() in read(pid, "cmdline")]


def read(pid: int, name: str) -> bytes:
    try:
        return b"\0" + Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def lines(run_dir):
    return list(read_jsonl(run_dir / "metrics.jsonl"))


def outcome(run_dir):
    return json.loads((run_dir / "outcome.json").read_text())


def end(process, who: str, number: signal.Signals) -> None:
    """A signal to the launcher alone, or to all that a closed terminal reaches."""
    if who == "launcher":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)


@pytest.mark.parametrize(
    ("launcher", "who", "number", "reason"),
    [
        ("plain", "launcher", signal.SIGHUP, "SIGHUP"),
        ("torchrun", "all", signal.SIGHUP, "SIGHUP"),
        ("torchrun", "launcher", signal.SIGKILL, "the launcher is gone"),
        ("deepspeed", "all", signal.SIGHUP, "SIGHUP"),
        ("deepspeed", "launcher", signal.SIGHUP, "the launcher is gone"),
    ],
)
def test_an_ended_launcher_is_a_request_to_stop(launch, tmp_path, launcher, who, number, reason):
    """The ranks used to go on without it, or to lose what they had since the last checkpoint. SIGTERM: see below."""
    process = launch(launcher)
    end(process, who, number)
    check_stopped(process, tmp_path / "run", reason)


def check_stopped(process: subprocess.Popen, run_dir: Path, reason: str) -> None:
    """The job saves, gives its run directory back, and ends."""
    process.wait(timeout=60)
    wait_for(lambda: not members(run_dir))
    assert outcome(run_dir)["outcome"] == "stopped", (run_dir.parent / "log").read_text()
    assert reason in outcome(run_dir)["message"] or "another rank" in outcome(run_dir)["message"]
    assert resolve(run_dir).name == f"{lines(run_dir)[-1]['samples_seen']:012d}", "a checkpoint at the last step"
    assert not (run_dir / "owner.json").exists()


def test_torchrun_starts_a_job_again_whose_rank_was_killed(launch, tmp_path):
    """After its first checkpoint: the second attempt goes on from there, and repeats what was lost to the digit."""
    launcher, run_dir = "torchrun, restarting", tmp_path / "run"
    process = launch(launcher, settings=["checkpoint.every_samples=40"], steps=7)
    wait_for(lambda: (run_dir / "checkpoints").is_dir() and listed(run_dir / "checkpoints"))
    os.kill(ranks(run_dir, 1)[0], signal.SIGKILL)
    wait_for(lambda: any(r["attempt"] == 1 for r in lines(run_dir)))
    lost = {r["samples_seen"]: r["digest"] for r in read_jsonl(run_dir / "metrics.cut.jsonl")}
    wait_for(lambda: lines(run_dir)[-1]["samples_seen"] >= max(lost, default=0))
    process.send_signal(signal.SIGTERM)
    check_stopped(process, run_dir, "SIGTERM")
    kept = lines(run_dir)
    assert [r["samples_seen"] for r in kept] == list(range(8, 8 * len(kept) + 1, 8)), "each step once"
    assert all(lost.get(r["samples_seen"], r["digest"]) == r["digest"] for r in kept)
    begun = next(r["samples_seen"] for r in kept if r["attempt"] == 1)
    assert begun > 40 and begun % 40 == 8


@pytest.mark.parametrize(("launcher", "reason"), [("plain", "SIGTERM"), ("deepspeed", "the launcher is gone")])
def test_under_nohup_a_closed_terminal_ends_nothing_and_sigterm_does(launch, tmp_path, launcher, reason):
    process, run_dir = launch(launcher, "nohup"), tmp_path / "run"
    os.killpg(process.pid, signal.SIGHUP)
    seen = len(lines(run_dir))
    wait_for(lambda: len(lines(run_dir)) > seen + 5)
    assert process.poll() is None and outcome(run_dir)["outcome"] == "running"
    process.send_signal(signal.SIGTERM)
    check_stopped(process, run_dir, reason)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_is_killed_while_starting_does_not_hold_the_others(data, tmp_path, launcher):
    """The one that is left was asked to end by its launcher, remembered it for a loop that never came, and was killed
    after half a minute; now it says whom it missed, or ends of the signal."""
    words = [str(w).format(port=free_port()) for w in LAUNCHERS[launcher]]
    words += ["train", *SETTINGS, f"run_dir={tmp_path}/run", f"data.path={data}"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: ranks(tmp_path / "run", 1))
    os.kill(ranks(tmp_path / "run", 1)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=90)
    assert process.returncode != 0 and not members(tmp_path / "run")
    assert "had not come: 1" in error or "Signal 15" in error or "return code = -9" in error, error
    assert not (tmp_path / "run").exists()


@pytest.fixture
def default_port():
    """Somebody else holds the port that deepspeed gives every job."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody really does
            s.bind(("", 29500))
            s.listen()
        yield


def test_jobs_on_one_machine_do_not_collide(data, tmp_path, default_port):
    """Started as the docs say, without a port, while somebody else holds the default one: two of one launcher, and one
    of the other."""
    settings = ["train", *SETTINGS, f"data.path={data}", "train.total_samples=80"]
    commands = [
        [BIN / "deepspeed", "--num_accelerators=2", "--module", "ldt"],
        [BIN / "deepspeed", "--num_gpus=2", "--module", "ldt"],
        [BIN / "torchrun", "--nproc_per_node=2", "-m", "ldt"],
    ]
    jobs = [
        subprocess.Popen([*command, *settings, f"run_dir={tmp_path}/{i}"], stderr=subprocess.PIPE)
        for i, command in enumerate(commands)
    ]
    for process in jobs:
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()
    assert len({lines(tmp_path / f"{i}")[-1]["digest"] for i in range(3)}) == 1


def test_a_taken_port_names_the_flag_of_the_launcher(data, tmp_path):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        command = [BIN / "deepspeed", "--num_accelerators=2", f"--master_port={s.getsockname()[1]}", "--module", "ldt"]
        command += ["train", *SETTINGS, f"run_dir={tmp_path}/run", f"data.path={data}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "start deepspeed with --master_port=PORT and a free one" in done.stderr, done.stderr


def ranks(run_dir: Path, rank: int) -> list[int]:
    """Those that have begun to be `ldt train` of this rank."""
    return [pid for pid in members(run_dir) if b"\0RANK=%d\0" % rank in read(pid, "environ")]
