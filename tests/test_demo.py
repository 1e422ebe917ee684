"""The demo and the README's tour, shortened: the very commands, on 200 images and with a model that learns little.

Real launchers and their ranks, and forked processes of what needs none: encode → train on 2 → evaluate on 2 → report.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import forked
import pytest

from ldt.commands.verify import changed_files
from ldt.data.images import EMBEDDED
from ldt.data.images.open import open_images
from ldt.log import read_jsonl
from records import BEGIN, END
from records import main as records

ROOT = Path(__file__).parents[1]
TOOLS = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
SHORT = {
    "encode": ["images.path={tmp}/images", "output={tmp}/data", "shard_samples=50"],
    "train": [
        "data.path={tmp}/data",
        "run_dir={tmp}/run",
        "model={{width: 48, depth: 2, heads: 2, inner_head: 1}}",
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


def demo_commands(target: str = "demo") -> list[str]:
    recipe = re.search(rf"^{target}:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    return [line.strip() for line in recipe.group(1).splitlines()]


def carry_out(words: list[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A command line: launchers as they are, `ldt` and `python` in a fork."""
    if words[0] == "ldt":
        return forked.run("-m", *words, cwd=cwd, env=env)
    if words[0] == "python":
        return forked.run(*words[1:], cwd=cwd, env=env)
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


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
        done = carry_out(words, ROOT, env)
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


SPEEDRUN = {
    "encode": SHORT["encode"],
    "train": [
        "data.path={tmp}/data",
        "train.total_samples=1600",
        "checkpoint.every_samples=800",
        "evaluate={{images: 40, steps: 2, cache_dir: {tmp}/cache}}",
    ],
    "evaluate": [],
    "verify": [],
    "tools/make_record.py": [],
    "tools/records.py": ["--records", "{tmp}/records", "--page", "{tmp}/page.md"],
}


def test_the_speedrun_makes_a_record(tmp):
    """Its commands with the debug config: a record that verifies, and a table that is generated from it."""
    (tmp / "page.md").write_text(f"before\n{BEGIN}\n\nold\n\n{END}\nafter\n")
    stands_for = {
        "$(SPEEDRUN)": "configs/debug.yaml", "runs/speedrun": f"{tmp}/speedrun", "$(RECORD)": f"{tmp}/records/debug",
    }  # fmt: skip
    for command in demo_commands("speedrun"):
        for name, value in stands_for.items():
            command = command.replace(name, value)
        words = shlex.split(command)
        program = next(w for w in words if w in SPEEDRUN)
        words += [s.format(tmp=tmp) for s in SPEEDRUN[program]]
        done = carry_out(words, ROOT, TOOLS)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        assert program != "verify" or "the same run, 4 logged steps" in done.stdout
    record = tmp / "records" / "debug"
    kept = ["config.yaml", "environment.jsonl", "evaluations.jsonl", "hashes.json", "metrics.jsonl"]
    assert sorted(p.name for p in record.iterdir()) == kept
    assert sum(p.stat().st_size for p in record.iterdir()) < 50_000
    (attempt,) = read_jsonl(record / "environment.jsonl")
    assert "host" not in attempt and "/" not in attempt["command"][0] and " x " in attempt["hardware"]
    log = list(read_jsonl(record / "metrics.jsonl"))
    assert [r["samples_seen"] for r in log if "digest" in r] == [320, 640, 960, 1280, 1600]
    page = (tmp / "page.md").read_text()
    assert page.startswith(f"before\n{BEGIN}\n\n| record | score |") and page.endswith(f"|\n\n{END}\nafter\n")
    assert "| [debug](records/debug) | fd_efficientnet_lite0 " in page and " of 40 images | " in page
    where = ["--records", str(tmp / "records"), "--page", str(tmp / "page.md"), "--check"]
    assert records(where) == 0
    changed = record / "evaluations.jsonl"
    changed.write_text(changed.read_text().replace('"images": 40', '"images": 41'))
    assert records(where) == 1, "a table that is not that of the files"


def test_the_readmes_table_is_that_of_the_records():
    assert records(["--check"]) == 0
    for record in (ROOT / "records").glob("*/"):
        assert changed_files(record) == [], record


TINY = ["model={width: 48, depth: 2, heads: 2, inner_head: 1}", "evaluate={images: 40, steps: 2, cache_dir: cache}"]
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
        done = carry_out([*words, *short], tmp_path, os.environ)
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
