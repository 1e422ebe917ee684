"""What a checkpoint costs: how long training stops for it, how fast it is written and read beside the disk's own rate.

And what the averages cost a step. All parts are measured in turn in one run; medians over the repetitions.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldt.checkpoint.checkpoint import Checkpoint
from ldt.checkpoint.manifest import TrainState, listed
from ldt.checkpoint.restore import restore, verify_together
from ldt.checkpoint.retention import Retention
from ldt.checkpoint.writer import Content, Writer
from ldt.config import to_dict
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.dist import World, all_gather, all_reduce_sum, barrier, process_group
from ldt.engine.config import EMAConfig, EngineConfig, OptimizerConfig
from ldt.engine.ema import ShardedEMA
from ldt.engine.engine import Engine
from ldt.engine.partition import MOMENTS
from ldt.nn.build import build, parameter_count
from ldt.nn.config import ModelConfig

LATENT, CLASSES = (4, 32, 32), 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="where to write; emptied afterwards")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="samples a process and step")
    parser.add_argument("--repeat", type=int, default=3)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Medians of seconds and bytes a second; on rank 0."""
    with process_group() as world:
        return Bench(arguments, world).run()


class Bench:
    """A training step of a Transformer, and its checkpoints."""

    def __init__(self, arguments: argparse.Namespace, world: World) -> None:
        self.arguments, self.world, self.root = arguments, world, arguments.directory / "bench-checkpoint"
        self.model = model = ModelConfig(width=arguments.width, depth=arguments.depth, heads=arguments.width // 64)
        denoiser = build(model, LATENT, CLASSES, seed=0)
        self.parameters = parameter_count(denoiser)
        config = EngineConfig(arguments.zero_stage, arguments.precision)
        self.engine = Engine(denoiser, config, OptimizerConfig(), world, 1)
        self.objective = Objective(ObjectiveConfig())
        self.masters = [f.master for f in self.engine.partition.owned]
        self.ema = ShardedEMA(EMAConfig(), self.masters)
        self.writer = Writer(self.engine.partition, world)
        self.seconds: dict[str, list[float]] = {}

    def run(self) -> dict[str, Any] | None:
        for i in range(self.arguments.repeat + 1):
            self.repetition(i)
        bytes_here = sum(p.stat().st_size for p in self.my_files())
        total = sum(all_gather(bytes_here))
        if self.world.rank == 0:
            shutil.rmtree(self.root)
        t = {name: statistics.median(values[1:]) for name, values in self.seconds.items()}
        if self.world.rank != 0:
            return None
        return {
            "processes": self.world.size,
            "parameters": self.parameters,
            "checkpoint_bytes": total,
            "step_seconds": t["step"],
            "stall_seconds": t["stall"],
            "stall_steps": t["stall"] / t["step"],
            "memory_copy_seconds": t["copy"],
            "step_seconds_while_writing": t["step_while_writing"],
            "write_bytes_per_second": total / t["write"],
            "disk_write_bytes_per_second": total / t["plain_write"],
            "write_of_disk": t["plain_write"] / t["write"],
            "read_bytes_per_second": total / t["read"],
            "disk_read_bytes_per_second": total / t["plain_read"],
            "read_of_disk": t["plain_read"] / t["read"],
            "ema_of_step_per_average": t["ema"] / 2 / t["step"],
        }

    def repetition(self, i: int) -> None:
        """Every part once; other parts never run at the same time, but for steps while a save is on its way."""
        self.timed("step", self.step)
        self.timed("ema", self.update_averages)
        self.timed("copy", lambda: [t.clone() for tensors in self.state() for t in tensors])
        self.timed("stall", lambda: self.begin(2 * i + 1))
        self.timed("step_while_writing", self.step)
        self.writer.finish()
        self.timed("write", lambda: self.save(2 * i + 2))
        self.timed("plain_write", self.plain_write)
        path = listed(self.root)[-1]
        self.forget_cached()
        self.timed("plain_read", lambda: [p.read_bytes() for p in self.my_files()])
        self.forget_cached()
        self.timed("read", lambda: self.read(path))

    def read(self, path: Path) -> None:
        verify_together(path, self.world)
        restore(Checkpoint.read(path), self.engine.partition, self.ema)

    def timed(self, name: str, work: Callable[[], Any]) -> None:
        """Seconds of the slowest rank, from a common start."""
        barrier()
        start = time.perf_counter()
        work()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.seconds.setdefault(name, []).append(max(all_gather(time.perf_counter() - start)))

    def step(self) -> None:
        """One optimizer step on random latents."""
        n, device = self.arguments.batch, self.world.device
        x0, noise = torch.randn(n, *LATENT, device=device), torch.randn(n, *LATENT, device=device)
        t, label = torch.rand(n, device=device), torch.randint(CLASSES, (n,), device=device)

        def loss(denoiser: Any, _: Any) -> torch.Tensor:
            return self.objective.loss(denoiser, x0, noise, t, Condition(label)).sum()

        self.engine.gradients([None], loss, n * self.world.size)
        result = self.engine.apply(1e-4, votes=self.writer.vote()).result()
        self.writer.settle(*map(int, result.sums))

    def update_averages(self) -> None:
        self.ema.update(1_000_000, self.arguments.batch)

    def state(self) -> list[list[torch.Tensor]]:
        moments = [self.engine.partition.moments(f) for f in self.engine.partition.owned]
        return [self.masters, *([m[kind] for m in moments] for kind in MOMENTS), *self.ema.tensors.values()]

    def begin(self, samples_seen: int) -> None:
        kinds = dict(zip(["master", *MOMENTS, *self.ema.tensors], self.state(), strict=True))
        spec = LatentSpec(LATENT, [], [0.0] * LATENT[0], [1.0] * LATENT[0], "", "", 0, 0)
        facts = {
            "progress": asdict(TrainState(samples_seen, "bench")),
            "sampling": spec.to_json(),
            "config": {"model": to_dict(self.model), "objective": to_dict(ObjectiveConfig())},
            "averages": self.ema.describe(),
        }
        self.writer.begin([Content(self.root, kinds, Retention(1))], facts)

    def save(self, samples_seen: int) -> None:
        self.begin(samples_seen)
        self.writer.finish()

    def plain_write(self) -> None:
        """The same bytes from memory to a file, and sync: what dd would do."""
        file = self.root / f"plain-{self.world.rank}"
        size, block = sum(p.stat().st_size for p in self.my_files()), b"\1" * (1 << 24)
        with file.open("wb") as f:
            while size > 0:
                size -= f.write(block[: min(size, len(block))])
            f.flush()
            os.fsync(f.fileno())
        file.unlink()

    def my_files(self) -> list[Path]:
        return list(listed(self.root)[-1].glob(f"rank-{self.world.rank:05d}-*.safetensors"))

    def forget_cached(self) -> None:
        """Ask the system to drop the files from its memory, so that reading reads the disk."""
        barrier()
        for path in listed(self.root)[-1].iterdir():
            with path.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        all_reduce_sum(torch.zeros(1, device=self.world.device))
