"""Small shard directories of random latents for tests and tools, written by the same functions as `ldt encode`."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ldt import rng
from ldt.data.batch import SampleDraws
from ldt.data.buffer import RankSlice
from ldt.data.latent_spec import pack_statistics
from ldt.data.loader import AnyShards, Loader, ValidationLoader, make_order, views_of
from ldt.data.shards import mds, tar
from ldt.data.shards.buckets import write_buckets
from ldt.data.shards.layout import Layout, Samples
from ldt.data.shards.manifest import Manifest, make_table
from ldt.data.shards.sources import Shards
from ldt.files import write_atomic

PACK = {"tar": tar.pack, "mds": mds.pack}
CLASSES = ("ant", "bee", "cat")


def make_samples(count: int, layout: Layout, seed: int = 0, classes: int = len(CLASSES)) -> Samples:
    rng = np.random.default_rng(seed)

    def moments() -> np.ndarray:
        mean = rng.standard_normal((count, 1, *layout.latent_shape))
        std = 0.05 + 0.2 * rng.random((count, 1, *layout.latent_shape))
        return layout.pack(torch.from_numpy(np.concatenate([mean, std] if layout.posterior else [mean], 1)))

    def target() -> np.ndarray:
        return rng.standard_normal((count, *(layout.target or ()))).astype(np.float16)

    views = (moments(), moments() if layout.flips else None)
    targets = [target() if layout.target and there else None for there in (True, layout.flips)]
    return Samples(rng.integers(0, classes, count), *views, None, None, *targets)


def write_shards(
    directory: Path,
    counts: list[int],
    format: str = "tar",
    dtype: str = "fp16",
    flips: bool = False,
    latent_shape: tuple[int, int, int] = (4, 2, 2),
    spoiled: dict[int, float] | None = None,
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    posterior: bool = True,
    by_element: bool = False,
    target: tuple[int, int, int] | None = None,
) -> list[Samples]:
    """Shards of the given sizes with a manifest; returns what was written. `spoiled`: sample → its latent's value.

    posterior: whether latents have a deviation; by_element: whether each element has whitening statistics of its own;
    target: the shape of features of patches, if there are to be some.
    """
    layout = Layout(latent_shape, dtype, flips, posterior=posterior, target=target)
    directory.mkdir(parents=True, exist_ok=True)
    rows, written, first = [], [], 0
    for i, count in enumerate(counts):
        samples = make_samples(count, layout, seed=seed + i, classes=len(classes))
        for sample, value in (spoiled or {}).items():
            if first <= sample < first + count:
                samples.moments_n2CHW[sample - first] = value
        content = PACK[format](samples, layout, first)
        name = f"shard-{i:08d}.{format}"
        write_atomic(directory / name, content)
        rows.append((name, len(content), count, xxhash.xxh64_intdigest(content), samples.content_hash()))
        written.append(samples)
        first += count
    label = np.concatenate([s.label_n for s in written])
    manifest = Manifest(
        format=format,
        latent_shape=latent_shape,
        dtype=dtype,
        flips=flips,
        classes=list(classes),
        class_counts=np.bincount(label, minlength=len(classes)).tolist(),
        mean_C=np.linspace(-0.5, 0.5, latent_shape[0]).tolist(),
        std_C=np.linspace(0.5, 2.0, latent_shape[0]).tolist(),
        autoencoder="test",
        autoencoder_hash="0" * 16,
        image_size=8,
        image_channels=1,
        table=make_table(rows),
        posterior=posterior,
        target={"name": "test", "hash": "0", "shape": list(target), "dtype": "fp16"} if target else {},
        mean_CHW=pack_statistics(np.linspace(-0.5, 0.5, prod(latent_shape))) if by_element else "",
        std_CHW=pack_statistics(np.linspace(0.5, 2.0, prod(latent_shape))) if by_element else "",
    )
    manifest.save(directory)
    return written


SHAPES = {"8x8": (4, 4, 4), "8x16": (4, 4, 8), "12x4": (4, 6, 2)}


def write_bucket_shards(
    directory: Path,
    counts: dict[str, list[int]],
    held_out: dict[str, list[int]] | None = None,
    shapes: dict[str, tuple[int, int, int]] = SHAPES,
    **how: Any,
) -> None:
    """Buckets of shards of the given sizes, and their list. how: further arguments of `write_shards`."""
    manifests = {}
    for i, (name, of_bucket) in enumerate(counts.items()):
        write_shards(directory / name, of_bucket, latent_shape=shapes[name], seed=100 * i, **how)
        if held_out and name in held_out:
            where = directory / name / "validation"
            write_shards(where, held_out[name], latent_shape=shapes[name], seed=100 * i + 50, **how)
        manifests[name] = Manifest.load(directory / name)
    write_buckets(directory, manifests, {})


def make_loader(
    shards: AnyShards, *, batch: int, seed: int, streams: int = 8, window: int = 1 << 16, rank: int = 0, ranks: int = 1,
    micro_batch: int = 0, label_drop: float = 0.0, condition_on: str = "class", version: int = rng.VERSION, **how: Any,
) -> Loader:  # fmt: skip
    """A training loader of one rank. how: device, threads and ahead of `Loader`."""
    order = make_order(shards, seed, batch, streams, window)
    shapes = [view.manifest.latent_shape for view in views_of(shards).values()]
    shares = RankSlice.by_bucket(batch, rank, ranks, micro_batch, shapes)
    draws = SampleDraws(seed, label_drop, condition_on, shards.manifest.flips, version=version)
    return Loader(shards, order, shares, draws, **how)


def make_validation_loader(
    shards: Shards, *, seed: int, micro_batch: int, rank: int = 0, ranks: int = 1, limit: int = 0
) -> ValidationLoader:
    """A validation loader of one rank over the first `limit` samples, 0 for all."""
    total = min(limit or shards.manifest.samples, shards.manifest.samples)
    return ValidationLoader(shards, SampleDraws(seed), RankSlice.of(total, rank, ranks, micro_batch))
