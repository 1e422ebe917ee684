"""Every benchmark runs, small, and stores what it found with where, when and how; how fast is not for tests to say."""

import json
from pathlib import Path

import forked
import pytest
from bench import BENCHMARKS
from run_data import shared_run

ROOT = Path(__file__).parents[1]
TINY = [
    "model={width: 32, depth: 2, heads: 2}",
    "train.global_batch=4",
    "engine.compile=false",
    "--latent",
    "4x4x4",
    "--classes",
    "3",
]
SAMPLING = ["evaluate.sampler=heun", "evaluate.steps=2", "evaluate.guidance=2", "evaluate.block=2"]
DIT = "configs/imagenet256/dit_s2.yaml"
TRAIN = ["train", DIT, *TINY, "--steps", "1", "--turns", "1", "--warmup", "1"]
COMMANDS = {
    "checkpoint": (["checkpoint", "{tmp}", "--width", "64", "--depth", "1", "--batch", "1", "--repeat", "1"], 1),
    "data": (["data", "--samples", "512", "--shard-samples", "128", "--batch", "32"], 1),
    "encode": (["encode", "--images", "8", "--batch", "4", "--turns", "1"], 1),
    "index": (["index", "--images", "60", "--shards", "3"], 1),
    "evaluate": (["evaluate", "{run}", "--blocks", "1", "--repeat", "1"], 1),
    "sample": (["sample", DIT, *TINY, *SAMPLING, "--turns", "1"], 1),
    "train": ([*TRAIN, "--compare", "plain"], 2),
    "train, compared": ([*TRAIN, "engine.precision=fp32", "--compare", "engine.zero_stage=0 train.micro_batch=1"], 1),
}


def test_none_is_left_out():
    assert {name.split(",")[0] for name in COMMANDS} == set(BENCHMARKS)


def test_mistakes_are_sentences():
    command = ["tools/bench.py", "train", DIT, "model.attention=flash", "engine.precision=fp32", *TINY]
    result = forked.run(*command, cwd=ROOT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("bench: error: model.attention=flash ")


@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs_and_stores_its_result(name, tmp_path, tmp_path_factory):
    command, processes = COMMANDS[name]
    run = str(shared_run(tmp_path_factory)) if "{run}" in command else ""
    arguments = [a.format(tmp=tmp_path, run=run) if a in ("{tmp}", "{run}") else a for a in command]
    ranks = forked.start_ranks(processes, "tools/bench.py", *arguments, "--json", tmp_path / "result.json", cwd=ROOT)
    for result in [rank.finish() for rank in ranks]:
        assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "result.json").read_text())
    assert {"date", "hardware", "command", "torch"} <= set(stored)
    if name.startswith("train"):
        assert stored["images_per_second"] > 0 and 0 < stored["mfu"] < 2 and stored["processes"] == processes
        shares = [stored[f"{phase}, of the step"] for phase in ("data", "forward", "backward", "check", "optimizer")]
        assert all(share >= 0 for share in shares) and 0.5 < sum(shares) <= 1.01
