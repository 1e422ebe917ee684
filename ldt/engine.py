"""The training engine: DeepSpeed's ZeRO around a denoiser, and one function that makes an optimizer step.

Everything about DeepSpeed is in this file and in `partition`. The engine is told its learning rate at every step, so
it has no schedule and no clock of its own.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ldt.dist import World, all_reduce_sum
from ldt.errors import InputError
from ldt.options import choice
from ldt.partition import Partition

MicroBatch = TypeVar("MicroBatch")


@dataclass
class EngineConfig:
    """Where and how the same arithmetic is done; none of it defines the run."""

    zero_stage: int = 1
    precision: str = choice("fp32", "bf16")
    compile: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise InputError(f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
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

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"optimizer.lr={self.lr} must be positive")
        if self.clip < 0:
            raise InputError(f"optimizer.clip={self.clip} must be positive, or 0 for no clipping")
        if self.warmup_samples < 0:
            raise InputError(f"optimizer.warmup_samples={self.warmup_samples} can't be negative")


class Step(NamedTuple):
    """What a step is known by: its loss (mean over the global batch) and the gradient's norm before clipping."""

    loss: float
    grad_norm: float


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
            denoiser.compile()
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        adam = torch.optim.AdamW(
            _parameter_groups(denoiser, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=world.device.type == "cuda",
        )
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use
            warnings.simplefilter("ignore")  # it imports parts of torch that complain about themselves
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=denoiser, optimizer=adam, config=_deepspeed_config(config, optimizer, micro_batches)
            )
        self.module: nn.Module = self.deepspeed
        self.partition = Partition(self.deepspeed, config.zero_stage)

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        weighted_loss: Callable[[nn.Module, MicroBatch], Tensor],
        lr: float,
        global_batch: int,
    ) -> Step:
        """One optimizer step. `weighted_loss` is the weighted sum of a micro-batch's per-sample losses, a scalar.

        DeepSpeed divides the gradient by the number of ranks and of micro-batches, ours is the mean over the global
        batch: the factor below makes up the difference exactly, whatever the split.
        """
        assert len(micro_batches) == self.micro_batches, (len(micro_batches), self.micro_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        factor = self.world.size * self.micro_batches / global_batch
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in micro_batches:
            loss = weighted_loss(self.module, batch)
            total += loss.detach()
            self.deepspeed.backward(loss * factor)
            grad_norm = self._replica_grad_norm()
            self.deepspeed.step()
        loss_sum = float(all_reduce_sum(total))
        if self.partition.stage > 0:
            grad_norm = float(self.deepspeed.get_global_grad_norm())
        return Step(loss_sum / global_batch, grad_norm)

    def _replica_grad_norm(self) -> float:
        """The gradient's norm before clipping at stage 0, where DeepSpeed reports none."""
        if self.partition.stage > 0 or not self.deepspeed.is_gradient_accumulation_boundary():
            return 0.0
        return float(torch.nn.utils.get_total_norm(p.grad for p in self.module.parameters() if p.grad is not None))


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


def _parameter_groups(denoiser: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms) do not."""
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def _deepspeed_config(config: EngineConfig, optimizer: OptimizerConfig, micro_batches: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only used for DeepSpeed's own reports
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": optimizer.clip,
        "zero_optimization": {"stage": config.zero_stage},
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
