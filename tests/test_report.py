"""The report: what its page says of a run, that broken files do not stop it, and what a real browser makes of it."""

import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from browser import Browser
from numpy.typing import NDArray
from PIL import Image
from run_data import CLASSES, shared_run

from ldt.checkpoint.manifest import read_manifest
from ldt.cli import main
from ldt.commands.evaluate import EvaluateJob, evaluate
from ldt.commands.report import ReportJob, names, run
from ldt.config import to_yaml
from ldt.data.shards.manifest import head_hash, read_head
from ldt.data.split import Split
from ldt.dist import World
from ldt.errors import InputError
from ldt.evaluation.config import EvaluateConfig
from ldt.evaluation.scorer import NOT_IN_RESULT
from ldt.files import write_json
from ldt.image_files import class_grid, write_cells, write_picture
from ldt.log import append_jsonl
from ldt.nn.config import ModelConfig
from ldt.nn.sizes import flops
from ldt.reporting.curves import (
    SETTINGS,
    SETTINGS_UNNAMED,
    best_score,
    decimate,
    evaluation_groups,
    hours_at,
    make_charts,
    restarts,
    smooth,
)
from ldt.reporting.history import read_history, running_hours
from ldt.reporting.html import Markup, script_json, tag
from ldt.reporting.pictures import NEIGHBOURS, distances, nearest, newest_cells, open_real
from ldt.reporting.png import write_plots
from ldt.reporting.reach import by_config, reaches
from ldt.reporting.summary import score
from ldt.run import directory, outcome
from ldt.run.directory import NEWEST_CELLS
from ldt.training.config import DataConfig, TrainJob

HOSTILE = "</script><script>window.stolen=1</script><img src=x onerror=window.stolen=1>&\"'"
COLUMNS = 4
MADE_FROM_IT = shutil.ignore_patterns("samples", "evaluations*")  # by other tests
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
START = 1.8e9


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts with curves, grids and scores, its files written by the code that writes them in a run."""
    root = tmp_path_factory.mktemp("report")
    path = Path(shutil.copytree(shared_run(tmp_path_factory), root / "first", ignore=MADE_FROM_IT))
    shards = read_manifest(path / "checkpoints" / "000000002000")["config"]["data"]["path"]
    head = read_head(Path(shards)) | {"image_size": 32, "image_channels": 1, "latent_shape": [4, 8, 8]}
    head["recipe"] |= {"validation_fraction": 0.1, "seed": 0, "number of images": 90}
    head["head_xxh64"] = head_hash(head)
    (root / "shards").mkdir()
    (root / "shards" / "manifest.json").write_text(json.dumps(head))
    config = TrainJob(run_dir=str(path), data=DataConfig(path=str(root / "shards")))
    for attempt, world_size in enumerate((1, 3)):
        directory.prepare(path, to_yaml(config), world_size)
        start = START + 7200 * attempt  # the second attempt waited for nearly two hours
        set_start(path, start)
        write_metrics(path, range(1000 * attempt + 100, 1000 * attempt + 1100, 100), attempt, world_size, start)
    outcome.begin(path)
    outcome.write_outcome(path, outcome.DONE, 2000, "trained to the end")
    (path / "samples").mkdir()
    for samples_seen in (1000, 1500, 2000):
        draw_grid(path, samples_seen)
    scoring = EvaluateConfig(
        images=9, sampler="euler", steps=1, block=9, checkpoint="all", cache_dir=str(root / "cache")
    )
    evaluate(EvaluateJob(run=str(path), evaluate=scoring), ALONE)
    return path


def set_start(path: Path, start: float) -> None:
    *earlier, newest = (path / "environment.jsonl").read_text().splitlines()
    lines = [*earlier, json.dumps(json.loads(newest) | {"time": start})]
    (path / "environment.jsonl").write_text("".join(line + "\n" for line in lines))


def write_metrics(path: Path, clock: range, attempt: int, world_size: int, start: float) -> None:
    for i, samples_seen in enumerate(clock):
        record = {
            "samples_seen": samples_seen,
            "loss": 1 / samples_seen,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "images_per_second": 100.0,
            "world_size": world_size,
            "data_wait_fraction": 0.01,
            "time": start + 60 * (i + 1),
            "attempt": attempt,
        }
        append_jsonl(path / "metrics.jsonl", record)
    held_out = {"samples_seen": clock[-1], "validation_loss": 0.5, "time": start + 601, "attempt": attempt}
    append_jsonl(path / "metrics.jsonl", held_out)


def some_samples(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    label_N = np.arange(len(CLASSES) * COLUMNS) % len(CLASSES)
    return np.random.default_rng(seed).integers(0, 255, (len(label_N), 32, 32, 1), dtype=np.uint8), label_N


def draw_grid(path: Path, samples_seen: int) -> None:
    """As the training program does: one row a class, and the images of the newest grid beside it."""
    image_NHWC, label_N = some_samples(samples_seen)
    write_picture(path / "samples" / f"{samples_seen:012d}.png", class_grid(image_NHWC, label_N))
    write_cells(path / NEWEST_CELLS, image_NHWC, label_N, samples_seen)


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture(autouse=True)
def plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of plots take most of the time of a page: only those tests that ask for this fixture make them."""
    if "plots" not in inspect.signature(request.function).parameters:
        monkeypatch.setattr("ldt.commands.report.write_plots", lambda charts, directory: [])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


def page_of(*runs: Path, **keys: Any) -> str:
    assert run(ReportJob(runs=[str(r) for r in runs], **keys)) == 0
    return Path(keys.get("output") or runs[0] / "report.html").read_text()


def words_of(page: str) -> str:
    """What a reader sees, without scripts and styles."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []
            self.hidden = 0

        def handle_starttag(self, name: str, attributes: Any) -> None:
            self.hidden += name in ("script", "style")

        def handle_endtag(self, name: str) -> None:
            self.hidden -= name in ("script", "style")

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                self.words.append(data)

    reader = Reader()
    reader.feed(page)
    return re.sub(r"\s+", " ", " ".join(reader.words))


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


# -------------------------------------------------------------------------------------------------- what the page says


def test_it_says_what_the_run_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith(str(run_dir / "report.html"))
    words = words_of((run_dir / "report.html").read_text())
    manifest = read_manifest(run_dir / "checkpoints" / "000000002000")
    for text in (
        "2,000 of 1,000,000 samples seen on 1, then 3 processes",
        "trained to the end",
        "grey images of 32 pixels in 3 classes as 4×8×8 latents",
        (run_dir / "checkpoints" / "000000002000" / "manifest.xxh64").read_text().strip(),
        manifest["sampling"]["autoencoder_hash"],
        manifest["written_by"]["torch"],
        "efficientnet_lite0",
        "Attempts (2)",
        *CLASSES,
    ):
        assert text in words, text


def test_a_unet_is_not_told_by_the_transformers_keys(run_dir: Path) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"] |= {"name": "unet", "unet": {"channels": 40, "multipliers": [1, 2, 2], "blocks": 1}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    words = words_of(page_of(run_dir))
    assert "unet (channels 40, multipliers [1, 2, 2], blocks a level 1), predicting" in words


def test_curves_hold_the_numbers_of_the_files(run_dir: Path) -> None:
    charts = {c["id"]: c for c in data_of(page_of(run_dir))["charts"]}
    assert list(charts) == [
        "fd_efficientnet_lite0", "loss", "grad_norm", "lr", "images_per_second", "data_wait_fraction"
    ]  # fmt: skip
    training, validation = charts["loss"]["series"]
    assert training["samples"] == [float(x) for x in range(100, 2100, 100)]
    assert training["y"] == [1 / x for x in range(100, 2100, 100)]
    assert validation["samples"] == [1000.0, 2000.0] and validation["y"] == [0.5, 0.5]
    scores = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    (scored,) = charts["fd_efficientnet_lite0"]["series"]
    assert scored["samples"] == [1000.0, 2000.0]
    assert scored["y"] == [s["fd_efficientnet_lite0"] for s in scores]
    assert scored["hours"] == pytest.approx([10 / 60, 20 / 60], abs=0.01)
    each = 3 * flops(ModelConfig(width=32, depth=2, heads=2), (4, 8, 8)) / 1e15
    assert scored["compute"] == pytest.approx([1000 * each, 2000 * each])
    (mark,) = charts["loss"]["marks"]
    assert mark["samples"] == 1000 and "1 → 3 processes" in mark["text"]


def test_a_picture_of_every_plot(run_dir: Path, plots: None) -> None:
    charts = data_of(page_of(run_dir))["charts"]
    for chart in charts:
        for name in (f"{chart['id']}.png", f"{chart['id']}_by_hours.png", f"{chart['id']}_by_compute.png"):
            with Image.open(run_dir / "report" / name) as picture:
                assert len(np.unique(np.asarray(picture.convert("L")))) > 10, name
    assert {"generated.png", "real.png", "neighbours.png"} <= {p.name for p in (run_dir / "report").iterdir()}


def test_several_runs_and_how_they_differ(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    before = config["optimizer"]["lr"]
    config["optimizer"]["lr"] = 0.0777
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    page = page_of(run_dir, other, output=str(tmp_path / "both.html"))
    words = words_of(page)
    rows = re.findall(r"<tr><td><code>([\w.]+)</code></td><td><code>(.*?)</code></td><td><code>(.*?)</code>", page)
    assert rows == [("optimizer.lr", str(before), "0.0777")]
    assert "Provenance · run" in words and "Provenance · other" in words
    assert [s["run"] for s in data_of(page)["charts"][2]["series"]] == [0, 1]
    assert (tmp_path / "both" / "1_real.png").exists() and not (run_dir / "report.html").exists()


def test_scores_that_do_not_compare_are_called_so(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    assert "do not compare" not in words_of(page_of(run_dir, other))
    first = json.loads((other / "evaluations.jsonl").read_text().splitlines()[0])
    append_jsonl(other / "evaluations.jsonl", first | {"images": 50_000, "reference_hash": "x"})
    words = words_of(page_of(run_dir, other))
    assert "best fd_efficientnet_lite0 of the runs do not compare: they differ in images, reference_hash." in words


def test_every_setting_that_decides_a_score_keeps_scores_apart(run_dir: Path, tmp_path: Path) -> None:
    """All keys of an evaluation but those of places, those of what is measured, and those in the detector's hash."""
    keys = {f.name for f in fields(EvaluateConfig)} - {*NOT_IN_RESULT, "metrics", "detector", "resize"}
    keys |= {"detector_hash", "reference_hash", "guide_hash", "captions_hash"}  # in the place of paths
    assert keys == {*SETTINGS, *SETTINGS_UNNAMED}
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    records = [json.loads(line) for line in (other / "evaluations.jsonl").read_text().splitlines()]
    for changes in ({"guidance_inner": 2.5}, {"guide_scale": 1.5, "guide_hash": "x"}, {"guide_scale": 1.5}):
        append_jsonl(other / "evaluations.jsonl", records[0] | changes | {"fd_efficientnet_lite0": 1.0})
    before, after = (evaluation_groups(read_history(path, "run")) for path in (run_dir, other))
    assert len(after) == len(before) + 3
    labels = ", ".join(after)
    assert "guidance_inner 2.5" in labels and "no guidance_inner" in labels and "guide_scale 1.5" in labels
    heads = [" ".join(words_of(page_of(path)).split()) for path in (other, run_dir)]
    assert "steps guidance guidance_inner guide_scale weights" in heads[0] and "steps guidance weights" in heads[1]


def an_arm(path: Path, seed: int, lr: float, scores: list[float], validation: list[float], minutes: float) -> Path:
    """A run of three evaluations at 1,000, 2,000 and 3,000 samples, so many minutes apart."""
    path.mkdir()
    config = TrainJob(run_dir=str(path), seed=seed, data=DataConfig(path="shards"))
    config.optimizer.lr = lr
    (path / "config.yaml").write_text(to_yaml(config))
    append_jsonl(path / "environment.jsonl", {"time": START, "world_size": 1})
    for i, (value, loss) in enumerate(zip(scores, validation, strict=True), 1):
        clock = {"samples_seen": 1000 * i, "time": START + 60 * minutes * i}
        append_jsonl(path / "metrics.jsonl", clock | {"loss": 1.0, "attempt": 0})
        append_jsonl(path / "metrics.jsonl", clock | {"validation_loss": loss, "validation_times": 8, "attempt": 0})
        append_jsonl(path / "evaluations.jsonl", {"samples_seen": 1000 * i, "fd_x": value, "images": 9, "seed": 0})
    return path


def three_arms(root: Path) -> list[Path]:
    """Two seeds of one config, of which the second takes as long for a sample; and another learning rate."""
    return [
        an_arm(root / "a0", 0, 1e-3, [50, 30, 20], [0.9, 0.6, 0.5], minutes=30),
        an_arm(root / "a1", 1, 1e-3, [60, 45, 28], [0.9, 0.7, 0.6], minutes=60),
        an_arm(root / "b0", 0, 2e-3, [70, 60, 30], [0.8, 0.7, 0.7], minutes=30),
    ]


def test_what_it_took_to_reach_a_score(tmp_path: Path) -> None:
    """What all have reached is the worst run's best; seeds share a row; the first evaluation that has it counts."""
    runs = [read_history(path, path.name) for path in three_arms(tmp_path)]
    assert by_config(runs) == [[0, 1], [2]]
    fd_a, fd_b, loss_a, loss_b = reaches(runs, {})
    assert (fd_a.score, fd_a.target, fd_a.runs) == ("fd_x", 30, [0, 1])
    assert (fd_a.samples, fd_a.hours) == ([2000, 3000], [1.0, 3.0])
    assert (fd_b.samples, fd_b.hours) == ([3000], [1.5])
    assert (loss_a.score, loss_a.target, loss_a.samples, loss_b.samples) == (
        "validation_loss", 0.7, [2000, 2000], [2000],
    )  # fmt: skip
    better = {row.score: row for row in reaches(runs, {"fd_x": 25}) if row.runs == [0, 1]}
    assert better["fd_x"].samples == [3000] and better["fd_x"].target == 25, "one of two seeds"


def test_the_page_says_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = three_arms(tmp_path)
    words = " ".join(words_of(page_of(*arms, targets={"fd_x": 28})).split())
    assert "To reach a score" in words
    assert "a0 a1 fd_x 28 2 of 2 3,000 (3,000 to 3,000) 2.25 (1.5 to 3)" in words
    assert "b0 fd_x 28 0 of 1 – – –" in words
    assert "To reach a score" not in words_of(page_of(arms[0])), "one run alone, and nothing asked for"
    assert "a0 fd_x 31 1 of 1 2,000 1" in " ".join(words_of(page_of(arms[0], targets={"fd_x": 31})).split())
    assert main(["report", str(arms[0]), "targets.fid=3"]) == 2
    assert "targets has fid, which no run was scored by; the scores there are fd_x, val" in capsys.readouterr().err


def test_a_loss_at_fixed_times_is_said_to_be_another_one(tmp_path: Path, run_dir: Path) -> None:
    def caption(path: Path) -> str:
        return next(c.caption for c in make_charts([read_history(path, "run")]) if c.id == "loss")

    assert "the velocity's loss at fixed times, which are not those of training" in caption(three_arms(tmp_path)[0])
    assert caption(run_dir).endswith("dots: averaged weights on held-out images")
    assert "inner head" not in caption(run_dir)
    config = run_dir / "config.yaml"
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    (other / "config.yaml").write_text(config.read_text().replace("inner_head: 0", "inner_head: 1"))
    assert "training batches, the inner head's loss included; dots" in caption(other)


def test_compute_of_a_score_is_that_of_training(run_dir: Path) -> None:
    history = read_history(run_dir, "run")
    (row,) = (r for r in reaches([history], {"fd_efficientnet_lite0": 1e9}))
    assert row.compute == [row.samples[0] * history.training_flops() / 1e15] and row.samples == [1000]


def test_losses_of_other_kinds_are_not_compared(tmp_path: Path) -> None:
    arms = three_arms(tmp_path)
    file = arms[2] / "metrics.jsonl"
    file.write_text(re.sub(r'"validation_times": ?8', '"validation_times": 4', file.read_text()))
    runs = [read_history(path, path.name) for path in arms]
    assert [row.score for row in reaches(runs, {})] == ["fd_x", "fd_x"]
    for path in arms:  # of one objective's own times they do compare
        file = path / "metrics.jsonl"
        file.write_text(re.sub(r', ?"validation_times": ?\d', "", file.read_text()))
    runs = [read_history(path, path.name) for path in arms]
    assert {row.score for row in reaches(runs, {})} == {"fd_x", "validation_loss"}
    config = yaml.safe_load((arms[2] / "config.yaml").read_text())
    config["objective"]["prediction"] = "eps"
    (arms[2] / "config.yaml").write_text(yaml.safe_dump(config))
    runs = [read_history(path, path.name) for path in arms]
    assert {row.score for row in reaches(runs, {})} == {"fd_x"}


def test_losses_of_guided_velocities_are_not_compared(tmp_path: Path) -> None:
    arms = three_arms(tmp_path)
    config = yaml.safe_load((arms[2] / "config.yaml").read_text())
    config["objective"] |= {"mean_flow": 0.25, "mean_flow_guidance": 1.5}
    (arms[2] / "config.yaml").write_text(yaml.safe_dump(config))
    assert {row.score for row in reaches([read_history(path, path.name) for path in arms], {})} == {"fd_x"}


def test_more_is_better_for_some_scores(tmp_path: Path) -> None:
    arms = three_arms(tmp_path)
    for path, values in zip(arms, ([0.1, 0.5, 0.9], [0.2, 0.3, 0.4], [0.3, 0.6, 0.2]), strict=True):
        file = path / "evaluations.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        shown = [{k.replace("fd_x", "recall_x"): v for k, v in line.items()} for line in lines]
        file.write_text("".join(json.dumps(o | {"recall_x": v}) + "\n" for o, v in zip(shown, values, strict=True)))
    rows = [row for row in reaches([read_history(p, p.name) for p in arms], {}) if row.score == "recall_x"]
    assert [(row.target, row.samples) for row in rows] == [(0.4, [2000, 3000]), (0.4, [2000])]


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert names([tmp_path / "a" / "run", tmp_path / "b" / "other"]) == ["run", "other"]
    with pytest.raises(InputError, match="given twice"):
        names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


# ------------------------------------------------------------------------------------------ pictures and memorisation


def test_the_images_of_the_newest_grid_stand_in_its_rows(run_dir: Path) -> None:
    image_NHWC, label_N = some_samples(2000)
    rows = newest_cells(read_history(run_dir, "run"), 2000)
    assert [len(row) for row in rows] == [COLUMNS] * 3
    for label, row in enumerate(rows):
        assert np.array_equal(np.stack(row), image_NHWC[label_N == label])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.unlink(), "the images of its sample grids are not kept"),
        (lambda file: file.write_bytes(file.read_bytes()[:500]), "newest.npz is damaged"),
        (lambda file: file.write_bytes(b"not a zip"), "newest.npz is damaged"),
        (lambda file: np.savez(file, images=np.zeros(3), labels=np.zeros(3), samples_seen=2000), "not images"),
        (lambda file: write_cells(file, *some_samples(1), 1000), "of 1,000 samples seen, the newest grid of 2,000"),
        (lambda file: write_cells(file, np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64), 2000), "(8, 8, 3)"),
    ],
    ids=["an old run", "cut", "garbage", "no images", "another grid", "another size"],
)
def test_a_run_without_the_images_of_its_grids_shows_the_grids(run_dir: Path, spoil: Any, reason: str) -> None:
    spoil(run_dir / NEWEST_CELLS)
    page = page_of(run_dir)
    words = words_of(page)
    assert "Real images and nearest neighbours are left out" in words and reason in words
    assert [f["samples"] for f in data_of(page)["grids"][0]] == [1000, 1500, 2000]


def test_images_that_are_others_now_are_not_searched(run_dir: Path, tmp_path: Path) -> None:
    """One more shifts which are held out: copies of training images would pass for images never seen."""
    shards = Path(yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["path"])
    head = read_head(shards)
    images = Path(shutil.copytree(head["recipe"]["images.path"], tmp_path / "images"))
    head["recipe"]["images.path"] = str(images)
    head["head_xxh64"] = head_hash(head)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(head))
    config = (run_dir / "config.yaml").read_text().replace(str(shards), str(tmp_path / "shards"))
    (run_dir / "config.yaml").write_text(config)
    assert "Nearest training images" in words_of(page_of(run_dir))
    shutil.copy(images / CLASSES[0] / "0000.png", images / CLASSES[0] / "0000 copy.png")
    words = words_of(page_of(run_dir))
    assert "has 91 images now, of the 90 encoded" in words and "Nearest training images" not in words


def test_white_samples_are_samples(run_dir: Path) -> None:
    """A diverged model may paint nothing else."""
    image_NHWC, label_N = some_samples(2000)
    write_cells(run_dir / NEWEST_CELLS, np.full_like(image_NHWC, 255), label_N, 2000)
    assert "Nearest training images" in words_of(page_of(run_dir))


def test_real_images_stand_in_the_row_of_their_class(run_dir: Path) -> None:
    page_of(run_dir)
    with Image.open(run_dir / "report" / "real.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 * 34 + 2, COLUMNS * 34 + 2)
    rows = [[pixels[y : y + 32, x : x + 32] for x in range(2, 34 * COLUMNS, 34)] for y in range(2, 34 * 3, 34)]
    real = open_real(read_history(run_dir, "run"))
    for label, row in enumerate(rows):
        members = [real.read(i).tobytes() for i in range(len(real.source)) if real.source.label(i) == label]
        assert {image.tobytes() for image in row} <= set(members) and len({i.tobytes() for i in row}) == COLUMNS


def test_a_copied_training_image_is_found(run_dir: Path) -> None:
    """And one from the held-out part is no copy: those images are not searched."""
    real = open_real(read_history(run_dir, "run"))
    split = Split(90, 0.1, 0)
    stolen, held_out = int(split.training([17])[0]), int(split.validation([3])[0])
    samples = [real.read(held_out), real.read(stolen)]
    found = nearest(samples, real, most=1000)
    assert found.distance_N[1] < 1e-6 < 0.05 < found.distance_N[0]
    assert np.array_equal(found.rows[0][0], found.rows[0][1]), "the copy comes first, beside its original"
    assert [len(row) for row in found.rows] == [1 + NEIGHBOURS] * 2
    assert (found.searched, found.of, len(found.held_out_M)) == (81, 81, 9)
    assert found.held_out_M.min() > 0.05
    assert nearest(samples, real, most=10).searched == 10


def test_distances_are_root_mean_squares() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 50), np.float32), rng.random((2500, 50), np.float32)
    expected = np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).mean(-1))
    np.testing.assert_allclose(distances(a, b), expected, rtol=1e-9)


def test_without_the_images_it_says_so(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub("path: .*shards", "path: /nowhere/shards", config))
    words = words_of(page_of(run_dir))
    assert "Real images and nearest neighbours are left out" in words and "/nowhere/shards" in words
    assert "Nearest training images" not in words and not (run_dir / "report" / "real.png").exists()


# ------------------------------------------------------------------------------------------------------ curves by hand


def test_hours_leave_out_pauses_and_lost_work() -> None:
    lines = [{"time": t} for t in (3600.0, 7200.0, 100_000.0)]
    assert running_hours(lines, [0.0, 96_400.0]) == pytest.approx([1.0, 2.0, 3.0])
    assert running_hours(lines, []) == pytest.approx([0.0, 1.0, 1 + 92_800 / 3600])


def test_hours_of_a_score_lie_between_those_of_the_lines_around_it(run_dir: Path) -> None:
    """A checkpoint is seldom where a line was logged: a fifth of the way between two lines is a fifth of their time."""
    history = read_history(run_dir, "run")
    run = replace(history, lines=[{"samples_seen": s} for s in (100, 200, 400)], hours=[1.0, 2.0, 7.0])
    assert [hours_at(run, s) for s in (100, 150, 240, 400)] == pytest.approx([1.0, 1.5, 3.0, 7.0])
    assert math.isnan(hours_at(run, 1000)), "after the last line there is nothing to go by"


def test_lines_from_before_the_clock_was_set_back_are_gone(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as f:
        f.write('{"samples_seen": 1200, "loss": 7.0, "attempt": 2}\n')
    history = read_history(run_dir, "run")
    assert [line["samples_seen"] for line in history.lines][-3:] == [1100, 1200, 1200]
    assert [m.samples for m in restarts(0, history)] == [1000, 1200]


def test_names_in_other_scripts_need_no_font(run_dir: Path, tmp_path: Path) -> None:
    """matplotlib warned of every glyph that its own font lacks, a page of it; warnings are errors here."""
    charts = make_charts([read_history(run_dir, "拡散"), read_history(run_dir, "دوم")])
    assert write_plots(charts[:1], tmp_path)


def test_scores_of_other_settings_are_another_line(run_dir: Path) -> None:
    first = json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[0])
    append_jsonl(run_dir / "evaluations.jsonl", first | {"images": 50_000, "fd_efficientnet_lite0": 9999.0})
    append_jsonl(run_dir / "evaluations.jsonl", first | {"kid": 0.25, "kid_std": 0.01, "recall": math.nan})
    history = read_history(run_dir, "run")
    assert sorted(evaluation_groups(history)) == ["50000 images", "9 images"]
    assert best_score(history, "fd_efficientnet_lite0") == 9999.0, "never compared with those of few images"
    assert [c.id for c in make_charts([history])][:3] == ["fd_efficientnet_lite0", "kid", "loss"]


def test_decimating_keeps_the_extremes_and_smoothing_the_mean() -> None:
    y = [0.0] * 50_000
    y[31_234], y[40_001] = 5.0, math.nan
    kept = decimate(range(len(y)), y, most=100)
    assert len(kept) <= 100 and 31_234 in kept and kept == sorted(kept)
    assert smooth([1.0, math.nan, 4.0, 4.0, 4.0], 1) == [1.0, 2.5, 4.0, 4.0, 4.0]


# ------------------------------------------------------------------------------------------- broken, missing, hostile


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    directory.prepare(tmp_path / "new", to_yaml(TrainJob(run_dir="new", data=DataConfig(path="x"))), 4)
    outcome.begin(tmp_path / "new")
    words = words_of(page_of(tmp_path / "new"))
    for text in ("no lines yet", "scored yet", "no checkpoint yet", "No sample grids", "nothing to plot", "running"):
        assert text in words, text


def test_broken_files_are_said_and_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as f:
        f.write('not json\n{"samples_seen": "many", "loss": 1}\n')
        f.write('{"samples_seen": 2100, "loss": NaN, "attempt": 1}\n{"sam')
    (run_dir / "environment.jsonl").write_bytes(b"\xff\xfe\n[1, 2]\n")
    (run_dir / "outcome.json").write_text("{")
    (run_dir / "samples" / "000000003000.png").write_bytes(b"\x89PNG broken")
    (run_dir / "checkpoints" / "000000002000" / "manifest.json").write_text("{}")
    page = page_of(run_dir)
    words = words_of(page)
    for text in (
        "The last line of metrics.jsonl is torn",
        "metrics.jsonl: 2 damaged lines left out, the first is line 23",
        "environment.jsonl: 2 damaged lines",
        "outcome.json is damaged",
        "1 sample grids are not readable",
        "Checkpoint 000000002000 is left out",
        "1 values that are not finite are left out",
    ):
        assert text in words, text
    assert data_of(page)["charts"][1]["series"][0]["y"][-1] is None


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", "[" * 200_000),
        ("metrics.jsonl", '{"samples_seen": 2100, "loss": 1' + "0" * 400 + "}"),
        ("config.yaml", "data: {sources: null}"),
        ("config.yaml", "data: {sources: {a: 3}}"),
        ("config.yaml", "a: " + "[" * 5000),
    ],
    ids=["deep log", "long number", "no sources", "odd sources", "deep config"],
)
def test_a_strange_file_does_not_stop_it(run_dir: Path, name: str, line: str) -> None:
    before = (run_dir / name).read_text() if name.endswith("jsonl") else ""
    (run_dir / name).write_text(before + line + "\n")
    page_of(run_dir)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, text in (
        ([tmp_path / "nothing"], "does not exist"),
        ([tmp_path / "empty"], "is not a run"),
        ([], "usage: ldt report RUN"),
        ([tmp_path / "empty", "output=page.pdf"], "must end in .html"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert text in capsys.readouterr().err
    assert list((tmp_path / "empty").iterdir()) == []


def test_values_become_text_not_tags() -> None:
    assert tag("p", HOSTILE).count("<") == 2
    assert "<script>" not in tag("p", "x", title=HOSTILE) and '"\'"' not in tag("p", "x", title=HOSTILE)
    assert tag("p", Markup("<b>") + "<i>") == "<p><b>&lt;i&gt;</p>"
    assert tag("p", f"{Markup('<b>')}{HOSTILE}").count("<") == 2, "an f-string is text"
    assert "<" not in script_json({HOSTILE: [HOSTILE]})
    assert json.loads(script_json([HOSTILE, math.inf])) == [HOSTILE, None]


def make_hostile(run_dir: Path) -> Path:
    """Every file of the run says something nasty, and so does its name."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"] = {HOSTILE: HOSTILE, "name": HOSTILE, "conditioning": HOSTILE}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    attempt = {"time": 1.0, "host": HOSTILE, "command": [HOSTILE, HOSTILE], "git": HOSTILE}
    append_jsonl(run_dir / "environment.jsonl", attempt)
    step = {"samples_seen": 2000, "loss": 1.0, "attempt": HOSTILE, "world_size": [HOSTILE]}
    append_jsonl(run_dir / "metrics.jsonl", step)
    score = {"samples_seen": 2000, "fid": 1.0, "sampler": HOSTILE, "detector": HOSTILE, "checkpoint_hash": HOSTILE}
    append_jsonl(run_dir / "evaluations.jsonl", score | {"fid_<b>": 2.0, "weights": "\ud800"})
    write_json(run_dir / "outcome.json", {"outcome": HOSTILE, "message": HOSTILE})
    return run_dir.rename(run_dir.with_name("<img src=x onerror=alert(1)> $\\frac"))


# ----------------------------------------------------------------------------------------------------- a real browser


def test_a_browser_shows_it_and_the_slider_moves(run_dir: Path, browser: Browser) -> None:
    frames = data_of(page_of(run_dir))["grids"][0]
    assert [f["samples"] for f in frames] == [1000, 1500, 2000]
    for width in (1200, 390):
        browser.open(run_dir / "report.html", width=width)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        curves = "[...document.querySelectorAll('.chart svg')].map(s => s.querySelectorAll('path.curve').length)"
        assert browser.evaluate(curves) == [1, 2, 1, 1, 1, 1]
        shown = "document.querySelector('img.generated').src"
        assert browser.evaluate(shown) == frames[2]["source"]
        browser.evaluate("document.querySelector('input[type=range]').focus()")
        browser.press("ArrowLeft", 37)
        assert browser.evaluate(shown) == frames[1]["source"] != frames[2]["source"]
        assert browser.evaluate("document.querySelector('output').textContent") == "1,500"
        browser.press("Home", 36)
        assert browser.evaluate(shown) == frames[0]["source"]
        assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.problems == []
    assert [url for url in browser.requests if not url.endswith("/report.html")] == []


def test_axis_legend_and_pointer(run_dir: Path, tmp_path: Path, browser: Browser) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    page_of(run_dir, other)
    browser.open(run_dir / "report.html")
    paths = "[...document.querySelectorAll('[data-chart=\"1\"] path.curve')].map(p => p.getAttribute('d'))"
    ticks = "[...document.querySelectorAll('[data-chart=\"1\"] svg text')].map(t => t.textContent).join(' ')"
    before = browser.evaluate(paths)
    assert len(before) == 4 and "2K" in browser.evaluate(ticks)
    browser.evaluate("document.querySelector('[data-axis=hours]').click()")
    assert browser.evaluate(paths) != before and "10 min" in browser.evaluate(ticks), "of a run of 20 minutes"
    browser.evaluate("document.querySelector('.legend [data-run=\"1\"]').click()")
    assert len(browser.evaluate(paths)) == 2
    assert browser.evaluate("document.querySelectorAll('[data-chart=\"1\"] .flag').length") == 1
    browser.evaluate("document.querySelector('[data-chart=\"2\"]').scrollIntoView()")
    box = browser.evaluate(
        "(b => [b.right - 20, b.y + 50])(document.querySelector('[data-chart=\"2\"] svg').getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert "0.5" in browser.evaluate("document.querySelector('[data-chart=\"2\"] .tip').textContent")
    assert browser.problems == []


def flags(browser: Browser) -> list[int]:
    return browser.evaluate("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.flag').length)")


def test_restarts_stand_where_they_belong_or_not_at_all(run_dir: Path, tmp_path: Path, browser: Browser) -> None:
    """Neither beyond the end of a chart, nor at 0 where a run's compute is not known, nor of a run that is hidden."""
    other = Path(shutil.copytree(run_dir, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints")))
    first = json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[0])
    (run_dir / "evaluations.jsonl").write_text(json.dumps(first | {"samples_seen": 500}) + "\n")
    (other / "evaluations.jsonl").unlink()
    page_of(run_dir, other)
    browser.open(run_dir / "report.html")
    assert flags(browser) == [0, 2, 2, 2, 2, 2], "the only score lies before the restart"
    browser.evaluate("document.querySelector('[data-axis=compute]').click()")
    assert flags(browser) == [0, 1, 1, 1, 1, 1], "one run has no checkpoint"
    browser.evaluate("document.querySelector('[data-axis=samples]').click()")
    browser.evaluate("document.querySelector('.legend [data-run=\"0\"]').click()")
    browser.evaluate("document.querySelector('[data-chart=\"2\"]').scrollIntoView()")
    x, y = browser.evaluate(
        "(b => [b.x, b.y + 30])(document.querySelector('[data-chart=\"2\"] .restart').getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tip = browser.evaluate("document.querySelector('[data-chart=\"2\"] .tip').textContent")
    assert tip.count("restart: ") == 1 and "other: attempt 1" in tip
    assert browser.problems == []


def test_a_single_score_has_a_scale_of_its_own_size(run_dir: Path, browser: Browser) -> None:
    first = json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[0])
    (run_dir / "evaluations.jsonl").write_text(json.dumps(first | {"kid": 0.0042}) + "\n")
    page_of(run_dir)
    browser.open(run_dir / "report.html")
    labels = browser.evaluate("[...document.querySelectorAll('[data-chart=\"1\"] svg text')].map(t => t.textContent)")
    assert "0.0042" in labels and "-0.50" not in labels


def test_a_hostile_run_stays_text(run_dir: Path, browser: Browser) -> None:
    hostile = make_hostile(run_dir)
    page_of(hostile)
    browser.open(hostile / "report.html")
    assert browser.evaluate("typeof window.stolen") == "undefined"
    assert browser.evaluate("[...document.images].filter(i => !i.src.startsWith('data:')).length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert "onerror" in browser.evaluate("document.body.innerText"), "it is shown as what it is"
    assert browser.problems == []


def test_only_the_pages_own_script_may_run(run_dir: Path, browser: Browser) -> None:
    page = page_of(run_dir)
    (run_dir / "report.html").write_text(page.replace("</main>", "<script>window.stolen=1</script></main>"))
    browser.open(run_dir / "report.html")
    assert browser.evaluate("typeof window.stolen") == "undefined"
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()


def test_the_command_that_takes_the_pictures_for_the_docs(run_dir: Path, tmp_path: Path) -> None:
    page_of(run_dir)
    tool = Path(__file__).parents[1] / "tools" / "screenshots.py"
    command = [sys.executable, tool, run_dir / "report.html", tmp_path / "out", "--views", "phone", "dark"]
    subprocess.run(command, check=True)
    with Image.open(tmp_path / "out" / "report-phone.png") as phone:
        assert phone.width == 2 * 390 and phone.height > 2000
    with Image.open(tmp_path / "out" / "report-dark.png") as dark:
        assert np.asarray(dark.convert("L"))[5, 5] < 40 < len(np.unique(np.asarray(dark.convert("L"))))


@pytest.mark.parametrize(
    ("value", "said"),
    [(525.007, "525.0"), (422.774, "422.8"), (12345.678, "12,345.7"), (28, "28"), (0.677, "0.677"), (np.nan, "–")],
)
def test_scores_of_a_table_are_alike(value, said):
    assert score(value) == said
