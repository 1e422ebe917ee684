"""Muon: for whole matrices AdamW is replaced by momentum whose singular values are all brought near one.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Nesterov's momentum as there.

ZeRO leaves no rank a whole matrix, and every rank making all of them would waste what sharding saves. So each rank is
sent the parts of the updates that are its share, makes those matrices, and sends every rank its parts of the results.
At stages 1 and 2 a rank's partition is a run of whole matrices but for its ends, and these are its share: it sends
little. At stage 0 all have the updates, and all of the results are gathered. What is computed depends on no partition
(promise 1).

A convolution [out, in, height, width] is a matrix [out, in·height·width].
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ldt.dist import World, all_gather, all_gather_tensor, exchange
from ldt.engine.partition import Partition

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 3


def orthogonalised(update_KSL: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U·p(S)·Vᵀ of each update U·S·Vᵀ of a batch: singular values between about 0.6 and 1.2, but for the smallest.

    update_KSL: float32, the short side before the long one; dtype: of the products. Three steps of the quintic
    iteration x ← (a + b·xxᵀ + c·(xxᵀ)²)·x, from a Frobenius norm of 1.
    """
    x_KSL = (update_KSL / (update_KSL.flatten(1).norm(dim=1)[:, None, None] + 1e-12)).to(dtype)
    if 2 * x_KSL.shape[2] > 3 * x_KSL.shape[1] and dtype == torch.float32 and x_KSL.device.type == "cpu":
        return _product_of_steps(x_KSL @ x_KSL.mT) @ x_KSL
    for _ in range(STEPS):
        x_KSL = _factor(x_KSL @ x_KSL.mT) @ x_KSL
    return x_KSL.float()


def _factor(gram_KSS: Tensor) -> Tensor:
    """What a step multiplies x by: a + b·g + c·g² with g = xxᵀ."""
    a, b, c = NEWTON_SCHULZ
    factor_KSS = torch.baddbmm(gram_KSS, gram_KSS, gram_KSS, beta=b, alpha=c)
    factor_KSS.diagonal(dim1=1, dim2=2).add_(a)
    return factor_KSS


def _product_of_steps(gram_KSS: Tensor) -> Tensor:
    """What all steps together multiply a long x by: products of the short side alone, which needs float32's digits.

    A step's factor f commutes with g = xxᵀ, of which it makes f·g·f.
    """
    product_KSS = factor_KSS = _factor(gram_KSS)
    for _ in range(STEPS - 1):
        gram_KSS = factor_KSS @ gram_KSS @ factor_KSS
        factor_KSS = _factor(gram_KSS)
        product_KSS = factor_KSS @ product_KSS
    return product_KSS


def _joined(parts: list[tuple[int, Tensor]]) -> Tensor:
    """The parts of a flat tensor, each with its start, in one; a single one is not copied."""
    tensors = [part for _, part in sorted(parts, key=lambda part: part[0])]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def share_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank makes which matrix: of all numbers in a row, cut into equal parts, the one that has its middle."""
    total, before, makers = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        makers[name] = (2 * before + size) * ranks // (2 * total)
        before += size
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
        self.fragments = {f.name: f for f in partition.load_targets() if f.name in stacked}
        self.places = all_gather({f.name: (f.start, f.count) for f in self.fragments.values() if f.count})
        self.makers = share_out({name: math.prod(shape) for name, shape in self.shapes.items()}, world.size)

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
        made = self._make(self._wholes(names, owners, ahead))
        for name, update in self._parts(names, made, owners[0]):
            self.fragments[name].master.addcmul_(update, applied, value=-lr)

    def _is_in(self, owner: Tensor | None, owners: Sequence[Tensor]) -> bool:
        """At stages 1 and 2 all matrices are in one flat group, and of other ranks' there is no owner here."""
        return self.stage in (1, 2) or any(owner is one for one in owners)

    def _pieces(self, names: list[str], holder: int, maker: int) -> list[tuple[str, int, int]]:
        """Name, start and count of what one rank holds of the matrices that another one makes."""
        places = self.places[holder]
        return [(name, *places[name]) for name in names if self.makers[name] == maker and name in places]

    def _wholes(self, names: list[str], owners: Sequence[Tensor], ahead: list[Tensor]) -> dict[str, Tensor]:
        """The whole updates of those matrices that this rank makes."""
        rank, ranks = self.world.rank, range(self.world.size)
        if self.stage == 0:
            by_owner = {id(owner): update for owner, update in zip(owners, ahead, strict=True)}
            mine = [name for name in names if self.makers[name] == rank]
            return {name: by_owner[id(self.owners[name])].reshape(self.shapes[name]) for name in mine}
        (update,) = ahead  # of a flat group
        held = [[self.fragments[n].slice_of(update) for n, _, _ in self._pieces(names, rank, r)] for r in ranks]
        coming = [self._pieces(names, r, rank) for r in ranks]
        received = exchange(held, [[count for *_, count in of_rank] for of_rank in coming], update)
        parts = defaultdict(list)
        for (name, start, _), part in zip(chain(*coming), chain(*received), strict=True):
            parts[name].append((start, part))
        return {name: _joined(of_name).view(self.shapes[name]) for name, of_name in parts.items()}

    def _parts(self, names: list[str], made: Mapping[str, Tensor], like: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Of every matrix that is made by some rank, the part that this one holds."""
        rank, ranks = self.world.rank, range(self.world.size)
        if self.stage == 0 and self.world.size > 1:  # a gather crosses the network once, an exchange to each rank
            by_maker = [[n for n in names if self.makers[n] == r] for r in ranks]
            sizes = [[math.prod(self.shapes[n]) for n in of_rank] for of_rank in by_maker]
            own = torch.cat([made[n].view(-1) for n in by_maker[rank]] + [like.new_empty(0)])
            own = torch.nn.functional.pad(own, (0, max(map(sum, sizes)) - len(own)))
            for of_rank, counts, row in zip(by_maker, sizes, all_gather_tensor(own), strict=True):
                yield from zip(of_rank, row[: sum(counts)].split(counts), strict=True)
            return
        going = [[made[n].view(-1)[start : start + c] for n, start, c in self._pieces(names, r, rank)] for r in ranks]
        coming = [self._pieces(names, rank, r) for r in ranks]
        received = exchange(going, [[count for *_, count in of_rank] for of_rank in coming], like)
        yield from zip((name for name, *_ in chain(*coming)), chain(*received), strict=True)

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
