"""Train a denoiser on latent shards.

The loop's only clock is `samples_seen`: learning rate, averages, logs, samples, validation and checkpoints are
functions of it, so a run does not depend on how many processes carry it or how often it was restarted. Re-running the
same command resumes.
"""

import contextlib
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldt import ema as averaging
from ldt import log, rundir
from ldt.checkpoint import (
    Progress,
    Sampling,
    newest_whole,
    read_manifest,
    remove_old,
    resolve,
    restore,
    save,
    start_from,
)
from ldt.config import required, section, to_dict, to_yaml
from ldt.data.draws import Batch, digest_text
from ldt.data.loader import Loader, ValidationLoader
from ldt.data.shards import Manifest, open_shards, open_validation
from ldt.diffusion.objectives import Denoiser, Objective, ObjectiveConfig
from ldt.dist import World, all_gather, all_reduce_sum, barrier, process_group
from ldt.ema import EMAConfig
from ldt.engine import Engine, EngineConfig, OptimizerConfig, Step, learning_rate
from ldt.errors import InputError
from ldt.evaluate import EvaluateConfig
from ldt.nn.build import build, parameter_count
from ldt.nn.condition import Condition
from ldt.nn.config import ModelConfig
from ldt.pictures import class_grid, write_picture
from ldt.rundir import DONE, FAILED, STOPPED, WRONG_INPUT
from ldt.sample import ImageModel, labels_of, load_autoencoder, sample_images
from ldt.stop import StopRequests

logger = log.get_logger(__name__)

TIME_BINS = 10
PREVIEW_COLUMNS = 8


@dataclass
class DataConfig:
    """`path` holds shards and a manifest (`ldt encode`); `streams` and `window` shape the shuffle (docs/data.md).

    A remote `path` (`s3://…`) is read through `cache_dir` on each node, of at most `cache_gb` (10⁹ bytes).
    """

    path: str = required()
    cache_dir: str = ""
    cache_gb: float = 100.0
    streams: int = 16
    window: int = 65536
    threads: int = 2


@dataclass
class TrainConfig:
    """`micro_batch` is the most samples a rank sends through the network at once; 0 for all its share."""

    global_batch: int = 256
    total_samples: int = 1_000_000
    micro_batch: int = 0
    init_from: str = ""

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InputError(f"train.global_batch={self.global_batch} must be at least 1")
        if self.total_samples < self.global_batch:
            raise InputError(f"train.total_samples={self.total_samples} is less than one global batch")
        if self.micro_batch < 0:
            raise InputError(f"train.micro_batch={self.micro_batch} must be positive, or 0 for the rank's whole share")


@dataclass
class CheckpointConfig:
    """Save every so many samples (0: only at the end) and keep the newest ones."""

    every_samples: int = 0
    keep: int = 2


@dataclass
class LogConfig:
    """Everything in samples; 0 turns validation and sample grids off."""

    every_samples: int = 10_000
    validation_every_samples: int = 0
    samples_every_samples: int = 0
    wandb: bool = False


@dataclass
class Config:
    """A training run."""

    run_dir: str = required()
    seed: int = 0
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    train: TrainConfig = section(TrainConfig)
    engine: EngineConfig = section(EngineConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    ema: EMAConfig = section(EMAConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)


def run(config: Config) -> int:
    """Train until `train.total_samples` or until asked to stop; returns the exit code."""
    run_dir = Path(config.run_dir)
    with process_group() as world:
        try:
            code, message, seen = Trainer(config, world).train()
        except BaseException as error:
            code = WRONG_INPUT if isinstance(error, InputError) else FAILED
            if world.rank == 0 and run_dir.is_dir():
                rundir.write_outcome(run_dir, code, message=f"{type(error).__name__}: {error}")
            raise
        if world.rank == 0:
            rundir.write_outcome(run_dir, code, seen, message)
            print(f"{message} at {seen} samples: {run_dir}\nnext: ldt evaluate {run_dir}; ldt report {run_dir}")
    return code


class Trainer:
    """One attempt at a run: its parts, and the loop that drives them."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.run_dir = config, world, Path(config.run_dir)
        self.batch = config.train.global_batch
        self.shards = open_shards(config.data.path, config.data.cache_dir or None, config.data.cache_gb)
        self.sampling = sampling_of(self.shards.manifest)
        self.objective = Objective(config.objective)
        self.autoencoder = load_autoencoder(self.sampling, world.device) if config.log.samples_every_samples else None
        denoiser = build(config.model, self.sampling.latent_shape, len(self.sampling.classes), config.seed)
        self.parameters = parameter_count(denoiser)
        if world.rank == 0:
            rundir.prepare(self.run_dir, to_yaml(config), world.size)
        barrier()
        self.loader, self.validation = self._make_loaders()
        self.engine = Engine(denoiser, config.engine, config.optimizer, world, self.loader.micro_batches)
        self.ema = [f.master.clone() for f in self.engine.partition.owned]
        self.progress = self._restore()
        self.metrics = self.run_dir / "metrics.jsonl"
        self.wandb = log.Wandb(self.run_dir, to_dict(config), config.log.wandb and world.rank == 0)
        self.meter = Meter()

    def train(self) -> tuple[int, str, int]:
        """Run to the end, or to a request to stop: exit code, what happened, samples seen."""
        config, total, stopping = self.config, self.config.train.total_samples, ""
        self._say_what_runs()
        bar = log.progress(total, "img", "train", self.progress.samples_seen, self.world.rank == 0)
        with StopRequests() as stop, self.loader, self.validation or contextlib.nullcontext(), self.wandb, bar:
            for step in self.loader.steps(self.progress.samples_seen):
                before = self.progress.samples_seen
                if before >= total or stopping:
                    break
                seen = self.progress.samples_seen = before + self.batch
                lr = learning_rate(config.optimizer, seen, total)
                result = self.engine.step(step.micro_batches, self.weighted_loss, lr, self.batch)
                averaging.update(self.ema, self._masters(), averaging.decay(config.ema, seen, self.batch))
                digest, stopping = self._agree(step.digest, stop.received)
                self.meter.add(self.batch, step.waited)

                last = seen >= total
                if due(config.log.every_samples, before, seen, last):
                    self._log_step(result, lr, digest)
                if due(config.log.validation_every_samples, before, seen, last):
                    self._log_validation()
                if due(config.log.samples_every_samples, before, seen, last):
                    self._draw_samples()
                if due(config.checkpoint.every_samples, before, seen) or last or stopping:
                    self._save()
                bar.update(self.batch)
                bar.set_postfix_str(f"loss {result.loss:.4f}", refresh=False)
        if self.progress.samples_seen < total:
            return STOPPED, f"stopped on request ({stopping})", self.progress.samples_seen
        return DONE, "trained to the end", self.progress.samples_seen

    def weighted_loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Sum of the samples' losses, padding left out: a scalar."""
        return (self._loss_B(denoiser, batch) * batch.weight_B).sum()

    def _loss_B(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        t_B = self.objective.timesteps(batch.uniform_B)
        condition = Condition(label_B=batch.label_B)
        return self.objective.loss(denoiser, batch.latent_BCHW, batch.noise_BCHW, t_B, condition)

    def _masters(self) -> list[Tensor]:
        return [f.master for f in self.engine.partition.owned]

    def _agree(self, digest: int, request: str) -> tuple[str, str]:
        """Over all ranks: the step's digest, and whether anybody was asked to stop."""
        shared = torch.tensor([digest, int(bool(request))], dtype=torch.int64, device=self.world.device)
        total, requests = all_reduce_sum(shared).tolist()
        return digest_text(total), (request or "by another rank") if requests else ""

    # ------------------------------------------------------------------------------------------- start and resumption

    def _make_loaders(self) -> tuple[Loader, ValidationLoader | None]:
        config, world = self.config, self.world
        loader = Loader(
            self.shards,
            batch=self.batch,
            seed=config.seed,
            streams=config.data.streams,
            window=config.data.window,
            rank=world.rank,
            ranks=world.size,
            micro_batch=config.train.micro_batch,
            label_drop=config.objective.condition_drop,
            device=world.device,
            threads=config.data.threads,
        )
        if not config.log.validation_every_samples:
            return loader, None
        held_out = open_validation(config.data.path)
        if held_out is None:
            raise InputError(
                f"data.path={config.data.path} has no held-out split for log.validation_every_samples; "
                "encode with validation_fraction, or set log.validation_every_samples=0"
            )
        validation = ValidationLoader(
            open_shards(held_out, config.data.cache_dir or None, config.data.cache_gb),
            seed=config.seed,
            micro_batch=loader.share.size,
            rank=world.rank,
            ranks=world.size,
            device=world.device,
        )
        return loader, validation

    def _restore(self) -> Progress:
        """Go on from the newest whole checkpoint of the run directory, or start."""
        fingerprint = self.shards.manifest.fingerprint
        found = newest_whole(self.run_dir / "checkpoints", self.world)
        if found is None:
            if self.config.train.init_from:
                start_from(resolve(Path(self.config.train.init_from)), self.engine.partition, self.ema)
            return Progress(samples_seen=0, data_fingerprint=fingerprint, skipped=[], attempt=0)
        rundir.check_identity(read_manifest(found)["config"], to_dict(self.config), found)
        progress = restore(found, self.engine.partition, self.ema)
        if progress.data_fingerprint != fingerprint:
            raise InputError(
                f"data.path={self.config.data.path} holds other data (fingerprint {fingerprint[:12]}) than those that "
                f"{found} was trained on ({progress.data_fingerprint[:12]}); restore them, or choose another run_dir"
            )
        if self.world.rank == 0:
            cut = log.keep_jsonl_until(self.run_dir / "metrics.jsonl", "samples_seen", progress.samples_seen)
            logger.info(
                "resuming at %d samples from %s; %d later log lines set aside", progress.samples_seen, found, cut
            )
        barrier()
        progress.attempt += 1
        return progress

    def _say_what_runs(self) -> None:
        share, config = self.loader.share, self.config
        logger.info(
            "model %s, %.2f M parameters; data %d samples in %d classes, %s latents",
            config.model.conditioning,
            self.parameters / 1e6,
            self.shards.manifest.samples,
            len(self.sampling.classes),
            "x".join(map(str, self.sampling.latent_shape)),
        )
        logger.info(
            "world %d (%s), ZeRO-%d %s; global batch %d = %d ranks x %d micro-batches x %d; %d of %d samples to go",
            self.world.size,
            self.world.device.type,
            config.engine.zero_stage,
            config.engine.precision,
            self.batch,
            self.world.size,
            share.count,
            share.size,
            max(config.train.total_samples - self.progress.samples_seen, 0),
            config.train.total_samples,
        )

    # -------------------------------------------------------------------------------------------- what the loop writes

    def _log_step(self, result: Step, lr: float, digest: str) -> None:
        rate, wait_fraction = self.meter.read()
        record = {
            "samples_seen": self.progress.samples_seen,
            "loss": float(np.float32(result.loss)),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "images_per_second": rate,
            "world_size": self.world.size,
            "data_wait_fraction": wait_fraction,
            "time": time.time(),
            "attempt": self.progress.attempt,
            "digest": digest,
            "peak_memory": peak_memory(self.world.device),
        }
        self._write(record)

    def _log_validation(self) -> None:
        """Loss of the averaged weights on the held-out samples, over all times and by tenths of t (collective)."""
        assert self.validation is not None
        sums = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=self.world.device)
        with self.engine.partition.swapped(self.ema), torch.no_grad():
            for batch in self.validation.batches():
                loss_B = self._loss_B(self.engine.module, batch).double() * batch.weight_B
                bin_B = (self.objective.timesteps(batch.uniform_B) * TIME_BINS).long().clamp(max=TIME_BINS - 1)
                sums[0].index_add_(0, bin_B, loss_B)
                sums[1].index_add_(0, bin_B, batch.weight_B.double())
        loss, count = all_reduce_sum(sums).cpu()
        record: dict[str, Any] = {
            "samples_seen": self.progress.samples_seen,
            "validation_loss": float(loss.sum() / count.sum()),
            "validation_loss_by_time": [float(x / n) if n else None for x, n in zip(loss, count, strict=True)],
            "time": time.time(),
            "attempt": self.progress.attempt,
        }
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self.world.rank == 0:
            log.append_jsonl(self.metrics, record)
            self.wandb.log(record)

    def _draw_samples(self) -> None:
        """A grid of the averaged weights' samples, always of the same noise and labels (collective)."""
        assert self.autoencoder is not None
        settings = self.config.evaluate
        classes = len(self.sampling.classes)
        images = min(10, classes) * PREVIEW_COLUMNS
        mine = -(-images // self.world.size)  # the same number on every rank: ZeRO-3 gathers weights together
        model = ImageModel(self.engine.module, self.objective, self.sampling, self.autoencoder, self.world.device)
        with self.engine.partition.swapped(self.ema):
            drawn = sample_images(model, range(self.world.rank * mine, (self.world.rank + 1) * mine), settings)
        blocks = all_gather(drawn.numpy())
        if self.world.rank == 0:
            label_N = labels_of(range(images), classes, settings)
            path = self.run_dir / "samples" / f"{self.progress.samples_seen:012d}.png"
            path.parent.mkdir(exist_ok=True)
            write_picture(path, class_grid(np.concatenate(blocks)[:images], label_N))

    def _save(self) -> None:
        root = self.run_dir / "checkpoints"
        save(root, self.engine.partition, self.ema, self.progress, self.sampling, to_dict(self.config), self.world)
        if self.world.rank == 0:
            remove_old(root, self.config.checkpoint.keep)


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


def due(every: int, before: int, after: int, last: bool = False) -> bool:
    """Whether a multiple of `every` lies in (before, after], or it is the last step; never if `every` is 0."""
    return every > 0 and (last or after // every > before // every)


def sampling_of(manifest: Manifest) -> Sampling:
    """What a checkpoint must know of the data to make images without them."""
    return Sampling(
        latent_shape=manifest.latent_shape,
        classes=list(manifest.classes),
        mean_C=manifest.mean_C.tolist(),
        std_C=manifest.std_C.tolist(),
        autoencoder=manifest.autoencoder,
        autoencoder_hash=manifest.autoencoder_hash,
        image_size=manifest.image_size,
        image_channels=manifest.image_channels,
    )


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held, in bytes: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
