"""Score checkpoints: images are sampled, a detector looks at them, and their statistics meet those of real images.

One file for each (checkpoint, evaluation) under `evaluations/` beside the run's checkpoints, and `evaluations.jsonl`
derived from them all. What is there already is not computed again. Statistics are float64 and merged in the order of
image ids, so that they do not depend on the number of processes.
"""

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldt import log
from ldt.checkpoint import MANIFEST, MODEL, Loaded, listed, load_denoiser, newest, versions
from ldt.config import to_dict
from ldt.data.shards.manifest import HEAD, read_head
from ldt.dist import World, barrier, broadcast, process_group
from ldt.errors import InputError
from ldt.files import misfit, natural, parse_json
from ldt.metrics.detectors import Detector, make_detector
from ldt.metrics.reference import Reference, reference_of_images
from ldt.metrics.reference import load as load_reference
from ldt.metrics.scores import check, compute, score_names
from ldt.metrics.store import FeatureStore
from ldt.options import choice, section
from ldt.rundir import write_json
from ldt.sample import DrawConfig, block_ids, image_model, sample_images
from ldt.watch import follow

logger = log.get_logger(__name__)

Section = dict[str, Any]


@dataclass
class EvaluateConfig(DrawConfig):
    """How checkpoints are scored.

    `metrics`: of frechet, spatial_frechet, inception_score, kernel, precision_recall. `weights_file`: of the inception
    and timm detectors; `resize`: of inception; `model`: of timm. `checkpoint`: newest, all, or one's number of samples.
    `reference`: real images (directory, tar or embedded:NAME, brought to size by `fit`), latent shards (the images
    behind them) or an .npz of statistics; empty for the images that the run's data were encoded from. `output`: the
    evaluations.jsonl to write, empty for the run's. `cache_dir`: where statistics of real images are kept.
    """

    images: int = 50_000
    metrics: list[str] = field(default_factory=lambda: ["frechet"])
    detector: str = choice("efficientnet_lite0", "inception", "timm")
    model: str = "vit_large_patch14_dinov2.lvd142m"
    weights_file: str = ""
    resize: str = choice("tensorflow", "bilinear", "clean")
    checkpoint: str = "newest"
    reference: str = ""
    fit: str = choice("as_encoded", "crop", "pad")
    output: str = ""
    cache_dir: str = "~/.cache/ldt/references"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 2:
            raise InputError(f"evaluate.images={self.images} must be at least 2; published scores use 50000")
        if _is_images(self.reference) and self.fit == "as_encoded":
            raise InputError(
                f"evaluate.reference={self.reference} needs evaluate.fit=crop or pad: how its images come to the "
                "size of the generated ones"
            )
        if not _is_images(self.reference) and self.fit != "as_encoded":
            raise InputError(f"evaluate.fit={self.fit} belongs to images given as evaluate.reference")


def _is_images(reference: str) -> bool:
    """Whether a reference is a set of images, rather than statistics, latent shards or the run's own data."""
    return bool(reference) and not reference.endswith(".npz") and not (Path(reference) / HEAD).exists()


@dataclass
class Config:
    """`run` is a run directory or a checkpoint; without it `run_dir` of a training config is meant.

    `watch` follows the run directory and scores each new checkpoint until the run is done.

    The other sections are those of a training config, so that the same file serves both; of them only `log.wandb` is
    read: the scores are then tracked too, as a run of their own beside the training's.
    """

    run: str = ""
    run_dir: str = ""
    watch: bool = False
    evaluate: EvaluateConfig = section(EvaluateConfig)
    seed: int = 0
    data: Section = field(default_factory=dict)
    model: Section = field(default_factory=dict)
    objective: Section = field(default_factory=dict)
    train: Section = field(default_factory=dict)
    engine: Section = field(default_factory=dict)
    optimizer: Section = field(default_factory=dict)
    ema: Section = field(default_factory=dict)
    checkpoint: Section = field(default_factory=dict)
    log: Section = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.run or self.run_dir):
            raise InputError("nothing to evaluate; give a run directory, a checkpoint, or a config with run_dir")


NOT_IN_RESULT = ("checkpoint", "reference", "fit", "output", "cache_dir", "weights_file", "model", "compile")
"""Keys that say where things are and how they are computed, not what."""


def run(config: Config) -> int:
    """Score the checkpoints asked for, all ranks together."""
    with process_group() as world:
        evaluate(config, world)
    return 0


def evaluate(config: Config, world: World) -> list[Section]:
    """`run` inside of a process group; rank 0 gets the results."""
    torch.backends.cudnn.allow_tf32 = False  # features are compared to many digits
    settings, run_dir = config.evaluate, Path(config.run or config.run_dir)
    detector = make_detector(settings.detector, world.device, settings.weights_file, settings.resize, settings.model)
    check(settings.metrics, detector)
    if config.watch:
        key = _short_hash({k: v for k, v in to_dict(settings).items() if k != "checkpoint"})
        paths = follow(run_dir, key, world)
    else:
        paths = iter(broadcast(select(run_dir, settings.checkpoint)))
    reference, results, tracking, start = None, [], None, time.time()
    with contextlib.ExitStack() as stack:
        for path in paths:
            loaded = load_denoiser(path, settings.weights, world.device)
            output = Path(settings.output) if settings.output else loaded.home / "evaluations.jsonl"
            if reference is None:  # all checkpoints of a run have the same
                reference = open_reference(settings, loaded, detector, world)
            result = score_once(settings, loaded, reference, detector, output, world)
            if world.rank != 0 or result is None:
                continue
            results.append(result)
            if config.log.get("wandb") and result["time"] >= start:
                if tracking is None:
                    tracker = log.Wandb(output.parent, to_dict(settings), "evaluation")
                    tracking = stack.enter_context(log.Tracking(tracker))
                tracking.log(result)
    return results


def select(path: Path, which: str) -> list[Path]:
    """The checkpoints meant by a run directory and `newest`, `all` or a number of samples; or the one that is given."""
    if (path / MANIFEST).exists() or (path / MODEL).exists():
        return [path]
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run directory or a checkpoint in it")
    if which == "newest":
        return [newest(path)]
    whole = [p for p in listed(path / "checkpoints") if (p / MANIFEST).exists()]
    chosen = whole if which == "all" else [p for p in whole if which.isdigit() and int(p.name) == int(which)]
    if not chosen:
        there = ", ".join(str(int(p.name)) for p in whole) or "none"
        raise InputError(f"evaluate.checkpoint={which} is not among the checkpoints of {path}: {there}")
    return chosen


def open_reference(config: EvaluateConfig, loaded: Loaded, detector: Detector, world: World) -> Reference:
    """Statistics of the real images to compare with."""
    path, fit = config.reference, config.fit
    if path.endswith(".npz"):
        return load_reference(Path(path), detector)
    if not _is_images(path):
        if not path and loaded.config["data"].get("sources"):
            raise InputError(
                "the run was trained on several data.sources; say with evaluate.reference which images to compare with"
            )
        shards = Path(path or loaded.config["data"]["path"])
        recipe = read_head(shards)["recipe"]
        if "images.path" not in recipe:
            raise InputError(
                f"the data in {shards} do not say which images they were encoded from; give evaluate.reference and "
                "evaluate.fit"
            )
        path, fit = recipe["images.path"], recipe["images.fit"]
    sampling = loaded.sampling
    cache_dir = Path(config.cache_dir).expanduser()
    return reference_of_images(path, sampling.image_size, sampling.image_channels, fit, detector, cache_dir, world)


def score_once(
    config: EvaluateConfig, loaded: Loaded, reference: Reference, detector: Detector, output: Path, world: World
) -> Section | None:
    """Score a checkpoint unless its result is there; rank 0 writes it, says where and returns it."""
    identity = {k: v for k, v in to_dict(config).items() if k not in NOT_IN_RESULT}
    identity |= {"detector_hash": detector.hash, "reference_hash": reference.hash}
    file = output.parent / "evaluations" / f"{loaded.samples_seen:012d}-{_short_hash(identity)}.json"
    result = broadcast(_read_result(file, loaded.hash) if world.rank == 0 else None)
    if result is None:
        start = time.time()
        store = FeatureStore(file.parent / f".{file.stem}-{loaded.hash[:8]}.work")
        blocks = make_features(config, loaded, detector, store, world)
        if world.rank != 0:
            return None
        scores, moments = compute(config.metrics, detector, store, blocks, reference, config.seed)
        assert moments.count == config.images, (moments.count, config.images)
        result = {
            "samples_seen": loaded.samples_seen,
            **scores,
            **identity,
            "rank_deficient": min(moments.count, reference.images or moments.count) <= moments.width,
            "reference_images": reference.images,
            "moments_hash": moments.hash,
            "checkpoint_hash": loaded.hash,
            "autoencoder_hash": loaded.sampling.autoencoder_hash,
            "world_size": world.size,
            "device": _device_name(world.device),
            "seconds": round(time.time() - start, 3),
            "time": time.time(),
            **versions(),
        }
        write_json(file, result)
        store.remove()
        _warn_of_few(result, detector)
    if world.rank == 0:
        derive_jsonl(output)
        shown = ", ".join(f"{k} {result[k]:.4f}" for k in result if k in score_names(detector))
        print(f"{shown} at {loaded.samples_seen} samples seen: {output}")
    return result


def make_features(config: EvaluateConfig, loaded: Loaded, detector: Detector, store: FeatureStore, world: World) -> int:
    """Put the features of images 0 to config.images − 1 into the store, all ranks together; returns how many blocks.

    The network always sees whole blocks: what a last one has too many is dropped. While it makes the next block, a
    thread looks at the last one.
    """
    model = image_model(loaded, config.precision, world.device, config.compile)
    blocks = -(-config.images // config.block)

    def detect(k: int, image_BHWC: torch.Tensor) -> None:
        wanted = config.images - k * config.block
        store.write(k, {name: value[:wanted] for name, value in detector(image_BHWC).arrays().items()})

    # on a CPU whose cores all have a process, a second thread only gets in the way
    overlap = world.device.type == "cuda" or len(os.sched_getaffinity(0)) > world.local_size
    missing = [k for k in range(world.rank, blocks, world.size) if not store.has(k)]
    with ThreadPoolExecutor(1) as thread, log.progress(config.images, "img", "evaluate", show=world.rank == 0) as bar:
        pending: Future[None] | None = None
        for k in missing:
            image_BHWC = sample_images(model, block_ids(k, config.block), config)
            if pending is not None:
                pending.result()
            pending = thread.submit(detect, k, image_BHWC)
            if not overlap:
                pending.result()
            bar.update(config.block * world.size)
        if pending is not None:
            pending.result()
    barrier()
    return blocks


def derive_jsonl(output: Path) -> None:
    """Rewrite evaluations.jsonl from the result files beside it, in the order of samples seen.

    Several evaluations may do so at once: whoever finds a new result after writing writes again.
    """
    directory, written = output.parent / "evaluations", None
    while written != (files := sorted(directory.glob("*.json"))):
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        results = [r for p in files if (r := _whole_result(p)) is not None]
        temporary.write_text("".join(json.dumps(r) + "\n" for r in results))
        temporary.replace(output)
        written = files


def _read_result(file: Path, checkpoint_hash: str) -> dict[str, Any] | None:
    """The result in a file, if it is of this very checkpoint."""
    result = _whole_result(file) if file.exists() else None
    if result is None:
        return None
    if result["checkpoint_hash"] != checkpoint_hash:
        logger.warning("%s is of another checkpoint with the same number of samples; it is made again", file)
        return None
    logger.info("already scored: %s", file)
    return result


def _whole_result(file: Path) -> dict[str, Any] | None:
    """What a result file says; None, with a word about it, if it is damaged."""
    try:
        result = parse_json(file.read_bytes())
        wrong = misfit(result, {"samples_seen": natural, "checkpoint_hash": str})
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong:
        logger.warning("%s is damaged (%s) and left out", file, wrong)
        return None
    return dict(result)


def _short_hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _warn_of_few(result: dict[str, Any], detector: Detector) -> None:
    if result["rank_deficient"] and detector.score in result:
        logger.warning(
            "%s of %d generated and %d real images is biased upwards: the detector has %d features and wants more "
            "images than that; compare only scores of equal numbers of images",
            detector.score,
            result["images"],
            result["reference_images"],
            detector.outputs["features"],
        )
