"""Latents as fast-DiT writes them, and as .npz, through `ldt encode latents=DIR`."""

import json

import numpy as np
import pytest
import torch
from run_data import make_autoencoder
from safetensors.torch import save_file

from ldt.cli import main
from ldt.data.latent_sources import open_latents
from ldt.data.shards import Manifest, open_shards
from ldt.errors import InputError

COUNT, SCALE = 23, 0.18215


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    make_autoencoder(path)
    return path


def draws_tree(root):
    """What fast-DiT's extract_features.py leaves: [1, C, H, W] and [1] a file."""
    generator = np.random.default_rng(0)
    (root / "imagenet256_features").mkdir(parents=True)
    (root / "imagenet256_labels").mkdir()
    latents = generator.standard_normal((COUNT, 4, 8, 8)).astype(np.float32)
    labels = generator.integers(0, 5, COUNT)
    for i in range(COUNT):
        np.save(root / "imagenet256_features" / f"{i}.npy", latents[i : i + 1] * np.float32(SCALE))
        np.save(root / "imagenet256_labels" / f"{i}.npy", labels[i : i + 1])
    return latents, labels


def moments_tree(root):
    generator = np.random.default_rng(1)
    root.mkdir()
    moments = generator.standard_normal((COUNT, 8, 8, 8)).astype(np.float32)
    for i in range(COUNT):
        np.savez(root / f"{i}.npz", moments=moments[i], label=np.int64(i % 3))
    return moments


def encode(tree, vae, output, *settings):
    keys = [f"latents={tree}", f"autoencoder={vae}", f"output={output}", "dtype=fp32", "shard_samples=10"]
    return main(["encode", *keys, "validation_fraction=0", *settings, "--quiet"])


def stored(path):
    shards = open_shards(path)
    place = [(s, i) for s, n in enumerate(shards.manifest.counts.tolist()) for i in range(n)]
    return shards.read(*np.array(place).T)


def test_draws_become_posteriors_without_width(vae, tmp_path):
    latents, labels = draws_tree(tmp_path / "tree")
    assert encode(tmp_path / "tree", vae, tmp_path / "shards") == 0
    records = stored(tmp_path / "shards")
    np.testing.assert_allclose(records.mean_nCHW, latents, rtol=1e-6)  # 10.npy comes after 9.npy
    assert not records.std_nCHW.any() and records.label_n.tolist() == labels.tolist()
    manifest = Manifest.load(tmp_path / "shards")
    assert manifest.latent_shape == (4, 8, 8) and manifest.image_size == 32 and manifest.classes == list("01234")


def test_moments_are_mean_and_logarithm_of_the_variance(vae, tmp_path):
    moments = moments_tree(tmp_path / "tree")
    (tmp_path / "tree" / "classes.txt").write_text("ant\nbee\ncat\n")
    assert encode(tmp_path / "tree", vae, tmp_path / "shards", "format=mds") == 0
    records = stored(tmp_path / "shards")
    np.testing.assert_allclose(records.mean_nCHW, moments[:, :4], rtol=1e-6)
    np.testing.assert_allclose(records.std_nCHW**2, np.exp(moments[:, 4:]), rtol=1e-5)
    assert Manifest.load(tmp_path / "shards").classes == ["ant", "bee", "cat"]


def spoil_shape(root):
    np.savez(root / "7.npz", moments=np.zeros((8, 4, 4), np.float32), label=np.int64(0))


def spoil_key(root):
    np.savez(root / "7.npz", moments=np.zeros((8, 8, 8), np.float32))


def spoil_label(root):
    np.savez(root / "7.npz", moments=np.zeros((8, 8, 8), np.float32), label=np.float32(0.5))


def cut(root):
    (root / "7.npz").write_bytes((root / "7.npz").read_bytes()[:300])


def few_names(root):
    (root / "classes.txt").write_text("ant\n")


def same_names(root):
    (root / "classes.txt").write_text("ant\nbee\nant\n")


def latin_names(root):
    (root / "classes.txt").write_bytes(b"caf\xe9\nbee\nant\n")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_shape, "7.npz has the shape (4, 4, 4), the first one has (4, 8, 8)"),
        (spoil_key, "7.npz has no `label`"),
        (spoil_label, "not one whole number"),
        (cut, "7.npz can't be read"),
        (few_names, "has 1 names, too few for label 2"),
        (same_names, "has the name 'ant' twice"),
        (latin_names, "classes.txt is not UTF-8 text"),
    ],
)
def test_what_does_not_fit_is_named(vae, tmp_path, capsys, spoil, said):
    moments_tree(tmp_path / "tree")
    spoil(tmp_path / "tree")
    assert encode(tmp_path / "tree", vae, tmp_path / "shards") == 2
    assert said in capsys.readouterr().err


def test_missing_labels_and_pickles_are_named(tmp_path):
    draws_tree(tmp_path / "tree")
    (tmp_path / "tree" / "imagenet256_labels" / "5.npy").unlink()
    with pytest.raises(InputError, match="5.npy has no label"):
        open_latents(str(tmp_path / "tree"), SCALE)
    pickles = tmp_path / "uvit"
    pickles.mkdir()
    pair = np.empty(2, object)
    pair[:] = [np.zeros((8, 8, 8), np.float32), 3]
    np.save(pickles / "0.npy", pair, allow_pickle=True)  # as U-ViT writes it
    with pytest.raises(InputError, match="0.npy is a pickle, as U-ViT writes them, and pickles are never read"):
        open_latents(str(pickles), SCALE)
    with pytest.raises(InputError, match="is not a directory"):
        open_latents(str(tmp_path / "none"), SCALE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has neither one"):
        open_latents(str(tmp_path / "empty"), SCALE)


def test_settings_that_exclude_each_other(vae, tmp_path, capsys):
    assert encode(tmp_path, vae, tmp_path / "x", "images.path=photos") == 2
    assert "latents= takes the place of images.path" in capsys.readouterr().err
    assert encode(tmp_path, vae, tmp_path / "x", "latents_scale=0") == 2
    assert "latents_scale=0.0 must be positive" in capsys.readouterr().err


def test_labels_without_latents_are_named(tmp_path):
    """An extraction that is not finished, or half a copy: what is there would be encoded as if it were all."""
    draws_tree(tmp_path / "tree")
    for i in (7, 20, 22):
        (tmp_path / "tree" / "imagenet256_features" / f"{i}.npy").unlink()
    with pytest.raises(InputError, match="imagenet256_labels has 3 labels without a latent in .*, such as 20.npy"):
        open_latents(str(tmp_path / "tree"), SCALE)


def test_standard_deviations_are_not_taken_for_logarithms(vae, tmp_path, capsys):
    """As REPA stores them: [mean, std]."""
    moments = moments_tree(tmp_path / "tree")
    moments[:, 4:] = np.abs(moments[:, 4:])
    for i in range(COUNT):
        np.savez(tmp_path / "tree" / f"{i}.npz", moments=moments[i], label=np.int64(i % 3))
    assert encode(tmp_path / "tree", vae, tmp_path / "shards") == 2
    assert "nowhere below 0, as standard deviations are" in capsys.readouterr().err
    assert encode(tmp_path / "tree", vae, tmp_path / "shards", "latents_second=std") == 0
    records = stored(tmp_path / "shards")
    np.testing.assert_allclose(records.moments_n2CHW.reshape(COUNT, 8, 8, 8), moments, rtol=1e-6)
    moments_tree(tmp_path / "other")
    assert encode(tmp_path / "other", vae, tmp_path / "more", "latents_second=std") == 2
    assert "a standard deviation is below 0" in capsys.readouterr().err


def test_what_is_infinite_in_the_source_is_not_the_dtypes_fault(vae, tmp_path, capsys):
    moments = moments_tree(tmp_path / "tree")
    cases = [(np.inf, "is not finite as it comes; check the file"), (1e5, "not finite in fp16; use dtype=fp32")]
    for value, said in cases:
        moments[3, 0, 0, 0] = value
        np.savez(tmp_path / "tree" / "3.npz", moments=moments[3], label=np.int64(0))
        assert encode(tmp_path / "tree", vae, tmp_path / "shards", "dtype=fp16") == 2
        assert "3.npz " in (error := capsys.readouterr().err) and said in error


def lightning_tree(root, count=COUNT, per=10, flips=True):
    """What LightningDiT's extract_features.py leaves, its pickled statistics included."""
    root.mkdir()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    labels = torch.arange(count) % 3
    for k in range(0, count, per):
        part = {"latents": latents[k : k + per].contiguous(), "labels": labels[k : k + per].contiguous()}
        if flips:
            part["latents_flip"] = latents[k : k + per].flip(-1).contiguous()
        save_file(part, root / f"latents_rank00_shard{k // per:03d}.safetensors")
    (root / "latents_stats.pt").write_bytes(b"never read")
    return latents.numpy(), labels.tolist()


def test_safetensors_of_lightningdit(vae, tmp_path, capsys):
    latents, labels = lightning_tree(tmp_path / "tree")
    assert encode(tmp_path / "tree", vae, tmp_path / "shards", "flips=true") == 0
    shards = open_shards(tmp_path / "shards")
    place = np.array([(s, i) for s, n in enumerate(shards.manifest.counts.tolist()) for i in range(n)]).T
    for flip, expected in ((False, latents), (True, latents[..., ::-1])):
        records = shards.read(*place, np.full(COUNT, flip))
        np.testing.assert_array_equal(records.mean_nCHW, expected)
        assert not records.std_nCHW.any() and records.label_n.tolist() == labels
    assert encode(tmp_path / "tree", vae, tmp_path / "plain") == 0
    np.testing.assert_array_equal(stored(tmp_path / "plain").mean_nCHW, latents)
    lightning_tree(tmp_path / "unflipped", flips=False)
    assert encode(tmp_path / "unflipped", vae, tmp_path / "no", "flips=true") == 2
    assert "has none of mirrored images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "not a whole safetensors file"),
        (lambda p: save_file({"latents": torch.zeros(3, 4, 8, 8)}, p), "expected are latents"),
        (
            lambda p: save_file({"latents": torch.zeros(3, 4, 8, 8), "labels": torch.zeros(2)}, p),
            "expected are latents",
        ),
        (lambda p: save_file({"latents": torch.zeros(3, 4, 4, 4), "labels": torch.zeros(3)}, p), "not like those of"),
        (lambda p: save_file({"z": torch.zeros(3)}, p), "expected are latents"),
    ],
)
def test_safetensors_that_do_not_fit_are_named(tmp_path, spoil, said):
    lightning_tree(tmp_path / "tree", flips=False)
    spoil(tmp_path / "tree" / "latents_rank00_shard001.safetensors")
    with pytest.raises(InputError, match=f"shard001.safetensors .*{said}"):
        open_latents(str(tmp_path / "tree"), SCALE)


def test_the_tree_of_repa(vae, tmp_path, capsys):
    root, generator = tmp_path / "vae-sd", np.random.default_rng(0)
    moments = generator.standard_normal((COUNT, 8, 8, 8)).astype(np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:])
    labels = []
    for i in range(COUNT):
        name = f"{i // 10:05d}/img-mean-std-{i:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, moments[i])
        labels.append([name, i % 4])
    (root / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    assert encode(root, vae, tmp_path / "shards") == 0
    records = stored(tmp_path / "shards")
    np.testing.assert_array_equal(records.moments_n2CHW.reshape(COUNT, 8, 8, 8), moments)
    assert records.label_n.tolist() == [i % 4 for i in range(COUNT)]
    (root / "00000" / "img-mean-std-00000003.npy").unlink()
    assert encode(root, vae, tmp_path / "more") == 2
    assert "img-mean-std-00000003.npy can't be used" in capsys.readouterr().err
    (root / "dataset.json").write_text("{}")
    assert encode(root, vae, tmp_path / "more") == 2
    assert "dataset.json names no latents" in capsys.readouterr().err
