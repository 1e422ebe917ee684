"""What the commands make of a run on buckets: images of any size, scores by bucket, costs, and whether all is whole."""

import re
import shutil

import numpy as np
import pytest
from encoding_cases import encode_case
from invariance_cases import train_case
from PIL import Image

import ldt
from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.config import from_dict
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.errors import InputError
from ldt.image_files import class_grid
from ldt.log import read_jsonl
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
    assert main(["evaluate", str(root / "run"), *given, f"evaluate.size={','.join(SIZES)}"]) == 0
    table = capsys.readouterr().out
    assert all(re.search(rf"^\s*{name} ", table, re.M) for name in SIZES)
    results = {r["size"]: r for r in read_jsonl(tmp_path / "evaluations.jsonl")}
    assert {name: r["reference_images"] for name, r in results.items()} == SIZES
    assert len({r["reference_hash"] for r in results.values()}) == 3
    assert main(["evaluate", str(root / "run"), *given]) == 2
    assert "scored one by one: evaluate.size= has to be one of 16x16, 16x24, 24x16" in capsys.readouterr().err


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
