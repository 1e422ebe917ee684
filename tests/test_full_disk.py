"""A full disk at each kind of file that is written: one sentence names it, nothing that was there is lost, and the same
command goes on once there is room.

Every command is run on a real disk with room for no page, one page, two, … until it succeeds; by bisection, as most of
these come to the same file.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dit_weights import DEPTH, HEADS, WIDTH, dit_layout
from run_data import make_autoencoder, make_images, shared_run
from safetensors.torch import save_file
from shard_data import write_shards
from small_disk import FULL, SmallDisk, disk, fill, name_in
from tiny_detector import MeanOfGrey

from ldt import log
from ldt.cli import main
from ldt.data.shards import open_shards
from ldt.dist import discover
from ldt.errors import RunError, in_a_sentence
from ldt.nn.embedding import sincos_2d
from ldt.reporting import png
from ldt.run import claims, directory, outcome, owner

__all__ = ["disk", "fill"]


@pytest.fixture
def run_dir(disk: SmallDisk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shared_run(tmp_path_factory), disk.path / "run"))


EVALUATE = ["evaluate.images=4", "evaluate.steps=1", "evaluate.block=4"]
SAMPLE = ["images=12", "steps=1", "block=4"]


def test_drawn_images(fill, run_dir):
    fill([r"run/samples/grid-000000002000.png"], "sample", run_dir, *SAMPLE)


def test_drawn_images_as_a_folder(fill, run_dir):
    fill([r"run/samples/folder-000000002000"], "sample", run_dir, *SAMPLE, "format=folder")


def test_drawn_images_as_npz(fill, run_dir):
    """Written through a memory map, a full disk ended the process by SIGBUS and without a word."""
    fill([r"run/samples/npz-000000002000.npz"], "sample", run_dir, *SAMPLE, "format=npz")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("ldt.evaluation.sets", "ldt.commands.evaluate"):
        monkeypatch.setattr(f"{place}.make_detector", lambda *_: MeanOfGrey())


@pytest.mark.usefixtures("quick")
def test_statistics_of_real_images(fill, disk, tmp_path, run_dir):
    names = [r"cache/grey-\w+.work/block-\d+.safetensors", r"cache/grey-\w+.features.npy", r"cache/grey-\w+.npz"]
    fill(names, "evaluate", run_dir, *EVALUATE, f"evaluate.cache_dir={disk.path}/cache")


@pytest.mark.usefixtures("quick")
def test_scores_of_a_checkpoint(fill, run_dir, tmp_path):
    names = [
        r"run/evaluations/.000000002000-\S+.work/block-\d+.safetensors",
        r"run/evaluations/000000002000-\w+.json",
        r"run/evaluations.jsonl",
    ]
    (run_dir / "evaluations").mkdir()
    for i in range(8):  # so that all of them together take some pages
        other = {"samples_seen": i, "checkpoint_hash": "x" * 2000}
        (run_dir / "evaluations" / f"{i:012d}-x.json").write_text(json.dumps(other))
    (run_dir / "evaluations.jsonl").write_text("of before\n")
    fill(names, "evaluate", run_dir, *EVALUATE, f"evaluate.cache_dir={tmp_path}/cache")


@pytest.mark.usefixtures("quick")
def test_scores_of_images(fill, disk, tmp_path):
    make_images(tmp_path / "made", 6)
    make_images(tmp_path / "real", 9)
    (disk.path / "scores.jsonl").write_text('{"other": 1}\n' + " " * 4096 + "\n")
    command = ["score", tmp_path / "made", f"reference={tmp_path}/real", f"cache_dir={tmp_path}/cache"]
    fill([r".score-\w+.work/block-\d+.safetensors"], *command, f"output={disk.path}/scores.jsonl")


@pytest.fixture
def logged(run_dir: Path) -> Path:
    """The run with a log and a preview, of which a report can be made."""
    directory.prepare(run_dir, (run_dir / "config.yaml").read_text(), 1)
    for i in range(1, 11):
        log.append_jsonl(run_dir / "metrics.jsonl", {"samples_seen": 200 * i, "loss": 1 / i, "time": 1.8e9 + i})
    assert main(["sample", str(run_dir), *SAMPLE, "--quiet"]) == 0
    (run_dir / "samples" / "grid-000000002000.png").rename(run_dir / "samples" / "000000002000.png")
    return run_dir


def test_the_page_of_a_report(fill, logged, monkeypatch):
    monkeypatch.setattr("ldt.commands.report.write_plots", lambda charts, directory: [])
    fill([r"run/report/generated.png", r"run/report.html"], "report", logged)


def test_the_plots_of_a_report(disk, logged, monkeypatch):
    charts = []
    monkeypatch.setattr("ldt.commands.report.write_plots", lambda found, directory: charts.extend(found) or [])
    assert main(["report", str(logged), "--quiet"]) == 0
    disk.leave(1)
    with pytest.raises(OSError, match=f"{FULL}: '{disk.path}/plots/{charts[0].id}.png'"):
        png.write_plots(charts, disk.path / "plots")
    assert not list((disk.path / "plots").iterdir())


@pytest.mark.parametrize("weights", ["ema", "master"])
def test_an_exported_model(fill, run_dir, disk, weights):
    """Half a model used to stay, over which the next attempt stumbled."""
    fill([r"model"], "export", run_dir, f"to={disk.path}/model", f"weights={weights}")


def import_words(tmp_path: Path, to: Path) -> list[object]:
    """A command that imports DiT's weights."""
    make_autoencoder(tmp_path / "vae")
    theirs = {name: torch.randn(shape) for name, shape in dit_layout(WIDTH, DEPTH, 7, 4).items()}
    theirs["pos_embed"] = sincos_2d(WIDTH, 4, 4)[None]
    save_file(theirs, tmp_path / "dit.safetensors")
    return ["import", tmp_path / "dit.safetensors", f"to={to}", f"autoencoder={tmp_path}/vae", f"heads={HEADS}"]


def test_an_imported_model(fill, disk, tmp_path):
    fill([r"model"], *import_words(tmp_path, disk.path / "model"))


def test_a_pipeline_for_diffusers(fill, disk, tmp_path):
    """safetensors' own writer, whose error is no OSError; half a pipeline was in the way of the next attempt."""
    assert main([*map(str, import_words(tmp_path, tmp_path / "model")), "--quiet"]) == 0
    facts = tmp_path / "model" / "model.json"
    facts.write_text(facts.read_text().replace('"time_frequencies": "dit"', '"time_frequencies": "diffusers"'))
    fill([r"pipeline"], "export", tmp_path / "model", f"to={disk.path}/pipeline", "format=diffusers")


def encoding(disk: SmallDisk, tmp_path: Path, *more: str) -> list[object]:
    """A command that encodes 12 small images, one of which can't be read, onto the disk."""
    make_autoencoder(tmp_path / "vae")
    make_images(tmp_path / "images", 12)
    (tmp_path / "images" / "boot" / "broken.png").write_bytes(b"x")
    settings = ["images.on_error=skip", "shard_samples=5", "validation_fraction=0.2", "threads=1", "batch=5", *more]
    place = [f"images.path={tmp_path}/images", f"autoencoder={tmp_path}/vae", f"output={disk.path}/out"]
    return ["encode", *place, *settings]


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_encoded_shards(fill, disk, tmp_path, format):
    names = [
        r"out/encode.json", r"out/left_out.jsonl", rf"out/(validation/)?shard-\d+.{format}",
        rf"out/(validation/)?shard-\d+.{format}.json", r"out/validation/shards.npy", r"out/validation/manifest.json",
        r"out/shards.npy", r"out/manifest.json", *([r"out/(validation/)?index.json"] if format == "mds" else []),
    ]  # fmt: skip
    fill(names, *encoding(disk, tmp_path, f"format={format}", "images.size=32", "images.fit=pad"))


def test_encoded_buckets(fill, disk, tmp_path):
    command = encoding(disk, tmp_path, "images.buckets=[32x32,32x40]", "images.fit=pad")
    (tmp_path / "images" / "boot" / "broken.png").unlink()
    command.remove("images.on_error=skip")
    fill([r"out/sizes-\w+.npy", r"out/32x32/\S+"], *command)
    (disk.path / "out" / "buckets.json").unlink()  # what comes last, when all that was needed on the way is gone
    shutil.rmtree(tmp_path / "before")
    fill([r"out/buckets.json"], *command)


def test_the_manifest_of_shards_made_elsewhere(fill, disk, tmp_path):
    make_autoencoder(tmp_path / "vae")
    write_shards(disk.path / "data", [5, 6], latent_shape=(4, 8, 8))
    for name in ("manifest.json", "shards.npy"):
        (disk.path / "data" / name).unlink()
    names = [r"data/shards.npy", r"data/manifest.json"]
    fill(names, "encode", f"index={disk.path}/data", f"autoencoder={tmp_path}/vae")


def test_a_grid_of_encoded_data(fill, disk, tmp_path):
    make_autoencoder(tmp_path / "vae")
    command = encoding(disk, tmp_path, "images.size=32", "images.fit=pad")
    assert main([*map(str, command), "--quiet"]) == 0
    fill([r"grid.png"], "inspect", disk.path / "out", f"grid={disk.path}/grid.png")


def test_the_cache_of_remote_shards(disk, tmp_path):
    write_shards(tmp_path / "data", [40])
    shards = open_shards(f"file://{tmp_path}/data", str(disk.path / "cache"))
    disk.leave(1)
    with pytest.raises(RunError, match=rf"data.cache_dir={disk.path}/cache is full \({FULL}\)"):
        shards.read([0], [0])
    assert not [p for p in (disk.path / "cache").iterdir() if p.is_file()]
    disk.make_room()
    assert len(shards.read([0], [3]).label_n) == 1


# ---------------------------------------------------------------------------------- what is written by a start of a run


def begin(run_dir: Path) -> None:
    with owner.owned(run_dir, discover({})):
        outcome.begin(run_dir)
        directory.prepare(run_dir, "seed: 2\n", 1)
        log.keep_jsonl_until(run_dir / "metrics.jsonl", "samples_seen", 100)
        outcome.write_outcome(run_dir, outcome.DONE, 101)


def test_the_files_of_a_start(disk, monkeypatch):
    """With room for 0, 1, 2, … pages: a file is whole or as before, and a next start is not held up by this one."""
    run_dir, named = disk.path / "run", set()
    monkeypatch.setattr(directory, "git", lambda *words: "x" * 9000 if words[0] == "diff" else "abc")
    directory.prepare(run_dir, "seed: 1\n", 1)
    for i in range(1, 150):
        log.append_jsonl(run_dir / "metrics.jsonl", {"samples_seen": i, "words": "x" * 500})
    shutil.copytree(run_dir, disk.path.parent / "before")
    for pages in range(50):
        disk.empty()
        shutil.copytree(disk.path.parent / "before", run_dir)
        before = disk.files()
        disk.leave(pages)
        try:
            with in_a_sentence():
                begin(run_dir)
        except RunError as error:
            named.add(name_in(str(error), disk).removeprefix("run/"))
        else:
            break
        after = disk.files()
        whole = [json.loads(line)["samples_seen"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert whole == list(range(1, max(whole) + 1)) and max(whole) in (100, 149)
        cut = [json.loads(line)["samples_seen"] for line in after.get("run/metrics.cut.jsonl", b"").splitlines()]
        assert cut == ([] if max(whole) == 149 else list(range(101, 150)))
        assert after["run/config.yaml"] in (before["run/config.yaml"], b"seed: 2\n")
        assert not [n for n in after if "unfinished" in n or n.endswith("owner.json")]
        disk.make_room()
        begin(run_dir)
    assert named == {
        "owner.json", "outcome.json", "config.yaml", "environment.jsonl", "source.diff", "metrics.jsonl",
        "metrics.cut.jsonl",
    }  # fmt: skip


def test_a_line_of_a_log(disk):
    """What fits of it is taken back: the next line would be glued to it, and the log not readable any more."""
    path = disk.path / "metrics.jsonl"
    log.append_jsonl(path, {"samples_seen": 8})
    before = path.read_bytes()
    disk.leave(0)
    with pytest.raises(RunError, match=f"the disk of {path} is full"), in_a_sentence():
        log.append_jsonl(path, {"samples_seen": 16, "words": "x" * 5000})
    assert path.read_bytes() == before
    disk.make_room()
    log.append_jsonl(path, {"samples_seen": 16})
    assert [line["samples_seen"] for line in log.read_jsonl(path)] == [8, 16]


def test_a_claim(disk):
    """An empty claim would have kept its checkpoint from the other watchers, and from deletion, for ten minutes."""
    checkpoint = disk.path / "000000001000"
    disk.leave(0)
    with pytest.raises(RunError, match=f"{checkpoint}.claim-key is full"), in_a_sentence():
        claims.Claim.take(checkpoint, "key")
    disk.make_room()
    assert claims.Claim.take(checkpoint, "key") is not None
