"""What encodes: a small autoencoder, 23 images, `ldt encode` in this process or in a pool."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldt import cli
from ldt.config import load
from ldt.dist import World
from ldt.encoding.buckets import encode_buckets
from ldt.encoding.config import EncodeJob

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory):
    """A real AutoencoderKL, small and untrained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL
    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("autoencoder")
    model.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(23):
        directory = root / CLASSES[i * 3 // 23]
        directory.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(directory / f"{i:03d}.png")
    return root


@pytest.fixture
def encode(autoencoder, images, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # process_group sets them
        monkeypatch.setenv(name, {"WORLD_SIZE": "1"}.get(name, "0"))

    def arguments(output: Path, **settings) -> list[str]:
        keys = {"images.path": images, "images.size": 8, "images.fit": "pad", "autoencoder": autoencoder,
                "output": output, "shard_samples": 5, "validation_fraction": 0.2, "batch": 2} | settings  # fmt: skip
        return ["encode", *(f"{k}={v}" for k, v in keys.items())]

    def run(output: Path, **settings) -> int:
        return cli.main(arguments(output, **settings))

    run.arguments = arguments
    return run


def encode_case(world: World, settings: list[str]) -> None:
    encode_buckets(load(EncodeJob, None, settings), world)
