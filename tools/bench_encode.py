"""Encoding against the autoencoder's own forward pass on the same images, in turns."""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldt.data.images import FashionMNIST
from ldt.dist import process_group
from ldt.encode import Encoder
from ldt.encode_config import Config, ImagesConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size and kind of the work."""
    parser.add_argument("--images", type=int, default=2048, help="PNG files, of Fashion-MNIST's enlarged to --size")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--autoencoder", default="embedded:fashion_mnist")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--format", default="tar", choices=("tar", "mds"))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the forward pass alone and of encoding, medians over turns, and of their ratios."""
    forward, whole, count = [], [], arguments.images
    with process_group() as world, tempfile.TemporaryDirectory() as directory:
        _write_images(Path(directory) / "images", count, arguments.size)
        for turn in range(arguments.turns + 1):
            images = ImagesConfig(f"{directory}/images", arguments.size, "crop")
            config = Config(
                images=images,
                autoencoder=arguments.autoencoder,
                output=f"{directory}/{turn}",
                format=arguments.format,
                batch=arguments.batch,
                threads=arguments.threads,
                shard_samples=1024,
                validation_fraction=0,
            )
            encoder = Encoder(config, world)
            forward.append(_forward(encoder, count, arguments.batch))
            start = time.perf_counter()
            encoder.run()
            whole.append(count / (time.perf_counter() - start))
    forward, whole = forward[1:], whole[1:]  # the first turn warms up
    ratios = [b / a for a, b in zip(forward, whole, strict=True)]
    return {
        "autoencoder alone, images/s": median(forward),
        "encode, images/s": median(whole),
        "ratio": median(ratios),
        "ratio, lowest": min(ratios),
        "ratio, highest": max(ratios),
    }


def _forward(encoder: Encoder, count: int, batch: int) -> float:
    """Images a second of the encoder's network on one batch again and again, results on the CPU."""
    autoencoder = encoder.plan.autoencoder
    size, channels = encoder.plan.image_size, autoencoder.image_channels
    pixels = torch.randint(0, 256, (batch, size, size, channels), dtype=torch.uint8)
    start = time.perf_counter()
    for _ in range(count // batch):
        [moments.cpu() for moments in autoencoder.encode(pixels)]
    return count // batch * batch / (time.perf_counter() - start)


def _write_images(directory: Path, count: int, size: int) -> None:
    source = FashionMNIST()
    for i in range(count):
        path = directory / f"{source.label(i)}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(i).resize((size, size)).save(path)
