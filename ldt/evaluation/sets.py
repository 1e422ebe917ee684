"""Scores of any set of images against real ones, and of two sets against each other with an interval.

Pixels are hashed, then a detector looks at them in blocks; a killed job goes on with the blocks that are missing. How
sure a difference is: the scores are computed again of keyed halves of the images. The images of a set are cut into up
to `GROUPS` groups of consecutive ones, of which each replicate takes a half without replacement, the same of both sets.
A half drawn so differs from the whole as much as the whole does from another set of its size, and unlike in a bootstrap
with replacement no image stands in it twice, which precision, recall and kernel distances would not survive.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ldt import log, rng
from ldt.checkpoint.manifest import versions
from ldt.config_fields import check_seed, choice, path_field, required_path_field
from ldt.data.images import ImageSource, open_images
from ldt.dist import World, in_block_order, on_rank_zero
from ldt.errors import InputError
from ldt.evaluation.config import MeasureConfig, is_images, is_statistics
from ldt.evaluation.real_images import images_of_shards
from ldt.evaluation.scorer import Section, device_name, short_hash, warn_of_few
from ldt.metrics.detectors import Detector, make_detector
from ldt.metrics.feature_store import ChosenFeatures, FeatureStore, StoredFeatures
from ldt.metrics.features import block_sizes, store_features
from ldt.metrics.image_set import ImageSet
from ldt.metrics.reference import Reference, load, reference_of
from ldt.metrics.scores import CAPTIONS, captions_of, check, check_counts, compute
from ldt.paths import is_remote

logger = log.get_logger(__name__)
GROUPS, LEAST_GROUPS = 100, 20
NORMAL_95 = 1.96  # deviations of a normal distribution that hold 95 %


@dataclass
class ScoreJob(MeasureConfig):
    """`images`: the set to score, and `against`: another one to compare it with, as whatever images.path may be.

    `reference`: real images, likewise; or latent shards (the images behind them) or an .npz of statistics. `size`: both
    sets become squares of it by `fit`; 0 leaves the set as it is, all of one size, and brings the real images to that
    by `fit`. `block`: images that the detector sees at once; it is part of the last bits. `halves`: replicates behind
    the interval of a difference. `output`: the file that gets a line of JSON.
    """

    images: str = required_path_field(remote=True)
    reference: str = required_path_field(remote=True)
    against: str = path_field(remote=True)
    size: int = 0
    fit: str = choice("as_is", "crop", "pad")
    seed: int = 0
    block: int = 50
    halves: int = 100
    output: str = path_field("scores.jsonl")

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.block < 1:
            raise InputError(f"block={self.block} must be at least 1; it is how many images the detector sees at once")
        if self.size < 0 or (self.size > 0) and self.fit == "as_is":
            raise InputError(f"size={self.size} must be positive and needs fit=crop or pad, or be 0 for images as is")
        if self.halves < 2:
            raise InputError(f"halves={self.halves} must be at least 2; 100 give an interval to about a tenth")


@dataclass(frozen=True)
class Measured:
    """A set of images whose features are in a store."""

    path: str
    images: ImageSet
    hash: str
    store: FeatureStore
    features: StoredFeatures
    captions: Sequence[str]


def score_sets(config: ScoreJob, world: World) -> Section:
    """Score a set, and compare it where there is another; rank 0 gets the result (collective)."""
    start = time.perf_counter()
    detector = make_detector(config.detector, world.device, config.weights_file, config.resize, config.model)
    check(config.metrics, detector)
    sets = _open_sets(config)
    reference = _open_reference(config, next(iter(sets.values())), detector, world)
    if reference.images:
        check_counts(config.metrics, reference.images, config.reference)
    measured = [_measure(path, images, config, detector, world) for path, images in sets.items()]
    replicates = _replicates(measured, config, detector, reference, world) if config.against else []
    if world.rank != 0:
        return {}
    first, *others = (_scores(one, config, detector, reference) for one in measured)
    for one in measured:
        one.store.remove()
    differences = _differences(first, others[0], np.array(replicates), config) if others else {}
    return {
        **first,
        **({"against": others[0]} if others else {}),
        **differences,
        "metrics": config.metrics,
        "detector": config.detector,
        "detector_hash": detector.hash,
        "reference": config.reference,
        "reference_hash": reference.hash,
        "reference_images": reference.images,
        "size": [measured[0].images.height, measured[0].images.width],
        "fit": config.fit,
        "seed": config.seed,
        "block": config.block,
        "world_size": world.size,
        "device": device_name(world.device),
        "seconds": round(time.perf_counter() - start, 3),
        "time": time.time(),
        **versions(),
    }


def _open_sets(config: ScoreJob) -> dict[str, ImageSet]:
    """The images to score, and those to compare them with, by their paths."""
    fit = config.fit if config.size else "as_is"
    paths = [config.images, *([config.against] if config.against else [])]
    if len({*paths}) < len(paths):
        raise InputError(f"against={config.against} is the set that is scored; give another one")
    sets = {path: ImageSet.of(_opened(path), config.size, fit) for path in paths}
    first = sets[config.images]
    for path, images in sets.items():
        check_counts(config.metrics, len(images), path)
        if config.against:
            check_counts(config.metrics, len(images) // 2, f"half of {path}")
        if config.against and len(images) < LEAST_GROUPS:
            raise InputError(f"{path} has {len(images)} images, and a comparison needs {LEAST_GROUPS} of each set")
        if (images.height, images.width) != (first.height, first.width):
            raise InputError(
                f"{config.images} holds images of {first.width}x{first.height} and {path} of {images.width}x"
                f"{images.height}; bring them to one size by size= and fit=crop or pad"
            )
    return sets


def _opened(path: str) -> ImageSource:
    source = open_images(path)
    for remark in source.remarks():
        logger.info("%s: %s", path, remark)
    return source


def _open_reference(config: ScoreJob, like: ImageSet, detector: Detector, world: World) -> Reference:
    """The real images' statistics, at the size of the others."""
    path, fit = config.reference, config.fit
    if is_statistics(path):
        if CAPTIONS in config.metrics:
            raise InputError(f"reference={path} holds no captions; give images as reference, or leave {CAPTIONS} out")
        if is_remote(path):
            raise InputError(f"reference={path} is read on local disks only, as statistics; copy it here")
        return load(Path(path), detector)
    if is_images(path):
        source = _opened(path)
    else:
        source, encoded_fit = images_of_shards(path)
        fit = encoded_fit if fit == "as_is" else fit
    images = ImageSet(source, like.height, like.width, like.channels, fit)
    reference = reference_of([images], detector, Path(config.cache_dir).expanduser(), world)
    return replace(reference, captions=_captions(images, config, path, world))


def _captions(images: ImageSet, config: ScoreJob, path: str, world: World) -> list[str]:
    """Of a set, where a metric needs them (collective)."""
    if CAPTIONS not in config.metrics:
        return []
    return on_rank_zero(world, lambda: captions_of(images.source, path))


def _measure(path: str, images: ImageSet, config: ScoreJob, detector: Detector, world: World) -> Measured:
    """Features of a set, which a job that was killed may have left in part."""
    pixels = images.hash(world)
    identity = {"path": path, "pixels": pixels, "detector": detector.hash, "block": config.block}
    store = FeatureStore(Path(config.output).parent / f".score-{short_hash(identity)}.work")

    def produce(k: int) -> torch.Tensor:
        block_BHWC = images.block(k, config.block)
        missing = config.block - len(block_BHWC)
        return torch.from_numpy(np.concatenate([block_BHWC, np.repeat(block_BHWC[-1:], missing, 0)]))

    blocks = store_features(store, detector, block_sizes(len(images), config.block), produce, world, "score")
    captions = _captions(images, config, path, world)
    return Measured(path, images, pixels, store, StoredFeatures(store, blocks), captions)


def _scores(one: Measured, config: ScoreJob, detector: Detector, reference: Reference) -> Section:
    scores, moments = compute(config.metrics, detector, one.features, reference, config.seed, one.captions)
    few = min(moments.count, reference.images or moments.count) <= moments.width
    if few and detector.score in scores:
        warn_of_few(detector, moments.count, reference.images)
    hashes = {"images_hash": one.hash, "moments_hash": moments.hash, "rank_deficient": few}
    return {"set": one.path, **scores, "images": moments.count, **hashes}


def groups_of(images: int) -> list[NDArray[np.int64]]:
    """The ids of a set, cut into groups of consecutive ones as equal as can be."""
    return np.array_split(np.arange(images), min(GROUPS, images))


def half(images: int, replicate: int, seed: int) -> NDArray[np.int64]:
    """The ids of a keyed half of a set's groups, in order."""
    groups = groups_of(images)
    drawn = rng.permute(np.arange(len(groups) // 2), len(groups), seed, rng.Purpose.SAMPLE_SUBSET, replicate, 2)
    return np.concatenate([groups[g] for g in np.sort(drawn)])


def _replicates(
    measured: list[Measured], config: ScoreJob, detector: Detector, reference: Reference, world: World
) -> list[list[float]]:
    """Score by score, the first set less the second, of each half; the ranks share the replicates."""
    columns = [{name: one.features.column(name) for name in detector.outputs} for one in measured]

    def scores(one: Measured, column: dict[str, NDArray[np.float32]], replicate: int) -> dict[str, float]:
        ids = half(len(one.images), replicate, config.seed)
        asked = [one.captions[i] for i in ids.tolist()] if one.captions else []
        return compute(config.metrics, detector, ChosenFeatures(column, ids), reference, config.seed, asked)[0]

    def difference(replicate: int) -> list[float]:
        first, second = (scores(*pair, replicate) for pair in zip(measured, columns, strict=True))
        return [first[name] - second[name] for name in first]

    with log.progress(config.halves, "halves", "compare", show=world.rank == 0) as bar:
        out = []
        for one in in_block_order(config.halves, difference, world):
            out.append(one)
            bar.update(1)
    return out


def _differences(first: Section, second: Section, replicate_RS: NDArray[np.float64], config: ScoreJob) -> Section:
    """The difference of each score, its standard error, and the interval that holds it 95 times of 100."""
    names = [name for name in first if name in second and isinstance(first[name], float)]
    errors = dict(zip(names, replicate_RS.std(0, ddof=1).tolist(), strict=True))
    names = [name for name in names if not name.endswith("_std")]
    difference = {name: first[name] - second[name] for name in names}
    margin = {name: NORMAL_95 * errors[name] for name in names}
    return {
        "difference": difference,
        "difference_std": {name: errors[name] for name in names},
        "interval": {name: [difference[name] - margin[name], difference[name] + margin[name]] for name in names},
        "halves": config.halves,
    }


def table(result: Section) -> Iterator[str]:
    """A line a score: of the set, and where there are two, of both, and what lies between them."""
    second = result.get("against", {})
    names = [name for name in result if isinstance(result[name], float) and name not in ("seconds", "time")]
    rows = [["score", "images", *(["against", "difference", "95 % interval"] if second else [])]]
    for name in (n for n in names if not n.endswith("_std")):
        cells = [name, f"{result[name]:.4f}"]
        if second:
            low, high = result["interval"][name]
            cells += [f"{second[name]:.4f}", f"{result['difference'][name]:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
