"""Encoding against the autoencoder's own forward pass on the same images, in turns."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldt.data.images.embedded import FashionMNIST
from ldt.dist import process_group
from ldt.encoding.config import EncodeJob, ImagesConfig
from ldt.encoding.encoder import Encoder


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
    forward, whole, count = [], [], arguments.images  # (wall, CPU) seconds an image
    with process_group() as world, tempfile.TemporaryDirectory() as directory:
        _write_images(Path(directory) / "images", count, arguments.size)
        for turn in range(arguments.turns + 1):
            images = ImagesConfig(f"{directory}/images", arguments.size, fit="crop")
            config = EncodeJob(
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
            forward.append(_seconds(lambda e=encoder: _forward(e, count, arguments.batch), count))  # type: ignore[misc]
            whole.append(_seconds(encoder.run, count))
    forward, whole = forward[1:], whole[1:]  # the first turn warms up
    ratios = [a / b for (a, _), (b, _) in zip(forward, whole, strict=True)]
    return {
        "autoencoder alone, images/s": 1 / median(wall for wall, _ in forward),
        "encode, images/s": 1 / median(wall for wall, _ in whole),
        "autoencoder alone, CPU us an image": 1e6 * median(cpu for _, cpu in forward),
        "encode, CPU us an image": 1e6 * median(cpu for _, cpu in whole),
        "ratio": median(ratios),
        "ratio, lowest": min(ratios),
        "ratio, highest": max(ratios),
    }


def _forward(encoder: Encoder, count: int, batch: int) -> None:
    """The encoder's network on one batch again and again, until it has seen so many images; results on the CPU."""
    autoencoder = encoder.plan.autoencoder
    height, width = encoder.plan.input.size
    pixels = torch.randint(0, 256, (batch, height, width, autoencoder.image_channels), dtype=torch.uint8)
    for start in range(0, count, batch):
        [m.cpu() for m in autoencoder.encode(pixels[: count - start]) if m is not None]


def _seconds(action: Callable[[], Any], count: int) -> tuple[float, float]:
    """Wall and CPU time an image."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def _write_images(directory: Path, count: int, size: int) -> None:
    source = FashionMNIST()
    for i in range(count):
        path = directory / f"{source.label(i)}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(i).resize((size, size)).save(path)
