"""A few steps of a tiny model in plain PyTorch, which every engine's are compared with."""

import torch

from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.dist import all_gather
from ldt.engine.config import OptimizerConfig
from ldt.nn.build import build
from ldt.nn.config import ModelConfig

BATCH, STEPS, LR = 12, 6, 2e-3
MODEL = ModelConfig(width=32, depth=2, heads=2)
OBJECTIVE = Objective(ObjectiveConfig())
OPTIMIZER = OptimizerConfig(lr=LR, clip=0.3, weight_decay=0.1)


def data(step):
    g = torch.Generator().manual_seed(step)
    x0, noise = (torch.randn(BATCH, 4, 8, 8, generator=g) for _ in range(2))
    return x0, noise, torch.rand(BATCH, generator=g), torch.randint(0, 11, (BATCH,), generator=g)


def loss_B(denoiser, batch):
    x0, noise, t, label = batch
    return OBJECTIVE.loss(denoiser, x0, noise, t, Condition(label))


def reference():
    """Losses, gradient norms, final weights and their running average of plain PyTorch on the whole batch."""
    model = build(MODEL, (4, 8, 8), 10, seed=0)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = []
    for step in range(STEPS):
        loss = loss_B(model, data(step)).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        adam.step()
        steps.append((float(loss.detach()), float(norm)))
        for n, p in model.named_parameters():
            average[n].lerp_(p.detach(), 0.5)
    return steps, {n: p.detach() for n, p in model.named_parameters()}, average


def gather(partition, values):
    """Full tensors by name from what the ranks own; every element owned exactly once."""
    parts = [(f.name, f.start, v.detach().tolist()) for f, v in zip(partition.owned, values, strict=True)]
    full = {n: torch.full((int(torch.tensor(s).prod()),), torch.nan) for n, s in partition.shapes().items()}
    for name, start, numbers in (part for parts_of_rank in all_gather(parts) for part in parts_of_rank):
        assert full[name][start : start + len(numbers)].isnan().all(), f"{name} is owned twice"
        full[name][start : start + len(numbers)] = torch.tensor(numbers)
    return {n: v.view(partition.shapes()[n]) for n, v in full.items()}


def distance(ours, theirs):
    """Root mean square difference of all weights relative to their root mean square."""
    a, b = (torch.cat([x[n].flatten() for n in theirs]) for x in (ours, theirs))
    return float((a - b).norm() / b.norm())
