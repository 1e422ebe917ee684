"""The wide head: what it is for, and that it trains the same under every stage, compiled, and with Muon."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from engine_reference import BATCH, LR, data, distance, gather, loss_B
from pool import Pool

from ldt.diffusion.condition import Condition
from ldt.dist import World
from ldt.engine.config import EngineConfig, OptimizerConfig
from ldt.engine.engine import Engine
from ldt.errors import InputError
from ldt.nn.build import build, checkpoint_blocks, matrices_of
from ldt.nn.config import HeadConfig, ModelConfig

NARROW = ModelConfig(width=16, depth=2, heads=2, patch=1)
HEAD = HeadConfig(depth=2, width=48, heads=2)
MODEL = ModelConfig(width=32, depth=2, heads=2, value_residual=True, head=HEAD)
SHAPE, STEPS = (4, 8, 8), 4


# ------------------------------------------------------------------------------------------------- what it is for


def overfit(config: ModelConfig, steps: int = 250) -> float:
    """Loss of a denoiser after training on one sample of 32 numbers a token, over the last steps."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 32, 2, 2, generator=g)
    model = build(config, (32, 2, 2), 1, seed=0)
    adam = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0)
    condition, losses = Condition(torch.zeros(64, dtype=torch.int64)), []
    for _ in range(steps):
        noise, t = torch.randn(64, 32, 2, 2, generator=g), 0.3 + 0.7 * torch.rand(64, generator=g)
        t_111 = t[:, None, None, None]
        velocity = model((1 - t_111) * x0 + t_111 * noise, t, condition)
        loss = (velocity - (noise - x0)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("conditioning", ["in_context", "adaln_zero"])
def test_narrower_than_the_token_it_cannot_learn_one_sample_and_with_the_head_it_can(conditioning):
    """RAE, theorem 1 (2510.11690): of tokens of n numbers a width d < n leaves at least (n − d)/n of the noise."""
    narrow = dataclasses.replace(NARROW, conditioning=conditioning)
    least = (32 - 16) / 32
    assert overfit(narrow) > 0.95 * least
    assert overfit(dataclasses.replace(narrow, head=HEAD)) < 0.6 * least


def test_each_token_is_modulated_by_its_own(torch_seed=3):
    """With blocks that do nothing but the head's modulation, an input patch moves its own output patch alone."""
    model = build(dataclasses.replace(NARROW, conditioning="adaln_zero", head=HeadConfig(1, 48, 2)), SHAPE, 10, seed=0)
    g = torch.Generator().manual_seed(torch_seed)
    with torch.no_grad():
        for layer in (model.head.modulation, model.head.unpatchify):
            layer.weight.normal_(0, 0.1, generator=g)
    x, t, condition = torch.randn(1, *SHAPE, generator=g), torch.tensor([0.5]), Condition(torch.tensor([2]))
    moved = x.clone()
    moved[:, :, 5, 2] += 1
    changed = (model(moved, t, condition) - model(x, t, condition)).abs().amax((0, 1)) > 1e-7
    assert changed[5, 2] and changed.sum() == 1


def test_its_initial_output_is_zero_and_its_matrices_are_muons():
    model = build(MODEL, SHAPE, 10, seed=0)
    out = model(torch.randn(2, *SHAPE), torch.rand(2), Condition(torch.tensor([0, 10])))
    assert out.shape == (2, *SHAPE) and not out.any()
    names = {name for name in matrices_of(model) if name.startswith("head.")}
    parts = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert names == {f"head.blocks.{i}.{part}.weight" for i in range(2) for part in parts}


def test_the_heads_blocks_are_recomputed_after_all_others():
    def kept(blocks: int) -> int:
        sizes: list[int] = []
        model = build(MODEL, SHAPE, 10, seed=0)
        checkpoint_blocks(model, blocks)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(torch.randn(1, *SHAPE), torch.rand(1), Condition(torch.tensor([0])))
        return sum(sizes)

    sizes = [kept(blocks) for blocks in range(5)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": -1}, "model.head.depth=-1 must be between 0"),
        ({"width": 0}, "model.head.width=0 must be between 1 and"),
        ({"width": 50, "heads": 4}, "model.head.heads=4 does not divide model.head.width=50"),
    ],
)
def test_impossible_heads_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        HeadConfig(**settings)


# ------------------------------------------------------------------------------------------------- how it trains


def train_case(world: World, stage: int, muon: float = 0.0, compiled: bool = False, precision: str = "fp32"):
    """Losses and final weights."""
    optimizer = OptimizerConfig(lr=LR, weight_decay=0.1, muon_lr=muon)
    engine = Engine(build(MODEL, SHAPE, 10, seed=0), EngineConfig(stage, precision, compiled), optimizer, world, 1)
    mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
    losses = []
    for step in range(STEPS):
        batch = tuple(x[mine] for x in data(step))
        engine.gradients([batch], lambda d, b: loss_B(d, b).sum(), BATCH)
        losses.append(engine.apply(LR).result().loss)
    if compiled:
        frames = torch._dynamo.utils.counters["frames"]
        assert frames["ok"] == frames["total"] > 0, "it fell back to eager code somewhere"
    weights = gather(engine.partition, [f.master for f in engine.partition.owned])
    return losses, {n: w.tolist() for n, w in weights.items()}


def tensors(weights):
    return {n: torch.tensor(w) for n, w in weights.items()}


@pytest.fixture(scope="module", params=[0.0, 0.02], ids=["adamw", "muon"])
def alone(pool, request):
    losses, weights = pool(1).run(train_case, stage=0, muon=request.param)
    return request.param, losses, tensors(weights)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_partition_trains_it_alike(pool, alone, size, stage):
    muon, expected, expected_weights = alone
    losses, weights = pool(size).run(train_case, stage=stage, muon=muon)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    assert distance(tensors(weights), expected_weights) < 1e-3
    assert losses[-1] < losses[0]


def test_bf16_is_near(pool, alone):
    muon, expected, _ = alone
    losses, _ = pool(2).run(train_case, stage=2, muon=muon, precision="bf16")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.03, atol=0)


@pytest.fixture(scope="module")
def fresh_pool() -> Iterator[Pool]:
    """As in test_compile."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_it_trains_as_eager(pool, fresh_pool, stage):
    expected, _ = pool(1).run(train_case, stage=0)
    losses, _ = fresh_pool.run(train_case, stage=stage, compiled=True)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
