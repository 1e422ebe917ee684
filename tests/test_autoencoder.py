"""The autoencoder: equal to diffusers', reversible on the embedded images, and known by its weights."""

import json
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from run_data import make_autoencoder
from safetensors.torch import load_file, save_file

from ldt.data.images import prepare
from ldt.data.images.open import open_images
from ldt.errors import InputError
from ldt.models.autoencoder import EMBEDDED, Autoencoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder")
    make_autoencoder(path)
    return path


def test_embedded_images_survive_the_round_trip():
    """Above 28 dB on images all over the set; the embedded README gives 29.35 dB for the held-out ones."""
    source, autoencoder = open_images("embedded:fashion_mnist"), Autoencoder.load(EMBEDDED)
    image_BHWC = torch.from_numpy(np.stack([prepare(source.image(i), 32, 1, "pad") for i in range(0, 10_000, 125)]))
    mean_BCHW, std_BCHW = autoencoder.encode(image_BHWC)
    assert mean_BCHW.shape == std_BCHW.shape == (80, 4, 8, 8) and (std_BCHW > 0).all()
    again_BHWC = autoencoder.decode(mean_BCHW)
    assert again_BHWC.dtype == torch.uint8
    error = (again_BHWC.double() - image_BHWC.double()).square().mean((1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).mean() > 28


def test_it_is_diffusers_autoencoder(saved):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(saved, low_cpu_mem_usage=False)
    ours = Autoencoder.load(str(saved))
    image = torch.randint(0, 256, (3, 32, 32, 1), dtype=torch.uint8)
    with torch.no_grad():
        posterior = theirs.encode(image.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    mean, std = ours.encode(image)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    difference = (ours.decode(posterior.mean).float() - expected).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01  # float noise can tip only what lies at a half
    assert (ours.image_channels, ours.latent_channels, ours.downsample) == (1, 4, 4)


def test_the_hash_belongs_to_the_weights_alone(saved, tmp_path):
    original = Autoencoder.load(str(saved)).hash
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text((saved / "config.json").read_text())
    weights = load_file(saved / "diffusion_pytorch_model.safetensors")
    target = copy / "diffusion_pytorch_model.safetensors"
    save_file(dict(reversed(weights.items())), target, metadata={"format": "pt", "note": "another container"})
    assert Autoencoder.load(str(copy)).hash == original
    next(iter(weights.values())).view(-1)[0] += 1e-6
    save_file(weights, target, metadata={"format": "pt"})
    assert Autoencoder.load(str(copy)).hash != original


def rewrite(saved, target, change):
    """A copy of a saved autoencoder with other tensors."""
    target.mkdir()
    (target / "config.json").write_text((saved / "config.json").read_text())
    weights = change(load_file(saved / "diffusion_pytorch_model.safetensors"))
    save_file(weights, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "decoder.conv_out" not in k}, "lack decoder.conv_out.bias .2 such"),
        (lambda w: w | {"stray.weight": torch.ones(1)}, "have an unknown stray.weight .1 such"),
        (lambda w: {k: v * torch.nan for k, v in w.items()}, "values in .* that are not finite"),
    ],
)
def test_weights_that_are_not_whole_are_refused(saved, tmp_path, change, message):
    """diffusers itself would leave missing tensors random, another number at each start."""
    with pytest.raises(InputError, match=message):
        Autoencoder.load(rewrite(saved, tmp_path / "changed", change))


def test_the_older_names_of_attention_load(tmp_path):
    """As in SD-VAE's public weights: query, key, value, proj_attn."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, **blocks).save_pretrained(tmp_path / "new")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for new, old in older.items():
            weights = {k.replace(f"attentions.0.{new}", f"attentions.0.{old}"): v for k, v in weights.items()}
        assert any("query" in k for k in weights)
        return weights

    loaded = Autoencoder.load(rewrite(tmp_path / "new", tmp_path / "old", rename))
    assert loaded.hash == Autoencoder.load(str(tmp_path / "new")).hash


def test_bad_weights_and_images_are_named(saved, tmp_path):
    with pytest.raises(InputError, match="no embedded autoencoder embedded:other; known are embedded:fashion_"):
        Autoencoder.load("embedded:other")
    with pytest.raises(InputError, match="has no config.json"):
        Autoencoder.load(str(tmp_path))
    config = json.loads((saved / "config.json").read_text())
    with pytest.raises(InputError, match="missing is not a directory"):
        Autoencoder.load(str(tmp_path / "missing"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(InputError, match="is diffusers' UNet2DModel; give one of AutoencoderKL, AutoencoderDC"):
        Autoencoder.load(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json that names no class"):
        Autoencoder.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="can't be loaded as one of diffusers'"):
        Autoencoder.load(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="can't be loaded as one of diffusers'"):
        Autoencoder.load(str(tmp_path))
    with pytest.raises(InputError, match="takes images with sides divisible by 4, not 30x32"):
        Autoencoder.load(str(saved)).encode(torch.zeros(1, 30, 32, 1, dtype=torch.uint8))


def test_one_of_your_own_is_trained_on_photographs(tmp_path):
    """docs/own_data.md's command: images of any size, brought to one; what it saves is loaded as any other."""
    for i in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40 + i, 30), (20 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.jpg")
    tool = Path(__file__).parents[1] / "tools" / "train_autoencoder.py"
    command = [tool, tmp_path / "mine", "--images", tmp_path / "photos", "--channels", "3"]
    done = forked.run(*command, "--size", "16", "--fit", "crop", "--steps", "2")
    assert done.returncode == 0, done.stderr
    mine = Autoencoder.load(str(tmp_path / "mine"))
    assert mine.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))[0].shape == (1, 4, 4, 4)
    padded = forked.run(*command, "--size", "16")
    assert padded.returncode == 2 and "use images.fit=crop" in padded.stderr and "Traceback" not in padded.stderr
