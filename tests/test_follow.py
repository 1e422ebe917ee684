"""Following a run in one process, on directories that look like checkpoints; tests/test_watch.py has whole watchers."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldt.dist import World
from ldt.errors import InputError
from ldt.evaluation import follow as following
from ldt.evaluation.follow import POLL_PERIOD_S, follow
from ldt.run import claims
from ldt.run.claims import Claim, pinned, want
from ldt.run.outcome import DONE, begin, write_outcome

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Waited(Exception):
    """Instead of waiting: the follower has nothing to do, and has not ended."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    add_checkpoint(tmp_path, 10)
    add_checkpoint(tmp_path, 20)
    begin(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def polls(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens while the follower waits, once each; it raises `Waited` when nothing is left."""
    acts: list[Callable[[], object]] = []

    def sleep(seconds: float) -> None:
        assert seconds == POLL_PERIOD_S
        if not acts:
            raise Waited
        acts.pop(0)()

    monkeypatch.setattr(following.time, "sleep", sleep)
    return acts


def add_checkpoint(run_dir: Path, samples_seen: int) -> Path:
    path = run_dir / "checkpoints" / f"{samples_seen:012d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    (path / "manifest.xxh64").write_text("0123456789abcdef")
    return path


def followed(run_dir: Path, key: str = "a", **keys: str) -> list[int]:
    return [int(path.name) for path in follow(run_dir, key, ALONE, **keys)]


def files(run_dir: Path) -> list[str]:
    """The claims and wishes beside the checkpoints."""
    return [p.name for p in (run_dir / "checkpoints").iterdir() if p.is_file()]


def test_each_comes_once_and_oldest_first_until_the_run_has_ended(run_dir, polls):
    polls += [lambda: None, lambda: add_checkpoint(run_dir, 30), lambda: write_outcome(run_dir, DONE)]
    assert followed(run_dir) == [10, 20, 30] and not polls
    assert not files(run_dir)
    assert followed(run_dir) == [], "all are done"
    assert followed(run_dir, "b") == [10, 20, 30], "other work goes over them by itself"


def test_two_share_a_run_and_what_waits_is_kept(run_dir):
    first, second = follow(run_dir, "a", ALONE), follow(run_dir, "a", ALONE)
    one = next(first)
    two = one.with_name(f"{20:012d}")
    assert one.name.endswith("10") and pinned(one) and pinned(two)
    assert next(second) == two
    with pytest.raises(Waited):
        next(second)
    assert pinned(one) and not pinned(two), "the second is done with its own, not with that of the first"
    with pytest.raises(Waited):
        next(first)
    assert not files(run_dir)


def test_what_was_interrupted_comes_again(run_dir):
    follower = follow(run_dir, "a", ALONE)
    next(follower)
    follower.close()
    write_outcome(run_dir, DONE)
    assert followed(run_dir) == [10, 20]


def test_a_claim_whose_owner_may_be_dead_keeps_the_follower(run_dir, polls, monkeypatch):
    """The run has ended, and the checkpoint becomes free only after a while."""
    path = run_dir / "checkpoints" / f"{10:012d}"
    Claim.take(path, "a")
    (claim,) = (run_dir / "checkpoints").glob("*.claim-a")
    os.utime(claim, (0, 0))
    write_outcome(run_dir, DONE)
    polls += [lambda: None, lambda: monkeypatch.setattr(claims, "WATCH_PERIOD_S", 0.0)]
    assert followed(run_dir) == [20, 10] and not polls


def test_what_is_done_keeps_nobody_though_its_claim_was_left(run_dir):
    """By a watcher that was killed right after it had finished."""
    write_outcome(run_dir, DONE)
    assert followed(run_dir) == [10, 20]
    Claim.take(run_dir / "checkpoints" / f"{20:012d}", "a")
    (claim,) = (run_dir / "checkpoints").glob("*.claim-a")
    os.utime(claim, (0, 0))
    assert followed(run_dir) == []


def test_a_claim_of_the_living_keeps_nobody(run_dir):
    claim = Claim.take(run_dir / "checkpoints" / f"{10:012d}", "a")
    write_outcome(run_dir, DONE)
    assert followed(run_dir) == [20]
    assert claim is not None


def test_one_that_somebody_else_has_just_finished_is_given_back(run_dir, monkeypatch):
    take = Claim.take

    def late(path: Path, key: str) -> Claim | None:
        if path.name.endswith("10"):
            following._mark(run_dir, path, key).touch()  # the other one, right after this one has looked
        return take(path, key)

    monkeypatch.setattr(Claim, "take", late)
    write_outcome(run_dir, DONE)
    assert followed(run_dir) == [20]
    assert not files(run_dir)


def test_what_is_unfinished_or_half_deleted_is_passed_over_and_a_new_save_is_new(run_dir):
    (add_checkpoint(run_dir, 5) / "manifest.json").unlink()
    (add_checkpoint(run_dir, 7) / "manifest.xxh64").unlink()
    write_outcome(run_dir, DONE)
    assert followed(run_dir) == [10, 20]
    ten, twenty = (run_dir / "checkpoints" / f"{samples_seen:012d}" for samples_seen in (10, 20))
    (ten / "manifest.xxh64").write_text("fedcba9876543210")
    follower = follow(run_dir, "a", ALONE)
    assert next(follower) == ten and not pinned(twenty), "nobody needs it any more"
    assert list(follower) == []


@pytest.mark.parametrize(
    ("job", "says", "ends"),
    [
        ("", "running", False),
        ("", "done", True),
        (str(os.getpid()), "done", False),  # a new start of it waits or works
        ("4194305", "running", True),  # greater than any process number: killed before it could say so
    ],
    ids=["none running", "none done", "lives", "killed"],
)
def test_a_job_decides_and_without_one_the_outcome(run_dir, job, says, ends):
    if says == "done":
        write_outcome(run_dir, DONE)
    if ends:
        assert followed(run_dir, job=job) == [10, 20]
    else:
        with pytest.raises(Waited):
            followed(run_dir, job=job)


@pytest.mark.parametrize(("code", "ends"), [(None, False), (DONE, True)])
def test_where_nobody_can_say_whether_the_job_lives_the_outcome_decides(run_dir, monkeypatch, code, ends):
    monkeypatch.setattr(following, "is_alive", lambda job: None)
    if code is not None:
        write_outcome(run_dir, code)
    assert following._has_ended(run_dir, "7") == ends


def test_other_ranks_take_part_and_touch_no_file(run_dir, monkeypatch):
    path = run_dir / "checkpoints" / f"{10:012d}"
    of_rank_0: Iterator[object] = iter([True, (path, False), (None, False), (path, False), (None, True)])
    monkeypatch.setattr(following, "broadcast", lambda value: next(of_rank_0))
    follower = follow(run_dir, "a", World(1, 2, 1, 2, torch.device("cpu")))
    assert next(follower) == path
    want(path, "a")
    with pytest.raises(Waited):
        next(follower)
    assert files(run_dir) == [f"{10:012d}.wanted-a"] and not list((run_dir / "evaluations").glob(".*.done-a"))


def test_there_has_to_be_a_run(tmp_path):
    with pytest.raises(InputError, match="is not a run directory to follow; start the training first"):
        followed(tmp_path / "nowhere")
