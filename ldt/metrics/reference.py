"""Statistics of real images, the other side of every score, kept in a cache by the hash of what made them.

A reference is a set of images (directory, tar or embedded), the images behind latent shards, or a `.npz` of
statistics: ours, or ADM's (mu, sigma, mu_s, sigma_s, as in Dhariwal and Nichol 2105.05233).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldt import log
from ldt.dist import World, broadcast
from ldt.errors import InputError, by_reason
from ldt.files import beside_threads, load_npy, parse_json, replacing, schema_error, write_npy
from ldt.metrics.detectors import Detector
from ldt.metrics.feature_store import FeatureStore, Vanished
from ldt.metrics.features import block_sizes, store_features
from ldt.metrics.image_set import BLOCK, ImageSet
from ldt.metrics.moments import MomentStream

logger = log.get_logger(__name__)
SUFFIX = {"features": "", "spatial": "_s"}  # of mu and sigma in an .npz


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D], float64."""

    mean_D: NDArray[np.float64]
    covariance_DD: NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """Statistics by kind of feature (`features`, `spatial`), and where the features themselves are, if anywhere.

    `hash` covers the pixels (so the crop as well) and the detector. `images` is 0 where a file does not say. captions:
    of the images, where a metric needs them.
    """

    by_name: dict[str, Statistics]
    images: int
    hash: str
    file: Path
    captions: Sequence[str] = ()

    def statistics(self, name: str) -> Statistics:
        """Statistics of one kind of feature."""
        if name not in self.by_name:
            raise InputError(f"{self.file} holds no statistics of {name} features; give images as reference")
        return self.by_name[name]

    def features(self) -> NDArray[np.float32]:
        """The features of the real images, for scores that need more than moments."""
        file = _features_file(self.file)
        if not file.exists():
            raise InputError(
                f"{self.file} has no features beside it, which all metrics but frechet, spatial_frechet and "
                "inception_score need; give images as reference"
            )
        try:
            features: NDArray[np.float32] = load_npy(file)
        except (OSError, ValueError) as error:
            raise by_reason(f"{file} is not readable as .npy ({error}); remove it and evaluate again", error) from None
        if features.ndim != 2 or features.dtype != np.float32:
            raise InputError(f"{file} holds {features.dtype} {features.shape}, no features; remove it")
        return features


def reference_of(sets: Sequence[ImageSet], detector: Detector, cache_dir: Path, world: World) -> Reference:
    """Statistics of all images of one or several sets, each of its size, as one distribution.

    Pixels are hashed on every call, features computed once; the ranks share both.
    """
    digest = hashlib.sha256(detector.hash.encode())
    for images in sets:
        if len(sets) > 1:  # blocks of 8×12 and of 12×8 pixels may have the same bytes
            digest.update(f"{len(images)} {images.height} {images.width}".encode())
        for block_digest in images.digests(world):
            digest.update(block_digest)
    file = cache_dir / f"{detector.name}-{digest.hexdigest()[:32]}.npz"
    if not broadcast(file.exists()):
        store, places = FeatureStore(file.with_suffix(".work")), [(s, k) for s in sets for k in range(s.blocks)]

        def produce(number: int) -> Tensor:
            images, k = places[number]
            return torch.from_numpy(images.block(k))

        wanted_K = [n for images in sets for n in block_sizes(len(images), BLOCK)]
        blocks = store_features(store, detector, wanted_K, produce, world, "reference")
        if world.rank == 0:
            made_by: dict[str, object] = {
                "images": sets[0].source.name(0),
                "size": [[images.height, images.width] for images in sets],
                "channels": sets[0].channels,
                "fit": sets[0].fit,
                "detector": detector.name,
            }
            try:
                _save(file, store, blocks, detector, made_by | {"hash": digest.hexdigest()})
            except Vanished:
                if not file.exists():
                    raise
            store.remove()
    # rank 0 hands its own around: the others may see another file system
    return broadcast(load(file, detector) if world.rank == 0 else None)  # type: ignore[return-value]


def _save(file: Path, store: FeatureStore, blocks: int, detector: Detector, made_by: dict[str, object]) -> None:
    """Write an .npz: mu and sigma as other evaluators name them, the count, and how they were made."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, suffix in SUFFIX.items():
        if name not in detector.outputs:
            continue
        stream = MomentStream(detector.outputs[name])
        for block in store.read(blocks):
            stream.add(block[name])
        moments = stream.moments()
        arrays |= {f"mu{suffix}": moments.mean_D, f"sigma{suffix}": moments.covariance_DD}
        arrays["count"] = np.int64(moments.count)  # type: ignore[assignment]
    arrays["made_by"] = np.array(json.dumps(made_by | {"detector_hash": detector.hash}))
    write_npy(_features_file(file), store.column("features", blocks))
    with replacing(file) as temporary, temporary.open("wb") as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]


def _features_file(file: Path) -> Path:
    return file.with_suffix(".features.npy")


def _arrays(file: Path) -> dict[str, Any]:
    with file.open("rb") as f, np.load(f, allow_pickle=False) as z:
        return {name: z[name] for name in z.files if name in ("mu", "sigma", "mu_s", "sigma_s", "count", "made_by")}


def load(file: Path, detector: Detector) -> Reference:
    """Read statistics of ours or ADM's; refuses those of another detector, of another width, and NaN."""
    try:
        held = beside_threads(lambda: _arrays(file))
        made_by = parse_json(str(held["made_by"])) if "made_by" in held else {}
        if any(held[name].dtype.kind not in "fiu" for name in held if name != "made_by"):
            raise ValueError("statistics are real numbers")
        by_name = {
            name: Statistics(held[f"mu{s}"].astype(np.float64), held[f"sigma{s}"].astype(np.float64))
            for name, s in SUFFIX.items()
            if f"mu{s}" in held and f"sigma{s}" in held
        }
        count = int(held.get("count", 0))
    except Exception as error:  # numpy and zipfile raise a dozen types over a damaged file
        raise by_reason(f"{file} is not readable as .npz ({error}); remove it or download it again", error) from None
    if "features" not in by_name:
        raise InputError(f"{file} holds no reference statistics (mu and sigma); remove it or give another file")
    if made_by and (wrong := schema_error(made_by, {"detector_hash": str, "detector": str, "hash": str}, "made_by")):
        raise InputError(f"{file} is damaged ({wrong}); remove it or download it again")
    if made_by and made_by["detector_hash"] != detector.hash:
        raise InputError(
            f"{file} holds statistics of another detector ({made_by['detector']}) than detector="
            f"{detector.name} with its weights and resize; evaluate with that one, or give images as reference"
        )
    for name, statistics in by_name.items():
        _check(file, name, statistics, detector)
    digest = made_by["hash"] if made_by else hashlib.sha256(file.read_bytes()).hexdigest()
    return Reference(by_name, count, digest, file)


def _check(file: Path, name: str, statistics: Statistics, detector: Detector) -> None:
    width = detector.outputs.get(name, statistics.mean_D.size)
    if statistics.mean_D.shape != (width,) or statistics.covariance_DD.shape != (width, width):
        raise InputError(
            f"{file} holds {name} of width {statistics.mean_D.size}, but the detector {detector.name} has {width}; "
            "it was made by another detector"
        )
    if not (np.isfinite(statistics.mean_D).all() and np.isfinite(statistics.covariance_DD).all()):
        raise InputError(f"{file} holds NaN or infinite statistics; remove it or download it again")
