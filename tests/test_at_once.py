"""Several of the same on one machine: suites, demos, and jobs that do the same work beside each other."""

import shutil
import subprocess
import sys
from pathlib import Path

import at_once
import numpy as np
import pytest
import torch
from cluster import free_ports
from run_data import make_images, shared_run
from tiny_detector import MeanOfGrey

from ldt.commands.evaluate import EvaluateJob, evaluate
from ldt.data.images.open import open_images
from ldt.dist import World
from ldt.errors import RunError
from ldt.evaluation.config import EvaluateConfig
from ldt.log import read_jsonl
from ldt.metrics.feature_store import FeatureStore
from ldt.metrics.image_set import ImageSet
from ldt.metrics.reference import reference_of

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
BESIDE = """
import pathlib, sys, time
pathlib.Path("begun").touch()
others = [p for p in pathlib.Path("..").glob("copy-*") if p.is_dir()]
end = time.monotonic() + 60
while not all((p / "begun").exists() for p in others) and time.monotonic() < end:
    time.sleep(0.05)
print(len(others), pathlib.Path("ldt/cli.py").exists(), pathlib.Path(".venv/bin/python").exists())
sys.exit(0 if all((p / "begun").exists() for p in others) else 3)
"""


def test_copies_run_side_by_side(capsys):
    assert at_once.main(["--copies", "3", sys.executable, "-c", BESIDE]) == 0
    logs = [Path(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert [log.read_text() for log in logs] == ["3 True True\n"] * 3
    assert at_once.main([sys.executable, "-c", "import sys; sys.exit('copy-0' in __import__('os').getcwd())"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" after")[0] for line in said] == ["code 1", "code 0"]
    for path in {logs[0].parent, Path(said[0].split(": ")[1]).parent}:
        shutil.rmtree(path)


def test_two_clusters_have_ports_of_their_own():
    """Also while neither of them listens yet: they are started minutes apart from the look at what is free."""
    with free_ports() as first, free_ports() as second:
        code = "from cluster import free_ports\nwith free_ports() as third: print(third)"
        third = int(
            subprocess.run(
                [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
            ).stdout
        )
        assert len({first // 100, second // 100, third // 100}) == 3


@pytest.fixture
def another(monkeypatch):
    """`another(action, at)`: does the action, as another process would, when features are read for the `at`-th time."""

    def do(action, at: int) -> None:
        real, calls = FeatureStore.read, []

        def read(self, blocks):
            calls.append(blocks)
            if len(calls) == at + 1:
                monkeypatch.setattr(FeatureStore, "read", real)
                action()
            yield from real(self, blocks)

        monkeypatch.setattr(FeatureStore, "read", read)

    return do


@pytest.mark.parametrize("at", [0, 1])
def test_two_jobs_may_make_the_same_statistics(another, tmp_path, at):
    """Two demos on one machine do: whoever is first removed the features under the other's hands."""
    make_images(tmp_path / "images", 9)
    images = [ImageSet(open_images(str(tmp_path / "images")), 32, 32, 1, "pad")]
    expected = reference_of(images, MeanOfGrey(), tmp_path / "alone", ALONE)
    another(lambda: reference_of(images, MeanOfGrey(), tmp_path / "cache", ALONE), at)
    made = reference_of(images, MeanOfGrey(), tmp_path / "cache", ALONE)
    assert made.hash == expected.hash and np.array_equal(made.features(), expected.features())
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".npy", ".npz"]


def test_two_jobs_may_score_the_same_checkpoint(another, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("ldt.commands.evaluate.make_detector", lambda *_: MeanOfGrey())
    run_dir = shutil.copytree(shared_run(tmp_path_factory), tmp_path / "run")
    cache = str(tmp_path / "cache")
    few, job = (
        EvaluateJob(run=str(run_dir), evaluate=EvaluateConfig(images=n, steps=1, block=4, cache_dir=cache))
        for n in (4, 8)
    )
    evaluate(few, ALONE)  # so that the statistics of the real images are there

    def faster() -> None:
        (work,) = (run_dir / "evaluations").glob(".*.work")
        evaluate(job, ALONE)
        FeatureStore(work).write(5, {"features": np.zeros((1, 1), np.float32)})  # ours that was on its way

    another(faster, 0)
    (result,) = evaluate(job, ALONE)
    lines = list(read_jsonl(run_dir / "evaluations.jsonl"))
    assert {line["images"] for line in lines} == {4, 8} and len(lines) == 2 and result in lines
    assert not list((run_dir / "evaluations").glob(".*.work"))


def test_features_that_are_gone_for_another_reason_are_said(tmp_path):
    store = FeatureStore(tmp_path / "work")
    store.remove()
    store.remove()
    with pytest.raises(RunError, match="work was removed meanwhile"):
        list(store.read(1))
    store.write(0, {"features": np.zeros((1, 1), np.float32)})
    assert len(list(store.read(1))) == 1
