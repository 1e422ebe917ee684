"""Statistics of real images, the other side of a Fréchet distance, kept in a cache by the hash of what made them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from ldt import log
from ldt.data.images import open_images, prepare
from ldt.dist import World, broadcast, in_block_order
from ldt.errors import InputError
from ldt.metrics.detectors import Detector
from ldt.metrics.moments import Moments, MomentStream

logger = log.get_logger(__name__)
BLOCK = 64


@dataclass(frozen=True)
class Reference:
    """Mean [D] and covariance [D, D] of a detector's features on real images, float64.

    `hash` covers the pixels (so the crop as well) and the detector.
    """

    mean_D: NDArray[np.float64]
    covariance_DD: NDArray[np.float64]
    images: int
    hash: str


def reference_of_images(
    path: str, size: int, channels: int, fit: str, detector: Detector, cache_dir: Path, world: World
) -> Reference:
    """Statistics of all images under `path` (see `open_images`), prepared as for encoding; the ranks share the work.

    `fit` is `crop` (ADM's centre crop) or `pad`. Pixels are hashed on every call, features computed once.
    """
    source = open_images(path)

    def images(k: int) -> NDArray[np.uint8]:
        ids = range(k * BLOCK, min((k + 1) * BLOCK, len(source)))
        return np.stack([prepare(source.image(i), size, channels, fit) for i in ids])

    def features(k: int) -> NDArray[np.float32]:
        return detector(torch.from_numpy(images(k))).feature_BD.cpu().numpy()

    blocks = -(-len(source) // BLOCK)
    digest = hashlib.sha256(detector.hash.encode())
    for block_digest in in_block_order(blocks, lambda k: hashlib.sha256(images(k).tobytes()).digest(), world):
        digest.update(block_digest)
    file = cache_dir / f"{detector.name}-{digest.hexdigest()[:32]}.npz"
    if not broadcast(file.exists()):
        stream = MomentStream(detector.width)
        with log.progress(len(source), "img", "reference", show=world.rank == 0) as bar:
            for feature_BD in in_block_order(blocks, features, world):
                stream.add(feature_BD)
                bar.update(len(feature_BD))
        if world.rank == 0:
            made_by = {"images": path, "size": size, "channels": channels, "fit": fit, "detector": detector.name}
            save(file, stream.moments(), made_by | {"detector_hash": detector.hash, "hash": digest.hexdigest()})
    # rank 0 hands its own around: the others may see another file system
    return broadcast(load(file) if world.rank == 0 else None)  # type: ignore[return-value]


def save(file: Path, moments: Moments, made_by: dict[str, object]) -> None:
    """Write statistics as .npz: mu and sigma as other evaluators name them, the count, and how they were made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    text = np.array(json.dumps(made_by))
    with temporary.open("wb") as f:
        np.savez(f, mu=moments.mean_D, sigma=moments.covariance_DD, count=np.int64(moments.count), made_by=text)
    temporary.replace(file)


def load(file: Path) -> Reference:
    """Read statistics written by `save`; refuses files that hold none, or hold NaN."""
    try:
        with file.open("rb") as f, np.load(f, allow_pickle=False) as z:
            reference = Reference(z["mu"], z["sigma"], int(z["count"]), json.loads(str(z["made_by"]))["hash"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise InputError(f"{file} holds no reference statistics ({error}); remove it to have it made again") from None
    if not (np.isfinite(reference.mean_D).all() and np.isfinite(reference.covariance_DD).all()):
        raise InputError(f"{file} holds NaN or infinite statistics; remove it to have it made again")
    return reference
