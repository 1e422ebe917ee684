"""Sampling: latents a second of a denoiser with guidance, eager and with compiled blocks in turn.

`bench.py sample CONFIG [key=value …]`: the sampler, its steps, guidance, precision and images in one call (`block`) are
those of the config's `evaluate`. The weights are random, for speed asks nothing of them; nothing is decoded.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_train import matrix_peak, synchronise
from torch import nn

from ldt import config as configs
from ldt.diffusion.condition import Condition
from ldt.diffusion.objectives import Objective
from ldt.diffusion.samplers import sample
from ldt.dist import discover
from ldt.nn.build import build, compile_blocks
from ldt.nn.sizes import flops
from ldt.training.config import TrainJob


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--latent", default="4x32x32", help="shape of the latents")
    parser.add_argument("--classes", type=int, default=1000)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over the turns; the first call of each kind, which compiles, is not counted."""
    device = discover().device
    config = configs.load(TrainJob, arguments.config, arguments.settings)
    channels, height, width = map(int, arguments.latent.split("x"))
    bench = Bench(config, (channels, height, width), arguments.classes, device)
    eager, compiled = bench.denoiser(), bench.denoiser()
    compile_blocks(compiled)
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    peaks = []
    for _ in range(arguments.turns + 1):
        seconds["eager"].append(bench.seconds(eager))
        seconds["compiled"].append(bench.seconds(compiled))
        peaks.append(matrix_peak(device, config.evaluate.precision))
    rates = {name: config.evaluate.block / statistics.median(values[1:]) for name, values in seconds.items()}
    cost = flops(config.model, bench.shape, None) * bench.passes
    return {
        "threads": torch.get_num_threads(),
        "precision": config.evaluate.precision,
        "sampler": config.evaluate.sampler,
        "steps": config.evaluate.steps,
        "guidance": config.evaluate.guidance,
        "images in one call": config.evaluate.block,
        "eager: images_per_second": rates["eager"],
        "images_per_second": rates["compiled"],
        "ratio, compiled to eager": rates["compiled"] / rates["eager"],
        "matrix_peak_flops": statistics.median(peaks),
        "mfu": cost * rates["compiled"] / statistics.median(peaks),
    }


class Bench:
    """One block of images, again and again."""

    def __init__(self, config: TrainJob, shape: tuple[int, int, int], classes: int, device: torch.device) -> None:
        self.config, self.shape, self.classes, self.device = config, shape, classes, device
        self.objective = Objective(config.objective, shape)
        self.passes = 0.0  # of the denoiser, an image

    def denoiser(self) -> nn.Module:
        dtype = torch.bfloat16 if self.config.evaluate.precision == "bf16" else torch.float32
        return build(self.config.model, self.shape, self.classes, seed=0).to(self.device, dtype).eval()

    @torch.no_grad()
    def seconds(self, denoiser: nn.Module) -> float:
        """Of one block from noise to clean latents."""
        settings, seen = self.config.evaluate, 0

        def counted_denoiser(x_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
            nonlocal seen
            seen += len(x_BCHW)
            return denoiser(x_BCHW, t_B, condition)

        noise_BCHW = torch.randn(settings.block, *self.shape, device=self.device)
        condition = Condition(torch.arange(settings.block, device=self.device) % self.classes)
        synchronise(self.device)
        start = time.perf_counter()
        sample(counted_denoiser, self.objective, noise_BCHW, condition, self.classes, settings, lambda _: noise_BCHW)
        synchronise(self.device)
        self.passes = seen / settings.block
        return time.perf_counter() - start
