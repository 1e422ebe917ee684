"""The demo and the README's tour, shortened: the very commands, on 200 images and with a model that learns little.

Real launchers, real processes: encode → train on 2 → evaluate on 2 → report.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ldt.data.images import EMBEDDED
from ldt.data.images.open import open_images
from ldt.log import read_jsonl

ROOT = Path(__file__).parents[1]
SHORT = {
    "encode": ["images.path={tmp}/images", "output={tmp}/data", "shard_samples=50"],
    "train": [
        "data.path={tmp}/data",
        "run_dir={tmp}/run",
        "model={{width: 48, depth: 2, heads: 2}}",
        "train.total_samples=1280",
        "optimizer.warmup_samples=64",
        "log.every_samples=320",
        "log.validation_every_samples=640",
        "log.samples_every_samples=640",
        "checkpoint.every_samples=640",
        "engine.zero_stage=2",
        "log.wandb=true",
        "log.tensorboard=true",
        "evaluate={{images: 40, steps: 2, cache_dir: {tmp}/cache}}",
    ],
    "evaluate": [],
    "report": [],
}


def demo_commands() -> list[str]:
    recipe = re.search(r"^demo:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    return [line.strip() for line in recipe.group(1).splitlines()]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """200 embedded images as a directory that a user might have."""
    root = tmp_path_factory.mktemp("demo")
    source = open_images(EMBEDDED)
    for i in range(200):
        path = root / "images" / source.classes[source.label(i)] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(i).save(path)
    return root


def test_the_demo_runs(tmp):
    ran, env = [], os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for command in demo_commands():
        words = [w.replace("runs/fashion_mnist", f"{tmp}/run") for w in shlex.split(command)]
        program = next(w for w in words if w in SHORT)
        words += [s.format(tmp=tmp) for s in SHORT[program]]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        ran.append((program, done.stdout.strip().splitlines()))
    assert [program for program, _ in ran] == ["encode", "train", "evaluate", "report"]
    assert str(tmp / "data") in ran[0][1][-1]
    assert any(line.endswith(str(tmp / "run" / "evaluations.jsonl")) for line in ran[2][1])  # then the launcher's own
    assert str(tmp / "run" / "report.html") in ran[3][1][-1]

    lines = list(read_jsonl(tmp / "run" / "metrics.jsonl"))
    training = [r for r in lines if "loss" in r]
    assert [r["samples_seen"] for r in training] == [320, 640, 960, 1280]
    assert training[-1]["loss"] < training[0]["loss"]
    assert len([r for r in lines if "validation_loss" in r]) == 2
    assert sorted(p.name for p in (tmp / "run" / "samples").glob("0*.png")) == ["000000000640.png", "000000001280.png"]
    scores = list(read_jsonl(tmp / "run" / "evaluations.jsonl"))
    assert sorted(s["samples_seen"] for s in scores) == [640, 1280]
    assert all(s["fd_efficientnet_lite0"] > 0 and s["images"] == 40 for s in scores)

    tracked = [path.parent.name.rpartition("-")[2] for path in (tmp / "run").rglob("*.wandb")]
    assert len(set(tracked)) == 2, "one wandb run of the training, one of the evaluation"
    assert list((tmp / "run" / "tensorboard").glob("events.*"))


TINY = ["model={width: 48, depth: 2, heads: 2}", "evaluate={images: 40, steps: 2, cache_dir: cache}"]
SHORTER = {"train": ["data.window=64", "log.every_samples=320", *TINY], "sample": ["steps=2"], "evaluate": TINY[1:]}
SHORTER["score"] = ["cache_dir=cache"]


def tour_commands() -> list[str]:
    """The lines of the tour that need no cluster and nothing from elsewhere; the first one encodes."""
    tour = (ROOT / "README.md").read_text().partition("## Ten minutes")[2].partition("**Your own images**")[0]
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", tour, re.M | re.S))
    inline = re.findall(r"`(ldt replay [^`]+)`", tour)
    return [line for line in [*blocks.splitlines(), *inline] if line.split()[0] in ("ldt", "deepspeed", "torchrun")]


def test_the_tour_runs(tmp, tmp_path):
    """Its lines one after another as they stand, with small models; the elastic run goes on with the same digests."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran = []
    for command in tour_commands():
        words = shlex.split(command)
        program = next(w for w in words if w in (*SHORT, "sample", "score", "export", "replay"))
        short = [s.format(tmp=tmp) for s in SHORT["encode"][:1]] if program == "encode" else SHORTER.get(program, [])
        done = subprocess.run([*words, *short], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        ran.append(program)
    assert ran == ["encode", *["train"] * 4, "sample", "sample", "evaluate", "score", "report", "export", "replay"]
    runs = tmp_path / "runs"
    for made in ("debug/grid.png", "debug/evaluations.jsonl", "debug/report.html", "debug/model/model.safetensors"):
        assert (runs / made).is_file(), made
    assert list((runs / "debug").rglob("events.*"))
    lines = [r for r in read_jsonl(runs / "elastic" / "metrics.jsonl") if "loss" in r]
    assert [r["world_size"] for r in lines][:: len(lines) - 1] == [1, 2] and lines[-1]["samples_seen"] == 9600
