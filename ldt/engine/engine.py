"""The training engine: DeepSpeed's ZeRO around a denoiser, and one function that makes an optimizer step.

Everything about DeepSpeed is in this file and in `partition`. The engine is told its learning rate at every step, so
it has no schedule and no clock of its own.
"""

import contextlib
import inspect
import io
import math
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ldt.cluster.gpus import choose_arithmetic
from ldt.dist import World, all_reduce_sum
from ldt.engine.config import EngineConfig, OptimizerConfig, at_work
from ldt.engine.memory import BUCKET
from ldt.engine.muon import Muon
from ldt.engine.partition import Partition
from ldt.nn.block import Block
from ldt.nn.build import compile_blocks, matrices_of, parameter_count

MicroBatch = TypeVar("MicroBatch")

FLOAT32_MAX = float(torch.finfo(torch.float32).max)


class StepResult(NamedTuple):
    """What a step reports to the training loop.

    loss: mean over the global batch; grad_norm: before clipping; applied: whether the weights were changed;
    sums: over all ranks, of what each gave as `votes`.
    """

    loss: float
    grad_norm: float
    applied: bool
    sums: list[float]


class QueuedStep:
    """A step that the device has been told to make, whose result the host has not looked at yet."""

    def __init__(self, numbers: Tensor) -> None:
        """numbers: float64 on the device: whether it is applied, its loss, its gradient's squared norm, the sums."""
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event() if numbers.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def result(self) -> StepResult:
        """Wait until the result has come, but for nothing that the device was told to do after it."""
        if self._copied is not None:
            self._copied.synchronize()
        applied, loss, squared_norm, *sums = self._host.tolist()
        return StepResult(loss, squared_norm**0.5, bool(applied), sums)


class _AdamW(torch.optim.AdamW):
    """AdamW that skips steps and clips gradients as the device decides, and leaves matrices to Muon.

    DeepSpeed calls it deep inside of its own step, at every stage alike: at 0 for all groups, else for one at a time.
    """

    found_inf: Tensor  # as torch's fused kernel reads it: 1 for a step that changes nothing, else 0
    grad_scale: Tensor | None = None  # the same: what all gradients are divided by
    muon: Muon

    # without torch's decorators, which keep its compiler out of them and import it (2 s) to do so
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    _step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def step(self, closure: Any = None) -> Any:
        matrices = [(group, group["params"]) for group in self.param_groups if group["muon"]]
        for group, owners in matrices:
            if owners:
                gradients = [owner.grad for owner in owners]
                if self.grad_scale is not None:
                    torch._foreach_div_(gradients, self.grad_scale)
                lr = group["lr"]
                self.muon.step(owners, self.state, lr * group["muon"], lr * group["weight_decay"], 1 - self.found_inf)
            group["params"] = []
        self._step(closure)
        for group, owners in matrices:
            group["params"] = owners


class Engine:
    """A denoiser under DeepSpeed. `module` is the wrapped denoiser for forward passes on all ranks together."""

    def __init__(
        self, denoiser: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, world: World, micro_batches: int
    ) -> None:
        """micro_batches: the most that a step may have, on all ranks alike."""
        self.world = world
        self.micro_batches = micro_batches
        settings = _deepspeed_config(config, micro_batches, parameter_count(denoiser), world)
        config = replace(config, zero_stage=settings["zero_optimization"]["stage"])
        deepspeed = _import_deepspeed(world.device)
        denoiser.to(world.device)
        if config.compile:
            compile_blocks(denoiser)
            if config.zero_stage == 3:  # its hooks inside of a block would break the compiled code apart
                deepspeed.utils.set_z3_leaf_modules(denoiser, [Block])
        choose_arithmetic(config.deterministic, tf32=world.device.type == "cuda" and not config.deterministic)
        matrices = matrices_of(denoiser) if optimizer.muon_lr else {}
        self._adam = _AdamW(
            parameter_groups(denoiser, optimizer, matrices),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._clip = optimizer.clip
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use
            warnings.simplefilter("ignore")  # it imports parts of torch that complain about themselves
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=denoiser,
                optimizer=self._adam,
                config=settings,
            )
        if world.size == 1 and config.zero_stage == 0:  # it would flatten all gradients and copy them back
            self.deepspeed.enable_backward_allreduce = False
        self.module: nn.Module = self.deepspeed
        self.bare: nn.Module = self.deepspeed.module  # for passes without gradients of one rank alone; not at stage 3
        self.partition = Partition(self.deepspeed, config.zero_stage, matrices)
        if matrices:
            self._adam.muon = Muon(self.partition, matrices, world, config.precision)
        self.partition.init_optimizer_state(0)
        self.mark: Callable[[str], None] = lambda phase: None  # called when a phase of a step ends; benchmarks set it

    def gradients(
        self,
        micro_batches: Sequence[MicroBatch],
        weighted_loss: Callable[[nn.Module, MicroBatch], Tensor],
        global_batch: int,
    ) -> None:
        """Queue the forward and backward passes of a step, which `apply` must follow.

        weighted_loss: the weighted sum of a micro-batch's per-sample losses, a scalar. DeepSpeed divides the gradient
        by the number of ranks and of micro-batches that it was told at the start, ours is the mean over the global
        batch: the factor below makes up the difference exactly, whatever the split.
        """
        count = len(micro_batches)
        assert 0 < count <= self.micro_batches, (count, self.micro_batches)
        factor = self.world.size * self.micro_batches / global_batch
        self._total, self._global_batch = torch.zeros((), dtype=torch.float64, device=self.world.device), global_batch
        self.partition.forget_gradients()
        for i, batch in enumerate(micro_batches):
            if i:
                self.deepspeed.step()  # only counts micro-batches until the last
            self.deepspeed.set_gradient_accumulation_boundary(i + 1 == count)
            loss = weighted_loss(self.module, batch)
            self._total += loss.detach()
            self.mark("forward")
            self.deepspeed.backward(loss * factor)
            self.mark("backward")

    def apply(self, lr: float, loss_limit: float = math.inf, votes: Sequence[int] = ()) -> QueuedStep:
        """Queue the change of the weights by the gradients that were made last (collective).

        One all-reduce tells every rank the loss, the gradient's norm and the sums of `votes` (exact for integers below
        2⁵³). If loss or norm are not finite, or the loss is above `loss_limit`, no rank applies the step: weights,
        moments and Adam's step count stay as they are. The device decides, so the host need not wait for it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shares = torch.cat([torch.stack([self._total, self._squared_norm()]), self._on_device(votes)])
        total, squared_norm, *sums = all_reduce_sum(shares).unbind()
        loss = total / self._global_batch
        # a norm that overflows in float32 is a bad step too
        applied = loss.isfinite() & (squared_norm < FLOAT32_MAX) & (loss <= loss_limit)
        self._adam.found_inf = applied.logical_not().float()
        if self._clip:
            self._adam.grad_scale = ((squared_norm.sqrt() + 1e-6) / self._clip).clamp(min=1.0).float()
        queued = QueuedStep(torch.stack([applied, loss, squared_norm, *sums]))
        self.mark("check")
        self.deepspeed.step()
        self.mark("optimizer")
        return queued

    def drop_gradients(self) -> None:
        """Forget the gradients that were made last, as if there had been no such step (collective)."""
        self.apply(0.0, loss_limit=-math.inf)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        """Copy numbers to the device as float64, from pinned memory, so that the host does not wait."""
        cuda = self.world.device.type == "cuda"
        return torch.tensor(numbers, dtype=torch.float64, pin_memory=cuda).to(self.world.device, non_blocking=True)

    def _squared_norm(self) -> Tensor:
        """This rank's share of the gradient's squared norm: a float64 scalar."""
        norms = torch._foreach_norm(self.partition.gradients(), 2, torch.float32)
        squared = torch.stack(norms).double().square().sum()
        return squared / self.world.size if self.partition.stage == 0 else squared


def parameter_groups(
    denoiser: nn.Module, optimizer: OptimizerConfig, matrices: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Matrices decay, and some are Muon's; vectors (biases, norms) do not. muon: its learning rate by AdamW's."""
    named = [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]
    decay, muon = optimizer.weight_decay, optimizer.muon_lr / optimizer.lr
    groups = [
        {"params": [p for name, p in named if name in matrices], "weight_decay": decay, "muon": muon},
        {"params": [p for name, p in named if p.ndim >= 2 and name not in matrices], "weight_decay": decay, "muon": 0},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0, "muon": 0},
    ]
    return [g for g in groups if g["params"]]


def _deepspeed_config(config: EngineConfig, micro_batches: int, parameters: int, world: World) -> dict[str, Any]:
    """Norm, clipping and the look for overflow are `Engine.apply`'s: each of DeepSpeed's own waits for the GPU."""
    stage, summed_bytes = at_work(config.zero_stage, config.precision, world.size, micro_batches)
    bucket = min(parameters + parameters % 2, BUCKET)  # it refuses an odd one
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only used for DeepSpeed's own reports
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": world.device.type == "cuda",
            "compute_grad_norm": stage in (0, 3) or (stage, config.precision) == (1, "bf16"),
            "memory_efficient_linear": not config.compile,  # stage 3's own linear layer can't be compiled
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "timers": {"throughput": {"enabled": False}},
    }
    if config.precision == "bf16":
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.precision == "bf16" and summed_bytes == 4:
        out["communication_data_type"] = "fp32"
        out["zero_optimization"]["reduce_scatter"] = False
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
    # an earlier engine of stage 3 in this process leaves its own behind, which has no derivative in forward mode
    torch.nn.functional.linear = torch._C._nn.linear
    deepspeed.utils.logger.setLevel("ERROR")
    # ZeRO imports DeepSpeed's own Muon to ask whether it is at work; compiled, it would import torch's compiler (2 s)
    compiler = deepspeed.runtime.compiler
    decorator, compiler.compile = compiler.compile, lambda: lambda function: function
    import deepspeed.runtime.zero.muon.original_muon

    compiler.compile = decorator
    for module in (deepspeed.runtime.bf16_optimizer, deepspeed.runtime.zero.stage3):
        assert callable(module.is_invalid_grad_norm), module  # it reads the norm a second time, after `Engine.apply`
        module.is_invalid_grad_norm = lambda norm: False
    return deepspeed
