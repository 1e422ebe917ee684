"""Train a denoiser on latent shards.

The loop's only clock is `samples_seen`: learning rate, averages, logs, samples, validation and checkpoints are
functions of it, so a run does not depend on how many processes carry it or how often it was restarted. Re-running the
same command resumes.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldt import log, rng, tracking
from ldt.checkpoint.manifest import TrainState
from ldt.checkpoint.restore import newest_whole
from ldt.checkpoint.retention import Retention, remove_leftovers
from ldt.checkpoint.writer import Content, Writer
from ldt.config import to_dict, to_yaml
from ldt.data.batch import Batch
from ldt.data.loader import StepInputs
from ldt.diffusion import mean_flow
from ldt.diffusion.condition import Condition
from ldt.diffusion.fixed_times import FixedTimes
from ldt.diffusion.objectives import Denoiser, Objective
from ldt.dist import World, on_rank_zero
from ldt.engine.ema import ShardedEMA, profiles
from ldt.engine.engine import Engine, QueuedStep, StepResult
from ldt.engine.learning_rate import learning_rate
from ldt.engine.partition import MOMENTS
from ldt.errors import RunError
from ldt.nn.align import Aligned
from ldt.nn.attention import choose_kernel, forward_differentiable
from ldt.nn.build import build, check_shapes, parameter_count
from ldt.nn.entangled import Entangled
from ldt.progress import ProgressLine
from ldt.run import directory
from ldt.run.outcome import DONE, STOPPED
from ldt.run.owner import Owner
from ldt.run.preflight import check_room
from ldt.run.stop import StopRequests
from ldt.run.watchdog import Watchdog
from ldt.sampling.draw import ImageModel, load_autoencoder
from ldt.training.bad_steps import REMEDY, BadSteps
from ldt.training.config import TrainJob
from ldt.training.consensus import StepConsensus
from ldt.training.data import open_data
from ldt.training.journal import Journal
from ldt.training.monitor import draw_preview, fixed_time_loss, preview_text, validation_loss
from ldt.training.resume import cut_back, resume
from ldt.training.setup import align_denoiser, denoised, describe, fit_into_memory, make_loaders

logger = log.get_logger(__name__)

START_LIMITS = 4  # times engine.stall_seconds that a part of the start may take: a large checkpoint from a slow disk


class Trainer:
    """One attempt at a run: its parts, and the loop that drives them.

    Until everything is checked, and the attempt with it accepted, nothing in the run directory changes.
    """

    def __init__(
        self,
        config: TrainJob,
        world: World,
        owner: Owner,
        watchdog: Watchdog,
        until: int = 0,
        rng_version: int = rng.VERSION,
    ) -> None:
        self.config, self.world, self.run_dir, self.watchdog = config, world, Path(config.run_dir), watchdog
        watchdog.at("reading the data", START_LIMITS)
        self.batch, self.total = config.train.global_batch, config.train.total_samples
        self.until = until or self.total
        if config.log.tensorboard:
            tracking.require_tensorboard()
        self.shards = open_data(config.data, world)
        self.spec = denoised(config, self.shards)
        check_shapes(config.model, self.spec.shapes)
        self.objective = Objective(config.objective, self.spec.latent_shape)
        fixed = config.log.validation_times
        self.times = FixedTimes(self.objective, fixed) if fixed else None
        self.autoencoder = load_autoencoder(self.spec, world.device) if config.log.samples_every_samples else None
        uses_text = config.model.uses_text and config.log.samples_every_samples > 0
        self.text = preview_text(self.spec, uses_text, world)
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self.kernel = choose_kernel(config.model.attention, world.device, dtype)
        shape, classes, text = self.spec.latent_shape, len(self.spec.classes), self.spec.text_shape
        denoiser = build(config.model, shape, classes, config.seed, text, self.spec.token)
        align_denoiser(denoiser, config, self.shards)
        self.parameters, averages = parameter_count(denoiser), len(profiles(config.ema))
        micro_batch = fit_into_memory(denoiser, config, self.spec, averages, world)
        if world.rank == 0:
            for root in (self.run_dir / "checkpoints", self.run_dir / "ema"):
                remove_leftovers(root)
        check_room(self.run_dir, self.parameters, 3 + averages, world)
        self.loader, self.validation = make_loaders(config, self.shards, micro_batch, world)
        watchdog.at("starting the engine", START_LIMITS)
        self.engine = Engine(denoiser, config.engine, config.optimizer, world, self.loader.micro_batches)
        self.bare = forward_differentiable(self.engine.bare)
        self.ema = ShardedEMA(config.ema, self._masters())
        self.writer = Writer(self.engine.partition, world, owner.check)
        self.bad_steps = BadSteps(config.train.bad_steps, config.train.spike_factor)
        self.rng_version = rng_version
        self.state, damaged = self._restore()
        self.loader.check_position(self.state.samples_seen)
        self.attempt = self.state.attempt = on_rank_zero(world, lambda: self._accept(damaged))
        self.mirrors = tracking.track(self.run_dir, to_dict(config), world.rank, self.state.samples_seen)
        self.journal = Journal(self.run_dir, world, self.mirrors)

    def train(self) -> tuple[int, str, int]:
        """Run to the end, or to a request to stop: exit code, what happened, samples seen."""
        config, total, seen = self.config, self.until, self.state.samples_seen
        for line in describe(config, self.shards, self.parameters, self.kernel, self.loader.share, seen, self.world):
            logger.info("%s", line)
        was_done = seen >= total
        with (
            StopRequests(60 * config.train.time_limit_minutes) as stop,
            self.writer,
            self.loader,
            self.validation or contextlib.nullcontext(),
            self.mirrors,
            log.progress(total, "img", "train", seen, self.world.rank == 0) as bar,
        ):
            request = self._loop(stop, bar)
            self.watchdog.at("writing the last checkpoint")
            self.writer.finish()
        if self.writer.problem:
            remedy = "make room, or mend what its line in the log names, and start the same command again"
            raise RunError(f"{self.writer.problem}; {remedy}")
        if self.state.samples_seen < total:
            return STOPPED, f"stopped on request ({request})", self.state.samples_seen
        if was_done:
            return DONE, "already finished; raise train.total_samples to continue", self.state.samples_seen
        return DONE, "trained to the end", self.state.samples_seen

    def _loop(self, stop: StopRequests, bar: ProgressLine) -> str:
        """Steps until the end or a request to stop, which is returned. All that a step does stands here, in order.

        A GPU gets the next step's passes to do before the host asks for this one's result, so that neither waits for
        the other; not where something else comes between the two steps.
        """
        every, request, ahead = self.config.log, "", None
        steps = self.loader.steps(self.state.samples_seen)
        while self.state.samples_seen < self.until and not request:
            before, lr = self.state.samples_seen, self.learning_rate()
            inputs = ahead or self.gradients(steps)
            queued = self.apply(inputs, lr, stop.received)
            self.tick()
            seen, last = self.state.samples_seen, self.state.samples_seen >= self.until
            validates = due(every.validation_every_samples, before, seen, last)
            previews = due(every.samples_every_samples, before, seen, last)
            snapshot = due(self.config.ema.snapshot_every_samples, before, seen, last)
            checkpoint = due(self.config.checkpoint.every_samples, before, seen) or last
            ahead = None if validates or previews or snapshot or checkpoint else self.gradients(steps)

            self.watchdog.at(f"the step at {before} samples")
            result = queued.result()
            agreed = self.settle(result)
            self.journal.meter.add(self.batch, inputs.waited)
            request = (stop.received or "by another rank") if agreed.stop_requests else ""
            if result.applied:
                self.bad_steps.passed(result.loss, self.state)
            else:
                reason = self.bad_steps.judge(inputs.first, result, self.state)
                positions = range(inputs.first, inputs.first + self.batch)
                self.journal.skipped_step(self.state, positions, result, agreed.digest, reason)
            if self.bad_steps.exhausted:
                self.watchdog.at("rolling back")
                if ahead is not None:
                    self.engine.drop_gradients()
                self._roll_back()
                bar.go_back(self.state.samples_seen)
                steps, ahead = self.loader.steps(self.state.samples_seen), None
                continue
            if due(every.every_samples, before, seen, last) and result.applied:
                self.journal.step(self.state, result, lr, agreed.digest, inputs.bucket)
            if validates:
                self.watchdog.at("validation")
                self._log_validation()
            if previews:
                self.watchdog.at("drawing samples")
                self._draw_preview()
            if checkpoint or snapshot or request:
                self.watchdog.at("copying a checkpoint")
                self._save(checkpoint or bool(request), snapshot)
            bar.update(self.batch, result.loss, inputs.waited)
        return request

    # ------------------------------------------------------------------------------------------------ parts of a step

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return learning_rate(self.config.optimizer, self.state.samples_seen + self.batch, self.total)

    def gradients(self, steps: Iterator[StepInputs]) -> StepInputs:
        """Load the next step's data and queue its forward and backward passes."""
        seen = self.state.samples_seen
        self.watchdog.at(f"loading the data of the step at {seen} samples")
        inputs = next(steps)
        self.engine.mark("data")
        self.watchdog.at(f"the step at {seen} samples")
        self.engine.gradients(inputs.micro_batches, self.weighted_loss, self.batch)
        return inputs

    def apply(self, inputs: StepInputs, lr: float, request: str = "") -> QueuedStep:
        """Queue the change of the weights (collective), in which the ranks also learn of each other what `settle`
        needs; the step before must be settled.
        """
        over, failed = self.writer.vote()
        mine = StepConsensus(inputs.digest, int(bool(request)), over, failed, int(bool(self.writer.refused)))
        return self.engine.apply(lr, self.bad_steps.loss_limit(inputs.first, self.state), mine.pack())

    def settle(self, result: StepResult) -> StepConsensus:
        """What the ranks agreed on: the save on its way takes its next step, or the run ends for it is not ours."""
        agreed = StepConsensus.unpack(result.sums)
        self.writer.settle(agreed.saves_over, agreed.saves_failed)
        if agreed.commits_refused:
            raise RunError(self.writer.refused or "another job has taken the run directory over")
        return agreed

    def tick(self) -> None:
        """The clock and the averages go on by one global batch."""
        self.state.samples_seen += self.batch
        self.ema.update(self.state.samples_seen, self.batch)
        self.engine.mark("averages")

    def weighted_loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Sum of the samples' losses, padding left out: a scalar."""
        inner, align = self.config.model.inner_head > 0, self.config.align
        until = align.until_samples or math.inf
        net = self._entangled(denoiser, batch)
        aligned = Aligned(net) if align.weight and self.state.samples_seen < until else None
        loss_B = self._loss_B(aligned or net, batch, inner)
        if isinstance(net, Entangled):
            loss_B = loss_B + align.token_weight * net.loss()
        if aligned is not None and batch.target is not None:
            distance_B = aligned.distance(batch.target) * (batch.index_B < until)
            loss_B = loss_B + align.weight * distance_B
        return (loss_B * batch.weight_B).sum()

    def _entangled(self, denoiser: Denoiser, batch: Batch) -> Denoiser:
        """The denoiser, given the batch's class tokens where it has one."""
        if batch.target is None or batch.token_noise_BF is None:
            return denoiser
        return Entangled(denoiser, self.objective, batch.target, batch.token_noise_BF)

    def _loss_B(self, denoiser: Denoiser, batch: Batch, inner: bool = False) -> Tensor:
        objective = self.objective.at(batch.latent_BCHW.shape[1:])
        t_B = objective.timesteps(batch.uniform_B)
        condition = Condition(label_B=batch.label_B, text=batch.text)
        if batch.second_B is not None:
            times = (batch.uniform_B, batch.second_B, batch.intervals)
            parts = (batch.latent_BCHW, batch.noise_BCHW, *times, condition)
            return mean_flow.loss(objective, denoiser, self.bare, *parts, null_label=len(self.spec.classes))
        return objective.loss(denoiser, batch.latent_BCHW, batch.noise_BCHW, t_B, condition, inner)

    # ------------------------------------------------------------------------------------ start, return, and the state

    def _restore(self) -> tuple[TrainState, list[Path]]:
        self.watchdog.at("reading the checkpoint", START_LIMITS)
        fingerprint = self.shards.manifest.fingerprint
        state, begun_with, damaged = resume(
            self.config, fingerprint, self.spec, self.engine.partition, self.ema, self.world
        )
        self.rng_version = begun_with or self.rng_version
        for loader in (self.loader, *(self.validation.parts.values() if self.validation else ())):
            loader.use_random_numbers(self.rng_version)
        return state, damaged

    def _accept(self, damaged: list[Path]) -> int:
        """Write down that this attempt goes on with the run; returns its number. On rank 0, after all checks."""
        list(log.read_jsonl(self.run_dir / "environment.jsonl"))  # refuses before anything is changed, as the next line
        cut_back(self.run_dir, self.state, damaged)
        return directory.prepare(self.run_dir, to_yaml(self.config), self.world.size, self.rng_version)

    def _roll_back(self) -> None:
        """Return to the newest checkpoint, pass over the bad positions, and save that this was done (collective)."""
        self.writer.finish()
        roll_back = self.bad_steps.begin_roll_back(self.state, self.batch)
        if newest_whole(self.run_dir / "checkpoints", self.world)[0] is None:
            raise RunError(f"{roll_back.reason}, before there was a checkpoint to return to; {REMEDY}")
        logger.warning("%s; rolling back to the newest checkpoint and passing over them", roll_back.reason)
        self.state, damaged = self._restore()
        self.state.attempt = self.attempt
        on_rank_zero(self.world, lambda: cut_back(self.run_dir, self.state, damaged))
        roll_back.mark_for_skipping(self.state)
        self._save(checkpoint=True, snapshot=False)
        self.writer.finish()

    def _save(self, checkpoint: bool, snapshot: bool) -> None:
        """Start to write the whole state, and the averages alone where they are to be kept (collective)."""
        partition, config = self.engine.partition, self.config
        contents = []
        if checkpoint:
            moments = [partition.moments(f) for f in partition.owned]
            stored: dict[str, Sequence[Tensor | None]] = {"master": self._masters(), **self.ema.tensors}
            stored |= {kind: [m.get(kind) for m in moments] for kind in MOMENTS}
            retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every_samples)
            contents.append(Content(self.run_dir / "checkpoints", stored, retention))
        if snapshot:
            contents.append(Content(self.run_dir / "ema", self.ema.tensors))
        facts = {
            "progress": asdict(self.state),
            "rng_version": self.rng_version,
            "sampling": self.spec.to_json(),
            "config": to_dict(config),
            "averages": self.ema.describe(),
        }
        self.writer.begin(contents, facts)

    def _masters(self) -> list[Tensor]:
        return [f.master for f in self.engine.partition.owned]

    # -------------------------------------------------------------------------------------------- looks at the averages

    def _log_validation(self) -> None:
        assert self.validation is not None
        module, device = self.engine.module, self.world.device
        with self.engine.partition.using_weights(self.ema.tensors["ema"]):
            if self.times is not None:
                losses = fixed_time_loss(self.validation, self.times, partial(self._entangled, module), device)
            else:

                def loss_B(batch: Batch) -> Tensor:
                    return self._loss_B(self._entangled(module, batch), batch)

                losses = validation_loss(self.validation, self.objective, loss_B, device)
        self.journal.write(self.state, **losses)

    def _draw_preview(self) -> None:
        assert self.autoencoder is not None
        parts = (self.engine.module, self.objective, self.spec, self.autoencoder, self.world.device, self.text)
        model = ImageModel(*parts)
        with self.engine.partition.using_weights(self.ema.tensors["ema"]):
            draw_preview(model, self.config.log.preview, self.world, self.run_dir, self.state.samples_seen)


def due(every: int, before: int, after: int, last: bool = False) -> bool:
    """Whether a multiple of `every` lies in (before, after], or it is the last step; never if `every` is 0."""
    return every > 0 and (last or after // every > before // every)
