"""One optimizer step under DeepSpeed equals plain PyTorch at every stage and split, and weights are where we say.

This file is the canary for the private attributes of DeepSpeed that `ldt.engine.partition` reads.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.dist import World, all_gather
from ldt.engine.config import EMAConfig, EngineConfig, OptimizerConfig
from ldt.engine.ema import ShardedEMA
from ldt.engine.engine import Engine
from ldt.engine.learning_rate import learning_rate
from ldt.errors import InputError
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


def train_case(world: World, stage: int, micro_batches: int, precision: str):
    """Train on this rank's share, padded to equal micro-batches; compare with the reference."""
    engine = Engine(
        build(MODEL, (4, 8, 8), 10, seed=0), EngineConfig(stage, precision), OPTIMIZER, world, micro_batches
    )
    ema = ShardedEMA(EMAConfig(kind="half_life", half_life=BATCH), [f.master for f in engine.partition.owned])
    low, high = BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size
    rows = list(range(low, high))
    rows += [low] * (-len(rows) % micro_batches + (0 if len(rows) else micro_batches))
    weights = [1.0] * (high - low) + [0.0] * (len(rows) - high + low)
    size = len(rows) // micro_batches
    steps = []
    for step in range(STEPS):
        whole = data(step)
        batches = [
            (tuple(x[rows[i : i + size]] for x in whole), torch.tensor(weights[i : i + size]))
            for i in range(0, len(rows), size)
        ]
        result = engine.step(batches, lambda d, b: (loss_B(d, b[0]) * b[1]).sum(), LR, BATCH)
        ema.update((step + 1) * BATCH, BATCH)
        steps.append([result.loss, result.grad_norm])
        assert result.applied
    expected_steps, expected_weights, expected_average = reference()
    digits = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected_steps), rtol=digits, atol=0)
    # Adam turns the rounding of a vanishing gradient into a visible part of a step: compare to the length of one
    weights_now = gather(engine.partition, [f.master for f in engine.partition.owned])
    average_now = gather(engine.partition, ema.tensors["ema"])
    if precision == "fp32":
        torch.testing.assert_close(weights_now, expected_weights, rtol=0, atol=0.05 * LR)
        torch.testing.assert_close(average_now, expected_average, rtol=0, atol=0.05 * LR)
    assert distance(weights_now, expected_weights) < digits
    assert distance(average_now, expected_average) < digits
    assert engine.partition.optimizer_steps() == STEPS
    check_swap(engine, ema.tensors["ema"])


def skip_case(world: World, stage: int, precision: str):
    """A step that is not finite or above the limit leaves no trace, on any rank, in weights or in the optimizer."""

    def train(steps, micro_batches=2):
        engine = Engine(
            build(MODEL, (4, 8, 8), 10, seed=0), EngineConfig(stage, precision), OPTIMIZER, world, micro_batches
        )
        mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
        results = []
        for step, spoil, limit in steps:
            x0, *rest = data(step)
            if spoil:
                x0[BATCH - 1, 0, 0, 0] = spoil  # of the last rank's share
            share = [x[mine].tensor_split(micro_batches) for x in (x0, *rest)]
            results.append(
                engine.step(
                    list(zip(*share, strict=True)), lambda d, b: loss_B(d, b).sum(), LR, BATCH, limit, (world.rank,)
                )
            )
        state = [v.clone() for f in engine.partition.owned for v in (f.master, *engine.partition.moments(f).values())]
        return results, state, engine.partition.optimizer_steps()

    inf = float("inf")
    results, state, count = train([(0, 0, inf), (1, inf, inf), (2, 0, 1e-3), (3, 3e25, inf), (4, 0, inf)])
    expected, expected_state, expected_count = train([(0, 0, inf), (4, 0, inf)])
    assert [r.applied for r in results] == [True, False, False, False, True]
    assert results[2].loss > 1e-3 and not torch.isfinite(torch.tensor(results[1].loss))
    assert (results[-1].loss, results[-1].grad_norm) == (expected[-1].loss, expected[-1].grad_norm)
    assert results[0].sums == [sum(range(world.size))]
    assert count == expected_count == 2
    assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_leaves_no_trace(pool, stage, precision):
    if (stage, precision) != (0, "bf16"):  # refused, see below
        pool(2).run(skip_case, stage=stage, precision=precision)


def distance(ours, theirs):
    """Root mean square difference of all weights relative to their root mean square."""
    a, b = (torch.cat([x[n].flatten() for n in theirs]) for x in (ours, theirs))
    return float((a - b).norm() / b.norm())


def check_swap(engine, average):
    """Inside `using_weights` the model computes with the average; afterwards it is bit for bit what it was."""
    batch = data(99)

    def evaluate():
        with torch.no_grad():
            return float(loss_B(engine.module, batch).sum())

    before = evaluate()
    expected = build(MODEL, (4, 8, 8), 10, seed=0)
    expected.load_state_dict(gather(engine.partition, average))
    expected.to(next(engine.deepspeed.module.parameters()).dtype)
    with engine.partition.using_weights(average), torch.no_grad():
        inside = float(loss_B(engine.module, batch).sum())
        assert inside != before
        assert abs(inside - float(loss_B(expected, batch).sum())) < 1e-4 * abs(inside)
    assert evaluate() == before


@pytest.mark.parametrize(
    ("size", "stage", "micro_batches", "precision"),
    [
        (1, 0, 1, "fp32"),
        (1, 3, 2, "fp32"),
        (1, 1, 1, "bf16"),
        (2, 0, 2, "fp32"),
        (2, 1, 1, "fp32"),
        (2, 2, 3, "fp32"),
        (2, 3, 1, "fp32"),
        (2, 2, 1, "bf16"),
        (3, 0, 1, "fp32"),
        (3, 1, 3, "fp32"),
        (3, 2, 1, "fp32"),
        (3, 3, 2, "fp32"),
    ],
)
def test_a_step_equals_plain_pytorch(pool, size, stage, micro_batches, precision):
    pool(size).run(train_case, stage=stage, micro_batches=micro_batches, precision=precision)


def copies_case(world: World, stage: int) -> dict[str, float]:
    """How many numbers a step copies from and to flat tensors, as ZeRO's are, by operation, per parameter."""
    model = build(MODEL, (4, 8, 8), 10, seed=0)
    engine = Engine(model, EngineConfig(stage), OptimizerConfig(), world, 1)
    copied = {"cat": 0, "copy_": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            if name in copied and out.ndim == 1:
                copied[name] += out.numel()
            return out

    for step in range(3):
        engine.step([data(step)], lambda d, b: loss_B(d, b).sum(), 1e-3, BATCH)
    with Count():
        engine.step([data(3)], lambda d, b: loss_B(d, b).sum(), 1e-3, BATCH)
    return {name: count / sum(p.numel() for p in model.parameters()) for name, count in copied.items()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_process_copies_no_gradients_and_weights(pool, stage):
    assert pool(1).run(copies_case, stage=stage) == pytest.approx({"cat": 0, "copy_": 0}, abs=0.01)


def test_bf16_at_stage_0_is_refused():
    with pytest.raises(InputError, match="engine.precision=bf16 needs engine.zero_stage of 1 to 3"):
        EngineConfig(zero_stage=0, precision="bf16")


def test_learning_rate_is_a_function_of_samples():
    config = OptimizerConfig(lr=1.0, warmup_samples=100, decay="cosine", final_lr=0.2)
    assert learning_rate(config, 50, 1100) == 0.5
    assert learning_rate(config, 100, 1100) == 1.0
    assert learning_rate(config, 350, 1100) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 600, 1100) == pytest.approx(0.6)
    assert learning_rate(config, 1100, 1100) == pytest.approx(0.2)
    assert learning_rate(OptimizerConfig(lr=1.0, decay="linear"), 250, 1000) == 0.75
    assert learning_rate(OptimizerConfig(lr=1.0), 250, 1000) == 1.0
    assert learning_rate(OptimizerConfig(lr=1.0), 0, 1000) == 1.0, "without warm-up"
    assert learning_rate(config, 101, 101) == pytest.approx(0.2), "a decay of one sample"
    assert learning_rate(config, 100, 100) == 1.0, "of none"
