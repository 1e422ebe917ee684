"""Steps that must not change the weights, in whole runs: noted, skipped alike on all ranks, rolled back, explained."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_data import write_shards
from training_cases import BATCH
from training_cases import SETTINGS as TRAINING

from ldt.checkpoint.checkpoint import Checkpoint, checkpoints_of, resolve
from ldt.checkpoint.manifest import TrainState, read_manifest
from ldt.config import load
from ldt.dist import World, broadcast
from ldt.engine.engine import FLOAT32_MAX, StepResult
from ldt.errors import InputError, RunError
from ldt.log import read_jsonl
from ldt.training.attempt import attempt
from ldt.training.bad_steps import RECENT_LOSSES, BadSteps
from ldt.training.config import TrainJob

COUNTS, SPOILED = [40, 24], 21
SETTINGS = [*TRAINING, "checkpoint.every_samples=16"]


def train_case(world: World, settings: list[str]) -> list:
    """Train in this pool: [how it ended, the lines of metrics.jsonl]."""
    config, end = load(TrainJob, None, SETTINGS + settings), "done"
    try:
        attempt(config, world)
    except RunError as error:
        end = str(error)
    return broadcast([end, list(read_jsonl(Path(config.run_dir) / "metrics.jsonl"))])


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """64 samples, one of which has a latent of NaNs."""
    path = tmp_path_factory.mktemp("spoiled")
    write_shards(path, COUNTS, spoiled={SPOILED: np.nan})
    return path


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_a_bad_step_is_skipped_alike_everywhere_and_noted(pool, spoiled, tmp_path, ranks, stage):
    settings = [f"run_dir={tmp_path}", f"data.path={spoiled}", "train.total_samples=128"]
    end, lines = pool(ranks).run(train_case, settings=[*settings, f"engine.zero_stage={stage}"])
    assert end == "done"
    bad = [r for r in lines if "skipped_first" in r]
    assert [r["reason"] for r in bad] == ["the loss is not finite"] * 2, "once an epoch"
    assert all(r["skipped_last"] - r["skipped_first"] == BATCH - 1 for r in bad)
    assert all(np.isfinite(r["loss"]) for r in lines if "loss" in r)
    assert [r["samples_seen"] for r in lines] == list(range(8, 129, 8)), "every position exactly once"
    assert read_manifest(resolve(tmp_path))["progress"]["skipped"] == [r["skipped_first"] for r in bad]


@pytest.mark.parametrize("stage", [0, 1])
def test_too_many_in_a_row_roll_back_once_and_are_passed_over(pool, spoiled, tmp_path, stage):
    settings = [f"run_dir={tmp_path}", f"data.path={spoiled}", "train.bad_steps=1", "train.total_samples=64"]
    settings += ["checkpoint.every_samples=32", f"engine.zero_stage={stage}"]
    end, lines = pool(2).run(train_case, settings=settings)
    assert end == "done"
    assert [r["samples_seen"] for r in lines] == list(range(8, 65, 8)), "the lines before the roll-back are set aside"
    (passed,) = (r for r in lines if "reason" in r)
    assert passed["reason"] == "passed over after a roll-back"
    aside = list(read_jsonl(tmp_path / "metrics.cut.jsonl"))
    assert aside[-1]["reason"] == "the loss is not finite" and aside[-1]["digest"] == passed["digest"]
    (before, again) = ([r for r in x if r["samples_seen"] == aside[0]["samples_seen"]] for x in (aside, lines))
    assert before[0]["loss"] == again[0]["loss"] and before[0]["grad_norm"] == again[0]["grad_norm"], (
        "the gradients of the step that was begun meanwhile are forgotten"
    )


def test_a_second_time_ends_the_run_with_an_explanation(pool, spoiled, tmp_path):
    settings = [f"run_dir={tmp_path}", f"data.path={spoiled}", "train.bad_steps=1", "train.total_samples=160"]
    end, _ = pool(2).run(train_case, settings=settings)
    assert "1 bad steps in a row at positions" in end and "after a roll-back had passed over earlier ones" in end
    assert "lower optimizer.lr" in end


def test_a_restart_remembers_the_roll_back_and_what_to_pass_over(pool, spoiled, tmp_path):
    """Else a requeue after each roll-back would roll back again and again."""
    settings = [f"run_dir={tmp_path}", f"data.path={spoiled}", "train.bad_steps=1"]
    end, lines = pool(2).run(train_case, settings=[*settings, "train.total_samples=64"])
    state = Checkpoint.read(resolve(tmp_path)).state
    (passed,) = (r for r in lines if "reason" in r)
    assert end == "done" and state.rolled_back and state.avoid == [passed["skipped_first"]]
    end, _ = pool(1).run(train_case, settings=[*settings, "train.total_samples=160"])
    assert "after a roll-back had passed over earlier ones" in end


def test_the_roll_back_is_saved_before_the_next_step(pool, spoiled, tmp_path):
    """The checkpoint that was returned to says so at once: a kill in the next step changes nothing."""
    settings = [f"run_dir={tmp_path}", f"data.path={spoiled}", "train.bad_steps=1", "checkpoint.every_samples=8"]
    _, lines = pool(1).run(train_case, settings=[*settings, "train.total_samples=64", "checkpoint.keep=99"])
    (passed,) = (r for r in lines if "reason" in r)
    for path in checkpoints_of(tmp_path):
        checkpoint = Checkpoint.read(path)
        assert checkpoint.state.rolled_back == (checkpoint.samples_seen >= passed["skipped_first"])


def test_without_a_checkpoint_to_return_to_it_is_said(pool, spoiled, tmp_path):
    settings = [f"run_dir={tmp_path}", f"data.path={spoiled}", "train.bad_steps=1", "checkpoint.every_samples=0"]
    end, _ = pool(1).run(train_case, settings=[*settings, "train.total_samples=64"])
    assert "before there was a checkpoint to return to" in end


def test_loss_spikes_are_skipped_once_there_is_enough_to_judge_by(pool, tmp_path):
    write_shards(tmp_path / "data", COUNTS, spoiled={SPOILED: 3e4})
    steps = RECENT_LOSSES + 24
    settings = [f"run_dir={tmp_path}/run", f"data.path={tmp_path}/data", "train.spike_factor=50", "optimizer.lr=1e-5"]
    end, lines = pool(2).run(train_case, settings=[*settings, f"train.total_samples={steps * BATCH}"])
    assert end == "done"
    spikes = [r for r in lines if r.get("reason") == "loss spike"]
    assert 2 <= len(spikes) <= 4 and all(r["samples_seen"] > RECENT_LOSSES * BATCH for r in spikes)
    assert all(r["skipped_loss"] > 1e6 for r in spikes)
    before = [r["loss"] for r in lines if "loss" in r and r["samples_seen"] <= RECENT_LOSSES * BATCH]
    assert max(before) > 1e6, "without enough losses to judge by they are trained on"
    assert max(r["loss"] for r in lines if "loss" in r and r["samples_seen"] > RECENT_LOSSES * BATCH) < 1e6
    assert len(read_manifest(resolve(tmp_path / "run"))["progress"]["recent_losses"]) == RECENT_LOSSES


def test_the_limit_is_robust():
    judge = BadSteps(in_a_row=3, spike_factor=10)
    losses = [1.0 + 0.01 * (i % 10) for i in range(RECENT_LOSSES)]

    def limit_after(recent: list[float], **state: Any) -> float:
        return judge.loss_limit(8, TrainState(0, "data", recent_losses=recent, **state))

    limit = limit_after(losses)
    assert limit == pytest.approx(1.045 + 10 * 1.4826 * 0.025), "the median, and the deviation of a normal distribution"
    assert limit_after([*losses[:-3], 1e9, 1e9, 1e9]) == pytest.approx(limit, rel=0.05)
    assert limit_after(losses[:-1]) == float("inf")
    assert limit_after(losses, avoid=[8]) == -float("inf")


def test_only_runs_that_watch_for_spikes_remember_losses():
    """The newest hundred, which every checkpoint of such a run carries."""
    watching, blind = BadSteps(in_a_row=3, spike_factor=10), BadSteps(in_a_row=3, spike_factor=0)
    state, other = TrainState(0, "data"), TrainState(0, "data")
    for step in range(RECENT_LOSSES + 5):
        watching.passed(float(step), state)
        blind.passed(float(step), other)
    assert state.recent_losses == [float(step) for step in range(5, RECENT_LOSSES + 5)]
    assert other.recent_losses == []
    assert blind.loss_limit(8, state) == math.inf, "0 stands for never, whatever losses a checkpoint brings along"


LARGEST_NORM = math.sqrt(FLOAT32_MAX)  # from which on its square is no float32 any more


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "the loss is not finite"),
        (math.inf, math.nan, "the loss is not finite"),
        (1.0, math.nan, "the gradient is not finite"),
        (1.0, LARGEST_NORM, "the gradient is not finite"),
        (1.0, LARGEST_NORM * (1 - 1e-15), "loss spike"),
    ],
)
def test_a_skipped_step_is_noted_with_its_reason(loss, grad_norm, reason):
    state = TrainState(0, "data", skipped=[8])
    assert BadSteps(3, 0.0).judge(16, StepResult(loss, grad_norm, False, []), state) == reason
    assert state.skipped == [8, 16]


def test_only_bad_steps_in_a_row_roll_back_and_only_once():
    judge, state = BadSteps(in_a_row=2, spike_factor=0), TrainState(0, "data")
    bad = StepResult(math.nan, 1.0, False, [])
    judge.judge(0, bad, state)
    judge.passed(1.0, state)
    judge.judge(16, bad, state)
    assert not judge.exhausted, "a good step lies between"
    judge.judge(24, bad, state)
    assert judge.exhausted
    roll_back = judge.begin_roll_back(state, 8)
    assert roll_back.reason == "2 bad steps in a row at positions 16 to 31" and not judge.exhausted
    restored = TrainState(8, "data", avoid=[4])
    roll_back.mark_for_skipping(restored)
    assert restored.avoid == [4, 16, 24] and restored.rolled_back
    for first in (16, 24):
        assert judge.judge(first, bad, restored) == "passed over after a roll-back"
    assert not judge.exhausted, "what is passed over on purpose is no new sign of divergence"
    for first in (32, 40):
        judge.judge(first, bad, restored)
    with pytest.raises(RunError, match="2 bad steps in a row at positions 32 to 47, after a roll-back"):
        judge.begin_roll_back(restored, 8)


@pytest.mark.parametrize("setting", ["train.bad_steps=0", "train.spike_factor=-1", "train.time_limit_minutes=-1"])
def test_wrong_settings_are_refused(setting):
    with pytest.raises(InputError, match=setting.split("=")[0]):
        load(TrainJob, None, ["run_dir=x", "data.path=y", setting])


def test_the_log_stays_readable_by_others(tmp_path, pool, spoiled):
    """Infinite losses are written so that strict JSON readers can read them."""
    settings = [f"run_dir={tmp_path}", f"data.path={spoiled}", "train.total_samples=64"]
    pool(1).run(train_case, settings=settings)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
