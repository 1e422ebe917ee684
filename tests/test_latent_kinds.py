"""Data without a posterior and data whitened by element: encoded, indexed, mixed, trained on, sampled, refused."""

import dataclasses
import itertools
import json
import shutil

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shard_data import make_loader, write_shards
from tiny_autoencoders import make_kind
from training_cases import assert_same_run, refused_case, train_case

from ldt import cli
from ldt.api import load
from ldt.data.latent_spec import LatentSpec, pack_statistics
from ldt.data.shards import MixedShards, open_shards
from ldt.data.shards.manifest import Manifest, head_hash
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder

CASES = [
    ("AutoencoderTiny", "tar", False),
    ("AutoencoderDC", "mds", True),
    ("AutoencoderKLFlux2", "tar", False),
    ("AutoencoderKLQwenImage", "mds", False),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(17):
        directory = root / ("ant", "bee")[i % 2]
        directory.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(directory / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_kind("AutoencoderTiny", tmp_path_factory.mktemp("tiny") / "vae")


def arguments(autoencoder, images, output, **settings) -> list[str]:
    keys = {"images.path": images, "images.size": 32, "autoencoder": autoencoder, "output": output}
    keys |= {"shard_samples": 5, "validation_fraction": 0.2, "batch": 4, "dtype": "fp32"} | settings
    return ["encode", *(f"{k}={v}" for k, v in keys.items())]


@pytest.fixture
def encode(images, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # process_group sets them
        monkeypatch.setenv(name, {"WORLD_SIZE": "1"}.get(name, "0"))
    return lambda autoencoder, output, **settings: cli.main(arguments(autoencoder, images, output, **settings))


def everything(directory, flip=None):
    shards = open_shards(directory)
    counts = shards.manifest.counts
    shard_n = np.repeat(np.arange(len(counts)), counts)
    sample_n = np.concatenate([np.arange(n) for n in counts])
    return shards, shards.read(shard_n, sample_n, None if flip is None else np.full(len(shard_n), flip))


@pytest.mark.parametrize("whitening", ["channel", "element"])
@pytest.mark.parametrize(("kind", "format", "flips"), CASES)
def test_latents_are_stored_as_they_are_and_whitened_as_said(encode, tmp_path, kind, format, flips, whitening, capsys):
    autoencoder = make_kind(kind, tmp_path / "vae")
    out = tmp_path / "out"
    assert encode(autoencoder, out, format=format, flips=flips, whitening=whitening) == 0
    shards, _ = everything(out)
    manifest, model = shards.manifest, Autoencoder.load(str(autoencoder))
    assert manifest.posterior == model.posterior and manifest.by_element == (whitening == "element")
    head = json.loads((out / "manifest.json").read_text())
    assert head["version"] == (2 if model.posterior and whitening == "channel" else 4)
    views = [everything(out, flip)[1].moments_n2CHW for flip in ((False, True) if flips else (None,))]
    moments = np.concatenate(views).astype(np.float64)
    assert moments.shape[1] == (2 if model.posterior else 1)
    axes = (0,) if whitening == "element" else (0, 2, 3)
    mean = moments[:, 0].mean(axes, keepdims=True)[0]
    square = (moments[:, 0] ** 2 + (moments[:, 1] ** 2 if model.posterior else 0)).mean(axes, keepdims=True)[0]
    np.testing.assert_allclose(manifest.whitening[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(manifest.whitening[1], np.sqrt(square - mean**2), rtol=1e-5)
    assert cli.main(["inspect", str(out), f"grid={tmp_path}/grid.png"]) == 0
    said = capsys.readouterr().out
    assert ("without a posterior" in said) == (not model.posterior) and ("by element" in said) == manifest.by_element


def test_without_a_posterior_half_of_the_bytes_are_stored_and_none_is_drawn(tmp_path):
    for posterior in (False, True):
        write_shards(tmp_path / str(posterior), [64], "mds", latent_shape=(8, 16, 16), posterior=posterior)
    size = {p: (tmp_path / str(p) / "shard-00000000.mds").stat().st_size for p in (False, True)}
    assert size[False] < 0.55 * size[True]
    shards, records = everything(tmp_path / "False")
    with make_loader(shards, batch=16, seed=3) as loader:
        batch = next(iter(loader.steps(0))).micro_batches[0]
    mean, std = shards.manifest.whitening
    latents = {((x - mean) / std).tobytes() for x in records.mean_nCHW}
    assert all(x.numpy().tobytes() in latents for x in batch.latent_BCHW)


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_statistics_have_the_same_bits_from_any_number_of_ranks(encode, images, tiny, tmp_path, format):
    settings = {"whitening": "element", "format": format, "shard_samples": 3}
    assert encode(tiny, tmp_path / "one", **settings) == 0
    ranks = forked.run_ranks(3, "-m", "ldt", *arguments(tiny, images, tmp_path / "three", **settings))
    assert [rank.returncode for rank in ranks] == [0] * 3
    for name in ("manifest.json", "shards.npy", "validation/manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_shards_without_a_posterior_can_be_indexed(encode, tiny, tmp_path, format):
    assert encode(tiny, tmp_path / "out", format=format, whitening="element") == 0
    before = open_shards(tmp_path / "out").manifest
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "shards.npy").unlink()
    keys = [f"index={tmp_path}/out", "whitening=element"]
    assert cli.main(["encode", f"autoencoder={tiny}", *keys]) == 0
    after = open_shards(tmp_path / "out").manifest
    assert not after.posterior and after.table["content"].tolist() == before.table["content"].tolist()
    for ours, theirs in zip(after.whitening, before.whitening, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ------------------------------------------------------------------------------------------------- training on them


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for whitening in ("channel", "element"):
        elements = whitening == "element"
        write_shards(root / whitening, [40, 23], latent_shape=(4, 4, 4), posterior=False, by_element=elements)
    return root


@pytest.fixture(scope="module")
def alone(pool, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")

    def train(whitening: str) -> list[dict]:
        settings = [f"data.path={data}/{whitening}", "train.total_samples=80", f"run_dir={root}/{whitening}"]
        return pool(1).run(train_case, settings=[*settings, "engine.zero_stage=0"])

    return {whitening: train(whitening) for whitening in ("channel", "element")}


WORLDS = [place for place in itertools.product((1, 2, 3), range(4)) if place != (1, 0)]  # which is the reference


@pytest.mark.parametrize(("ranks", "stage"), WORLDS)
def test_a_run_on_them_is_the_same_at_any_world_and_stage(pool, data, alone, tmp_path, ranks, stage):
    whitening = ("channel", "element")[
        (ranks + stage) % 2
    ]  # one of the two a place: it acts before ranks share anything
    settings = [f"data.path={data}/{whitening}", f"engine.zero_stage={stage}"]
    records = pool(ranks).run(train_case, settings=[*settings, "train.total_samples=80", f"run_dir={tmp_path}/run"])
    assert_same_run(records, alone[whitening], rel=2e-4)


def test_what_is_learnt_of_them_is_sampled_exported_and_decoded(pool, encode, tiny, tmp_path):
    assert encode(tiny, tmp_path / "data", whitening="element") == 0
    run = ["train.total_samples=80", f"data.path={tmp_path}/data", f"run_dir={tmp_path}/run"]
    run += ["model.patch=2", "objective={prediction: x, loss: flow, time_floor: 0.05, shift_base: 64}"]
    run += ["model.head={depth: 1, width: 32, heads: 2}"]
    pool(1).run(train_case, settings=run)
    draw = ["images=5", "block=5", "steps=2", "format=npz"]
    assert cli.main(["sample", f"{tmp_path}/run", *draw, f"output={tmp_path}/a.npz"]) == 0
    assert cli.main(["export", f"{tmp_path}/run", f"to={tmp_path}/model"]) == 0
    assert cli.main(["sample", f"{tmp_path}/model", *draw, f"output={tmp_path}/b.npz"]) == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (5, 32, 32, 3)
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    model, vae = load(f"{tmp_path}/run"), Autoencoder.load(str(tiny))
    image = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    latents = model.encode(image)
    mean, std = open_shards(tmp_path / "data").manifest.whitening
    expected = vae.encode(torch.from_numpy(image))[0].numpy()
    np.testing.assert_allclose(latents * std + mean, expected, rtol=1e-4, atol=1e-5)
    again = vae.decode(torch.from_numpy(expected)).numpy()
    assert np.abs(model.decode(latents).astype(int) - again).max() <= 1


# --------------------------------------------------------------------------------------------------- what is refused


def test_latents_of_two_kinds_do_not_mix(pool, tmp_path):
    kinds = {"plain": {}, "means": {"posterior": False}, "elements": {"by_element": True}}
    for i, (name, kind) in enumerate(kinds.items()):
        write_shards(tmp_path / name, [20], latent_shape=(4, 4, 4), seed=i, **kind)
    for other, what in (("means", "posterior"), ("elements", "whitening")):
        sources = f"data.sources={{a: {{path: {tmp_path}/plain}}, b: {{path: {tmp_path}/{other}}}}}"
        said = pool(1).run(refused_case, settings=[sources, f"run_dir={tmp_path}/run"])
        assert f"data.sources.a and data.sources.b differ in their {what}" in said


def test_a_mixture_has_the_statistics_of_its_draws_by_element(tmp_path):
    for name, seed in (("a", 0), ("b", 9)):
        write_shards(tmp_path / name, [30], latent_shape=(4, 4, 4), seed=seed, posterior=False, by_element=True)
    head = json.loads((tmp_path / "b" / "manifest.json").read_text())
    head |= {"mean_CHW": pack_statistics(np.linspace(1, 2, 64)), "std_CHW": pack_statistics(np.linspace(1, 3, 64))}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(head | {"head_xxh64": head_hash(head)}))
    sources = {name: open_shards(tmp_path / name) for name in ("a", "b")}
    mixed = MixedShards(sources, {"a": 3.0, "b": 1.0}).manifest
    rng = np.random.default_rng(0)
    draws = [
        s.manifest.whitening[0] + s.manifest.whitening[1] * rng.standard_normal((n, 4, 4, 4))
        for s, n in zip(sources.values(), (60_000, 20_000), strict=True)
    ]
    both = np.concatenate(draws)
    np.testing.assert_allclose(mixed.whitening[0], both.mean(0), atol=0.05)
    np.testing.assert_allclose(mixed.whitening[1], both.std(0), rtol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_CHW": pack_statistics(np.zeros(63))}, "mean_CHW is not 64 numbers"),
        ({"std_CHW": pack_statistics(np.full(64, np.nan))}, "std_CHW is not 64 numbers"),
        ({"std_CHW": "?"}, "std_CHW is not base64 of float32"),
        ({"std_CHW": ""}, "std_CHW is not 64 numbers"),
        ({"mean_CHW": 7}, "mean_CHW"),
        ({"posterior": 1}, "posterior"),
        ({"posterior": True}, "does not belong to the table beside it"),
    ],
)
def test_statistics_of_another_shape_are_refused(tmp_path, change, message):
    write_shards(tmp_path, [5], latent_shape=(4, 4, 4), posterior=False, by_element=True)
    head = json.loads((tmp_path / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(head | {"head_xxh64": head_hash(head)}))
    with pytest.raises(InputError, match=message):
        Manifest.load(tmp_path)


def test_facts_survive_json_and_old_ones_say_nothing_of_elements(tmp_path):
    write_shards(tmp_path, [5], latent_shape=(4, 4, 4), by_element=True)
    spec = Manifest.load(tmp_path).spec
    assert LatentSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    plain = dataclasses.replace(spec, mean_CHW="", std_CHW="")
    assert "mean_CHW" not in plain.to_json() and plain.whitening[0].shape == (4, 1, 1)


def test_a_changed_encoder_is_refused_though_the_decoder_is_the_same(pool, encode, tiny, tmp_path, capsys):
    vae = tmp_path / "vae"
    shutil.copytree(tiny, vae)
    assert encode(vae, tmp_path / "data") == 0
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    name = next(k for k in sorted(weights) if k.startswith("encoder."))
    save_file(weights | {name: weights[name] + 1}, vae / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert encode(vae, tmp_path / "data") == 2
    assert "encoded with other settings (autoencoder's hash:" in capsys.readouterr().err
    run = [f"data.path={tmp_path}/data", f"run_dir={tmp_path}/run", "log.samples_every_samples=80"]
    assert "but the data were encoded with" in pool(1).run(refused_case, settings=run)


def test_what_an_autoencoder_without_a_posterior_cannot_have_made_is_refused(encode, tiny, tmp_path, capsys):
    write_shards(tmp_path / "shards", [5], latent_shape=(4, 8, 8))
    (tmp_path / "shards" / "manifest.json").unlink()
    (tmp_path / "shards" / "shards.npy").unlink()
    assert cli.main(["encode", f"autoencoder={tiny}", f"index={tmp_path}/shards"]) == 2
    assert "(AutoencoderTiny) has no posterior" in capsys.readouterr().err
    (tmp_path / "npz").mkdir()
    for i in range(4):
        moments = np.random.default_rng(i).normal(size=(8, 8, 8)).astype(np.float32)
        np.savez(tmp_path / "npz" / f"{i}.npz", moments=moments, label=np.int64(0))
    keys = [f"latents={tmp_path}/npz", f"output={tmp_path}/out", "validation_fraction=0"]
    assert cli.main(["encode", f"autoencoder={tiny}", *keys]) == 2
    assert "has a standard deviation, and" in capsys.readouterr().err
    assert encode(tiny, tmp_path / "other", **{"images.size": 30}) == 2
    assert "takes images with sides divisible by 4, not 30x30" in capsys.readouterr().err
