"""Where DeepSpeed keeps this rank's share of the float32 weights and of the optimizer's moments.

At every ZeRO stage a rank owns one contiguous range of each flattened parameter, so a model is fully described by
`Fragment`s: (parameter, start, count). EMA and checkpoints are written in terms of fragments and need not know the
stage. This file touches DeepSpeed's private attributes; the cases of `tests/test_engine.py` fail when a new
version moves them.

    stage 0     all of it is on every rank; rank r owns the r-th slice of the concatenated parameters
    stage 1, 2  `param._hp_mapping` says which part of the flat float32 group is this parameter's
    stage 3     `optimizer.grad_position` does
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of the flattened parameter `name`; `count` may be 0 on this rank."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    owner: Tensor | None  # the tensor that the optimizer updates: a flat group, or the parameter itself at stage 0
    offset: int  # of the fragment in the flattened owner

    def slice_of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements in a tensor laid out like the owner: a view, 1-D."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]

    @property
    def master(self) -> Tensor:
        """The fragment's float32 weights: a view, 1-D."""
        assert self.owner is not None
        return self.slice_of(self.owner)


class Partition:
    """The fragments of a DeepSpeed engine, and what is needed to write to them.

    matrices: the parameters that Muon steps, which have a momentum and no second moment.
    """

    def __init__(self, engine: Any, stage: int, matrices: Collection[str] = ()) -> None:
        self.engine = engine
        self.stage = stage
        self.matrices = frozenset(matrices)
        self.all = list(_FIND[stage](engine))
        self.owned = [f for f in self.all if f.count]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and full shape of every trainable parameter, in the model's order."""
        return {f.name: f.shape for f in self.all}

    def load_targets(self) -> list[Fragment]:
        """What must be loaded on this rank: its own fragments, or at stage 0 the whole replica."""
        if self.stage > 0:
            return self.owned
        parameters = dict(self.engine.module.named_parameters())
        return [Fragment(f.name, f.shape, 0, parameters[f.name].numel(), parameters[f.name], 0) for f in self.all]

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Adam's moments of a fragment, of Muon's matrices the momentum alone: 1-D views."""
        state, kinds = self._state(fragment), MOMENTS[:1] if fragment.name in self.matrices else MOMENTS
        return {k: fragment.slice_of(state[k]) for k in kinds}

    def gradients(self) -> list[Tensor]:
        """This rank's share of the averaged gradient, between the last backward pass and the step.

        Together the ranks hold every element once, at stage 0 each holds all of them; padding is zero.
        """
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return [p.grad for _, p in _trainable(self.engine) if p.grad is not None]
        if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # bf16 at stage 1
            return list(optimizer.fp32_groups_gradient_flat_partition)
        return [g for group in optimizer.averaged_gradients.values() for g in group if g is not None]

    def forget_gradients(self) -> None:
        """Before the first backward pass of a step: at stage 3 a parameter that the step does not use would keep the
        gradient of an earlier one, which would count in the norm.
        """
        if self.stage == 3:
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def optimizer_steps(self) -> int:
        """How many steps the optimizer has taken; 0 before the first."""
        return max((int(s["step"]) for s in self._base_optimizer().state.values() if "step" in s), default=0)

    def init_optimizer_state(self, steps: int) -> None:
        """Make Adam's state (it appears at the first step otherwise), ready to be filled from a checkpoint."""
        optimizer = self._base_optimizer()
        for p in self._owners():
            optimizer.state[p] = {"step": torch.tensor(float(steps), device=p.device)}
            optimizer.state[p] |= {k: torch.zeros_like(p, dtype=torch.float32).detach() for k in MOMENTS}
        if self.stage in (1, 2):  # the parameters' own links into the state
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def sync_model_weights(self) -> None:
        """Model weights ← float32 masters, on all ranks (collective)."""
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer.checkpoint_event_prologue()  # partitions the parameters that are kept whole
            for i in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            optimizer.checkpoint_event_epilogue()

    @contextmanager
    def using_weights(self, average: list[Tensor]) -> Iterator[None]:
        """Run the block with `average` (one tensor an owned fragment) in place of the weights (collective)."""
        if self.stage == 0:
            saved = [f.owner.detach().clone() for f in self.load_targets() if f.owner is not None]
            _spread(self.load_targets(), self.owned, average)
        else:
            saved = [f.master.clone() for f in self.owned]
            for f, value in zip(self.owned, average, strict=True):
                f.master.copy_(value)
            self.sync_model_weights()
        try:
            yield
        finally:
            for f, value in zip(self.load_targets(), saved, strict=True):
                f.master.copy_(value.view(-1))
            self.sync_model_weights()

    def _owners(self) -> list[Tensor]:
        """All tensors that the optimizer updates on this rank; between steps stage 3 hides them from it."""
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._base_optimizer().param_groups for p in group["params"]]

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def _state(self, fragment: Fragment) -> dict[str, Tensor]:
        assert fragment.owner is not None
        return self._base_optimizer().state[fragment.owner]


def _spread(whole: list[Fragment], owned: list[Fragment], values: list[Tensor]) -> None:
    """Fill the whole replica from the values that the ranks own, one parameter at a time (collective)."""
    mine = {f.name: (f, value) for f, value in zip(owned, values, strict=True)}
    for f in whole:
        assert f.owner is not None
        full = torch.zeros(f.count, dtype=torch.float32, device=f.owner.device)
        if f.name in mine:
            fragment, value = mine[f.name]
            full[fragment.start : fragment.start + fragment.count] = value
        dist.all_reduce(full)
        f.master.copy_(full)


def _trainable(engine: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _fragments_stage_0(engine: Any) -> Iterator[Fragment]:
    rank, size = dist.get_rank(), dist.get_world_size()
    parameters = _trainable(engine)
    total = sum(p.numel() for _, p in parameters)
    low, high = total * rank // size, total * (rank + 1) // size
    position = 0
    for name, p in parameters:
        start, stop = max(low - position, 0), min(high - position, p.numel())
        count = max(stop - start, 0)
        yield Fragment(name, tuple(p.shape), start if count else 0, count, p, start if count else 0)
        position += p.numel()


def _fragments_stage_1_2(engine: Any) -> Iterator[Fragment]:
    groups = engine.optimizer.optimizer.param_groups
    for name, p in _trainable(engine):
        mapping = p._hp_mapping
        if mapping is None:  # another rank's
            yield Fragment(name, tuple(p.shape), 0, 0, None, 0)
            continue
        flat = groups[mapping.param_group_index]["params"][0]
        local, master = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Fragment(name, tuple(p.shape), local.start, local.numel, flat, master.start)


def _fragments_stage_3(engine: Any) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for name, p in _trainable(engine):
        group, offset, share = optimizer.grad_position[optimizer.get_param_id(p)]
        start = min(share * optimizer._get_param_partition_rank(p), p.ds_numel)
        count = min(share, p.ds_numel - start)  # the last share is padded
        yield Fragment(name, tuple(p.ds_shape), start, count, optimizer.fp32_partitioned_groups_flat[group], offset)


_FIND: dict[int, Callable[[Any], Iterator[Fragment]]] = {
    0: _fragments_stage_0,
    1: _fragments_stage_1_2,
    2: _fragments_stage_1_2,
    3: _fragments_stage_3,
}
