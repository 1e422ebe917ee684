"""Score checkpoints: sample images, extract features, and compare their statistics with those of real images.

One file for each (checkpoint, evaluation) under `evaluations/` beside the run's checkpoints, and `evaluations.jsonl`
derived from them all. What is there already is not computed again. Statistics are float64 and merged in the order of
image ids, so that they do not depend on the number of processes.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldt import log
from ldt.checkpoint.load import Loaded
from ldt.checkpoint.manifest import versions
from ldt.config import to_dict
from ldt.dist import World, broadcast, on_rank_zero
from ldt.errors import InputError
from ldt.evaluation.config import EvaluateConfig, is_statistics
from ldt.evaluation.parts import Block, blocks_of, parts_of
from ldt.evaluation.real_images import real_images
from ldt.files import natural, parse_json, replacing, schema_error, write_json
from ldt.metrics.detectors import Detector
from ldt.metrics.feature_store import FeatureStore, StoredFeatures, Vanished
from ldt.metrics.features import store_features
from ldt.metrics.reference import Reference, reference_of
from ldt.metrics.reference import load as load_reference
from ldt.metrics.scores import CAPTIONS, captions_of, compute, score_names
from ldt.sampling.draw import ImageModel, examples_of, image_model, load_guide, resized, sample_images

logger = log.get_logger(__name__)

Section = dict[str, Any]


NOT_IN_RESULT = (
    "checkpoint",
    "reference",
    "fit",
    "output",
    "cache_dir",
    "weights_file",
    "model",
    "compile",
    "guide",
    "guide_weights",
)
"""Keys that say where things are and how they are computed, not what."""

SILENT_UNLESS_CHANGED = {"guidance_inner": 1.0, "guide_scale": 1.0, "size": ""}
"""Keys that stand in a result only where they are in use, so that results from before they came stay valid."""


def open_reference(config: EvaluateConfig, loaded: Loaded, detector: Detector, world: World) -> Reference:
    """Statistics of the real images to compare with."""
    path = config.reference
    if CAPTIONS in config.metrics:
        asked_captions(loaded, [])  # refuses before any work
    if is_statistics(path):
        if CAPTIONS in config.metrics:
            raise InputError(f"reference={path} holds no captions; give images as reference, or leave {CAPTIONS} out")
        return load_reference(Path(path), detector)
    sets, cache_dir = real_images(config, loaded), Path(config.cache_dir).expanduser()
    reference = reference_of(sets, detector, cache_dir, world)
    if CAPTIONS not in config.metrics:
        return reference
    where = path or "the data of the run"
    captions = on_rank_zero(world, lambda: [text for images in sets for text in captions_of(images.source, where)])
    return replace(reference, captions=captions)


def asked_captions(loaded: Loaded, ids: Iterable[int]) -> list[str]:
    """The caption that each of these images is drawn of."""
    if loaded.config["model"].get("condition_on", "class") == "class":
        raise InputError(f"metrics={CAPTIONS} needs a denoiser of captions, and {loaded.path} knows classes alone")
    captions = [caption for _, caption in examples_of(loaded.spec)]
    if not any(captions):
        raise InputError(f"metrics={CAPTIONS} needs captions, and {loaded.path} was trained on none; leave it out")
    return [captions[i % len(captions)] for i in ids]


def score_once(
    config: EvaluateConfig, loaded: Loaded, reference: Reference, detector: Detector, output: Path, world: World
) -> Section | None:
    """Score a checkpoint unless its result is there; rank 0 writes it, says where and returns it."""
    identity = {k: v for k, v in to_dict(config).items() if k not in NOT_IN_RESULT}
    guide = load_guide(config, loaded, world.device)
    identity = {k: v for k, v in identity.items() if SILENT_UNLESS_CHANGED.get(k) != v}
    identity |= {"detector_hash": detector.hash, "reference_hash": reference.hash}
    identity |= {"guide_hash": guide.hash} if guide else {}
    blocks = blocks_of(parts_of(config, loaded.spec), config.block)
    ids = itertools.chain.from_iterable(block.ids[: block.wanted] for block in blocks)
    asked = asked_captions(loaded, ids) if CAPTIONS in config.metrics else []
    identity |= {"captions_hash": short_hash([asked, reference.captions])} if asked else {}
    file = output.parent / "evaluations" / f"{loaded.samples_seen:012d}-{short_hash(identity)}.json"
    result = broadcast(_read_result(file, loaded.hash) if world.rank == 0 else None)
    if result is None:
        start = time.perf_counter()
        store = FeatureStore(file.parent / f".{file.stem}-{loaded.hash[:8]}.work")
        model = image_model(loaded, config.precision, world.device, config.compile, guide)
        models = {size: resized(model, loaded.config, size) for size in {block.size for block in blocks}}
        features = make_features(config, blocks, models, detector, store, world)
        if world.rank != 0:
            return None
        try:
            scores, moments = compute(config.metrics, detector, features, reference, config.seed, asked)
        except Vanished:
            if (result := _read_result(file, loaded.hash)) is None:
                raise
            store.remove()  # made again by blocks that were written after the other job had removed it
            return _announce(result, detector, output)
        assert moments.count == config.images, (moments.count, config.images)
        result = {
            "samples_seen": loaded.samples_seen,
            **scores,
            **identity,
            "rank_deficient": min(moments.count, reference.images or moments.count) <= moments.width,
            "reference_images": reference.images,
            "moments_hash": moments.hash,
            "checkpoint_hash": loaded.hash,
            "autoencoder_hash": loaded.spec.autoencoder_hash,
            "world_size": world.size,
            "device": device_name(world.device),
            "seconds": round(time.perf_counter() - start, 3),
            "time": time.time(),
            **versions(),
        }
        write_json(file, result)
        store.remove()
        if result["rank_deficient"] and detector.score in result:
            warn_of_few(detector, config.images, reference.images)
    return _announce(result, detector, output) if world.rank == 0 else result


def _announce(result: Section, detector: Detector, output: Path) -> Section:
    """Add a result to the JSONL, and say it and where."""
    derive_jsonl(output)
    shown = ", ".join(f"{k} {result[k]:.4f}" for k in result if k in score_names(detector))
    print(f"{shown} at {result['samples_seen']} samples seen: {output}")
    return result


def make_features(
    config: EvaluateConfig,
    blocks: Sequence[Block],
    models: Mapping[str, ImageModel],
    detector: Detector,
    store: FeatureStore,
    world: World,
) -> StoredFeatures:
    """Put the features of the blocks' images into the store, all ranks together. models: by the blocks' sizes."""

    def produce(k: int) -> torch.Tensor:
        return sample_images(models[blocks[k].size], blocks[k].ids, config)

    wanted_K = [block.wanted for block in blocks]
    return StoredFeatures(store, store_features(store, detector, wanted_K, produce, world, "evaluate"))


def derive_jsonl(output: Path) -> None:
    """Rewrite evaluations.jsonl from the result files beside it, in the order of samples seen.

    Several evaluations may do so at once: whoever finds a new result after writing writes again.
    """
    directory, written = output.parent / "evaluations", None
    while written != (files := sorted(directory.glob("*.json"))):
        results = [r for p in files if (r := _whole_result(p)) is not None]
        with replacing(output) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in results))
        written = files


def _read_result(file: Path, checkpoint_hash: str) -> dict[str, Any] | None:
    """The result in a file, if it is of this very checkpoint."""
    result = _whole_result(file) if file.exists() else None
    if result is None:
        return None
    if result["checkpoint_hash"] != checkpoint_hash:
        logger.warning("%s is of another checkpoint with the same number of samples; recomputing", file)
        return None
    logger.info("already scored: %s", file)
    return result


def _whole_result(file: Path) -> dict[str, Any] | None:
    """What a result file says; None, with a warning, if it is damaged."""
    try:
        result = parse_json(file.read_bytes())
        wrong = schema_error(result, {"samples_seen": natural, "checkpoint_hash": str})
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong:
        logger.warning("%s is damaged (%s) and left out", file, wrong)
        return None
    return dict(result)


def short_hash(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def warn_of_few(detector: Detector, images: int, real: int) -> None:
    logger.warning(
        "%s of %d generated and %d real images is biased upwards: the detector has %d features and wants more images "
        "than that; compare only scores of equal numbers of images",
        detector.score,
        images,
        real,
        detector.outputs["features"],
    )
