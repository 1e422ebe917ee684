"""`tools/compare_recipes.py`: both sides trained and scored for real at tiny size, stopped once; its table by hand."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare_recipes
import forked
import pytest
from compare_recipes import Failed, plan, run_of, table
from run_data import make_autoencoder, make_images

from ldt.config import to_yaml
from ldt.log import append_jsonl, read_jsonl
from ldt.training.config import DataConfig, TrainJob

ROOT = Path(__file__).parents[1]
SCORE = "fd_efficientnet_lite0"
PATIENCE = 280
"""Seconds for each program that the tool starts."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_autoencoder(root / "vae")
    make_images(root / "images", 60)
    keys = [f"images.path={root}/images", "images.size=32", "images.fit=pad", f"autoencoder={root}/vae"]
    done = forked.run("-m", "ldt", "encode", *keys, f"output={root}/shards", "validation_fraction=0.2")
    assert done.returncode == 0, done.stderr
    return root


def started(data, output):
    """The tool, comparing a recipe with an inner head."""
    words = ["--recipe", ROOT / "configs" / "study" / "inner_head.yaml", "--seeds", 3, "--samples", 800]
    words += ["--recipe-samples", 64, "--checkpoints", 2, "--processes", 1, "--output", output]
    words += [f"data.path={data}/shards", "model={width: 48, depth: 3, heads: 2}", "train.global_batch=8"]
    words += ["log.every_samples=8", f"evaluate={{images: 20, block: 10, steps: 2, cache_dir: {data}/cache}}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, ROOT / "tools" / "compare_recipes.py", *words]
    return subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_trains_scores_and_goes_on_where_it_stopped(data, tmp_path):
    dit, recipe, log = tmp_path / "dit-800-seed3", tmp_path / "inner_head-64-seed3", "metrics.jsonl"
    with started(data, tmp_path) as first:
        while first.poll() is None and not (dit / log).exists():
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=PATIENCE)
    assert first.returncode == 1 and f"the training of {dit} left with 75" in said, said
    with started(data, tmp_path) as second:
        out, said = second.communicate(timeout=5 * PATIENCE)
    assert second.returncode == 0, said

    lines = [r for r in read_jsonl(dit / log) if "loss" in r]
    assert [r["samples_seen"] for r in lines] == list(range(8, 801, 8)) and {r["attempt"] for r in lines} == {0, 1}
    pieces = list(read_jsonl(dit / "cpu.jsonl"))
    assert len(pieces) == 2 and sum(p["samples"] for p in pieces) == 800 and all(p["cpu_seconds"] > 0 for p in pieces)

    ours, theirs = (list(read_jsonl(run / "evaluations.jsonl")) for run in (recipe, dit))
    told = [(r["samples_seen"], r["guidance"], r.get("guidance_inner", 1)) for r in ours]
    assert sorted(told) == [(32, 1, 1), (32, 1.5, 1.25), (64, 1, 1), (64, 1.5, 1.25)]
    assert sorted((r["samples_seen"], r["guidance"]) for r in theirs) == [(800, 1), (800, 1.5)]
    assert {(r["sampler"], r["steps"], r["images"]) for r in ours + theirs} == {("heun", 2, 20)}
    rows = re.findall(rf"^\| ([\d.]+)(.*?) \| {SCORE} ([\d.,]+) \| dit-800 \| all \| 800 \| \d+ s \| ", out, re.M)
    assert [(g, how) for g, how, _ in rows] == [("1.5", ", the recipe also guidance_inner=1.25"), ("1", "")]
    for guidance, _, target in rows:
        final = next(r[SCORE] for r in theirs if r["guidance"] == float(guidance))
        assert float(target.replace(",", "")) == pytest.approx(final, rel=1e-3)
        good = [r["samples_seen"] for r in ours if r["guidance"] == float(guidance) and r[SCORE] <= final]
        row = f"| inner_head-64 | 1 of 1 | {min(good)} |" if good else "| inner_head-64 | 0 of 1 | – | – | – |"
        assert row in out


# -------------------------------------------------------------------------------------------------- its table by hand


def a_run(path, seed, scores, cpu_seconds, **differs):
    """A run with a score every 100 samples, guided; and, 10 worse, unguided."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(TrainJob(run_dir=str(path), seed=seed, data=DataConfig(path="x"))))
    append_jsonl(path / "environment.jsonl", {"time": 0.0, "hardware": "an abacus", "git": "0123456789abcdef-dirty"})
    for piece in cpu_seconds:
        append_jsonl(path / "cpu.jsonl", {"samples": 100, "cpu_seconds": piece})
    settings = {"images": 1300, "sampler": "heun", "steps": 12, "shift": 1.0, "seed": 0, "labels": "balanced"}
    settings |= {"block": 50, "precision": "fp32", "detector": "efficientnet_lite0", "guidance_low": 0.0}
    settings |= {"guidance_high": 1.0, "detector_hash": "a", "reference_hash": "b", "autoencoder_hash": "c"}
    for i, value in enumerate(scores, 1):
        for guidance, worse in ((1.5, 0), (1.0, 10), (4.0, -1000)):
            facts = {"samples_seen": 100 * i, "guidance": guidance, SCORE: value + worse, "time": 0.0}
            append_jsonl(path / "evaluations.jsonl", settings | facts | differs)


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """Two seeds of either side; a training sample costs 2 · 10¹² operations."""
    monkeypatch.setattr(compare_recipes.History, "training_flops", lambda run: 2e12)
    words = ["--recipe", str(ROOT / "configs" / "study" / "transformer.yaml"), "--output", str(tmp_path)]
    flags = compare_recipes.parse([*words, "--samples", "400", "--recipe-samples", "300"])
    arms = plan(flags)
    for seed, final in ((0, 50), (1, 60)):
        a_run(run_of(arms[0], seed, flags), seed, [90, 80, 70, final], [36, 36, 72, 36])
    return arms, flags


def test_the_first_checkpoint_as_good_as_the_last_of_the_dit_counts(compared):
    """The target is 55 guided, 65 unguided: one seed has it after 200, the other after 100 samples."""
    arms, flags = compared
    a_run(run_of(arms[1], 0, flags), 0, [56, 55, 40], [72, 36])
    a_run(run_of(arms[1], 1, flags), 1, [54, 57, 58], [72])
    about, _, _, _, *rows = table(arms, flags)
    assert "transformer-300 beside dit-400, seeds 0 1" in about and "an abacus, commit 0123456789;" in about
    assert rows == [
        f"| 1.5 | {SCORE} 55 (50 to 60) | dit-400 | all | 400 | 3 min | 0.8 |",
        "| | | transformer-300 | 2 of 2 | 150 (100 to 200) | 2 min (72 s to 2 min) | 0.3 (0.2 to 0.4) |",
        "| | | times less | | 2.67 | 2.00 | 2.67 |",
        f"| 1 | {SCORE} 65 (60 to 70) | dit-400 | all | 400 | 3 min | 0.8 |",
        "| | | transformer-300 | 2 of 2 | 150 (100 to 200) | 2 min (72 s to 2 min) | 0.3 (0.2 to 0.4) |",
        "| | | times less | | 2.67 | 2.00 | 2.67 |",
    ]


def test_a_seed_that_never_has_the_score_leaves_no_ratio(compared):
    arms, flags = compared
    a_run(run_of(arms[1], 0, flags), 0, [56, 55, 40], [72])
    a_run(run_of(arms[1], 1, flags), 1, [64, 57, 58], [72])
    rows = table(arms, flags)[4:]
    assert (
        rows[1].startswith("| | | transformer-300 | 1 of 2 | 200 |") and rows[2] == "| | | times less | | – | – | – |"
    )


def test_other_images_or_another_detector_are_refused(compared):
    arms, flags = compared
    a_run(run_of(arms[1], 0, flags), 0, [50], [72])
    a_run(run_of(arms[1], 1, flags), 1, [50], [72], reference_hash="another")
    with pytest.raises(Failed, match="differ in reference_hash"):
        table(arms, flags)


def test_both_are_sampled_as_the_dit_arm_is():
    """But for guidance of the recipe's own; the second time without any."""
    flags = compare_recipes.parse(["--recipe", str(ROOT / "configs" / "study" / "inner_head.yaml")])
    dit, recipe = plan(flags)
    assert dit.samples == 120_000 and recipe.samples == 48_000
    assert "checkpoint.every_samples=4000" in recipe.settings and "checkpoint.keep=13" in recipe.settings
    guided, unguided = recipe.evaluations
    assert {k: v for k, v in guided.items() if v != dit.evaluations[0][k]} == {"guidance_inner": 1.25}
    assert unguided == dit.evaluations[1] and unguided["guidance"] == 1 and unguided["sampler"] == "heun"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed=1"], "unrecognized arguments: --seed=1"),
        (["seed"], "unrecognized arguments: seed"),
        (["--seeds", "0-3"], "--seeds 0-3 must be numbers separated by commas, such as 0,1"),
    ],
)
def test_what_is_no_setting_is_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        compare_recipes.parse(["--recipe", "x.yaml", *words])
    assert said in capsys.readouterr().err
