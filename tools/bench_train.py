"""The training step: images a second, time by phase, and how much of this machine's matrix products it makes use of.

`bench.py train CONFIG [key=value …] --steps N`. With --compare, a second setting takes turns with the first, A B A B,
and its ratio is given: other keys ("engine.compile=true"), or `plain`: the same denoiser and batches in a loop of plain
eager PyTorch, under DistributedDataParallel where there are several processes.

Data that are not there are made up, by --latent and --classes: the loader, its draws and the shards are real.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldt import config as configs
from ldt.data.batch import Batch
from ldt.dist import World, all_gather, barrier, broadcast, process_group
from ldt.engine import memory
from ldt.engine.config import EMAConfig
from ldt.engine.ema import ShardedEMA
from ldt.engine.engine import parameter_groups
from ldt.nn.build import build
from ldt.nn.sizes import flops
from ldt.run.owner import owned
from ldt.run.watchdog import Watchdog
from ldt.training.config import TrainJob
from ldt.training.trainer import Trainer

SAMPLES = 4096  # of made-up data
PHASES = ("data", "forward", "backward", "check", "optimizer", "averages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--steps", type=int, default=10, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    parser.add_argument("--compare", metavar="'key=value …' or plain", help="a second setting, in turn with the first")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU time, where others share the machine")
    parser.add_argument("--latent", default="4x32x32", help="shape of made-up latents")
    parser.add_argument("--classes", type=int, default=1000, help="of made-up data")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Medians over the turns; on rank 0."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with process_group() as world, ExitStack() as stack:
        scratch = Path(broadcast(stack.enter_context(tempfile.TemporaryDirectory())))
        first = stack.enter_context(bench(arguments, [], world, scratch / "a"))
        second: Bench | Plain | None = None
        if arguments.compare == "plain":
            second = Plain(first.trainer)
        elif arguments.compare:
            second = stack.enter_context(bench(arguments, arguments.compare.split(), world, scratch / "b"))
        both = [first] if second is None else [first, second]
        peaks = []
        for turn in range(arguments.turns + 1):
            for one in both:
                one.turn(arguments.warmup if turn == 0 else arguments.steps, turn > 0, clock)
            peaks.append(matrix_peak(world.device, first.trainer.config.engine.precision))
        barrier()
        if world.rank != 0:
            return None
        out = first.result(statistics.median(peaks))
        if second is not None:
            ratios = [a / b for a, b in zip(second.seconds, first.seconds, strict=True)]
            out["b: images_per_second"] = second.images_per_second()
            out["ratio, a to b"] = statistics.median(ratios)
            out["ratio of each turn"] = " ".join(f"{r:.3f}" for r in ratios)
        return out


@contextmanager
def bench(arguments: argparse.Namespace, more: list[str], world: World, scratch: Path) -> Iterator["Bench"]:
    """A trainer in a directory of its own, with the data of the config or made-up ones."""
    config = configs.load(TrainJob, arguments.config, [*arguments.settings, *more, f"run_dir={scratch / 'run'}"])
    config.log.samples_every_samples = config.log.validation_every_samples = 0
    if not (Path(config.data.path) / "manifest.json").exists():
        config.data.path = str(scratch / "data")
        if world.rank == 0:
            make_data(scratch / "data", arguments.latent, arguments.classes)
        barrier()
    with owned(scratch / "run", world) as owner:
        before = forget_peak(world.device)
        trainer = Trainer(config, world, owner, Watchdog(Path(config.run_dir), 0.0, world, print))
        with trainer.writer, trainer.loader:
            yield Bench(trainer, before)


def make_data(directory: Path, latent: str, classes: int) -> None:
    """Shards of random latents."""
    from shard_data import write_shards

    channels, height, width = map(int, latent.split("x"))
    names = [str(i) for i in range(classes)]
    write_shards(directory, [SAMPLES], latent_shape=(channels, height, width), classes=names)


@dataclass
class Bench:
    """The trainer's own steps, timed."""

    trainer: Trainer
    memory_before: int
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})

    def __post_init__(self) -> None:
        self.steps = self.trainer.loader.steps()
        self.device = self.trainer.world.device

    def turn(self, steps: int, counts: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        """Some steps; the seconds of one, of the slowest rank."""
        barrier()
        start = clock()
        phases = Phases(self.device)
        self.trainer.engine.mark = phases.mark
        queued = None
        for _ in range(steps):
            inputs = self.trainer.gradients(self.steps)
            if queued is not None:
                self.trainer.settle(queued.result())
            queued = self.trainer.apply(inputs, self.trainer.learning_rate())
            self.trainer.tick()
        if queued is not None:
            self.trainer.settle(queued.result())
        synchronise(self.device)
        seconds = max(all_gather((clock() - start) / steps))
        if counts:
            self.seconds.append(seconds)
            for name, value in phases.sums().items():
                self.phases[name].append(value / steps)

    def images_per_second(self) -> float:
        return self.trainer.batch / statistics.median(self.seconds)

    def result(self, peak: float) -> dict[str, Any]:
        trainer, config = self.trainer, self.trainer.config
        cost = 3 * flops(config.model, trainer.spec.latent_shape, trainer.spec.text_shape, trainer.spec.token)
        seconds = statistics.median(self.seconds)
        out = {
            "processes": trainer.world.size,
            "threads": torch.get_num_threads(),
            "parameters": trainer.parameters,
            "global_batch": trainer.batch,
            "precision": config.engine.precision,
            "zero_stage": config.engine.zero_stage,
            "compile": config.engine.compile,
            "attention": trainer.kernel,
            "flops_per_image": cost,
            "images_per_second": self.images_per_second(),
            "step_seconds": seconds,
            "matrix_peak_flops": peak,
            "mfu": cost * self.images_per_second() / trainer.world.size / peak,
            "memory": peak_memory_since(self.device) - self.memory_before,
            "planned_memory": self.planned_memory(),
        }
        return out | {f"{name}, of the step": statistics.median(self.phases[name]) / seconds for name in PHASES}

    def planned_memory(self) -> int:
        """What `ldt plan` says of it."""
        trainer, engine = self.trainer, self.trainer.config.engine
        spec, ranks, averages = trainer.spec, trainer.world.size, len(trainer.ema.profiles)
        state = memory.state_bytes(
            trainer.parameters, engine.zero_stage, engine.precision, ranks, averages, trainer.loader.micro_batches
        )
        classes, text = len(spec.classes), spec.text_shape
        kept = memory.activations(trainer.config.model, spec.latent_shape, classes, text, engine.precision)
        recomputed = kept.blocks if trainer.config.model.activation_checkpointing else 0
        return state.peak + kept.of(trainer.loader.share.size, recomputed)


class Phases:
    """Seconds by phase: by events on the GPU's own clock, or on the CPU's."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, phase: str) -> None:
        """The phase ends here."""
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((phase, moment))

    def sums(self) -> dict[str, float]:
        out = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            out[phase] += before.elapsed_time(after) / 1e3 if self.cuda else after - before
        return out


class Plain:
    """What one would write without ldt: the same denoiser, batches and arithmetic in eager PyTorch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.device = trainer, trainer.world.device
        spec, config = trainer.spec, trainer.config
        classes = len(spec.classes)
        model = build(config.model, spec.latent_shape, classes, config.seed, spec.text_shape).to(self.device)
        self.adam = torch.optim.AdamW(
            parameter_groups(model, config.optimizer), config.optimizer.lr, config.optimizer.betas
        )
        self.weights = [p.detach() for p in model.parameters() if p.requires_grad]
        self.ema = ShardedEMA(EMAConfig(widths=[0.1]), self.weights)
        self.model: nn.Module = DistributedDataParallel(model) if trainer.world.size > 1 else model
        self.steps = trainer.loader.steps()
        self.half = config.engine.precision == "bf16"
        self.seconds: list[float] = []

    def turn(self, steps: int, counts: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        """Some steps; the seconds of one, of the slowest rank."""
        barrier()
        start = clock()
        for _ in range(steps):
            self.step(next(self.steps).micro_batches)
        synchronise(self.device)
        seconds = max(all_gather((clock() - start) / steps))
        if counts:
            self.seconds.append(seconds)

    def step(self, micro_batches: list[Batch]) -> None:
        self.adam.zero_grad()
        for batch in micro_batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                loss = self.trainer.weighted_loss(self.model, batch) / len(batch) / len(micro_batches)
            loss.backward()
        if self.trainer.config.optimizer.clip:
            nn.utils.clip_grad_norm_(self.weights_with_gradients(), self.trainer.config.optimizer.clip)
        self.adam.step()
        self.ema.update(1_000_000, self.trainer.batch)
        float(loss.detach())

    def weights_with_gradients(self) -> list[torch.Tensor]:
        return [p for p in self.model.parameters() if p.grad is not None]

    def images_per_second(self) -> float:
        return self.trainer.batch / statistics.median(self.seconds)


def forget_peak(device: torch.device) -> int:
    """Start to look for the peak anew; the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_memory_since(device: torch.device) -> int:
    """The most bytes held since `forget_peak`: on the GPU, or resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def matrix_peak(device: torch.device, precision: str) -> float:
    """Operations a second of a large square matrix product, by this process while the others do the same."""
    n = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    barrier()
    best = float("inf")
    for _ in range(6):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
