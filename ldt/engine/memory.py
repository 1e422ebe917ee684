"""What a training step holds in memory: weights, gradients, moments and averages by ZeRO stage, saved activations.

Sizes in bytes. The state's follow from what DeepSpeed 0.19 allocates (docs/plan.md); the activations' are those that
autograd keeps, taken from a forward pass of tensors without content. BENCHMARKS.md compares both with measured runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldt.diffusion.condition import Condition
from ldt.engine.config import at_work
from ldt.errors import InputError
from ldt.nn.build import build, checkpoint_blocks
from ldt.nn.config import ModelConfig
from ldt.nn.text_shape import TextShape

BUCKET = 100_000_000
"""Gradients that are reduced together; DeepSpeed keeps buffers of that many numbers."""

ROOM = 0.8
"""What an automatic micro-batch fills of the memory that is left beside the state."""


@dataclass(frozen=True)
class State:
    """Bytes on a rank. persistent: between steps; peak: with gradients and what reducing and gathering needs."""

    persistent: int
    peak: int


def state_bytes(
    parameters: int, stage: int, precision: str, ranks: int, averages: int, micro_batches: int = 1
) -> State:
    """Memory for `parameters` at a ZeRO stage (Rajbhandari et al. 1910.02054, section 5), DeepSpeed's buffers included.

    precision: fp32 or bf16, that of the weights the network computes with; masters, moments and averages are fp32.
    """
    stage, summed = at_work(stage, precision, ranks, micro_batches)
    width = 2 if precision == "bf16" else 4
    bucket = width * min(parameters, BUCKET)
    weights, master, moments = width * parameters, 4 * parameters, 8 * parameters
    average = 4 * averages * parameters // ranks
    if stage == 0:  # the weights are the masters; gradients, and a flat copy of them for the all-reduce
        persistent = master + moments + average
        return State(persistent, persistent + (2 if ranks > 1 else 1) * master)
    if stage == 3:  # small models stay gathered from the forward to the backward pass
        persistent = (weights + master + moments) // ranks + average
        return State(persistent, persistent + 2 * weights + 2 * bucket + 2 * master // ranks)
    persistent = weights + (master + moments) // ranks + average
    if stage == 2:
        copy = summed * min(parameters, BUCKET) if summed > width else 0
        return State(persistent, persistent + 2 * bucket + copy + 2 * master // ranks)
    if precision == "bf16":  # gradients of all weights in float32 beside those in bf16, and two flat copies
        return State(persistent + master, persistent + master + weights + 2 * master)
    return State(persistent, persistent + weights + 2 * bucket)


def muon_bytes(parameters: int, stage: int, ranks: int) -> int:
    """At work in a step of Muon's, beside what lasts: this rank's share of the updates, raw and made, and what it sends
    and gets of both. At stage 0 it holds all updates, raw and made.
    """
    return (8 * parameters if stage == 0 else 0) + 16 * parameters // ranks


@dataclass(frozen=True)
class Activations:
    """Bytes that one sample leaves for the backward pass: with all blocks' `kept`, and what each block can save of it.

    The blocks are in the order in which they are recomputed, the wide head's last.
    """

    kept: int
    saves: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return len(self.saves)

    @property
    def recomputed(self) -> int:
        """Bytes a sample that are kept when every block is recomputed."""
        return self.kept - sum(self.saves)

    def of(self, samples: int, recomputed_blocks: int) -> int:
        """Bytes that a micro-batch keeps, where so many blocks keep only what enters them, and one is recomputed."""
        saved = self.saves[:recomputed_blocks]
        return samples * (self.kept - sum(saved) + max(saved, default=0))

    def share(self, recomputed_blocks: int) -> float:
        """The fraction of all blocks' work that is done again."""
        return sum(self.saves[:recomputed_blocks]) / sum(self.saves)

    def blocks_to_recompute(self, samples: int, budget: float, at_least: int = 0) -> int:
        """The fewest blocks that keep a micro-batch within the budget; `InputError` if all are too few."""
        for blocks in range(at_least, self.blocks + 1):
            if self.of(samples, blocks) <= budget:
                return blocks
        raise InputError(
            f"a micro-batch of {samples} keeps {self.of(samples, self.blocks) / 1e9:.3g} GB of activations even with "
            f"every block computed again, and there is room for {budget / 1e9:.3g} GB (engine.activation_memory_gb, or "
            "what the state leaves of the memory); lower train.micro_batch, allow more, or use more ranks"
        )

    def fit(self, micro_batch: int | str, share: int, budget: float, at_least: int = 0) -> tuple[int, int]:
        """The samples of a micro-batch (`train.micro_batch`, of a rank's share), and the blocks to recompute."""
        auto = micro_batch == "auto"
        samples = self.largest(share, budget, at_least) if auto else min(int(micro_batch) or share, share)
        return samples, self.blocks_to_recompute(samples, budget, at_least)

    def settle(
        self,
        micro_batch: int | str,
        share: int,
        state_of: Callable[[int], State],
        budget: Callable[[State], float],
        at_least: int = 0,
    ) -> tuple[State, int, int]:
        """`fit`, and the state beside which it fits, which may be larger in a step of several micro-batches.

        state_of: of the number of micro-batches. budget: bytes for activations beside a state.
        """
        for micro_batches in (1, 2):
            state = state_of(micro_batches)
            samples, blocks = self.fit(micro_batch, share, budget(state), at_least)
            if samples >= share:
                break
        return state, samples, blocks

    def largest(self, samples: int, budget: float, at_least: int = 0) -> int:
        """The largest micro-batch up to `samples` that fits; more blocks are recomputed only if one sample needs it."""
        each = self.of(1, at_least) if self.of(1, at_least) <= budget else self.of(1, self.blocks)
        return max(1, min(samples, int(budget // each)))


def activations(
    config: ModelConfig,
    latent_shape: tuple[int, int, int],
    classes: int,
    text: TextShape | None,
    precision: str,
    kind: str = "cpu",
) -> Activations:
    """What a denoiser keeps in training, run eagerly; compiled code keeps less.

    kind: cpu or cuda, whose kernels save less. What a deep Transformer keeps follows from two shallow ones, for blocks
    are alike (with long skips those of each half). What a wide head's blocks save is what is left when all others are
    recomputed.
    """

    def saved(depth: int, recomputed: bool, head: int) -> int:
        blocks = depth if config.name == "transformer" else 1
        shallow = dataclasses.replace(
            config, depth=depth, init="dit", inner_head=min(config.inner_head, 1)
        )  # which costs no time here
        return _saved_bytes(shallow, latent_shape, classes, text, precision, kind, blocks + head if recomputed else 0)

    def extrapolated(recomputed: bool, head: int = 0) -> int:
        first = 2 + config.depth % 2
        if config.name != "transformer" or config.depth <= first + 2:
            return saved(config.depth, recomputed, head)
        low, high = saved(first, recomputed, head), saved(first + 2, recomputed, head)
        return low + (config.depth - first) // 2 * (high - low)

    kept, narrow, head = extrapolated(False), extrapolated(True), config.head.depth
    blocks = config.depth if config.name == "transformer" else 1
    saves = ((kept - narrow) // blocks,) * blocks
    if head:
        saves += ((narrow - extrapolated(True, head)) // head,) * head
    return Activations(kept, saves)


def _saved_bytes(
    config: ModelConfig,
    latent_shape: tuple[int, int, int],
    classes: int,
    text: TextShape | None,
    precision: str,
    kind: str,
    recomputed_blocks: int,
) -> int:
    """Bytes of all storages that autograd saves in one sample's forward pass, the parameters' own left out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        model = training_model(build(config, latent_shape, classes, seed=0, text=text), precision, kind)
        checkpoint_blocks(model, recomputed_blocks)
        words = no_text(text, 1) if config.uses_text else None
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            condition = Condition(torch.zeros(1, dtype=torch.int64), words)
            inputs = (torch.zeros(1, *latent_shape), torch.zeros(1), condition)
            outputs = model(*inputs, inner=True) if config.inner_head else (model(*inputs),)
            _loss = sum(y.square().mean() for y in outputs)
        own = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def training_model(model: nn.Module, precision: str, kind: str) -> nn.Module:
    """A model without content as it trains: its weights' dtype and, of kind cuda, norms like CUDA's."""
    if precision == "bf16":
        _to_bfloat16(model)
    if kind == "cuda":
        _fuse_norms(model)
    return model


def no_text(text: TextShape | None, samples: int) -> torch.Tensor | None:
    """Captions of that shape without text."""
    if text is None:
        return None
    shape = (samples, text.length) if text.vocabulary else (samples, text.length, text.width)
    return torch.zeros(shape, dtype=torch.int64 if text.vocabulary else torch.float32)


class _FusedRMSNorm(torch.autograd.Function):
    """Saves what CUDA's kernel does: the input, the weight and one float32 a row; the CPU's keeps three float32 copies.

    It also reads and writes as much, whatever the values. A torch without CUDA can't run that kernel even on tensors
    without content.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return x + grads[0], None if weight is None else torch.zeros_like(weight)


def _fuse_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = functools.partial(_apply_norm, module)  # type: ignore[method-assign]


def _apply_norm(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _FusedRMSNorm.apply(x, norm.weight)
    return out


def _to_bfloat16(model: nn.Module) -> None:
    """Like `model.bfloat16()`, which does not work on tensors without content."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().bfloat16(), p.requires_grad))
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, b.bfloat16() if b.is_floating_point() else b)


def available(device: torch.device, local_ranks: int) -> int:
    """Bytes that this rank may still take: of its GPU, or its part of the node's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 // local_ranks
