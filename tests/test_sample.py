"""Image i depends on (seed, i) alone, and the files are what other tools read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_data import make_autoencoder, shared_run

from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.commands.sample import SampleJob, run
from ldt.data.latent_spec import LatentSpec
from ldt.errors import InputError
from ldt.image_files import class_grid
from ldt.sampling.config import DrawConfig
from ldt.sampling.draw import ImageModel, block_ids, image_model, labels_of, load_autoencoder, sample_images

CPU = torch.device("cpu")
FAST = {"sampler": "euler", "steps": 3, "block": 8}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_run(tmp_path_factory)


@pytest.fixture(scope="module")
def model(run_dir: Path) -> ImageModel:
    return image_model(load_denoiser(run_dir), "fp32", CPU)


def test_an_image_depends_on_seed_and_id(model: ImageModel) -> None:
    config = DrawConfig(**FAST)
    images = sample_images(model, range(8, 16), config)
    assert images.shape == (8, 32, 32, 1) and images.dtype == torch.uint8
    assert len({i.numpy().tobytes() for i in images}) == 8, "different ids, different images"
    again = sample_images(model, [11, 3, 12, 15, 0, 1, 2, 40], config)
    for position, i in ((0, 11), (2, 12), (3, 15)):  # other company in the batch: equal up to rounding
        assert (again[position].int() - images[i - 8].int()).abs().max() <= 1
    other = sample_images(model, range(8, 16), DrawConfig(**FAST, seed=1))
    assert not torch.equal(other, images)


def test_the_label_matters(model: ImageModel) -> None:
    config = DrawConfig(**FAST)
    zero, one = (sample_images(model, range(8), config, np.full(8, label)) for label in (0, 1))
    assert not torch.equal(zero, one)


def test_guidance_one_is_none_and_more_is_more(model: ImageModel) -> None:
    plain, guided = (
        sample_images(model, range(8), DrawConfig(**FAST, guidance=guidance)).int() for guidance in (1.0, 4.0)
    )
    assert (plain - guided).abs().max() > 1


def test_labels() -> None:
    ids, spec = range(3000), LatentSpec((4, 2, 2), ["a", "b", "c"], [], [], "", "", 32, 1, class_counts=[10, 0, 30])
    assert labels_of(ids, spec, DrawConfig()).tolist() == [i % 3 for i in ids]
    drawn = labels_of(ids, spec, DrawConfig(labels="random", seed=5))
    some = labels_of(range(1000, 1010), spec, DrawConfig(labels="random", seed=5))
    assert drawn[1000:1010].tolist() == some.tolist()
    assert all(900 < n < 1100 for n in np.bincount(drawn)) and len(np.bincount(drawn)) == 3
    assert (drawn != labels_of(ids, spec, DrawConfig(labels="random", seed=6))).any()
    as_data = np.bincount(labels_of(ids, spec, DrawConfig(labels="data")))
    assert as_data[1] == 0 and 650 < as_data[0] < 850 and as_data.sum() == 3000
    with pytest.raises(InputError, match="labels=data needs a checkpoint that knows"):
        labels_of(ids, replace(spec, class_counts=[]), DrawConfig(labels="data"))


def test_bf16_is_near_fp32(run_dir: Path, model: ImageModel) -> None:
    exact = sample_images(model, range(8), DrawConfig(**FAST)).float()
    rounded = sample_images(image_model(load_denoiser(run_dir), "bf16", CPU), range(8), DrawConfig(**FAST)).float()
    assert 0 < (exact - rounded).abs().mean() < 4


def test_compiled_sampling_differs_by_rounding_alone(run_dir: Path, model: ImageModel) -> None:
    config = DrawConfig(**FAST, guidance=2.0, guidance_high=0.8)  # batches of two sizes
    compiled = image_model(load_denoiser(run_dir), "fp32", CPU, compiled=True)
    torch._dynamo.utils.counters.clear()
    images = sample_images(compiled, range(8), config)
    frames = torch._dynamo.utils.counters["frames"]
    assert 0 < frames["ok"] == frames["total"], "the blocks were not compiled whole"
    assert (images.int() - sample_images(model, range(8), config).int()).abs().max() <= 1


def test_npz_has_adms_layout(run_dir: Path, model: ImageModel, tmp_path: Path) -> None:
    output = tmp_path / "out" / "samples.npz"
    assert run(SampleJob(run=str(run_dir), images=19, format="npz", output=str(output), **FAST)) == 0
    with np.load(output, allow_pickle=False) as z:
        images, labels = z["arr_0"], z["arr_1"]
    assert images.shape == (19, 32, 32, 1) and images.dtype == np.uint8
    assert labels.tolist() == [i % 3 for i in range(19)]
    blocks = [sample_images(model, block_ids(k, 8), DrawConfig(**FAST)).numpy() for k in range(3)]
    assert np.array_equal(images, np.concatenate(blocks)[:19]), "bitwise: whole blocks, the rest dropped"
    assert [p.name for p in output.parent.iterdir()] == ["samples.npz"]


def test_folder(run_dir: Path, model: ImageModel, tmp_path: Path) -> None:
    output = tmp_path / "folder"
    config = SampleJob(run=str(run_dir), images=9, format="folder", output=str(output), classes=["coat", "2"], **FAST)
    assert run(config) == 0
    assert sorted(p.name for p in output.glob("*.png")) == [f"{i:06d}.png" for i in range(9)]
    record = json.loads((output / "samples.json").read_text())
    assert record["labels"] == [1, 2, 1, 2, 1, 2, 1, 2, 1] and record["samples_seen"] == 2000
    block = sample_images(model, range(8), DrawConfig(**FAST), np.array(record["labels"][:8]))
    with Image.open(output / "000005.png") as picture:
        assert np.array_equal(np.asarray(picture), block[5, ..., 0].numpy())
    with pytest.raises(InputError, match="exists"):
        run(config)


def test_grid_by_the_command_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run_dir), "images=7", "sampler=euler", "steps=2", "block=8"]) == 0
    output = run_dir / "samples" / "grid-000000002000.png"
    assert str(output) in capsys.readouterr().out.splitlines()[-1]
    with Image.open(output) as picture:
        assert picture.size == (3 * 34 + 2, 3 * 34 + 2)  # a row a class, at most three of each


def test_grid_puts_classes_in_rows() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    images = np.repeat(labels, 16).reshape(7, 4, 4, 1).astype(np.uint8) * 50
    picture = np.asarray(class_grid(images, labels))
    assert picture.shape == (3 * 6 + 2, 3 * 6 + 2)
    for row, label in enumerate((0, 1, 2)):
        assert picture[2 + 6 * row, 2] == 50 * label
    assert picture[8, 14] == 255, "the second class has only two"
    many = np.arange(30)
    assert class_grid(np.zeros((30, 4, 4, 3), np.uint8), many).size == (6 * 6 + 2, 5 * 6 + 2)


def test_bad_input_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class hat is not one .*boot, coat, shirt"):
        run(SampleJob(run=str(run_dir), classes=["hat"]))
    with pytest.raises(InputError, match="does not exist"):
        run(SampleJob(run=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="directory"):
        run(SampleJob(run=str(run_dir), output=str(tmp_path)))
    with pytest.raises(InputError, match="images=0"):
        SampleJob(run=str(run_dir), images=0)
    with pytest.raises(InputError, match="block=0"):
        DrawConfig(block=0)


def test_another_autoencoder_is_refused(model: ImageModel, tmp_path: Path) -> None:
    other = make_autoencoder(tmp_path).model
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.5
    other.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"encoded with {model.spec.autoencoder_hash[:12]}"):
        load_autoencoder(replace(model.spec, autoencoder=str(tmp_path)), CPU)


def test_weights_of_another_autoencoder_are_refused() -> None:
    spec = LatentSpec((4, 8, 8), ["a"], [0.0] * 4, [1.0] * 4, "embedded:fashion_mnist", "0" * 16, 32, 1)
    with pytest.raises(InputError, match="put the original weights back, or encode and train again"):
        load_autoencoder(spec, torch.device("cpu"))
