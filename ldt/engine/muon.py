"""Muon: for whole matrices AdamW is replaced by momentum whose singular values are all brought near one.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Nesterov's momentum as there.

ZeRO leaves no rank a whole matrix, and every rank making all of them would waste what sharding saves. So the parts of
the updates are gathered, each rank makes the matrices that are its share, and the results are gathered again: twice
the matrices' size in float32 is sent in a step more than with AdamW. What is computed depends on no partition
(promise 1).

A convolution [out, in, height, width] is a matrix [out, in·height·width].
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldt.dist import World, all_gather, all_gather_tensor
from ldt.engine.partition import Partition

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 3


def orthogonalised(update_KSL: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U·p(S)·Vᵀ of each update U·S·Vᵀ of a batch: singular values between about 0.6 and 1.2, but for the smallest.

    update_KSL: float32, the short side before the long one; dtype: of the products. Three steps of the quintic
    iteration x ← a·x + (b·xxᵀ + c·(xxᵀ)²)·x, from a Frobenius norm of 1.
    """
    a, b, c = NEWTON_SCHULZ
    x_KSL = (update_KSL / (update_KSL.flatten(1).norm(dim=1)[:, None, None] + 1e-12)).to(dtype)
    for _ in range(STEPS):
        gram_KSS = x_KSL @ x_KSL.mT
        gram_KSS = torch.baddbmm(gram_KSS, gram_KSS, gram_KSS, beta=b, alpha=c)
        x_KSL = torch.baddbmm(x_KSL, gram_KSS, x_KSL, beta=a)
    return x_KSL.float()


def share_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank makes which matrix: the largest first, each to the rank that has least to do."""
    load = [0] * ranks
    makers = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        makers[name] = load.index(min(load))
        load[makers[name]] += size
    return makers


class Muon:
    """Steps for the matrices of a partition. stacked: their names, and how many are stacked in each (qkv: 3).

    precision: the engine's. Under bf16 a GPU makes the products in bf16 as well, which is enough for them (Jordan et
    al.); a float32 run stays one.
    """

    def __init__(self, partition: Partition, stacked: Mapping[str, int], world: World, precision: str) -> None:
        self._dtype = torch.bfloat16 if precision == "bf16" and world.device.type == "cuda" else torch.float32
        self.world, self.stage, self.stacked = world, partition.stage, stacked
        self.shapes = {
            name: (shape[0], math.prod(shape[1:])) for name, shape in partition.shapes().items() if name in stacked
        }
        self.owners = {f.name: f.owner for f in partition.all if f.name in stacked}
        self.fragments = [f for f in partition.load_targets() if f.name in stacked]
        self.places = all_gather({f.name: (f.start, f.count, f.offset) for f in partition.all if f.name in stacked})
        self.makers = share_out({name: rows * columns for name, (rows, columns) in self.shapes.items()}, world.size)

    @torch.no_grad()
    def step(
        self, owners: Sequence[Tensor], state: Mapping[Tensor, Any], lr: float, decay: float, applied: Tensor
    ) -> None:
        """One step of the tensors that DeepSpeed lets its optimizer update, all of matrices (collective).

        The weights lose `decay` of themselves and, in most directions, `lr` of length. applied: a scalar on the device,
        1 for a step, 0 for one that changes nothing whatever its gradients are.
        """
        ahead, skipped, share = [], applied == 0, applied * (1 - MOMENTUM)
        for owner in owners:
            momentum, gradient = state[owner]["exp_avg"], owner.grad
            assert gradient is not None
            gradient.masked_fill_(skipped, 0)
            momentum.lerp_(gradient, share)
            ahead.append(gradient.lerp(momentum, MOMENTUM))
            owner.mul_(1 - decay * applied.double())
        names = [name for name, owner in self.owners.items() if self._is_in(owner, owners)]
        wholes = self._wholes(names, owners, ahead)
        updates = self._exchange(names, self._make(wholes), applied)
        for f in self.fragments:
            if f.name in updates:
                f.master.sub_(updates[f.name].view(-1)[f.start : f.start + f.count], alpha=lr)

    def _is_in(self, owner: Tensor | None, owners: Sequence[Tensor]) -> bool:
        """At stages 1 and 2 all matrices are in one flat group, and of other ranks' there is no owner here."""
        return self.stage in (1, 2) or any(owner is one for one in owners)

    def _wholes(self, names: list[str], owners: Sequence[Tensor], ahead: list[Tensor]) -> dict[str, Tensor]:
        """The whole updates of those matrices that this rank computes."""
        mine = [name for name in names if self.makers[name] == self.world.rank]
        if self.stage == 0:
            by_owner = {id(owner): update for owner, update in zip(owners, ahead, strict=True)}
            return {name: by_owner[id(self.owners[name])].reshape(self.shapes[name]) for name in mine}
        (update,) = ahead  # of a flat group
        parts = all_gather_tensor(update)
        return {name: self._assemble(name, parts) for name in mine}

    def _assemble(self, name: str, parts: Tensor) -> Tensor:
        """Put one whole update together from the flat groups of all ranks [ranks, numbers]."""
        pieces = sorted((*place[name], rank) for rank, place in enumerate(self.places) if place[name][1])
        flat = torch.cat([parts[rank, offset : offset + count] for _, count, offset, rank in pieces])
        return flat.view(self.shapes[name])

    def _make(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Orthogonalised in batches of one shape, and longer where a matrix has more rows than columns, so that the
        outputs change as much.
        """
        made = {name: torch.empty_like(update_RC) for name, update_RC in wholes.items()}
        batches = defaultdict(list)
        for name, update_RC in wholes.items():
            count = self.stacked[name]
            for source, target in zip(update_RC.chunk(count), made[name].chunk(count), strict=True):
                rows, columns = source.shape
                pair = (source, target) if rows <= columns else (source.T, target.T)
                batches[min(rows, columns), max(rows, columns)].append((*pair, max(1.0, rows / columns) ** 0.5))
        for matrices in batches.values():
            results = orthogonalised(torch.stack([source for source, _, _ in matrices]), self._dtype)
            for result, (_, target, scale) in zip(results, matrices, strict=True):
                torch.mul(result, scale, out=target)
        return made

    def _exchange(self, names: list[str], mine: dict[str, Tensor], applied: Tensor) -> dict[str, Tensor]:
        """Gather on every rank the updates that each rank computed, or zeros for a step that is not applied."""
        made = [[name for name in names if self.makers[name] == rank] for rank in range(self.world.size)]
        sizes = [sum(math.prod(self.shapes[name]) for name in of_rank) for of_rank in made]
        device = next(owner for owner in self.owners.values() if owner is not None).device
        own = torch.zeros(max(sizes), device=device)
        if mine:
            torch.cat([mine[name].view(-1) for name in made[self.world.rank]], out=own[: sizes[self.world.rank]])
            own *= applied
        everyones = all_gather_tensor(own)
        updates: dict[str, Tensor] = {}
        for rank, of_rank in enumerate(made):
            counts = [math.prod(self.shapes[name]) for name in of_rank]
            pieces = everyones[rank, : sizes[rank]].split(counts)
            updates |= {name: x.view(self.shapes[name]) for name, x in zip(of_rank, pieces, strict=True)}
        return updates
