"""The keys of the engine, the optimizer and the averages."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ldt.config_fields import choice
from ldt.errors import InputError


@dataclass
class EngineConfig:
    """Where and how the arithmetic is done. None of these keys defines the run, so all may change on resume.

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


class AtWork(NamedTuple):
    """What DeepSpeed runs. stage: its own; summed_bytes: of each number of a gradient while ranks are summed."""

    stage: int
    summed_bytes: int


def at_work(stage: int, precision: str, ranks: int, micro_batches: int) -> AtWork:
    """How a run with `engine.zero_stage` is really run.

    One process has nothing to share out: in float32 its stages 1 and 2 would only copy every gradient and weight
    several times in a step, for the same results. In bf16 DeepSpeed's stage 1 keeps all gradients in float32, to add up
    those of several micro-batches before it reduces them, after the backward pass; for a single one its stage 2 does
    without, and reduces during the backward pass. Either sums over ranks in float32, which the stages asked for as 2
    and 3 do in bf16.
    """
    if precision == "fp32":
        return AtWork(0 if ranks == 1 and stage < 3 else stage, 4)
    if stage == 1:
        return AtWork(2 if micro_batches == 1 else 1, 4)
    return AtWork(stage, 2)


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 1711.05101). Warm-up and decay are counted in samples.

    `muon_lr`: above 0 the matrices in a denoiser's blocks are Muon's, with this rate where AdamW's is `lr`.
    """

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
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas={list(self.betas)} must be at least 0 and below 1")
        for key in ("eps", "weight_decay", "final_lr"):
            if getattr(self, key) < 0:
                raise InputError(f"optimizer.{key}={getattr(self, key)} must not be negative")
        if self.clip < 0:
            raise InputError(f"optimizer.clip={self.clip} must be positive, or 0 for no clipping")
        if self.muon_lr < 0:
            raise InputError(f"optimizer.muon_lr={self.muon_lr} must be positive, such as 0.03, or 0 for AdamW alone")
        if self.warmup_samples < 0:
            raise InputError(f"optimizer.warmup_samples={self.warmup_samples} can't be negative")


@dataclass
class EMAConfig:
    """`widths`: relative standard deviations of the power profiles, the first is the one that is sampled from;
    `half_life`: in samples. Every `snapshot_every_samples` (0: never) the averages are stored for later reconstruction.
    """

    kind: str = choice("power", "half_life")
    widths: list[float] = field(default_factory=lambda: [0.05, 0.10])
    half_life: int = 500_000
    snapshot_every_samples: int = 0

    def __post_init__(self) -> None:
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise InputError(f"ema.widths={self.widths} must be one or several different widths, such as [0.05, 0.10]")
        for width in self.widths:
            if not 0 < width < 0.28:
                raise InputError(f"ema.widths={self.widths}: each must lie between 0 and 0.28, such as 0.05 or 0.10")
        if self.half_life < 1:
            raise InputError(f"ema.half_life={self.half_life} must be at least 1 sample")
        if self.snapshot_every_samples < 0:
            raise InputError(f"ema.snapshot_every_samples={self.snapshot_every_samples} can't be negative; 0 is never")
