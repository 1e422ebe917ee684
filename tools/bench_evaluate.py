"""An evaluation's images a second against what its parts cost alone: all three measured in turn, in one run."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ldt.checkpoint.load import load_denoiser
from ldt.config import from_dict
from ldt.dist import World, all_gather, barrier, broadcast, process_group
from ldt.evaluation.config import EvaluateConfig
from ldt.evaluation.parts import Part, blocks_of
from ldt.evaluation.scorer import make_features
from ldt.metrics.detectors import Detector, make_detector
from ldt.metrics.feature_store import FeatureStore
from ldt.sampling.draw import ImageModel, block_ids, image_model, sample_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="a run with a checkpoint and an evaluate section")
    parser.add_argument("--blocks", type=int, default=4, help="blocks a process and repetition")
    parser.add_argument("--repeat", type=int, default=3)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Median seconds an image of the sampler, the detector and the whole; on rank 0."""
    with process_group() as world:
        loaded = load_denoiser(arguments.run_dir, device=world.device)
        config = from_dict(EvaluateConfig, loaded.config.get("evaluate", {}))
        config.images = images = arguments.blocks * world.size * config.block
        blocks = blocks_of([Part("", images)], config.block)
        model, detector = (
            image_model(loaded, config.precision, world.device),
            make_detector(config.detector, world.device),
        )

        def whole() -> None:
            directory = broadcast(tempfile.mkdtemp() if world.rank == 0 else "")
            make_features(config, blocks, {"": model}, detector, store := FeatureStore(Path(directory)), world)
            barrier()
            if world.rank == 0:
                store.remove()

        parts = {
            "sampler": lambda: sample(model, config, world),
            "detector": lambda: detect(detector, config, world),
            "whole": whole,
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(arguments.repeat + 1):
            for name, part in parts.items():  # in turn, so that a busy machine slows all of them
                seconds[name].append(max(all_gather(timed(part, world))))
        if world.rank != 0:
            return None
        each = {name: statistics.median(values[1:]) / images for name, values in seconds.items()}
        return {
            "processes": world.size,
            "images": images,
            "sampler_images_per_second": 1 / each["sampler"],
            "detector_images_per_second": 1 / each["detector"],
            "images_per_second": 1 / each["whole"],
            "overhead": each["whole"] / (each["sampler"] + each["detector"]) - 1,
            "minutes_for_50k": 50_000 * each["whole"] / 60,
        }


def sample(model: ImageModel, config: EvaluateConfig, world: World) -> None:
    """This rank's blocks through the sampler and the decoder."""
    for k in range(world.rank, config.images // config.block, world.size):
        sample_images(model, block_ids(k, config.block), config)


def detect(detector: Detector, config: EvaluateConfig, world: World) -> None:
    """As many blocks of images through the detector."""
    image_BHWC = torch.zeros(config.block, 32, 32, 1, dtype=torch.uint8)
    for _ in range(world.rank, config.images // config.block, world.size):
        detector(image_BHWC).arrays()


def timed(work: Any, world: World) -> float:
    """Seconds of one call, from a common start."""
    barrier()
    start = time.perf_counter()
    work()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - start
