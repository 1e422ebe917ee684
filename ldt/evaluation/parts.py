"""Which images a score generates: parts of one size each, in blocks that pass through the network together.

A run on one size has one part. Of a run on buckets a part is a bucket, or there are as many as it has buckets: then
each has as many of the images as its share of the training data asks, and the features of all go into one distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from ldt.checkpoint.load import Loaded
from ldt.data.latent_spec import LatentSpec
from ldt.data.mixture import Mixture
from ldt.errors import InputError
from ldt.evaluation.config import ALL, EvaluateConfig
from ldt.metrics.features import block_sizes

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


def with_size(config: EvaluateConfig, loaded: Loaded) -> EvaluateConfig:
    """The settings with the size that is meant: without one, all buckets of a model that has several."""
    if not config.size and loaded.spec.buckets:
        config = replace(config, size=ALL)
    if config.size == ALL and not loaded.spec.buckets:
        raise InputError(
            f"evaluate.size={ALL} is for a model that was trained on buckets, and {loaded.path} was on one size; "
            "leave it out"
        )
    return config
