"""The evaluation job: the same numbers from any number of processes, each computed once, nothing silent."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from peers import random_inception
from pool import Pool
from run_data import shared_run

from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.commands.evaluate import EvaluateJob, evaluate, run
from ldt.config import load
from ldt.data.images import prepare
from ldt.data.images.open import open_images
from ldt.dist import World
from ldt.errors import InputError
from ldt.evaluation.config import EvaluateConfig
from ldt.evaluation.parts import blocks_of, parts_of
from ldt.evaluation.scorer import make_features, open_reference
from ldt.log import read_jsonl
from ldt.metrics.detectors import make_detector
from ldt.metrics.feature_store import FeatureStore
from ldt.metrics.frechet import frechet_distance
from ldt.metrics.image_set import ImageSet
from ldt.metrics.reference import load as load_reference
from ldt.metrics.reference import reference_of
from ldt.metrics.scores import CAPTIONS, METRICS
from ldt.metrics.set_metrics import inception_score, kernel_distance, precision_recall
from ldt.sampling.config import DrawConfig
from ldt.sampling.draw import ImageModel, image_model, sample_images
from ldt.training.config import TrainJob

FAST: dict[str, Any] = {"images": 21, "sampler": "euler", "steps": 2, "block": 8}
SCORE = "fd_efficientnet_lite0"
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_run(tmp_path_factory)


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., EvaluateConfig]:
    return lambda **keys: EvaluateConfig(**{**FAST, "cache_dir": str(tmp_path / "cache"), **keys})


def score(run_dir: Path, config: EvaluateConfig) -> dict[str, Any]:
    assert run(EvaluateJob(run=str(run_dir), evaluate=config)) == 0
    return list(read_jsonl(run_dir / "evaluations.jsonl"))[-1]


def case_evaluate(world: World, run: str, output: str, cache_dir: str, keys: dict[str, Any]) -> dict[str, Any]:
    evaluate(EvaluateJob(run=run, evaluate=EvaluateConfig(**keys, output=output, cache_dir=cache_dir)), world)
    return list(read_jsonl(Path(output)))[-1] if world.rank == 0 else {}


def test_bitwise_the_same_from_any_number_of_processes(
    original: Path, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    results = []
    for size in (1, 2, 3, 8):
        where = {"output": str(tmp_path / f"{size}" / "e.jsonl"), "cache_dir": str(tmp_path / f"{size}")}
        results.append(pool(size).run(case_evaluate, run=str(original), keys=FAST, **where))
    assert [r["world_size"] for r in results] == [1, 2, 3, 8]
    for key in (SCORE, "moments_hash", "reference_hash", "images"):
        assert len({r[key] for r in results}) == 1, key
    detector = make_detector("efficientnet_lite0")
    references = [load_reference(next((tmp_path / f"{size}").glob("*.npz")), detector) for size in (1, 2, 3, 8)]
    for other in references[1:]:
        assert np.array_equal(
            other.statistics("features").covariance_DD, references[0].statistics("features").covariance_DD
        )


def test_another_block_agrees_closely(run_dir: Path, settings: Callable[..., EvaluateConfig]) -> None:
    a, b = (score(run_dir, settings(block=block)) for block in (8, 21))
    by_block = {r["block"]: r for r in read_jsonl(run_dir / "evaluations.jsonl")}
    assert by_block[8][SCORE] == pytest.approx(by_block[21][SCORE], rel=1e-3)  # a pixel may round the other way
    assert a and b


def test_the_slices_of_decoding_are_part_of_the_evaluation(
    run_dir: Path, settings: Callable[..., EvaluateConfig]
) -> None:
    """Another slice may tip a pixel, so it is another evaluation, with a file of its own."""
    for size in (3, 0):
        score(run_dir, settings(decode_slice=size))
    by_slice = {r["decode_slice"]: r for r in read_jsonl(run_dir / "evaluations.jsonl")}
    assert by_slice[3][SCORE] == pytest.approx(by_slice[0][SCORE], rel=1e-3)


def test_the_score_is_that_of_the_images(run_dir: Path, settings: Callable[..., EvaluateConfig]) -> None:
    """Once more by hand: all images in memory, numpy's mean and covariance."""
    result = score(run_dir, settings())
    device = torch.device("cpu")
    model, detector = image_model(load_denoiser(run_dir), "fp32", device), make_detector("efficientnet_lite0")
    drawing = DrawConfig(sampler="euler", steps=2, block=8)
    made = torch.cat([sample_images(model, range(i, i + 8), drawing) for i in (0, 8, 16)])[:21]
    source = open_images(str(run_dir_images(run_dir)))
    real = torch.from_numpy(np.stack([prepare(source.image(i), 32, 1, "pad") for i in range(len(source))]))
    x, y = (detector(images).feature_BD.double().numpy() for images in (made, real))
    expected = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert result[SCORE] == pytest.approx(expected, rel=1e-4)
    assert result["samples_seen"] == 2000 and result["images"] == 21 and result["reference_images"] == 90
    assert result["rank_deficient"] is True, "21 images, 1280 features"


def _model(run_dir: Path) -> ImageModel:
    return image_model(load_denoiser(run_dir), "fp32", torch.device("cpu"))


def run_dir_images(run_dir: Path) -> Path:
    shards = Path(load_denoiser(run_dir).config["data"]["path"])
    return shards.parent / "images"


def test_done_once_and_derived_from_files(
    run_dir: Path, settings: Callable[..., EvaluateConfig], caplog: pytest.LogCaptureFixture
) -> None:
    score(run_dir, settings(checkpoint="all"))
    files = sorted((run_dir / "evaluations").iterdir())
    assert [f.name[:12] for f in files] == ["000000001000", "000000002000"]
    before = [f.stat().st_mtime_ns for f in files]
    (run_dir / "evaluations.jsonl").unlink()
    caplog.set_level(logging.INFO, "ldt")
    score(run_dir, settings(checkpoint="all"))
    assert [f.stat().st_mtime_ns for f in files] == before and "already scored" in caplog.text
    records = list(read_jsonl(run_dir / "evaluations.jsonl"))
    assert [r["samples_seen"] for r in records] == [1000, 2000]
    assert records[0][SCORE] != records[1][SCORE], "other weights, other score"
    score(run_dir, settings(checkpoint="1000", seed=1))
    assert len(list(read_jsonl(run_dir / "evaluations.jsonl"))) == 3


def test_a_result_of_replaced_weights_is_not_believed(run_dir: Path, settings: Callable[..., EvaluateConfig]) -> None:
    score(run_dir, settings())
    file = next((run_dir / "evaluations").iterdir())
    stale = json.loads(file.read_text()) | {"checkpoint_hash": "other", SCORE: -1.0}
    file.write_text(json.dumps(stale))
    assert score(run_dir, settings())[SCORE] > 0


def test_by_the_command_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"evaluate.{k}={v}" for k, v in {**FAST, "cache_dir": tmp_path / "cache"}.items()]
    assert main(["evaluate", str(run_dir), *keys]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(SCORE) and last.endswith(str(run_dir / "evaluations.jsonl"))


def test_a_training_config_serves(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(f"run_dir: {run_dir}\nmodel: {{width: 64}}\ncheckpoint: {{keep: 2}}\nevaluate: {{images: 77}}\n")
    config = load(EvaluateJob, path, [])
    assert config.run_dir == str(run_dir) and config.evaluate.images == 77
    with pytest.raises(InputError, match="imagse"):
        load(EvaluateJob, path, ["evaluate.imagse=3"])


def test_reference_cache_knows_its_content(original: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(run_dir_images(original), tmp_path / "images"))
    detector = make_detector("efficientnet_lite0")

    def open_it(fit: str = "pad", size: int = 32) -> tuple[str, int]:
        sets = [ImageSet(open_images(str(images)), size, size, 1, fit)]
        reference = reference_of(sets, detector, tmp_path / "cache", ALONE)
        return reference.hash, len(list((tmp_path / "cache").glob("*.npz")))

    first = open_it()
    assert open_it() == first and first[1] == 1, "found again"
    assert open_it(fit="crop")[1] == 2, "another crop is another reference"
    shutil.copy(images / "coat" / "0001.png", images / "boot" / "0000.png")
    changed = open_it()
    assert changed[0] != first[0] and changed[1] == 3, "another pixel is another reference"


def test_bad_input_is_refused(run_dir: Path, tmp_path: Path, settings: Callable[..., EvaluateConfig]) -> None:
    with pytest.raises(InputError, match=r"evaluate.images=1 "):
        EvaluateConfig(images=1)
    with pytest.raises(InputError, match="needs evaluate.fit"):
        EvaluateConfig(reference="somewhere")
    with pytest.raises(InputError, match="belongs to images given as evaluate.reference"):
        EvaluateConfig(fit="crop")
    with pytest.raises(InputError, match="nothing to evaluate"):
        EvaluateJob()
    with pytest.raises(InputError, match="1000, 2000"):
        score(run_dir, settings(checkpoint="1500"))
    with pytest.raises(InputError, match="does not exist"):
        score(tmp_path / "nowhere", settings())
    with pytest.raises(InputError, match="does not exist"):
        score(run_dir, settings(reference=str(tmp_path / "nowhere"), fit="crop"))
    assert not (run_dir / "evaluations").exists()


def test_damaged_reference_statistics_are_refused(
    run_dir: Path, tmp_path: Path, settings: Callable[..., EvaluateConfig]
) -> None:
    score(run_dir, settings())
    file = next((tmp_path / "cache").glob("*.npz"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="remove it"):
        score(run_dir, settings(seed=1))


def test_an_interrupted_evaluation_makes_only_what_is_missing(
    run_dir: Path, tmp_path: Path, settings: Callable[..., EvaluateConfig]
) -> None:
    """Blocks that a killed job left are kept, a damaged one is made again, and the numbers are the same."""
    model, detector, config = _model(run_dir), make_detector("efficientnet_lite0"), settings()
    store = FeatureStore(tmp_path / "work")
    blocks = blocks_of(parts_of(config, model.spec), config.block)
    assert len(list(make_features(config, blocks, {"": model}, detector, store, ALONE).pieces("features"))) == 3
    files = sorted(store.directory.iterdir())
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    files[0].unlink()
    files[1].write_bytes(before[1][0][:100])
    make_features(config, blocks, {"": model}, detector, store, ALONE)
    after = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    assert [a[0] for a in after] == [b[0] for b in before]
    assert [a[1] == b[1] for a, b in zip(after, before, strict=True)] == [False, False, True]


def test_nothing_is_left_behind(run_dir: Path, tmp_path: Path, settings: Callable[..., EvaluateConfig]) -> None:
    score(run_dir, settings())
    leftovers = [p for where in (run_dir, tmp_path / "cache") for p in where.rglob("*") if ".work" in p.name]
    assert leftovers == []


def test_all_scores_of_inception(run_dir: Path, tmp_path: Path, settings: Callable[..., EvaluateConfig]) -> None:
    """Through the program, with random weights: each score once more from the features themselves."""
    weights = random_inception(tmp_path / "inception.pth")
    keys = {
        "detector": "inception",
        "weights_file": str(weights),
        "metrics": [m for m in METRICS if m != CAPTIONS],
        "images": 16,
    }
    images = tmp_path / "few"
    for name in ("boot/0000", "coat/0001", "shirt/0002", "boot/0003", "coat/0004", "shirt/0005"):
        target = images / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_dir_images(run_dir) / f"{name}.png", target)
    result = score(run_dir, settings(**keys, reference=str(images), fit="pad"))

    detector = make_detector("inception", "cpu", str(weights))
    drawing = DrawConfig(sampler="euler", steps=2, block=8)
    model = image_model(load_denoiser(run_dir), "fp32", torch.device("cpu"))
    made = detector(torch.cat([sample_images(model, range(i, i + 8), drawing) for i in (0, 8)])).arrays()
    source = open_images(str(images))
    real = detector(torch.from_numpy(np.stack([prepare(source.image(i), 32, 1, "pad") for i in range(6)]))).arrays()

    def frechet(name: str) -> float:
        x, y = made[name].astype(np.float64), real[name].astype(np.float64)
        return frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))

    assert result["fid"] == pytest.approx(frechet("features"), rel=1e-4)
    assert result["sfid"] == pytest.approx(frechet("spatial"), rel=1e-4)
    assert result["inception_score"] == pytest.approx(inception_score(made["logits"]).mean, rel=1e-5)
    assert result["kid_inception_tensorflow"] == pytest.approx(
        kernel_distance(made["features"], real["features"], subset_size=6).mean, rel=1e-4
    )
    pair = precision_recall(made["features"], real["features"])
    assert (result["precision_inception_tensorflow"], result["recall_inception_tensorflow"]) == pair
    assert result["detector_hash"] == detector.hash


def test_statistics_as_adm_publishes_them(
    run_dir: Path, tmp_path: Path, settings: Callable[..., EvaluateConfig]
) -> None:
    """An .npz with mu and sigma alone, as the reference: the same score as from the images it was made of."""
    expected = score(run_dir, settings())[SCORE]
    ours = np.load(next((tmp_path / "cache").glob("*.npz")), allow_pickle=False)
    path = tmp_path / "adm.npz"
    np.savez(path, mu=ours["mu"], sigma=ours["sigma"])
    result = score(run_dir, settings(reference=str(path), seed=0))
    assert result[SCORE] == expected

    def refused(message: str, **arrays: np.ndarray) -> None:
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            score(run_dir, settings(reference=str(path), seed=1))

    refused("holds no reference statistics", mu=ours["mu"])
    refused("features of width 7, but the detector", mu=np.zeros(7), sigma=np.eye(7))
    refused("NaN or infinite", mu=ours["mu"] * np.nan, sigma=ours["sigma"])
    other = json.dumps({"detector": "other", "detector_hash": "x", "hash": "y"})
    refused("statistics of another detector", mu=ours["mu"], sigma=ours["sigma"], made_by=np.array(other))
    path.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="not readable as .npz"):
        score(run_dir, settings(reference=str(path)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["fid"]}, "metrics has fid, which is not one of frechet"),
        ({"metrics": []}, "metrics is empty"),
        ({"metrics": ["inception_score"]}, "needs a detector with logits, which efficientnet_lite0 does not have"),
        ({"detector": "inception", "weights_file": "nowhere.pth"}, "detector weights nowhere.pth do not exist"),
    ],
)
def test_impossible_scores_are_refused(
    run_dir: Path, settings: Callable[..., EvaluateConfig], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score(run_dir, settings(**keys))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_data_from_a_remote_know_their_images_too(
    run_dir: Path, settings: Callable[..., EvaluateConfig], scheme: str
) -> None:
    loaded, detector = load_denoiser(run_dir), make_detector("efficientnet_lite0", ALONE.device)
    shards = Path(loaded.config["data"]["path"])
    address = f"file://{shards}"
    if scheme == "memory":
        fsspec.filesystem("memory").pipe_file("/bucket/e/manifest.json", (shards / "manifest.json").read_bytes())
        address = "memory://bucket/e"
    elsewhere = dataclasses.replace(loaded, config=loaded.config | {"data": {"path": address}})
    found, expected = (open_reference(settings(), one, detector, ALONE) for one in (elsewhere, loaded))
    assert found.hash == expected.hash


def test_images_that_are_not_square_are_compared_with_images_of_their_shape(
    run_dir: Path, settings: Callable[..., EvaluateConfig]
) -> None:
    loaded, detector = load_denoiser(run_dir), make_detector("efficientnet_lite0", ALONE.device)
    wide = dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, latent_shape=(4, 8, 16)))
    assert wide.spec.image_shape == (32, 64)
    square, other = (open_reference(settings(), one, detector, ALONE) for one in (loaded, wide))
    assert square.images == other.images and square.hash != other.hash
    by_size = open_reference(settings(size="32x64"), loaded, detector, ALONE)
    assert by_size.hash == other.hash


def test_the_config_of_every_run_is_taken() -> None:
    """A section that a training has and an evaluation does not would refuse the saved config of every run."""
    sections = {f.name for f in dataclasses.fields(TrainJob)}
    assert sections <= {f.name for f in dataclasses.fields(EvaluateJob)}
