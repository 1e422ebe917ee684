"""What a run measures of itself besides its training loss."""

import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldt.data.batch import Batch
from ldt.data.latent_spec import LatentSpec
from ldt.data.loader import BucketValidation, ValidationLoader
from ldt.diffusion.condition import Condition
from ldt.diffusion.fixed_times import FixedTimes
from ldt.diffusion.objectives import Denoiser, Objective
from ldt.dist import World, all_gather, all_reduce_sum, on_rank_zero
from ldt.image_files import class_grid, stacked, write_cells, write_picture
from ldt.models.text_encoder import KnownCaptions, TextEncoder, reload_text_encoder
from ldt.run.directory import NEWEST_CELLS, SAMPLES
from ldt.sampling.config import ImageConfig
from ldt.sampling.draw import ImageModel, default_labels, examples_of, sample_images

TIME_BINS = 10
PREVIEW_COLUMNS = 8


def validation_loss(
    validation: ValidationLoader | BucketValidation,
    objective: Objective,
    loss: Callable[[Batch], Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Loss on the held-out samples, over all times, by tenths of t and by bucket (collective).

    loss: of each sample, [B].
    """
    parts = validation.parts
    sums = torch.zeros(2, len(parts), TIME_BINS, dtype=torch.float64, device=device)
    with torch.no_grad():
        for p, part in enumerate(parts.values()):
            for batch in part.batches():
                loss_B = loss(batch).double() * batch.weight_B
                t_B = objective.at(batch.latent_BCHW.shape[1:]).timesteps(batch.uniform_B)
                bin_B = (t_B * TIME_BINS).long().clamp(max=TIME_BINS - 1)
                sums[0, p].index_add_(0, bin_B, loss_B)
                sums[1, p].index_add_(0, bin_B, batch.weight_B.double())
    total_PT, count_PT = all_reduce_sum(sums).cpu()
    by_time = zip(total_PT.sum(0), count_PT.sum(0), strict=True)
    out: dict[str, Any] = {
        "validation_loss": float(total_PT.sum() / count_PT.sum()),
        "validation_loss_by_time": [float(x / n) if n else None for x, n in by_time],
    }
    if "" not in parts:
        out["validation_loss_by_bucket"] = _by_bucket(parts, total_PT, count_PT)
    return out


def fixed_time_loss(
    validation: ValidationLoader | BucketValidation,
    times: FixedTimes,
    denoiser_of: Callable[[Batch], Denoiser],
    device: torch.device,
) -> dict[str, Any]:
    """The velocity's loss on as many held-out samples of each fixed time, and by bucket (collective).

    denoiser_of: what predicts the batch's latents.
    """
    parts = validation.parts
    samples = sum(part.shards.manifest.samples for part in parts.values())
    counted = samples // times.count * times.count
    sums = torch.zeros(2, len(parts), times.count, dtype=torch.float64, device=device)
    with torch.no_grad():
        for p, part in enumerate(parts.values()):
            for batch in part.batches():
                condition = Condition(label_B=batch.label_B, text=batch.text)
                number_B = batch.index_B
                loss_B = times.loss(denoiser_of(batch), batch.latent_BCHW, batch.noise_BCHW, number_B, condition)
                counts_B = (number_B >= 0) & (number_B < counted)
                time_B = number_B.clamp(min=0) % times.count
                sums[0, p].index_add_(0, time_B, torch.where(counts_B, loss_B.double(), 0.0))
                sums[1, p].index_add_(0, time_B, counts_B.double())
    total_PK, count_PK = all_reduce_sum(sums).cpu()
    mean_K = (total_PK.sum(0) / (counted // times.count)).tolist()
    out: dict[str, Any] = {
        "validation_loss": float(np.mean(mean_K)),
        "validation_loss_by_time": mean_K,
        "validation_times": times.count,
    }
    if "" not in parts:
        out["validation_loss_by_bucket"] = _by_bucket(parts, total_PK, count_PK)
    return out


def _by_bucket(names: Iterable[str], total_PT: Tensor, count_PT: Tensor) -> dict[str, float]:
    """The mean over all times of each bucket that has samples."""
    by_part = zip(names, total_PT.sum(1).tolist(), count_PT.sum(1).tolist(), strict=True)
    return {name: total / count for name, total, count in by_part if count}


def preview_images(spec: LatentSpec) -> int:
    """How many images a preview shows, of each bucket where there are several: fewer, and at least a row."""
    rows = min(10, len(spec.classes))
    return max(1, rows // len(spec.shapes)) * PREVIEW_COLUMNS


def preview_text(spec: LatentSpec, uses_text: bool, world: World) -> TextEncoder | None:
    """The captions of all previews, encoded by rank 0, which frees their encoder afterwards (collective)."""
    if not uses_text:
        return None
    examples = examples_of(spec)
    images = preview_images(spec) + world.size  # with those that only fill the ranks' parts
    captions = [examples[i % len(examples)][1] for i in range(images)]

    def encode() -> TextEncoder:
        return KnownCaptions(reload_text_encoder(spec.text, world.device), captions)

    known = on_rank_zero(world, encode)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # the memory fit comes next
    return known


def draw_preview(model: ImageModel, settings: ImageConfig, world: World, run_dir: Path, samples_seen: int) -> None:
    """Write a grid of samples, always of the same noise and labels, and its images beside it (collective).

    Of data in buckets the picture has a grid of each, below each other, and the images are those of the largest.
    """
    images = preview_images(model.spec)
    mine = -(-images // world.size)  # the same number on every rank: ZeRO-3 gathers weights together
    ids, label_N = range(world.rank * mine, (world.rank + 1) * mine), default_labels(model, range(images), settings)
    grids = []
    for shape in model.spec.shapes.values():
        blocks = all_gather(sample_images(model.at(shape), ids, settings).numpy())
        if world.rank != 0:
            continue
        image_NHWC = np.concatenate(blocks)[:images]
        grids.append(class_grid(image_NHWC, label_N))
        if shape == model.spec.latent_shape:
            (run_dir / SAMPLES).mkdir(exist_ok=True)
            write_cells(run_dir / NEWEST_CELLS, image_NHWC, label_N, samples_seen)
    if world.rank == 0:
        write_picture(run_dir / SAMPLES / f"{samples_seen:012d}.png", stacked(grids))


class Meter:
    """Images a second and the share of time spent waiting for data, since it was last read."""

    def __init__(self) -> None:
        self._since, self._samples, self._waited = time.perf_counter(), 0, 0.0

    def add(self, samples: int, waited: float) -> None:
        self._samples += samples
        self._waited += waited

    def read(self) -> tuple[float, float]:
        elapsed = time.perf_counter() - self._since
        out = self._samples / elapsed, self._waited / elapsed
        self.__init__()  # type: ignore[misc]
        return out


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held, in bytes: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
