"""Train a denoiser on latent shards.

The loop's only clock is `samples_seen`: learning rate, averages, logs, samples, validation and checkpoints are
functions of it, so a run does not depend on how many processes carry it or how often it was restarted. Re-running the
same command resumes.
"""

import contextlib
import math
import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldt import ema as averaging
from ldt import log, rundir
from ldt.bad_steps import REMEDY, BadSteps
from ldt.checkpoint import (
    Content,
    Progress,
    Retention,
    Sampling,
    Writer,
    newest_whole,
    read_manifest,
    restore,
    start_from,
)
from ldt.checkpoint.writer import remove_leftovers
from ldt.config import from_dict, required, section, to_dict, to_yaml
from ldt.data.draws import Batch, digest_text
from ldt.data.loader import Loader, ValidationLoader
from ldt.data.loader import Step as LoadedStep
from ldt.data.shards import Manifest, open_shards, open_validation
from ldt.diffusion.objectives import Denoiser, Objective, ObjectiveConfig
from ldt.dist import World, all_gather, all_reduce_sum, barrier, process_group
from ldt.ema import EMAConfig
from ldt.engine import Engine, EngineConfig, OptimizerConfig, Step, learning_rate
from ldt.errors import InputError, RunError
from ldt.evaluate import EvaluateConfig
from ldt.nn.build import build, parameter_count
from ldt.nn.condition import Condition
from ldt.nn.config import ModelConfig
from ldt.owner import Owner, owned
from ldt.partition import MOMENTS
from ldt.pictures import class_grid, write_picture
from ldt.rundir import DONE, FAILED, STOPPED, WRONG_INPUT
from ldt.sample import ImageModel, labels_of, load_autoencoder, sample_images
from ldt.stop import StopRequests
from ldt.watchdog import Watchdog

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
    """`micro_batch` is the most samples a rank sends through the network at once; 0 for all its share.

    A step whose loss or gradient is not finite is skipped, with `spike_factor` also one whose loss lies that many
    robust standard deviations above the recent median; `bad_steps` of them in a row roll the run back once.
    `time_limit_minutes`: stop with a checkpoint then, to be started again. `accept_changes`: keys of the config that
    may differ from the run's checkpoint though they define it.
    """

    global_batch: int = 256
    total_samples: int = 1_000_000
    micro_batch: int = 0
    init_from: str = ""
    bad_steps: int = 3
    spike_factor: float = 0.0
    time_limit_minutes: float = 0.0
    accept_changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InputError(f"train.global_batch={self.global_batch} must be at least 1")
        if self.total_samples < self.global_batch:
            raise InputError(f"train.total_samples={self.total_samples} is less than one global batch")
        if self.micro_batch < 0:
            raise InputError(f"train.micro_batch={self.micro_batch} must be positive, or 0 for the rank's whole share")
        if self.bad_steps < 1:
            raise InputError(f"train.bad_steps={self.bad_steps} must be at least 1")
        if self.spike_factor < 0:
            raise InputError(f"train.spike_factor={self.spike_factor} must be positive, such as 20, or 0 for off")
        if self.time_limit_minutes < 0:
            raise InputError(f"train.time_limit_minutes={self.time_limit_minutes} must be positive, or 0 for none")


@dataclass
class CheckpointConfig:
    """Save every so many samples (0: only at the end); keep the newest ones and one every `keep_every_samples`."""

    every_samples: int = 0
    keep: int = 2
    keep_every_samples: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise InputError(f"checkpoint.keep={self.keep} must be at least 1")


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
    with process_group() as world, owned(run_dir, world) as owner:
        try:
            code, message, seen = Trainer(config, world, owner).train()
        except BaseException as error:
            code = WRONG_INPUT if isinstance(error, InputError) else FAILED
            if world.rank == 0 and run_dir.is_dir():
                rundir.write_outcome(run_dir, code, message=f"{type(error).__name__}: {error}")
            raise
        if world.rank == 0:
            rundir.write_outcome(run_dir, code, seen, message)
            print(f"{message} at {seen} samples: {run_dir}\nnext: ldt evaluate {run_dir}; ldt report {run_dir}")
    return code


def attempt(config: Config, world: World) -> tuple[int, str, int]:
    """One attempt inside of a process group: exit code, what happened, samples seen."""
    with owned(Path(config.run_dir), world) as owner:
        return Trainer(config, world, owner).train()


class Trainer:
    """One attempt at a run: its parts, and the loop that drives them."""

    def __init__(self, config: Config, world: World, owner: Owner) -> None:
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
            for root in (self.run_dir / "checkpoints", self.run_dir / "ema"):
                remove_leftovers(root)
        barrier()
        self.loader, self.validation = self._make_loaders()
        self.engine = Engine(denoiser, config.engine, config.optimizer, world, self.loader.micro_batches)
        self.profiles = averaging.profiles(config.ema)
        self.averages = {name: [m.clone() for m in self._masters()] for name in self.profiles}
        self.writer = Writer(self.engine.partition, world, owner.check)
        self.progress = self._restore()
        self.guard = BadSteps(config.train.bad_steps, config.train.spike_factor)
        self.metrics = self.run_dir / "metrics.jsonl"
        self.wandb = log.Wandb(self.run_dir, to_dict(config), config.log.wandb and world.rank == 0)
        self.meter = Meter()

    def train(self) -> tuple[int, str, int]:
        """Run to the end, or to a request to stop: exit code, what happened, samples seen."""
        config, total, request = self.config, self.config.train.total_samples, ""
        self._say_what_runs()
        bar = log.progress(total, "img", "train", self.progress.samples_seen, self.world.rank == 0)
        watchdog = Watchdog(self.run_dir / "stalls", config.engine.stall_seconds, self.world, self._stalled)
        with (
            StopRequests(60 * config.train.time_limit_minutes) as stop,
            watchdog,
            self.writer,
            self.loader,
            self.validation or contextlib.nullcontext(),
            self.wandb,
            bar,
        ):
            while self.progress.samples_seen < total and not request:
                request = self._run_until_bad(stop, watchdog, bar)
            watchdog.at("writing the last checkpoint")
            self.writer.finish()
        if self.writer.problem:
            raise RunError(f"{self.writer.problem}; make room and start the same command again")
        if self.progress.samples_seen < total:
            return STOPPED, f"stopped on request ({request})", self.progress.samples_seen
        return DONE, "trained to the end", self.progress.samples_seen

    def _run_until_bad(self, stop: StopRequests, watchdog: Watchdog, bar: tqdm) -> str:
        """Steps until the end or a request to stop, which is returned; or until bad steps have rolled the run back."""
        config, total = self.config, self.config.train.total_samples
        watchdog.at(f"loading the data of the step at {self.progress.samples_seen} samples")
        for step in self.loader.steps(self.progress.samples_seen):
            watchdog.at(f"the step at {self.progress.samples_seen} samples")
            before, seen = self.progress.samples_seen, self.progress.samples_seen + self.batch
            lr = learning_rate(config.optimizer, seen, total)
            result, digest, request = self._step(step, lr, stop.received)
            self.progress.samples_seen = seen
            for name, profile in self.profiles.items():
                averaging.update(self.averages[name], self._masters(), profile.decay(seen, self.batch))
            self.meter.add(self.batch, step.waited)
            if result.applied:
                self.guard.passed(result.loss, self.progress.recent_losses)
            elif self._skip(step, result, digest):
                return ""

            last = seen >= total
            if due(config.log.every_samples, before, seen, last) and result.applied:
                self._log_step(result, lr, digest)
            if due(config.log.validation_every_samples, before, seen, last):
                self._log_validation()
            if due(config.log.samples_every_samples, before, seen, last):
                watchdog.at("drawing samples")
                self._draw_samples()
            snapshot = due(config.ema.snapshot_every_samples, before, seen, last)
            if due(config.checkpoint.every_samples, before, seen) or last or request:
                watchdog.at("copying a checkpoint")
                self._save(checkpoint=True, snapshot=snapshot)
            elif snapshot:
                self._save(checkpoint=False, snapshot=True)
            bar.update(self.batch)
            bar.set_postfix_str(f"loss {result.loss:.4f}", refresh=False)
            if last or request:
                return request
            watchdog.at(f"loading the data of the step at {seen} samples")
        raise AssertionError("the loader's steps never end")

    def _step(self, step: LoadedStep, lr: float, request: str) -> tuple[Step, str, str]:
        """The optimizer's step, the digest of what it saw, and why to stop after it; agreed on by all ranks."""
        digest = step.digest % 2**64
        over, failed = self.writer.vote()
        also = (digest >> 32, digest % 2**32, bool(request), over, failed, bool(self.writer.refused))
        limit = -math.inf if step.first in self.guard.avoid else self.guard.loss_limit(self.progress.recent_losses)
        result = self.engine.step(step.micro_batches, self.weighted_loss, lr, self.batch, limit, also)
        high, low, requests, over, failed, refused = map(int, result.sums)
        self.writer.settle(over, failed)
        if refused:
            raise RunError(self.writer.refused or "another job has taken the run directory over")
        return result, digest_text((high << 32) + low), (request or "by another rank") if requests else ""

    def _skip(self, step: LoadedStep, result: Step, digest: str) -> bool:
        """Note a step that changed no weights; true if there were too many in a row and the run was rolled back."""
        self.progress.skipped.append(step.first)
        reason = self.guard.judge(step.first, result)
        record = {
            "samples_seen": self.progress.samples_seen,
            "skipped_first": step.first,
            "skipped_last": step.first + self.batch - 1,
            "reason": reason,
            "skipped_loss": result.loss if math.isfinite(result.loss) else None,
            "skipped_grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "digest": digest,
            "time": time.time(),
            "attempt": self.progress.attempt,
        }
        self._write(record)
        logger.warning("skipped positions %d to %d: %s", step.first, step.first + self.batch - 1, reason)
        if not self.guard.exhausted:
            return False
        self._roll_back()
        return True

    def _roll_back(self) -> None:
        """Return to the newest checkpoint and pass over the positions of the bad steps (collective)."""
        self.writer.finish()
        positions = self.guard.give_way(self.batch)
        if newest_whole(self.run_dir / "checkpoints", self.world) is None:
            raise RunError(f"{positions}, before there was a checkpoint to return to; {REMEDY}")
        logger.warning("%s; rolling back to the newest checkpoint and passing over them", positions)
        self.progress = self._restore()

    def _stalled(self, summary: str) -> None:
        rundir.write_outcome(self.run_dir, FAILED, self.progress.samples_seen, summary)

    def weighted_loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Sum of the samples' losses, padding left out: a scalar."""
        return (self._loss_B(denoiser, batch) * batch.weight_B).sum()

    def _loss_B(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        t_B = self.objective.timesteps(batch.uniform_B)
        condition = Condition(label_B=batch.label_B)
        return self.objective.loss(denoiser, batch.latent_BCHW, batch.noise_BCHW, t_B, condition)

    def _masters(self) -> list[Tensor]:
        return [f.master for f in self.engine.partition.owned]

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
                start_from(Path(self.config.train.init_from), self.engine.partition, self.averages)
            return Progress(samples_seen=0, data_fingerprint=fingerprint)
        saved = to_dict(
            from_dict(Config, read_manifest(found)["config"])
        )  # keys that are new since take their defaults
        rundir.check_identity(saved, to_dict(self.config), found, self.config.train.accept_changes)
        progress = restore(found, self.engine.partition, self.averages)
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
        with self.engine.partition.swapped(self.averages["ema"]), torch.no_grad():
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
        with self.engine.partition.swapped(self.averages["ema"]):
            drawn = sample_images(model, range(self.world.rank * mine, (self.world.rank + 1) * mine), settings)
        blocks = all_gather(drawn.numpy())
        if self.world.rank == 0:
            label_N = labels_of(range(images), classes, settings)
            path = self.run_dir / "samples" / f"{self.progress.samples_seen:012d}.png"
            path.parent.mkdir(exist_ok=True)
            write_picture(path, class_grid(np.concatenate(blocks)[:images], label_N))

    def _save(self, checkpoint: bool, snapshot: bool) -> None:
        """Start to write the whole state, and the averages alone where they are to be kept (collective)."""
        partition, config = self.engine.partition, self.config
        contents = []
        if checkpoint:
            moments = [partition.moments(f) for f in partition.owned]
            kinds = {"master": self._masters()} | {kind: [m[kind] for m in moments] for kind in MOMENTS}
            retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every_samples)
            contents.append(Content(self.run_dir / "checkpoints", kinds | self.averages, retention))
        if snapshot:
            contents.append(Content(self.run_dir / "ema", self.averages))
        facts = {
            "progress": asdict(self.progress),
            "sampling": asdict(self.sampling),
            "config": to_dict(config),
            "averages": {name: profile.describe() for name, profile in self.profiles.items()},
        }
        self.writer.begin(contents, facts)


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
