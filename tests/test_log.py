"""Logs: JSONL that survives torn writes and rewinds, and its mirror in real (offline) wandb."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import forked
import pytest

from ldt import log, progress, tracking
from ldt.cli import main
from ldt.errors import InputError
from ldt.run import directory


def write(path, *lines):
    path.write_text("".join(lines))


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "m.jsonl"
    records = [{"samples_seen": i, "text": "ü\n"} for i in range(3)]
    for r in records:
        log.append_jsonl(path, r)
    assert list(log.read_jsonl(path)) == records
    assert list(log.read_jsonl(tmp_path / "absent.jsonl")) == []


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, '{"a": 1}\n', '{"a": 2}\n', '{"a": ')
    assert list(log.read_jsonl(path)) == [{"a": 1}, {"a": 2}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, '{"a": 1}\n', '{"a": \n', '{"a": 3}\n')
    with pytest.raises(InputError, match="m.jsonl line 2 is not a JSON object"):
        list(log.read_jsonl(path))


def test_cutting_back_loses_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, *(f'{{"samples_seen":{n}}}\n' for n in (10, 20, 30, 40)), '{"samples_se')
    assert log.keep_jsonl_until(path, "samples_seen", 20) == 2
    assert [r["samples_seen"] for r in log.read_jsonl(path)] == [10, 20]
    assert [r["samples_seen"] for r in log.read_jsonl(tmp_path / "m.cut.jsonl")] == [30, 40]
    assert path.read_text().endswith("}\n")  # the torn tail is gone, so that the next line starts on its own


def test_a_message_is_a_line_whatever_names_are_in_it(capsys):
    log.configure(rank=0)
    log.get_logger("x").info("2 images in 1 class (%s)", "two\nlines\x1b[2J")
    assert capsys.readouterr().err == "2 images in 1 class (two\\nlines\\x1b[2J)\n"


def test_nothing_is_drawn_where_nobody_watches(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN", 0.0)
    log.configure(rank=0, quiet=True)
    with log.progress(10, "img", "train") as bar:
        bar.update(10)
    log.configure(rank=1)
    with log.progress(10, "img", "train") as bar:
        bar.update(10)
    log.configure(rank=0)
    with log.progress(10, "img", "train", show=False) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_is_a_plain_line_now_and_then(capsys, monkeypatch):
    log.configure(rank=0)
    with log.progress(1000, "img", "train", 200) as bar:
        bar._past[0] = (bar._past[0][0] - 3, *bar._past[0][1:])
        bar.update(100, loss=1.0, waited=0.0)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "PLAIN", 0.0)
        bar.update(100, loss=2.0, waited=0.0)
    line = capsys.readouterr().err
    pattern = r"train  400 of 1,000 img \(40%\)  [\d,]+ img/s  \d+ s to go  loss 1\.5000  data wait 0%\n"
    assert re.fullmatch(pattern, line), line


def test_the_first_plain_line_comes_soon(capsys):
    log.configure(rank=0)
    with log.progress(1000, "img", "train") as bar:
        bar.update(100)
        assert capsys.readouterr().err == ""
        bar._drawn -= progress.FIRST  # as long ago
        bar.update(100)
        assert "train  200 of 1,000 img" in capsys.readouterr().err
        bar._drawn -= progress.FIRST
        bar.update(100)
        assert capsys.readouterr().err == "", "the next ones are a minute apart"


TALKATIVE = """
import sys, time
from ldt import log
log.configure(0)
with log.progress(4, "img", "train") as bar:
    for i in range(4):
        time.sleep(0.3)
        bar.update(1, loss=0.5 * (i + 1))
        log.get_logger("x").info("word %d", i)
print("done")
"""


def test_the_first_moments_foretell_nothing():
    """They were `1 of 9,500 img (0%)  1.9 img/s  1 h 24 min to go` of a second's work."""
    bar = progress.ProgressLine(9500, "img", "nearest images", show=False)
    bar._past[0] = (bar._past[0][0] - 0.5, *bar._past[0][1:])
    bar.update(1)
    assert "img/s" in bar.line() and "to go" not in bar.line()


def test_on_a_terminal_one_line_renews_itself_below_the_log():
    """In a real pseudo-terminal of 40 columns, read as its screen would be."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", TALKATIVE], stdout=follower, stderr=follower, stdin=follower)
    os.close(follower)
    content = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(leader, 1 << 16):
            content += piece
    os.close(leader)
    assert child.wait() == 0
    screen = [line.split("\r")[-1].rpartition("\x1b[K")[2] for line in content.decode().split("\r\n")]
    assert screen[:4] == [f"word {i}" for i in range(4)]
    assert re.fullmatch(r"train  4 of 4 img \(100%\)  [\d.]+ img/s", screen[4]), "whole words, the first of them"
    assert screen[5:] == ["done", ""]
    assert content.count(b"train  ") < 9


LEFT_ALONE = """
import signal, sys, time
from pathlib import Path
from ldt import log
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as for a job that its shell has disowned
log.configure(0)
with log.progress(40, "img", "train") as bar:
    for i in range(40):
        bar.update(1, loss=1.0)
        log.get_logger("x").info("word")
        if i == 0:
            Path(sys.argv[1]).write_text("begun")
            sys.stdin.read()
Path(sys.argv[1]).write_text("trained to the end")
"""


def test_a_terminal_that_goes_away_does_not_end_the_work(tmp_path):
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE, tmp_path / "said"], stdout=follower, stderr=follower, stdin=subprocess.PIPE
    )
    os.close(follower)
    while not (tmp_path / "said").exists() and child.poll() is None:
        time.sleep(0.05)
    os.close(leader)
    child.stdin.close()
    child.wait()
    assert (tmp_path / "said").read_text() == "trained to the end"


def test_the_time_to_go_is_there_on_eighty_columns():
    bar = progress.ProgressLine(400_000_000, "img", "train", 123_456_789, show=False)
    bar._past[0] = (bar._past[0][0] - 60, *bar._past[0][1:])
    bar.update(350_000, loss=0.1234)
    assert len(bar.line()) > 79 >= len(bar.line(79))
    assert bar.line().startswith(bar.line(79)) and bar.line(79).endswith(" min to go")


def test_the_line_of_progress_goes_back_with_the_work():
    with log.progress(1000, "img", "train", show=False) as bar:
        bar.update(600)
        bar.go_back(200)
        assert bar.line().startswith("train  200 of 1,000 img (20%)")
        bar.update(100)
        assert bar.line().startswith("train  300 of 1,000 img (30%)")


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 "), (999, "999 "), (74_000, "74.0 k"), (330_300_000, "330 M"), (5.57e9, "5.57 G"), (3e15, "3000 T")],
)
def test_numbers_are_short(number, said):
    assert progress.si_format(number) == said


def test_wandb_offline_holds_the_records(tmp_path, monkeypatch):
    """No key: an offline run whose file, read back with wandb's own reader, has every record and the clock as axis."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    records = [{"samples_seen": 64 * i, "loss": 1 / i} for i in (1, 2, 3)]
    with tracking.track(run_dir, {"seed": 7, "log": {"wandb": True}}, rank=0) as tracker:
        for r in records:
            tracker.log(r)
    files = list(run_dir.rglob("*.wandb"))
    assert len(files) == 1 and "offline-run" in str(files[0])
    history, run = read_wandb(files[0])
    assert [{k: h[k] for k in ("samples_seen", "loss")} for h in history] == records
    assert run["config"]["seed"] == 7 and run["name"] == "run" and run["job"] == "train"


KEY = "0123456789abcdef" * 2 + "01234567"


def test_secrets_stay_out_of_what_a_run_saves(tmp_path, monkeypatch):
    """Neither from the environment nor from an edited file or a command line, nor in wandb's own files."""
    literal = KEY[::-1]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ldt", "train", f"key={KEY}"])
    diff = f"+export WANDB_API_KEY={literal}\n+run({KEY!r})\n+api_key: '{literal}'\n+token = uuid.uuid4().hex\n"
    monkeypatch.setattr(directory, "git", lambda *words: diff if words[0] == "diff" else "abc")
    run_dir = tmp_path / "run"
    directory.prepare(run_dir, "seed: 1\n", 1)
    with tracking.track(run_dir, {"seed": 1, "log": {"wandb": True}}, rank=0) as tracker:
        tracker.log({"samples_seen": 64, "loss": 1.0})
    saved = [p for p in run_dir.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in saved)
    for path in saved:
        content = path.read_bytes()
        assert KEY.encode() not in content and literal.encode() not in content, path
    kept = (run_dir / "source.diff").read_text()
    assert kept == (
        "+export WANDB_API_KEY=<removed>\n+run('<removed>')\n+api_key: '<removed>'\n+token = uuid.uuid4().hex\n"
    )


def test_without_trackers_or_on_other_ranks_nothing_is_written(tmp_path):
    both = {"log": {"wandb": True, "tensorboard": True}}
    for config, rank in (({}, 0), ({"log": {"wandb": False}}, 0), (both, 1)):
        with tracking.track(tmp_path, config, rank) as tracker:
            tracker.log({"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_restart_is_the_same_wandb_run_and_all_else_one_of_its_own(tmp_path, offline, capsys):
    """Two starts of a training, its replay twice: three wandb runs in one group, never one by two processes."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = {"log": {"wandb": True}}
    for seen in (64, 128):
        record = {"samples_seen": seen, "loss": 1 / seen}
        log.append_jsonl(run_dir / "metrics.jsonl", record)
        with tracking.track(run_dir, config, rank=0) as tracker:
            tracker.log(record)
        time.sleep(1.1)  # wandb's directories are told apart by their second
    log.append_jsonl(run_dir / "evaluations.jsonl", {"samples_seen": 100, "fd_x": 9.0})
    for _ in range(2):
        assert main(["replay", str(run_dir)]) == 0
    runs = [read_wandb(p) for p in sorted(run_dir.rglob("*.wandb"), key=lambda p: p.stat().st_mtime)]
    assert [run["job"] for _, run in runs] == ["train", "train", "replay", "replay"]
    assert len({run["id"] for _, run in runs}) == 3 and runs[0][1]["id"] == runs[1][1]["id"]
    assert len({run["group"] for _, run in runs}) == 1
    assert [h["samples_seen"] for h in runs[3][0]] == [64, 100, 128]
    assert runs[3][0][1]["fd_x"] == 9.0 and runs[3][1]["axis"] == "samples_seen"


MIRRORED = """
import os, signal, sys
from pathlib import Path
from ldt import log, tracking
log.configure(0)
with tracking.track(Path(sys.argv[1]), {"log": {"wandb": True, "tensorboard": True}}, rank=0) as tracker:
    tracker.log({"samples_seen": 64, "loss": 1.0})
    for children in list(Path("/proc/self/task").glob("*/children")):
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)
    for seen in range(128, 640, 64):
        tracker.log({"samples_seen": seen, "loss": 1.0})
print("trained to the end")
"""


def test_a_mirror_whose_service_is_killed_does_not_end_the_run(tmp_path, offline):
    """As the kernel does when memory is short. The other mirror has all of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    alone = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # not this process's service
    command = [sys.executable, "-c", MIRRORED, tmp_path]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120)
    assert "trained to the end" in done.stdout, done.stderr
    assert done.stderr.count("Wandb is lost") == 1 and "ldt replay" in done.stderr
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("loss")) == 9


CAN_NOT_START = """
import sys
from pathlib import Path
from ldt import log, tracking
log.configure(0)
with tracking.track(Path(sys.argv[1]), {"log": {"wandb": True, "tensorboard": True}}, rank=0) as tracker:
    tracker.log({"samples_seen": 64, "loss": 1.0})
print("trained to the end")
"""


def test_where_wandb_writes_does_not_depend_on_its_environment(tmp_path, offline):
    """It is in the run directory, also with a WANDB_DIR that can't be written."""
    log.append_jsonl(tmp_path / "metrics.jsonl", {"samples_seen": 64, "loss": 1.0})
    alone = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | {"WANDB_DIR": "/proc/nowhere"}
    done = subprocess.run([sys.executable, "-c", CAN_NOT_START, tmp_path], env=alone, capture_output=True, text=True)
    assert "trained to the end" in done.stdout and "goes on without it" not in done.stderr, done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("why", ["read-only", "a file", "another mode"])
def test_a_mirror_that_can_not_start_does_not_end_the_run(tmp_path, offline, monkeypatch, why):
    mode = {"read-only": 0o555, "a file": None, "another mode": 0o755}[why]
    for name in ("wandb", "tensorboard"):
        if mode is None:
            (tmp_path / name).write_text("")
        else:
            (tmp_path / name).mkdir(mode)
    if why == "another mode":
        monkeypatch.setenv("WANDB_MODE", "sideways")
    log.append_jsonl(tmp_path / "metrics.jsonl", {"samples_seen": 64, "loss": 1.0})
    alone = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # not this process's service

    def start(*command):
        return forked.run(*command, env=alone, unprivileged=True)

    done = start("-c", CAN_NOT_START, tmp_path)
    assert "trained to the end" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("the run goes on without it") == (1 if why == "another mode" else 2)
    replayed = start("-m", "ldt", "replay", tmp_path)
    assert replayed.returncode == 2 and "ldt replay: error: wandb can't start in" in replayed.stderr, replayed.stderr
    assert "Traceback" not in replayed.stderr


def test_tensorboard_holds_every_number_and_forgets_what_was_lost(tmp_path, capsys):
    """Read back with TensorBoard's own reader; the second start resumes at 128, so what came after it is gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"log": {"tensorboard": True}}

    def records(numbers, scale):
        return [{"samples_seen": n, "loss": scale / n, "digest": "ab", "time": 1.8e9 + n} for n in numbers]

    for resumed_at, lines in ((0, records((64, 128, 192), 1)), (128, records((192, 256), 2))):
        with tracking.track(tmp_path, config, 0, resumed_at) as tracker:
            for r in lines:
                tracker.log(r)
        time.sleep(1.1)  # event files are told apart by their second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    expected = [(64, 1 / 64), (128, 1 / 128), (192, 2 / 192), (256, 2 / 256)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(n, pytest.approx(v)) for n, v in expected]
    assert events.Scalars("loss")[0].wall_time == 1.8e9 + 64


def test_tensorboard_that_is_not_there_is_said_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for rank in (0, 1):  # all ranks together, so that none waits for one that has left
        with pytest.raises(InputError, match=r"pip install ldt-train\[tensorboard\]"):
            tracking.track(tmp_path, {"log": {"tensorboard": True}}, rank)


def test_replaying_nothing_is_refused(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "no lines in metrics.jsonl" in capsys.readouterr().err


def read_wandb(path):
    """History rows and run of an offline wandb file: protobuf records in a LevelDB log behind a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    history, run, over = [], {}, False
    end = time.monotonic() + 30  # wandb's service may still be writing when the run has been finished
    while not over and time.monotonic() < end:
        records = [wandb_internal_pb2.Record.FromString(d) for d in leveldb_records(path.read_bytes(), start=7)]
        over = any(r.WhichOneof("record_type") == "exit" for r in records)
        time.sleep(0 if over else 0.1)
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            history.append(items)
        elif kind == "run":
            config = {u.key: json.loads(u.value_json) for u in record.run.config.update if not u.key.startswith("_")}
            r = record.run
            run |= {"config": config, "name": r.display_name, "id": r.run_id, "group": r.run_group, "job": r.job_type}
        elif kind == "metric" and record.metric.glob_name == "*":
            run["axis"] = record.metric.step_metric
    return history, run


def leveldb_records(content, start, block=32768):
    """Records of a LevelDB log: blocks of fragments (crc, length, kind: 1 whole, 2 first, 3 middle, 4 last)."""
    position, parts = start, []
    while position + 7 <= len(content):
        if block - position % block < 7:  # the rest of a block is padding
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
