"""What the commands make of a run on buckets: images of any size, scores by bucket, costs, and whether all is whole."""

import dataclasses
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from encoding_cases import encode_case
from invariance_cases import train_case
from PIL import Image
from run_data import opened

import ldt
from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.commands.evaluate import EvaluateJob, evaluate
from ldt.config import from_dict, load
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.dist import broadcast
from ldt.errors import InputError
from ldt.evaluation.config import EvaluateConfig
from ldt.evaluation.parts import Part, blocks_of, parts_of, with_size
from ldt.evaluation.real_images import real_images
from ldt.image_files import class_grid, read_cells
from ldt.log import read_jsonl
from ldt.metrics.detectors import make_detector
from ldt.metrics.frechet import frechet_distance
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.nn.sizes import flops
from ldt.reporting.history import read_history
from ldt.sampling.config import DrawConfig
from ldt.sampling.draw import image_model, resized, sample_images

SIZES = {"16x16": 14, "16x24": 10, "24x16": 8}  # images of each


@pytest.fixture(scope="module")
def root(pool, autoencoder, tmp_path_factory):
    """Encoded buckets, and a run on them."""
    root, rng, number = tmp_path_factory.mktemp("buckets"), np.random.default_rng(0), 0
    for name, images in SIZES.items():
        height, width = map(int, name.split("x"))
        for _ in range(images):
            directory = root / "images" / ("ant", "bee")[number % 2]
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (height, width), np.uint8)).save(directory / f"{number:03d}.png")
            number += 1
    encode = {
        "images.path": root / "images", "images.buckets": f"[{','.join(SIZES)}]", "images.fit": "crop",
        "autoencoder": autoencoder, "output": root / "data", "validation_fraction": 0,
        "images.index_dir": root / "index",
    }  # fmt: skip
    pool(1).run(encode_case, settings=[f"{key}={value}" for key, value in encode.items()])
    train = ["log.validation_every_samples=0", "objective.shift_base=64", f"run_dir={root}/run"]
    pool(1).run(train_case, settings=[f"data.path={root}/data", *train])
    return root


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # process_group sets them
        monkeypatch.setenv(name, {"WORLD_SIZE": "1"}.get(name, "0"))


FAST = {"sampler": "euler", "steps": 2, "block": 4}


def test_images_of_any_size_are_those_of_a_model_made_for_it(root):
    """By the size's own grid of positions and its own shift of times; image i still depends on (seed, i) alone."""
    loaded = load_denoiser(root / "run")
    assert loaded.spec.shapes == {"16x16": (2, 8, 8), "16x24": (2, 8, 12), "24x16": (2, 12, 8)}
    assert loaded.spec.latent_shape == (2, 12, 8)  # of the two largest the higher one
    model = image_model(loaded, "fp32", "cpu")
    wide = resized(model, loaded.config, "8x32")
    images = sample_images(wide, range(4, 8), DrawConfig(**FAST))
    assert images.shape == (4, 8, 32, 1)
    objective = Objective(from_dict(ObjectiveConfig, loaded.config["objective"]), (2, 4, 16))
    made_for_it = build(from_dict(ModelConfig, loaded.config["model"]), (2, 4, 16), 2, seed=0).eval()
    weights = {name: p for name, p in loaded.denoiser.named_parameters() if p.requires_grad}
    made_for_it.load_state_dict(weights, strict=False)
    other = type(model)(made_for_it, objective, wide.spec, model.autoencoder, model.device)
    assert (sample_images(other, range(4, 8), DrawConfig(**FAST)) == images).all()
    assert resized(model, loaded.config, "24x16") is model is resized(model, loaded.config, "")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("256", "size has '256', which is not HEIGHTxWIDTH"),
        ("17x16", "size=17x16 is not divisible by 2, the factor of autoencoder"),
        ("16x18", r"model.patch=2 does not divide the latent size 8x9 of size=16x18"),
    ],
)
def test_sizes_that_can_not_be_drawn_are_refused(root, size, words):
    with pytest.raises(InputError, match=words):
        ldt.load(root / "run").sample(1, size=size, **FAST)


def test_sizes_come_through_the_command_and_python_alike(root, alone, tmp_path):
    out = tmp_path / "grid.png"
    settings = ["images=4", "size=16x8", "steps=2", "sampler=euler", "block=4", f"output={out}"]
    assert main(["sample", str(root / "run"), *settings]) == 0
    images = ldt.load(root / "run").sample(4, size="16x8", **FAST)
    assert images.shape == (4, 16, 8, 1)
    with Image.open(out) as picture:
        assert (np.asarray(picture) == np.asarray(class_grid(images, np.arange(4) % 2))).all()


def test_every_bucket_is_scored_against_its_own_images(root, alone, tmp_path, capsys):
    given = ["evaluate.images=16", "evaluate.steps=2", "evaluate.sampler=euler", "evaluate.block=8"]
    given += [f"evaluate.cache_dir={tmp_path}", f"evaluate.output={tmp_path}/evaluations.jsonl"]
    assert main(["evaluate", str(root / "run"), *given, f"evaluate.size=all,{','.join(SIZES)}"]) == 0
    table = capsys.readouterr().out
    assert all(re.search(rf"^\s*{name} ", table, re.M) for name in ("all", *SIZES))
    results = {r["size"]: r for r in read_jsonl(tmp_path / "evaluations.jsonl")}
    assert {name: r["reference_images"] for name, r in results.items()} == SIZES | {"all": 32}
    assert len({r["reference_hash"] for r in results.values()}) == 4
    assert main(["evaluate", str(root / "run"), *given, "evaluate.size=8x8"]) == 2
    assert "evaluate.size=8x8 has to be one of 16x16, 16x24, 24x16, or all" in capsys.readouterr().err


def evaluate_case(world, settings: list[str]) -> list[dict]:
    results = evaluate(load(EvaluateJob, None, settings), world)
    return [r for r in broadcast(results) if "samples_seen" in r]


def test_all_buckets_together_are_one_distribution(root, pool, tmp_path):
    """Against numpy: each bucket's images by its share of the training data, and the real ones each at its own size."""
    given = ["images=21", "steps=2", "sampler=euler", "block=4", f"cache_dir={tmp_path}", "metrics=[frechet,kernel]"]
    given = [f"run={root}/run", *(f"evaluate.{word}" for word in given)]
    results = [
        pool(ranks).run(evaluate_case, settings=[*given, *more, f"evaluate.output={tmp_path}/{ranks}/e.jsonl"])[0]
        for ranks, more in ((1, []), (3, ["evaluate.size=all"]))
    ]
    for key in ("fd_efficientnet_lite0", "kid_efficientnet_lite0", "moments_hash", "reference_hash", "size"):
        assert len({r[key] for r in results}) == 1, key
    one = results[0]
    assert one["size"] == "all" and one["reference_images"] == 32
    loaded, detector = load_denoiser(root / "run"), make_detector("efficientnet_lite0")
    model, drawn, real = image_model(loaded, "fp32", "cpu"), [], []
    for number, (name, images) in enumerate({"16x16": 9, "16x24": 6, "24x16": 6}.items()):  # of 21, by 14 : 10 : 8
        part = resized(model, loaded.config, name)
        for k in range(-(-images // 4)):
            ids = range((number << 32) + 4 * k, (number << 32) + 4 * k + 4)
            features = detector(sample_images(part, ids, DrawConfig(**FAST))).feature_BD
            drawn.append(features[: images - 4 * k].double().numpy())
        height, width = map(int, name.split("x"))
        pictures = [np.asarray(opened(p)) for p in sorted((root / "images").rglob("*.png"))]
        mine = np.stack([p for p in pictures if p.shape == (height, width)])[..., None]
        real.append(detector(torch.from_numpy(mine)).feature_BD.double().numpy())
    drawn, real = np.concatenate(drawn), np.concatenate(real)
    assert len(drawn) == 21 and len(real) == 32
    expected = frechet_distance(drawn.mean(0), np.cov(drawn.T), real.mean(0), np.cov(real.T))
    assert one["fd_efficientnet_lite0"] == pytest.approx(expected, rel=1e-4)


def test_every_stretch_of_a_joint_score_has_all_buckets_in_their_shares():
    """Metrics such as the Inception Score look at stretches of images; more images take none away from a bucket."""
    spec = LatentSpec((4, 4, 4), ["a"], [0] * 4, [1] * 4, "", "", 32, 3, buckets={
        name: {"latent_shape": [4, 4, n], "samples": samples}
        for n, (name, samples) in enumerate({"a": 700, "b": 200, "c": 100}.items(), 1)
    })  # fmt: skip
    blocks = blocks_of(parts_of(EvaluateConfig(images=10_000, size="all"), spec), 50)
    assert sum(block.wanted for block in blocks) == 10_000
    for stretch in range(10):
        drawn = Counter(block.size for block in blocks[20 * stretch : 20 * stretch + 20])
        assert drawn == {"a": 14, "b": 4, "c": 2}
    ids = [i for block in blocks for i in block.ids[: block.wanted]]
    assert len(set(ids)) == 10_000
    fewer = blocks_of(parts_of(EvaluateConfig(images=9_973, size="all"), spec), 50)
    assert {i for block in fewer for i in block.ids[: block.wanted]} < set(ids)
    assert parts_of(EvaluateConfig(images=5, size="4x4"), spec) == [Part("4x4", 5)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reference": "images", "fit": "crop"}, "is of images that are in no bucket, and evaluate.size=all compares"),
        ({"reference": "data/16x16"}, "evaluate.size=all needs data in buckets, and .*16x16 holds one size"),
    ],
)
def test_a_joint_score_needs_a_reference_in_buckets(root, settings, words):
    settings = settings | {"reference": str(root / settings["reference"])}
    with pytest.raises(InputError, match=words):
        real_images(EvaluateConfig(size="all", **settings), load_denoiser(root / "run"))


def test_the_reference_may_be_other_data_in_buckets(root):
    loaded, given = load_denoiser(root / "run"), EvaluateConfig(size="all", reference=str(root / "data"))
    assert [(len(s), s.height, s.width) for s in real_images(given, loaded)] == [
        (14, 16, 16),
        (10, 16, 24),
        (8, 24, 16),
    ]
    one = real_images(dataclasses.replace(given, size="16x24"), loaded)
    assert [(len(s), s.height, s.width) for s in one] == [(10, 16, 24)]


def test_a_model_of_one_size_has_no_joint_score(root):
    loaded = load_denoiser(root / "run")
    loaded.spec = dataclasses.replace(loaded.spec, buckets={})
    with pytest.raises(InputError, match="evaluate.size=all is for a model that was trained on buckets"):
        with_size(EvaluateConfig(size="all"), loaded)
    with pytest.raises(InputError, match="size has 'all', which is not HEIGHTxWIDTH"):
        DrawConfig(size="all")


def test_previews_show_every_bucket(root, pool, tmp_path):
    """A grid of each below each other, of the images that the averages make, on any number of ranks; at least a row."""
    settings = [f"data.path={root}/data", "log.validation_every_samples=0", "train.total_samples=8"]
    settings += ["log.samples_every_samples=8", "log.preview={steps: 2, sampler: euler}"]
    for ranks, stage in ((1, 0), (2, 3)):
        run = [f"run_dir={tmp_path}/{ranks}", f"engine.zero_stage={stage}"]
        pool(ranks).run(train_case, settings=[*settings, *run])
    picture = np.asarray(opened(tmp_path / "1" / "samples" / "000000000008.png")).astype(int)
    assert np.abs(np.asarray(opened(tmp_path / "2" / "samples" / "000000000008.png")) - picture).max() <= 1
    loaded, grids = load_denoiser(tmp_path / "1"), []
    model = image_model(loaded, "fp32", "cpu")
    for name in SIZES:
        images = sample_images(resized(model, loaded.config, name), range(8), DrawConfig(**FAST)).numpy()
        grids.append(np.asarray(class_grid(images, np.arange(8) % 2)))
    top = 0
    for grid in grids:
        height, width = grid.shape
        assert np.abs(picture[top : top + height, :width] - grid).max() <= 1
        assert (picture[top : top + height, width:] == 255).all()
        top += height
    assert picture.shape[0] == top
    cells, labels, seen = read_cells(tmp_path / "1" / "samples" / "newest.npz")
    assert cells.shape == (8, 24, 16, 1) and seen == 8 and labels.tolist() == [0, 1] * 4


def test_the_plan_is_by_bucket(root, capsys):
    width = ["model.width=32", "model.depth=2", "model.heads=2", "train.global_batch=8", "train.total_samples=8000"]
    assert main(["plan", f"data.path={root}/data", f"run_dir={root}/none", *width]) == 0
    lines = capsys.readouterr().out
    for name, images in SIZES.items():
        assert f"bucket {name}   {images / 32:.1%} of the batches" in lines
    assert "the largest of 3 in" in lines and "all buckets    a mean step of" in lines
    assert main(["plan", f"data.path={root}/data", f"run_dir={root}/none", *width, "model.positions=learned"]) == 2
    assert "not for several (16x16, 16x24, 24x16)" in capsys.readouterr().err


def test_inspect_looks_into_every_bucket(root, tmp_path, capsys):
    grid = tmp_path / "grid.png"
    assert main(["inspect", str(root / "data"), f"grid={grid}"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"whole: {root}/data"
    for name, images in SIZES.items():
        assert f"bucket {name}:" in said and re.search(rf"share of bucket {name} +{images / 32:.2%}", said)
        assert (tmp_path / f"grid-{name}.png").exists()
    copy = tmp_path / "copy"
    shutil.copytree(root / "data", copy)
    shard = next((copy / "16x24").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["inspect", str(copy)]) == 1
    assert "damaged: shard" in capsys.readouterr().out
    shutil.rmtree(copy / "16x24")
    shutil.copytree(root / "data" / "16x16", copy / "16x24")
    assert main(["inspect", str(copy)]) == 1
    assert "is not the bucket that buckets.json was written of" in capsys.readouterr().out


def test_the_report_counts_the_work_of_all_buckets(root, alone):
    assert main(["report", str(root / "run")]) == 0
    assert "3 buckets (16x16, 16x24, 24x16)" in (root / "run" / "report.html").read_text()
    loaded = load_denoiser(root / "run")
    model = from_dict(ModelConfig, loaded.config["model"])
    mean = sum(SIZES[name] * flops(model, shape) for name, shape in loaded.spec.shapes.items()) / 32
    assert read_history(root / "run", "run").training_flops() == pytest.approx(3 * mean)
