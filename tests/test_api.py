"""The library's few names: they do what the commands do, are typed, and cost nothing before they are used."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_data import shared_run

import ldt
from ldt.cli import main
from ldt.log import read_jsonl

FAST = {"sampler": "euler", "steps": 2, "block": 5}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_run(tmp_path_factory)


@pytest.fixture(scope="module")
def model(run_dir: Path) -> ldt.Model:
    return ldt.load(run_dir)


def test_it_knows_what_it_is(model: ldt.Model, run_dir: Path) -> None:
    assert model.samples_seen == 2000 and model.classes == ["boot", "coat", "shirt"]
    assert model.path == run_dir / "checkpoints" / "000000002000"
    assert repr(model) == f"<ldt.Model {model.path} at 2,000 samples, 3 classes>"
    assert model.config["model"]["width"] == 32


def test_samples_are_those_of_the_command(model: ldt.Model, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "images.npz"
    words = [f"{k}={v}" for k, v in (FAST | {"seed": 3, "images": 7, "output": output}).items()]
    assert main(["sample", str(run_dir), "format=npz", "classes=[coat]", *words]) == 0
    images = model.sample(7, classes=["coat"], seed=3, **FAST)
    assert images.dtype == np.uint8 and images.shape == (7, 32, 32, 1)
    with np.load(output) as command:
        np.testing.assert_array_equal(images, command["arr_0"])
    assert (model.sample(7, classes=["coat"], seed=4, **FAST) != images).any()


def test_latents_are_whitened_and_go_both_ways(model: ldt.Model) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 1), dtype=np.uint8)
    latents = model.encode(images)
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == np.float32
    spec, autoencoder = model._loaded.spec, model._images.autoencoder
    mean, _ = autoencoder.encode(torch.from_numpy(images))
    raw = latents * np.array(spec.std_C)[:, None, None] + np.array(spec.mean_C)[:, None, None]
    np.testing.assert_allclose(raw, mean.numpy(), atol=1e-5)
    np.testing.assert_array_equal(model.decode(latents), autoencoder.decode(mean).numpy())


def test_scores_are_those_of_the_command(model: ldt.Model, run_dir: Path, tmp_path: Path) -> None:
    where = {"output": str(tmp_path / "evaluations.jsonl"), "cache_dir": str(tmp_path / "cache")}
    result = model.evaluate(images=10, **where, **FAST)
    assert result == next(read_jsonl(tmp_path / "evaluations.jsonl"))
    assert result["fd_efficientnet_lite0"] > 0 and result["checkpoint_hash"] == model._loaded.hash


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda m: m.sample(2, stesp=3), "unknown key stesp in the arguments; did you mean steps"),
        (lambda m: m.sample(2, classes=["dog"]), "class dog is not one of"),
        (lambda m: m.encode(np.zeros((2, 32, 32), np.float32)), r"give uint8 \[N, H, W, C\]"),
        (lambda m: m.decode(np.zeros((2, 3, 8, 8))), r"give \[N, 4, h, w\]"),
        (lambda m: m.evaluate(images=1), "evaluate.images=1 must be at least 2"),
        (lambda m: ldt.load("nowhere"), "nowhere does not exist"),
    ],
)
def test_mistakes_are_sentences(model: ldt.Model, wrong: object, said: str) -> None:
    with pytest.raises(ldt.InputError, match=said):
        wrong(model)  # type: ignore[operator]


def test_importing_it_is_fast_and_its_names_are_there() -> None:
    code = "import sys, ldt; assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules); print(sorted(dir(ldt)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "load" in done.stdout
    assert all(getattr(ldt, name) for name in ldt.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = ldt.lode  # type: ignore[attr-defined]
