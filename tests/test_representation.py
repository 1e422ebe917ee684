"""The representation autoencoder: latents that an alignment's target agrees with, a decoder that knows them, one hash.

`tests/test_latent_kinds.py` trains on latents without a posterior, whitened by element, at any world size and stage.
"""

import json
import shutil

import forked
import numpy as np
import pytest
import torch
import train_representation
from safetensors.torch import load_file, save_file

from ldt import cli
from ldt.data.images import prepare
from ldt.data.images.open import open_images
from ldt.data.shards import open_shards
from ldt.errors import InputError
from ldt.metrics.patch_features import make_patch_net
from ldt.models import efficientnet
from ldt.models.autoencoder import ASSETS, EMBEDDED_REPRESENTATION, Autoencoder
from ldt.models.representation import CONFIG, DECODER, EfficientNetRAE


@pytest.fixture(scope="module")
def embedded():
    return Autoencoder.load(EMBEDDED_REPRESENTATION)


@pytest.fixture(scope="module")
def image_BHWC():
    source = open_images("embedded:fashion_mnist")
    return torch.from_numpy(np.stack([prepare(source.image(i), 32, 1, "pad") for i in range(0, 10_000, 125)]))


def decibels(image_BHWC, again_BHWC):
    error_B = (again_BHWC.double() - image_BHWC.double()).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / error_B)).mean())


def test_embedded_images_survive_the_round_trip(embedded, image_BHWC):
    """Above 19 dB on images all over the set; the embedded README gives 19.68 dB for the held-out ones."""
    latent_BCHW, std_BCHW = embedded.encode(image_BHWC)
    assert latent_BCHW.shape == (80, 112, 4, 4) and std_BCHW is None and not embedded.posterior
    again_BHWC = embedded.decode(latent_BCHW)
    assert again_BHWC.dtype == torch.uint8 and again_BHWC.shape == image_BHWC.shape
    assert decibels(image_BHWC, again_BHWC) > 19
    others_BHWC = embedded.decode(latent_BCHW.roll(1, 0))
    assert decibels(image_BHWC, others_BHWC) < 14, "an image of another latent"


def test_latents_are_what_alignment_calls_the_image_s_features(embedded, image_BHWC):
    """The same patches of the same network at the same magnification, by the other way into it."""
    net = make_patch_net("efficientnet_lite0", "", 4)
    torch.testing.assert_close(embedded.encode(image_BHWC)[0], net(image_BHWC), rtol=1e-3, atol=1e-3)


def test_a_latent_is_of_its_image_alone_and_any_size_will_do(embedded, image_BHWC):
    whole = embedded.encode(image_BHWC[:8])[0]
    torch.testing.assert_close(embedded.encode(image_BHWC[3:5])[0], whole[3:5], rtol=1e-4, atol=1e-4)
    wide = embedded.encode(torch.cat([image_BHWC[:2], image_BHWC[2:4]], 2))[0]
    assert wide.shape == (2, 112, 4, 8) and embedded.decode(wide).shape == (2, 32, 64, 1)
    with pytest.raises(InputError, match="takes images with sides divisible by 8, not 32x36"):
        embedded.encode(torch.zeros(1, 32, 36, 1, dtype=torch.uint8))


def test_the_encoder_is_not_stored_and_the_rest_is_small(tmp_path):
    EfficientNetRAE().save(tmp_path)
    names = load_file(tmp_path / DECODER)
    assert not [name for name in names if name.startswith("encoder.")] and "mean_C11" in names
    assert (tmp_path / DECODER).stat().st_size < 2 << 20


def test_the_hash_is_of_encoder_decoder_statistics_and_preprocessing(embedded, tmp_path, monkeypatch):
    EfficientNetRAE().save(tmp_path / "one")
    weights, known = load_file(tmp_path / "one" / DECODER), Autoencoder.load(str(tmp_path / "one")).hash
    assert Autoencoder.load(str(tmp_path / "one")).hash == known != embedded.hash
    hashes = {known}
    for name in ("0.conv_out.weight", "mean_C11"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        key = next(key for key in weights if key.endswith(name))
        save_file(weights | {key: weights[key] + 0.01}, tmp_path / name / DECODER, {"format": "pt"})
        hashes.add(Autoencoder.load(str(tmp_path / name)).hash)
    with monkeypatch.context() as patch:
        patch.setattr(EfficientNetRAE, "preprocessing", "another")
        hashes.add(Autoencoder.load(str(tmp_path / "one")).hash)
    with monkeypatch.context() as patch:
        patch.setattr(efficientnet, "load", other_encoder)
        hashes.add(Autoencoder.load(str(tmp_path / "one")).hash)
    assert len(hashes) == 5


def other_encoder(load=efficientnet.load):
    net = load()
    with torch.no_grad():
        net._blocks[0]._bn1.bias.add_(1e-3)
    return net


def test_shards_have_the_same_bits_from_any_number_of_ranks_and_name_the_autoencoder(
    encode, embedded, tmp_path, monkeypatch, capsys
):
    settings = {"autoencoder": EMBEDDED_REPRESENTATION, "images.size": 16, "shard_samples": 3, "whitening": "element"}
    for ranks in (1, 3):
        words = encode.arguments(tmp_path / str(ranks), **settings)
        assert [done.returncode for done in forked.run_ranks(ranks, "-m", "ldt", *words)] == [0] * ranks
    for name in ("manifest.json", "shards.npy", "validation/manifest.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    manifest = open_shards(tmp_path / "1").manifest
    assert manifest.latent_shape == (112, 2, 2) and not manifest.posterior and manifest.by_element
    assert (manifest.autoencoder, manifest.autoencoder_hash) == (EMBEDDED_REPRESENTATION, embedded.hash)
    assert cli.main(["inspect", str(tmp_path / "1"), f"grid={tmp_path}/grid.png"]) == 0
    monkeypatch.setattr(efficientnet, "load", other_encoder)
    capsys.readouterr()
    assert encode(tmp_path / "1", **settings) == 2
    assert "encoded with other settings (autoencoder's hash:" in capsys.readouterr().err


def test_the_tool_makes_one_of_any_images_and_the_same_again(tmp_path):
    image_BCHW = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("one", "two"):
        train_representation.main(tmp_path / name, image_BCHW, steps=2, batch=4)
    assert (tmp_path / "one" / DECODER).read_bytes() == (tmp_path / "two" / DECODER).read_bytes()
    mine = Autoencoder.load(str(tmp_path / "one"))
    assert (mine.image_channels, mine.latent_channels, mine.downsample) == (3, 112, 8)
    latent_BCHW = mine.encode(((image_BCHW + 1) * 127.5).byte().permute(0, 2, 3, 1))[0]
    normal_BCHW = mine.model.normalise(latent_BCHW)
    assert normal_BCHW.mean((0, 2, 3)).abs().max() < 0.3 and (normal_BCHW.std((0, 2, 3)) - 1).abs().max() < 0.3
    assert mine.decode(latent_BCHW).shape == (24, 16, 16, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [64]}, r"can't be loaded \(config.json.widths is \[64\]\); make it again with"),
        ({"groups": 4}, r"can't be loaded \(config.json.groups is 4\); make it again with"),
        ({"image_channels": None}, "config.json.image_channels is None"),
        ({"drop": "mean_C11"}, "weights of autoencoder .* lack mean_C11 .1 such tensors"),
        ({"add": "stray"}, "have an unknown stray .1 such tensors"),
        ({"nan": "std_C11"}, "values in std_C11 that are not finite"),
        ({"damage": True}, r"can't be loaded \("),
        ({"remove": True}, r"can't be loaded \("),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, change, message):
    EfficientNetRAE().save(tmp_path)
    weights, file = load_file(tmp_path / DECODER), tmp_path / DECODER
    settings = json.loads((tmp_path / CONFIG).read_text()) | change
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    weights |= {change["add"]: torch.ones(1)} if "add" in change else {}
    weights |= {change["nan"]: weights[change["nan"]] * torch.nan} if "nan" in change else {}
    save_file({k: v for k, v in weights.items() if k != change.get("drop")}, file, {"format": "pt"})
    if "damage" in change:
        file.write_bytes(file.read_bytes()[:1000])
    if "remove" in change:
        file.unlink()
    with pytest.raises(InputError, match=message):
        Autoencoder.load(str(tmp_path))


def test_every_embedded_autoencoder_has_its_own_weights():
    assert len({Autoencoder.load(name).hash for name in ASSETS}) == len(ASSETS)
