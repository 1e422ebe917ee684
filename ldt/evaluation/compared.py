"""What is compared: the generated images in parts of one size each, and the real ones in the same parts.

A run on one size has one part. Of a run on buckets a part is a bucket, or there are as many as it has buckets: then
each has as many of the generated images as its share of the training data asks, and the features of all go into one
distribution, whose reference is that of the real images of all buckets, each at the size of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from ldt.checkpoint.load import Loaded
from ldt.data.images import ImageSource, open_encoded, open_images
from ldt.data.images.bucket_rule import Size
from ldt.data.images.open import open_encoded_buckets
from ldt.data.latent_spec import LatentSpec
from ldt.data.mixture import Mixture
from ldt.data.shards.buckets import read_buckets
from ldt.data.shards.manifest import read_head
from ldt.errors import InputError
from ldt.evaluation.config import ALL, EvaluateConfig, is_images
from ldt.metrics.features import block_sizes
from ldt.metrics.image_set import ImageSet

IDS_A_BUCKET = 1 << 32  # its images have ids of its own, for the same id is the same noise


@dataclass(frozen=True)
class Part:
    """Images of one size, HEIGHTxWIDTH or empty for the model's own: how many, and the id of the first."""

    size: str
    images: int
    first: int = 0


@dataclass(frozen=True)
class Block:
    """Ids of a part that pass through the network together; the first `wanted` of them count."""

    size: str
    ids: range
    wanted: int


def parts_of(config: EvaluateConfig, spec: LatentSpec) -> list[Part]:
    """The generated images of a score; of all buckets each has its share, and more images take none away from it."""
    if config.size != ALL:
        return [Part(config.size, config.images)]
    shares = Mixture([bucket["samples"] for bucket in spec.buckets.values()], 1)
    counts = shares.before(np.array([config.images]))[:, 0].tolist()
    return [Part(name, n, k * IDS_A_BUCKET) for k, (name, n) in enumerate(zip(spec.buckets, counts, strict=True)) if n]


def blocks_of(parts: Sequence[Part], size: int) -> list[Block]:
    """The blocks of all parts, evenly mixed: scores that look at consecutive images see all parts in each stretch."""
    placed = []
    for number, part in enumerate(parts):
        sizes = block_sizes(part.images, size)
        for k, wanted in enumerate(sizes):
            first = part.first + k * size
            block = Block(part.size, range(first, first + size), wanted)
            placed.append((Fraction(2 * k + 1, len(sizes)), number, block))
    return [block for *_, block in sorted(placed, key=lambda entry: entry[:2])]


def for_model(config: EvaluateConfig, loaded: Loaded) -> EvaluateConfig:
    """The settings with the size that is meant: without one, all buckets of a model that has several."""
    if not config.size and loaded.spec.buckets:
        config = replace(config, size=ALL)
    if config.size == ALL and not loaded.spec.buckets:
        raise InputError(
            f"evaluate.size={ALL} is for a model that was trained on buckets, and {loaded.path} was on one size; "
            "leave it out"
        )
    return config


def real_images(config: EvaluateConfig, loaded: Loaded) -> list[ImageSet]:
    """The real images to compare with, at the sizes of the generated ones."""
    path, channels = config.reference, loaded.spec.image_channels
    if is_images(path):
        if config.size == ALL:
            raise InputError(
                f"evaluate.reference={path} is of images that are in no bucket, and evaluate.size={ALL} compares "
                f"bucket with bucket; score one (evaluate.size={next(iter(loaded.spec.buckets))}), leave "
                "evaluate.reference out, or give data in buckets or an .npz of statistics"
            )
        return [ImageSet(open_images(path), *_size(config, loaded), channels, config.fit)]
    shards = path or _own_data(loaded)
    buckets = read_buckets(shards)
    if config.size == ALL:
        if buckets is None:
            raise InputError(f"evaluate.size={ALL} needs data in buckets, and {shards} holds one size; leave it out")
        recipe = _recipe(f"{shards.rstrip('/')}/{next(iter(buckets))}")
        sources, fit = open_encoded_buckets(recipe), recipe["images.fit"]
        sizes = [Size.parse(name, shards) for name in buckets]
        return [ImageSet(sources[size], *size, channels, fit) for size in sizes]
    if buckets is not None:
        if config.size not in buckets:
            raise InputError(
                f"{shards} has several sizes: evaluate.size={config.size} has to be one of {', '.join(buckets)}, or "
                f"{ALL} (several, separated by commas, end in a table)"
            )
        shards = f"{shards.rstrip('/')}/{config.size}"
    source, fit = images_of_shards(shards)
    return [ImageSet(source, *_size(config, loaded), channels, fit)]


def images_of_shards(shards: str) -> tuple[ImageSource, str]:
    """The images that latent shards were encoded from, and how they came to size."""
    recipe = _recipe(shards)
    return open_encoded(recipe), recipe["images.fit"]


def _recipe(shards: str) -> dict[str, Any]:
    recipe: dict[str, Any] = read_head(shards)["recipe"]
    if "images.path" not in recipe:
        raise InputError(
            f"the data in {shards} do not say which images they were encoded from; give images as reference, and fit"
        )
    return recipe


def _size(config: EvaluateConfig, loaded: Loaded) -> tuple[int, int]:
    return Size.parse(config.size, "evaluate.size") if config.size else loaded.spec.image_shape


def _own_data(loaded: Loaded) -> str:
    """Where the data of the run are."""
    data = loaded.config.get("data", {})
    if not data:
        raise InputError(
            f"{loaded.path} does not know which data it was trained on, as an imported model; give "
            "evaluate.reference and evaluate.fit"
        )
    if data.get("sources"):
        raise InputError(
            "the run was trained on several data.sources; say with evaluate.reference which images to compare with"
        )
    return str(data["path"])
