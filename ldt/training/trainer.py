"""Train a denoiser on latent shards.

The loop's only clock is `samples_seen`: learning rate, averages, logs, samples, validation and checkpoints are
functions of it, so a run does not depend on how many processes carry it or how often it was restarted. Re-running the
same command resumes.
"""

import contextlib
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldt import log, tracking
from ldt.checkpoint.manifest import TrainState, read_manifest
from ldt.checkpoint.restore import newest_whole, restore, set_aside, start_from
from ldt.checkpoint.writer import Content, Retention, Writer, remove_leftovers
from ldt.config import from_dict, to_dict, to_yaml
from ldt.data.batch import Batch, digest_text
from ldt.data.loader import StepInputs
from ldt.diffusion.condition import Condition
from ldt.diffusion.objectives import Denoiser, Objective
from ldt.dist import World, on_rank_zero
from ldt.engine import ema as averaging
from ldt.engine.engine import Engine, StepResult, learning_rate
from ldt.engine.partition import MOMENTS
from ldt.errors import InputError, RunError, in_a_sentence
from ldt.nn.attention import choose_kernel
from ldt.nn.build import build, parameter_count
from ldt.progress import ProgressLine, pluralize
from ldt.run import directory, identity, outcome
from ldt.run.outcome import DONE, FAILED, STOPPED, WRONG_INPUT
from ldt.run.owner import Owner, owned
from ldt.run.preflight import check_room, check_shared, check_writable
from ldt.run.stop import StopRequests
from ldt.run.watchdog import Watchdog
from ldt.sampling.draw import ImageModel, load_autoencoder, load_text
from ldt.training.bad_steps import REMEDY, BadSteps
from ldt.training.config import TrainJob
from ldt.training.data import open_data, other_data
from ldt.training.monitor import Meter, draw_preview, peak_memory, validation_loss
from ldt.training.setup import describe, fit_into_memory, make_loaders

logger = log.get_logger(__name__)


def attempt(config: TrainJob, world: World) -> tuple[int, str, int]:
    """One attempt inside of a process group: exit code, what happened, samples seen. outcome.json says the same."""
    run_dir = Path(config.run_dir)
    with owned(run_dir, world) as owner:
        before, trainer = outcome.begin(run_dir) if world.rank == 0 else None, None
        try:
            with in_a_sentence():
                check_shared(run_dir, world)
                check_writable(run_dir, world)
                trainer = Trainer(config, world, owner)
                code, message, seen = trainer.train()
        except BaseException as error:
            if trainer is None and isinstance(error, InputError):  # refused: the run stays as it was
                if world.rank == 0:
                    outcome.take_back(run_dir, before)
                raise
            code = WRONG_INPUT if isinstance(error, InputError) else FAILED
            words = str(error) if isinstance(error, InputError | RunError) else f"{type(error).__name__}: {error}"
            outcome.write_outcome(run_dir, code, message=words)
            raise
        if world.rank == 0:
            outcome.write_outcome(run_dir, code, seen, message)
    return code, message, seen


class Trainer:
    """One attempt at a run: its parts, and the loop that drives them.

    Until everything is checked, and the attempt with it accepted, nothing in the run directory changes.
    """

    def __init__(self, config: TrainJob, world: World, owner: Owner) -> None:
        self.config, self.world, self.run_dir = config, world, Path(config.run_dir)
        self.batch, self.total = config.train.global_batch, config.train.total_samples
        if config.log.tensorboard:
            tracking.require_tensorboard()
        self.shards = open_data(config.data, world)
        self.spec = self.shards.manifest.spec
        self.objective = Objective(config.objective)
        self.autoencoder = load_autoencoder(self.spec, world.device) if config.log.samples_every_samples else None
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self.kernel = choose_kernel(config.model.attention, world.device, dtype)
        shape, classes, text = self.spec.latent_shape, len(self.spec.classes), self.spec.text_shape
        denoiser = build(config.model, shape, classes, config.seed, text)
        self.parameters = parameter_count(denoiser)
        self.profiles = averaging.profiles(config.ema)
        micro_batch = fit_into_memory(denoiser, config, self.spec, len(self.profiles), world)
        if world.rank == 0:
            for root in (self.run_dir / "checkpoints", self.run_dir / "ema"):
                remove_leftovers(root)
        check_room(self.run_dir, self.parameters, 3 + len(self.profiles), world)
        self.loader, self.validation = make_loaders(config, self.shards, micro_batch, world)
        self.engine = Engine(denoiser, config.engine, config.optimizer, world, self.loader.micro_batches)
        self.averages = {name: [m.clone() for m in self._masters()] for name in self.profiles}
        self.writer = Writer(self.engine.partition, world, owner.check)
        self.metrics = self.run_dir / "metrics.jsonl"
        self.progress, damaged = self._restore()
        self.attempt = self.progress.attempt = on_rank_zero(world, lambda: self._accept(damaged))
        self.guard = BadSteps(config.train.bad_steps, config.train.spike_factor)
        self.tracking = tracking.track(self.run_dir, to_dict(config), world.rank, self.progress.samples_seen)
        self.meter = Meter()

    def train(self) -> tuple[int, str, int]:
        """Run to the end, or to a request to stop: exit code, what happened, samples seen."""
        config, total, request = self.config, self.total, ""
        share, seen = self.loader.share, self.progress.samples_seen
        for line in describe(config, self.shards, self.parameters, self.kernel, share, seen, self.world):
            logger.info("%s", line)
        was_done = self.progress.samples_seen >= total
        bar = log.progress(total, "img", "train", self.progress.samples_seen, self.world.rank == 0)
        watchdog = Watchdog(self.run_dir / "stalls", config.engine.stall_seconds, self.world, self._stalled)
        with (
            StopRequests(60 * config.train.time_limit_minutes) as stop,
            watchdog,
            self.writer,
            self.loader,
            self.validation or contextlib.nullcontext(),
            self.tracking,
            bar,
        ):
            while self.progress.samples_seen < total and not request:
                request = self._run_until_bad(stop, watchdog, bar)
            watchdog.at("writing the last checkpoint")
            self.writer.finish()
        if self.writer.problem:
            remedy = "make room, or mend what its line in the log names, and start the same command again"
            raise RunError(f"{self.writer.problem}; {remedy}")
        if self.progress.samples_seen < total:
            return STOPPED, f"stopped on request ({request})", self.progress.samples_seen
        words = "was already trained to the end (a larger train.total_samples goes on)"
        return DONE, words if was_done else "trained to the end", self.progress.samples_seen

    def _run_until_bad(self, stop: StopRequests, watchdog: Watchdog, bar: ProgressLine) -> str:
        """Steps until the end or a request to stop, which is returned; or until bad steps have rolled the run back."""
        config, total = self.config, self.total
        watchdog.at(f"loading the data of the step at {self.progress.samples_seen} samples")
        for step in self.loader.steps(self.progress.samples_seen):
            watchdog.at(f"the step at {self.progress.samples_seen} samples")
            before, lr = self.progress.samples_seen, self.learning_rate()
            result, digest, request = self.advance(step, stop.received)
            seen = self.progress.samples_seen
            self.meter.add(self.batch, step.waited)
            if result.applied:
                self.guard.passed(result.loss, self.progress.recent_losses)
            elif self._skip(step, result, digest):
                return ""

            last = seen >= total
            if due(config.log.every_samples, before, seen, last) and result.applied:
                self._log_step(result, lr, digest)
            if due(config.log.validation_every_samples, before, seen, last):
                watchdog.at("validation")
                self._log_validation()
            if due(config.log.samples_every_samples, before, seen, last):
                watchdog.at("drawing samples")
                self._draw_preview()
            snapshot = due(config.ema.snapshot_every_samples, before, seen, last)
            if due(config.checkpoint.every_samples, before, seen) or last or request:
                watchdog.at("copying a checkpoint")
                self._save(checkpoint=True, snapshot=snapshot)
            elif snapshot:
                self._save(checkpoint=False, snapshot=True)
            bar.update(self.batch, result.loss, step.waited)
            if last or request:
                return request
            watchdog.at(f"loading the data of the step at {seen} samples")
        raise AssertionError("the loader's steps never end")

    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.config.optimizer, self.progress.samples_seen + self.batch, self.total)

    def advance(self, step: StepInputs, request: str = "") -> tuple[StepResult, str, str]:
        """One step of the optimizer, the clock and the averages (collective).

        Returns with the step's result the digest of what it saw and why to stop after it, agreed on by all ranks.
        """
        digest = step.digest % 2**64
        over, failed = self.writer.vote()
        also = (digest >> 32, digest % 2**32, bool(request), over, failed, bool(self.writer.refused))
        limit = -math.inf if step.first in self.guard.avoid else self.guard.loss_limit(self.progress.recent_losses)
        result = self.engine.step(step.micro_batches, self.weighted_loss, self.learning_rate(), self.batch, limit, also)
        high, low, requests, over, failed, refused = map(int, result.sums)
        self.writer.settle(over, failed)
        if refused:
            raise RunError(self.writer.refused or "another job has taken the run directory over")
        self.progress.samples_seen += self.batch
        for name, profile in self.profiles.items():
            keep = profile.decay(self.progress.samples_seen, self.batch)
            averaging.update(self.averages[name], self._masters(), keep)
        self.engine.mark("averages")
        return result, digest_text((high << 32) + low), (request or "by another rank") if requests else ""

    def _skip(self, step: StepInputs, result: StepResult, digest: str) -> bool:
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
        positions = self.guard.mark_for_skipping(self.batch)
        if newest_whole(self.run_dir / "checkpoints", self.world)[0] is None:
            raise RunError(f"{positions}, before there was a checkpoint to return to; {REMEDY}")
        logger.warning("%s; rolling back to the newest checkpoint and passing over them", positions)
        self.progress, damaged = self._restore()
        self.progress.attempt = self.attempt
        on_rank_zero(self.world, lambda: self._cut_back(damaged))

    def _stalled(self, summary: str) -> None:
        outcome.write_outcome(self.run_dir, FAILED, self.progress.samples_seen, summary)

    def weighted_loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Sum of the samples' losses, padding left out: a scalar."""
        return (self._loss_B(denoiser, batch) * batch.weight_B).sum()

    def _loss_B(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        t_B = self.objective.timesteps(batch.uniform_B)
        condition = Condition(label_B=batch.label_B, text=batch.text)
        return self.objective.loss(denoiser, batch.latent_BCHW, batch.noise_BCHW, t_B, condition)

    def _masters(self) -> list[Tensor]:
        return [f.master for f in self.engine.partition.owned]

    # ------------------------------------------------------------------------------------------- start and resumption

    def _restore(self) -> tuple[TrainState, list[Path]]:
        """Go on from the newest whole checkpoint of the run directory, or start; also which newer ones are damaged."""
        fingerprint = self.shards.manifest.fingerprint
        found, damaged = newest_whole(self.run_dir / "checkpoints", self.world)
        if found is None:
            if self.config.train.init_from:
                start_from(Path(self.config.train.init_from), self.engine.partition, self.averages)
            progress = TrainState(samples_seen=0, data_fingerprint=fingerprint)
        else:
            # keys that are new since then take their defaults
            saved = to_dict(from_dict(TrainJob, read_manifest(found)["config"]))
            identity.check_identity(saved, to_dict(self.config), found, self.config.train.accept_changes)
            progress = restore(found, self.engine.partition, self.averages)
        if progress.data_fingerprint != fingerprint:
            raise InputError(other_data(self.config.data, progress.data_fingerprint, fingerprint, str(found)))
        if found:
            logger.info("resuming at %s samples from %s", f"{progress.samples_seen:,}", found)
        return progress, damaged

    def _accept(self, damaged: list[Path]) -> int:
        """Write down that this attempt goes on with the run; returns its number. On rank 0, after all checks."""
        list(log.read_jsonl(self.run_dir / "environment.jsonl"))  # refuses before anything is changed, as the next line
        self._cut_back(damaged)
        return directory.prepare(self.run_dir, to_yaml(self.config), self.world.size)

    def _cut_back(self, damaged: list[Path]) -> None:
        """Leave the log and the checkpoints as they were at the samples seen; on rank 0."""
        seen = self.progress.samples_seen
        cut = log.keep_jsonl_until(self.metrics, "samples_seen", seen)
        if cut:
            lines = pluralize(cut, "log line", "log lines")
            logger.info("%s of later than %s samples set aside", lines, f"{seen:,}")
        set_aside(damaged)

    # -------------------------------------------------------------------------------------------- what the loop writes

    def _log_step(self, result: StepResult, lr: float, digest: str) -> None:
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
        assert self.validation is not None
        with self.engine.partition.using_weights(self.averages["ema"]):
            losses = validation_loss(
                self.validation, self.objective, lambda b: self._loss_B(self.engine.module, b), self.world.device
            )
        seen, attempt = self.progress.samples_seen, self.progress.attempt
        self._write({"samples_seen": seen, **losses, "time": time.time(), "attempt": attempt})

    def _draw_preview(self) -> None:
        assert self.autoencoder is not None
        text = load_text(self.spec, self.config.model.uses_text, self.world.device)
        model = ImageModel(self.engine.module, self.objective, self.spec, self.autoencoder, self.world.device, text)
        path = self.run_dir / "samples" / f"{self.progress.samples_seen:012d}.png"
        with self.engine.partition.using_weights(self.averages["ema"]):
            draw_preview(model, self.config.evaluate, self.world, path)

    def _write(self, record: dict[str, Any]) -> None:
        if self.world.rank == 0:
            log.append_jsonl(self.metrics, record)
            self.tracking.log(record)

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
            "sampling": self.spec.to_json(),
            "config": to_dict(config),
            "averages": {name: profile.describe() for name, profile in self.profiles.items()},
        }
        self.writer.begin(contents, facts)


def due(every: int, before: int, after: int, last: bool = False) -> bool:
    """Whether a multiple of `every` lies in (before, after], or it is the last step; never if `every` is 0."""
    return every > 0 and (last or after // every > before // every)
