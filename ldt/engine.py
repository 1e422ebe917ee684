"""The training engine: DeepSpeed's ZeRO around a denoiser, and one function that makes an optimizer step.

Everything about DeepSpeed is in this file and in `partition`. The engine is told its learning rate at every step, so
it has no schedule and no clock of its own.
"""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ldt.dist import World, all_reduce_sum
from ldt.errors import InputError
from ldt.memory import BUCKET
from ldt.nn.build import compile_blocks, parameter_count
from ldt.nn.transformer import Block
from ldt.options import choice
from ldt.partition import Partition

MicroBatch = TypeVar("MicroBatch")

FLOAT32_MAX = float(torch.finfo(torch.float32).max)


@dataclass
class EngineConfig:
    """Where and how the same arithmetic is done; none of it defines the run.

    `compile`: every block of the denoiser by torch.compile, which keeps what it compiled for the next start. On CUDA
    fp32 means TF32 in matrix products, unless `deterministic`. `activation_memory_gb` (10⁹ bytes; 0: no limit) is what
    a micro-batch may keep for the backward pass: as many blocks as need be are computed again there. A rank that makes
    no progress for `stall_seconds` (a hung collective, loader or disk) ends the job; 0 waits forever.
    """

    zero_stage: int = 1
    precision: str = choice("fp32", "bf16")
    compile: bool = False
    deterministic: bool = False
    activation_memory_gb: float = 0.0
    stall_seconds: float = 900.0

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise InputError(f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        if self.activation_memory_gb < 0:
            raise InputError(f"engine.activation_memory_gb={self.activation_memory_gb} must be positive, or 0 for any")
        if self.stall_seconds < 0:
            raise InputError(f"engine.stall_seconds={self.stall_seconds} must be positive, or 0 to wait forever")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise InputError(
                "engine.precision=bf16 needs engine.zero_stage of 1 to 3 (DeepSpeed keeps no float32 weights at stage "
                "0 and would stop learning); set engine.zero_stage=1"
            )


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 1711.05101). Warm-up and decay are counted in samples."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_samples: int = 0
    decay: str = choice("constant", "cosine", "linear")
    final_lr: float = 0.0
    muon_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"optimizer.lr={self.lr} must be positive")
        if self.clip < 0:
            raise InputError(f"optimizer.clip={self.clip} must be positive, or 0 for no clipping")
        if self.warmup_samples < 0:
            raise InputError(f"optimizer.warmup_samples={self.warmup_samples} can't be negative")


class Step(NamedTuple):
    """What a step is known by.

    loss: mean over the global batch; grad_norm: before clipping; applied: whether the weights were changed;
    sums: over all ranks, of what each gave as `also`.
    """

    loss: float
    grad_norm: float
    applied: bool
    sums: list[float]


class _AdamW(torch.optim.AdamW):
    """AdamW that can let a step go by: DeepSpeed calls it deep inside of its own step, at every stage alike."""

    skip = False
    muon_lr, base_lr = 0.0, 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.skip:
            return None
        held = []
        if self.muon_lr:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.ndim == 2 and getattr(p, "muon", False):
                        held.append((p, p.grad))
                        self.muon(p, self.muon_lr * group["lr"] / self.base_lr)
                        p.grad = None
        super().step(closure)
        for p, grad in held:
            p.grad = grad

    def muon(self, p: Tensor, lr: float) -> None:
        """Momentum, then the nearest orthogonal matrix by three Newton-Schulz steps (Jordan et al. 2024)."""
        momentum = self.state[p]["exp_avg"]
        momentum.lerp_(p.grad, 0.05)
        update = p.grad.lerp(momentum, 0.95)
        for part, out in zip(update.split(p.parts), p.split(p.parts), strict=True):
            x = part.T if part.shape[0] > part.shape[1] else part
            x = x / (x.norm() + 1e-7)
            for _ in range(3):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if part.shape[0] > part.shape[1] else x
            out.add_(x, alpha=-lr * max(1, part.shape[0] / part.shape[1]) ** 0.5)


class Engine:
    """A denoiser under DeepSpeed. `module` is the wrapped denoiser for forward passes on all ranks together."""

    def __init__(
        self, denoiser: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, world: World, micro_batches: int
    ) -> None:
        self.world = world
        self.micro_batches = micro_batches
        deepspeed = _import_deepspeed(world.device)
        denoiser.to(world.device)
        if config.compile:
            compile_blocks(denoiser)
            if config.zero_stage == 3:  # its hooks inside of a block would break the compiled code apart
                deepspeed.utils.set_z3_leaf_modules(denoiser, [Block])
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        elif world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        self._adam = _AdamW(
            parameter_groups(denoiser, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._adam.muon_lr, self._adam.base_lr = optimizer.muon_lr, optimizer.lr
        if optimizer.muon_lr:
            for block in denoiser.blocks:
                for name, p in block.named_parameters():
                    if p.ndim == 2:
                        p.muon, p.parts = True, p.shape[0] // (3 if "qkv" in name else 2 if "up" in name else 1)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use
            warnings.simplefilter("ignore")  # it imports parts of torch that complain about themselves
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=denoiser,
                optimizer=self._adam,
                config=_deepspeed_config(config, optimizer, micro_batches, parameter_count(denoiser), world.device),
            )
        self.module: nn.Module = self.deepspeed
        self.partition = Partition(self.deepspeed, config.zero_stage)
        self.partition.materialise_moments(0)
        self.mark: Callable[[str], None] = lambda phase: None  # told when a phase of the step ends, by benchmarks

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        weighted_loss: Callable[[nn.Module, MicroBatch], Tensor],
        lr: float,
        global_batch: int,
        loss_limit: float = math.inf,
        also: Sequence[int] = (),
    ) -> Step:
        """One optimizer step. `weighted_loss` is the weighted sum of a micro-batch's per-sample losses, a scalar.

        DeepSpeed divides the gradient by the number of ranks and of micro-batches, ours is the mean over the global
        batch: the factor below makes up the difference exactly, whatever the split.

        Before the weights change, one all-reduce tells every rank the loss, the gradient's norm and the sums of
        `also` (exact for integers below 2⁵³). If loss or norm are not finite, or the loss is above `loss_limit`, no
        rank applies the step: weights, moments and Adam's step count stay as they are.
        """
        assert len(micro_batches) == self.micro_batches, (len(micro_batches), self.micro_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        factor = self.world.size * self.micro_batches / global_batch
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i, batch in enumerate(micro_batches):
            if i:
                self.deepspeed.step()  # only counts micro-batches until the last
            loss = weighted_loss(self.module, batch)
            total += loss.detach()
            self.mark("forward")
            self.deepspeed.backward(loss * factor)
            self.mark("backward")
        shares = torch.cat(
            [torch.stack([total, self._squared_norm()]), torch.tensor(also, dtype=torch.float64).to(total)]
        )
        loss_sum, squared_norm, *sums = all_reduce_sum(shares).tolist()
        step_loss, grad_norm = loss_sum / global_batch, squared_norm**0.5
        # DeepSpeed squares norms in float32 and would leave out a step that overflows there by itself
        finite = math.isfinite(step_loss) and squared_norm < FLOAT32_MAX
        self._adam.skip = not (finite and step_loss <= loss_limit)
        self.mark("check")
        self.deepspeed.step()
        self.mark("optimizer")
        return Step(step_loss, grad_norm, not self._adam.skip, sums)

    def _squared_norm(self) -> Tensor:
        """This rank's share of the gradient's squared norm: a float64 scalar."""
        norms = torch._foreach_norm(self.partition.gradients(), 2, torch.float32)
        squared = torch.stack(norms).double().square().sum()
        return squared / self.world.size if self.partition.stage == 0 else squared


def learning_rate(config: OptimizerConfig, samples_seen: int, total_samples: int) -> float:
    """Linear warm-up, then constant, cosine or linear decay to `final_lr` at `total_samples`."""
    if samples_seen < config.warmup_samples:
        return config.lr * samples_seen / config.warmup_samples
    if config.decay == "constant":
        return config.lr
    span = max(total_samples - config.warmup_samples, 1)
    done = min((samples_seen - config.warmup_samples) / span, 1.0)
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
    return config.final_lr + (config.lr - config.final_lr) * left


def parameter_groups(denoiser: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms) do not."""
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def _deepspeed_config(
    config: EngineConfig, optimizer: OptimizerConfig, micro_batches: int, parameters: int, device: torch.device
) -> dict[str, Any]:
    bucket = min(parameters, BUCKET)
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only used for DeepSpeed's own reports
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": optimizer.clip,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": device.type == "cuda",
            "memory_efficient_linear": not config.compile,  # stage 3's own linear layer can't be compiled
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": config.precision == "bf16"},
    }
    if config.precision == "bf16":
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # it still calls collectives by names that torch has deprecated
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    if device.type == "cpu":
        # its shared-memory collectives would be compiled at start (27 s, needs g++); training doesn't use them
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed
