"""One optimizer step under DeepSpeed equals plain PyTorch at every stage and split, and weights are where we say.

This file is the canary for the private attributes of DeepSpeed that `ldt.engine.partition` reads.
"""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from engine_reference import BATCH, LR, MODEL, OPTIMIZER, STEPS, data, distance, gather, loss_B, reference
from torch.utils._python_dispatch import TorchDispatchMode

from ldt.dist import World
from ldt.engine.config import EMAConfig, EngineConfig, OptimizerConfig
from ldt.engine.ema import ShardedEMA
from ldt.engine.engine import Engine
from ldt.engine.learning_rate import learning_rate
from ldt.errors import InputError
from ldt.nn.build import build


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
        engine.gradients(batches, lambda d, b: (loss_B(d, b[0]) * b[1]).sum(), BATCH)
        result = engine.apply(LR).result()
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


def skip_case(world: World, stage: int, precision: str, muon: float):
    """A step that is not finite or above the limit leaves no trace, on any rank, in weights or in the optimizer; nor
    do gradients that are dropped.
    """
    optimizer = replace(OPTIMIZER, muon_lr=muon)

    def train(steps, micro_batches=2):
        engine = Engine(
            build(MODEL, (4, 8, 8), 10, seed=0), EngineConfig(stage, precision), optimizer, world, micro_batches
        )
        mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
        results = []
        for step, spoil, limit in steps:
            x0, *rest = data(step)
            if spoil:
                x0[BATCH - 1, 0, 0, 0] = spoil  # of the last rank's share
            share = [x[mine].tensor_split(micro_batches) for x in (x0, *rest)]
            engine.gradients(list(zip(*share, strict=True)), lambda d, b: loss_B(d, b).sum(), BATCH)
            if limit is None:
                engine.drop_gradients()
            else:
                results.append(engine.apply(LR, limit, (world.rank,)).result())
        state = [v.clone() for f in engine.partition.owned for v in (f.master, *engine.partition.moments(f).values())]
        return results, state, engine.partition.optimizer_steps()

    inf = float("inf")
    bad = [(1, inf, inf), (2, 0, 1e-3), (3, 3e25, inf), (5, 0, None)]
    results, state, count = train([(0, 0, inf), *bad, (4, 0, inf)])
    expected, expected_state, expected_count = train([(0, 0, inf), (4, 0, inf)])
    assert [r.applied for r in results] == [True, False, False, False, True]
    assert results[2].loss > 1e-3 and not torch.isfinite(torch.tensor(results[1].loss))
    assert (results[-1].loss, results[-1].grad_norm) == (expected[-1].loss, expected[-1].grad_norm)
    assert results[0].sums == [sum(range(world.size))]
    assert count == expected_count == 2
    assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))


@pytest.mark.parametrize("muon", [0.0, 0.03], ids=["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_leaves_no_trace(pool, stage, precision, muon):
    if (stage, precision) != (0, "bf16"):  # refused, see below
        pool(2).run(skip_case, stage=stage, precision=precision, muon=muon)


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
        (2, 1, 1, "bf16"),
        (2, 1, 2, "bf16"),
        (2, 2, 1, "bf16"),
        (3, 0, 1, "fp32"),
        (3, 1, 3, "fp32"),
        (3, 2, 1, "fp32"),
        (3, 3, 2, "fp32"),
    ],
)
def test_a_step_equals_plain_pytorch(pool, size, stage, micro_batches, precision):
    pool(size).run(train_case, stage=stage, micro_batches=micro_batches, precision=precision)


def sums_case(world: World, stage: int, told: int) -> tuple[list[float], float, float]:
    """Of bf16 steps of one micro-batch a rank, where DeepSpeed was told to expect `told` of them: the gradients' norms,
    which share of the summed gradients bf16 could hold as they are, and the bytes a parameter that are copied and added
    in the passes of a step.
    """
    engine = Engine(build(MODEL, (4, 8, 8), 10, seed=0), EngineConfig(stage, "bf16"), OPTIMIZER, world, told)
    mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
    norms, moved = [], Moved()
    for step in range(STEPS):
        with moved if step == STEPS - 1 else contextlib.nullcontext():
            engine.gradients([tuple(x[mine] for x in data(step))], lambda d, b: loss_B(d, b).sum(), BATCH)
        summed = torch.cat([g.flatten().float() for g in engine.partition.gradients()])
        norms.append(engine.apply(LR).result().grad_norm)
    there = summed[summed != 0]
    short = float((there == there.bfloat16().float()).float().mean())
    return norms, short, moved.bytes / sum(p.numel() for p in engine.deepspeed.module.parameters())


class Moved(TorchDispatchMode):
    """Bytes written by operations that copy or add."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in ("copy_", "add_", "cat", "_to_copy"):
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bf16_at_stage_1_sums_over_ranks_in_float32(pool, ranks):
    """Though it is DeepSpeed's stage 2 that is run for a single micro-batch: as by its BF16_Optimizer, which keeps all
    gradients in float32 and is run for several. Stage 2 that is asked for sums in bf16.
    """
    lean, kept = (pool(ranks).run(sums_case, stage=1, told=told) for told in (1, 2))
    assert lean[0] == pytest.approx(kept[0], rel=1e-5), "the norms"
    assert lean[2] < kept[2] - 3, "the bytes"
    if ranks > 1:
        rounded = pool(ranks).run(sums_case, stage=2, told=1)
        assert rounded[1] == 1 and lean[1] < 0.9 and kept[1] < 0.9


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

    def step(number: int) -> None:
        engine.gradients([data(number)], lambda d, b: loss_B(d, b).sum(), BATCH)
        engine.apply(1e-3)

    for number in range(3):
        step(number)
    with Count():
        step(3)
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
    assert learning_rate(config, 1300, 1100) == pytest.approx(0.2), "and not up again"
    assert learning_rate(OptimizerConfig(lr=1.0, decay="linear"), 250, 1000) == 0.75
    assert learning_rate(OptimizerConfig(lr=1.0), 250, 1000) == 1.0
    assert learning_rate(OptimizerConfig(lr=1.0), 0, 1000) == 1.0, "without warm-up"
    assert learning_rate(config, 101, 101) == pytest.approx(0.2), "a decay of one sample"
    assert learning_rate(config, 100, 100) == 1.0, "of none"
