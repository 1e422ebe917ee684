"""What pools of ranks (pool.py) and forked processes (forked.py) say of a case or a program that goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import forked
import pool as pools
import pytest
from pool import CaseFailed

from ldt.data import philox
from ldt.dist import World, all_gather


def answer_case(world: World, number: int) -> list[int]:
    print("{not an answer}")
    return all_gather(number + world.rank)


def wrong_case(world: World, how: str) -> None:
    if world.rank == 1:
        if how == "raises":
            raise KeyError("of rank 1")
        if how == "warns":
            warnings.warn("of rank 1", stacklevel=1)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"(?s)rank 1 of 2:.*in wrong_case.*KeyError: 'of rank 1'"),
        ("warns", r"(?s)rank 1 of 2:.*UserWarning: of rank 1"),
        ("dies", "rank 1 of 2:\nthe process ended with code -9"),
        ("hangs", r"no answer from ranks \[1\] of 2 within 3 s"),
    ],
)
def test_a_case_that_goes_wrong_is_told_and_the_next_one_finds_new_ranks(pool, monkeypatch, how, message):
    assert pool(2).run(answer_case, number=5) == [5, 6]
    with monkeypatch.context() as patch:
        if how == "hangs":
            patch.setattr(pools, "TIMEOUT", 3)
        with pytest.raises(CaseFailed, match=message):
            pool(2).run(wrong_case, how=how)
    assert pool(2).run(answer_case, number=7) == [7, 8]


def test_a_forked_program_is_as_a_started_one(tmp_path):
    """Its arguments, streams, exit code, environment and directory are those that `python` gives it."""
    code = (
        "import os, sys; print(sys.argv, os.environ['X'], os.getcwd()); print(__name__, file=sys.stderr); sys.exit(7)"
    )
    (tmp_path / "program.py").write_text(code)
    env = os.environ | {"X": "y"}
    for words in (["-c", code, "a", "b"], [str(tmp_path / "program.py"), "a"]):
        there = subprocess.run([sys.executable, *words], env=env, cwd=tmp_path, capture_output=True, text=True)
        here = forked.run(*words, env=env, cwd=tmp_path)
        assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)


def test_a_forked_program_that_is_late_is_killed():
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        forked.run("-c", "import time; print('begun', flush=True); time.sleep(60)", timeout=3)
    assert caught.value.stdout in ("begun\n", "")


def test_started_interpreters_load_what_the_server_has_compiled():
    """Real interpreters, of launchers for instance, compile nothing again, and draw the same bits."""
    code = "import warmed_up as w; from ldt.data import philox as p; print(p.words(3, 1, [5], 4).tolist()); "
    forked.run("-c", code)
    compiled = "(p._rows, w.digest._add_products)"
    hits = f"print(*(sum(f.stats.cache_hits.values()) for f in {compiled}))"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-c", code + hits]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    words, hits = done.stdout.splitlines()
    assert json.loads(words) == philox.words(3, 1, [5], 4).tolist()
    assert "0" not in hits.split()
