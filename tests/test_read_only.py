"""Runs that one may only read: every command says where else its output can go, before it works, and then does it."""

import itertools
import shutil
import subprocess
from pathlib import Path

import forked
import pytest
from contents import everything
from run_data import shared_run

from ldt.run import directory, outcome

FAST = ["evaluate.images=16", "evaluate.steps=1", "evaluate.block=8", "evaluate.cache_dir={tmp}/cache"]


@pytest.fixture
def run_dir(tmp_path_factory, tmp_path):
    path = Path(shutil.copytree(shared_run(tmp_path_factory), tmp_path / "run"))
    directory.prepare(path, "seed: 1\n", 1)
    outcome.begin(path)
    outcome.write_outcome(path, outcome.DONE, 2000)
    for p in (path, *path.rglob("*")):
        p.chmod(0o555 if p.is_dir() else 0o444)
    yield path
    for p in (path, *path.rglob("*")):
        p.chmod(0o755)


def ldt(*words: str) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", "ldt", *words, unprivileged=True)


@pytest.mark.parametrize(
    ("command", "settings", "elsewhere"),
    [
        ("sample", ["images=4", "steps=1", "block=4"], "output={tmp}/grid.png"),
        ("evaluate", FAST, "evaluate.output={tmp}/scores/evaluations.jsonl"),
        ("report", ["neighbours=0"], "output={tmp}/report.html"),
        ("export", ["to={run}/model"], "to={tmp}/model"),
    ],
)
def test_output_goes_elsewhere(run_dir, tmp_path, command, settings, elsewhere):
    words = [command, str(run_dir), *(s.format(tmp=tmp_path, run=run_dir) for s in settings)]
    before = everything(run_dir)
    refused = ldt(*words)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    assert "Permission denied" in refused.stderr and f"{run_dir}" in refused.stderr
    key, _, place = elsewhere.format(tmp=tmp_path).partition("=")
    assert command == "export" or f"{key}=" in refused.stderr, refused.stderr
    done = ldt(*words, f"{key}={place}")
    assert done.returncode == 0 and Path(place).exists(), done.stderr
    assert everything(run_dir) == before


@pytest.mark.parametrize("command", ["status", "inspect"])
def test_looking_needs_no_right_to_write(run_dir, command):
    done = ldt(command, str(run_dir))
    assert done.returncode == 0, done.stderr


def test_watching_needs_it_and_says_so(run_dir):
    done = ldt("evaluate", str(run_dir), "--watch", *FAST[:3])
    assert done.returncode == 2 and "score without --watch" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *itertools.product(["status", "report"], ["environment.jsonl", "metrics.jsonl", "config.yaml", "checkpoints"]),
        *itertools.product(["evaluate", "sample", "inspect"], ["checkpoints"]),
    ],
)
def test_what_may_not_be_read_is_named(run_dir, command, name):
    path = run_dir / name
    run_dir.chmod(0o755)
    path.touch()
    path.chmod(0)
    few = [s.format(tmp=run_dir.parent) for s in FAST] if command == "evaluate" else []
    done = ldt(command, str(run_dir), *few)
    path.chmod(0o755)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1) or "Permission denied" in done.stderr or "complete checkpoint" in done.stderr
