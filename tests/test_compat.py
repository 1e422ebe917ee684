"""What earlier versions wrote still works: tools/make_compat.py of its time made each directory under tests/data.

A failure here means that people's checkpoints or shards stop working: raise the format's version and read both.
"""

import json
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
from contents import seen_by_training
from make_compat import AFTER, BEFORE, SAMPLE, TRAIN

from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.data.shards import open_shards
from ldt.log import read_jsonl

VERSIONS = sorted((Path(__file__).parent / "data").iterdir())
versions = pytest.mark.parametrize("version", VERSIONS, ids=lambda p: p.name)


@versions
def test_shards_are_whole_and_say_the_same_in_both_formats(version: Path) -> None:
    for format in ("tar", "mds"):
        assert main(["inspect", str(version / format)]) == 0
    tar, mds = (open_shards(version / format).manifest for format in ("tar", "mds"))
    assert tar.fingerprint == mds.fingerprint and tar.samples == 12 and tar.flips
    assert seen_by_training(version / "tar")[-2:] == seen_by_training(version / "mds")[-2:]


@versions
def test_the_checkpoint_draws_the_same_pictures(version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = version / "run" / "checkpoints" / f"{BEFORE:012d}"
    assert load_denoiser(checkpoint).samples_seen == BEFORE
    assert main(["inspect", str(checkpoint)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(checkpoint), *SAMPLE]) == 0
    with np.load(tmp_path / "images.npz") as now, np.load(version / "images.npz") as then:
        difference = np.abs(now["arr_0"].astype(int) - then["arr_0"].astype(int))
    assert difference.mean() < 0.5 and difference.max() <= 8  # another CPU or torch rounds differently


@versions
def test_the_run_goes_on_as_it_did(version: Path, tmp_path: Path) -> None:
    """On one rank, from the other format: the same samples and noise, and losses to four digits."""
    shutil.copytree(version / "run", tmp_path / "run")
    settings = [*TRAIN, f"data.path={version / 'mds'}", f"train.total_samples={AFTER}"]
    assert forked.run("-m", "ldt", "train", *settings, cwd=tmp_path).returncode == 0
    then = [r for r in json.loads((version / "steps.json").read_text()) if r["samples_seen"] > BEFORE]
    now = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [(r["samples_seen"], r["digest"]) for r in now] == [(r["samples_seen"], r["digest"]) for r in then]
    assert [r["loss"] for r in now] == pytest.approx([r["loss"] for r in then], rel=1e-4)
