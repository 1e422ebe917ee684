"""Muon: the same steps from any partition, and those of torch's own Muon on whole matrices."""

import pytest
import torch
from engine_reference import BATCH, MODEL, data, distance, gather, loss_B
from torch.utils._python_dispatch import TorchDispatchMode

from ldt.dist import World, all_gather
from ldt.engine.config import EngineConfig, OptimizerConfig
from ldt.engine.engine import Engine
from ldt.engine.muon import MOMENTUM, NEWTON_SCHULZ, STEPS, orthogonalised, share_out
from ldt.nn.build import build, matrices_of
from ldt.nn.config import ModelConfig, UNetConfig

LR, MUON_LR, DECAY, TRAINED = 2e-3, 0.02, 0.1, 8
OPTIMIZER = OptimizerConfig(lr=LR, muon_lr=MUON_LR, weight_decay=DECAY, clip=0.0)
UNET = ModelConfig(name="unet", unet=UNetConfig(channels=24, multipliers=[1, 2], blocks=1, head_channels=8, context=16))
MODELS = {"transformer": MODEL, "unet": UNET}


@pytest.mark.parametrize("shape", [(8, 8), (6, 40)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_only_the_singular_values_change(shape, dtype, tolerance):
    """Of each matrix of a batch, whatever its size; nothing of nothing."""
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(3, *shape, generator=generator) * torch.tensor([1.0, 1e-6, 0.0])[:, None, None]
    made = orthogonalised(update, dtype)
    assert made.dtype == torch.float32
    for matrix, result in zip(update[:2], made[:2], strict=True):
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = s / s.norm()
        a, b, c = NEWTON_SCHULZ
        for _ in range(STEPS):
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(result.double(), u @ torch.diag(s) @ v, rtol=0, atol=tolerance)
    assert made[2].abs().max() == 0


def products_case(world: World) -> dict[str, int]:
    """How many batched and single matrix products a Muon step of a model of 4 blocks makes."""
    model = build(ModelConfig(width=32, depth=4, heads=2), (4, 8, 8), 10, seed=0)
    engine = Engine(model, EngineConfig(0), OPTIMIZER, world, 1)
    counts = {"bmm": 0, "baddbmm": 0, "mm": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.removeprefix("aten::")
            if name in counts:
                counts[name] += 1
            return func(*args, **(kwargs or {}))

    muon = engine._adam.muon
    with Count():
        muon._make({name: torch.randn(shape) for name, shape in muon.shapes.items()})
    return counts


def test_matrices_of_one_shape_are_made_together(pool):
    """qkv, its three parts, and the output projection are square, both halves of the MLP have one shape up to turning:
    two batches, however deep the model. The long ones are multiplied twice only: at the start and at the end."""
    square, long = 2 * STEPS, 1 + 3 * (STEPS - 1) + 1
    assert pool(1).run(products_case) == {"bmm": square + long, "baddbmm": 2 * STEPS, "mm": 0}


def sent_case(world: World, stage: int) -> int:
    """How many numbers a rank sends in a Muon step: of updates, and of what was made of them."""
    engine, sent = Engine(build(MODEL, (4, 8, 8), 10, seed=0), EngineConfig(stage), OPTIMIZER, world, 1), []
    engine.gradients([data(0)], lambda d, b: loss_B(d, b).sum(), BATCH)
    real = torch.distributed.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.distributed, "all_to_all_single", lambda out, x, *counts: (sent.append(len(x)), real(out, x, *counts))
        )
        engine.apply(LR).result()
    assert len(sent) == 2
    return sum(sent)


def test_a_rank_makes_what_it_holds(pool):
    """Stages 1 and 2 cut at most one matrix between two ranks; stage 3 cuts all of them."""
    model = build(MODEL, (4, 8, 8), 10, seed=0)
    sizes = [model.get_parameter(name).numel() for name in matrices_of(model)]
    assert pool(2).run(sent_case, stage=1) <= max(sizes)
    assert pool(2).run(sent_case, stage=3) == pytest.approx(sum(sizes) / 2, rel=0.01)


def test_the_work_is_shared_out():
    """In runs of the order, as a partition is, so that a rank has most of what it makes already."""
    assert share_out({"a": 9, "b": 3, "c": 4, "d": 4, "e": 4}, 3) == {"a": 0, "b": 1, "c": 1, "d": 2, "e": 2}
    assert share_out({"a": 1, "b": 1}, 4) == {"a": 1, "b": 3}


def test_which_matrices_and_how_many_are_in_one():
    model = build(ModelConfig(width=32, depth=2, heads=2, conditioning="adaln_zero"), (4, 4, 4), 3, seed=0)
    found = matrices_of(model)
    assert {name.removeprefix("blocks.0."): n for name, n in found.items() if ".0." in name} == {
        "attention.qkv.weight": 3,
        "attention.out.weight": 1,
        "mlp.up.weight": 2,
        "mlp.down.weight": 1,
    }
    assert all(model.get_parameter(name).shape[0] % n == 0 for name, n in found.items())


def test_of_a_unet_all_that_its_blocks_multiply_by():
    """All but the first and last layers, embeddings, and what brings the time into a block."""
    unet = build(UNET, (4, 8, 8), 10, seed=0)
    found = matrices_of(unet)
    left = {n for n, p in unet.named_parameters() if p.ndim >= 2 and n not in found}
    ends = {f"net.{n}.weight" for n in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")}
    assert {n for n in left if not n.endswith(".time_emb_proj.weight")} == ends | {"label.weight"}
    assert any(n.endswith(".time_emb_proj.weight") for n in left)
    assert {n for n, count in found.items() if count == 2} == {n for n in found if ".ff.net.0.proj." in n} != set()
    assert set(found.values()) == {1, 2}


def reference(name):
    """Losses and final weights of one process with torch's Muon, which has no stacked matrices, nor any of more than
    two dimensions, and works in bf16."""
    model = build(MODELS[name], (4, 8, 8), 10, seed=0)
    stacked = matrices_of(model)
    matrices = {n: p for n, p in model.named_parameters() if n in stacked}

    def parts_of(name, tensor):
        return [x.flatten(1) for x in tensor.chunk(stacked[name])]

    parts = {n: [torch.nn.Parameter(x.clone()) for x in parts_of(n, p.detach())] for n, p in matrices.items()}
    muon = torch.optim.Muon(
        [x for xs in parts.values() for x in xs], MUON_LR, LR * DECAY / MUON_LR, MOMENTUM, ns_steps=STEPS
    )
    rest = [(n, p) for n, p in model.named_parameters() if n not in stacked]
    groups = [
        {"params": [p for _, p in rest if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for _, p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam, losses = torch.optim.AdamW(groups, LR, OPTIMIZER.betas), []
    for step in range(TRAINED):
        loss = loss_B(model, data(step)).mean()
        model.zero_grad()
        loss.backward()
        adam.step()
        for name, p in matrices.items():
            for x, gradient in zip(parts[name], parts_of(name, p.grad), strict=True):
                x.grad = gradient
        muon.step()
        for name, p in matrices.items():
            p.data.copy_(torch.cat([x.detach() for x in parts[name]]).view_as(p))
        losses.append(float(loss.detach()))
    return losses, {n: p.detach() for n, p in model.named_parameters()}


def train_case(world: World, stage: int, precision: str, model: str = "transformer"):
    engine = Engine(build(MODELS[model], (4, 8, 8), 10, seed=0), EngineConfig(stage, precision), OPTIMIZER, world, 1)
    mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
    losses = []
    for step in range(TRAINED):
        batch = tuple(x[mine] for x in data(step))
        engine.gradients([batch], lambda d, b: loss_B(d, b).sum(), BATCH)
        losses.append(engine.apply(LR).result().loss)
    weights = gather(engine.partition, [f.master for f in engine.partition.owned])
    replicas = all_gather(
        [float(p.detach().double().sum()) for p in engine.deepspeed.module.parameters()] if stage < 3 else None
    )
    assert all(r == replicas[0] for r in replicas), "replicas differ"
    return losses, {n: w.tolist() for n, w in weights.items()}


@pytest.fixture(scope="module")
def alone(pool):
    """Of each model: losses and weights of one process."""
    runs = {name: pool(1).run(train_case, stage=0, precision="fp32", model=name) for name in MODELS}
    return {name: (losses, as_tensors(weights)) for name, (losses, weights) in runs.items()}


def as_tensors(weights):
    return {n: torch.tensor(w) for n, w in weights.items()}


@pytest.mark.parametrize("model", MODELS)
def test_one_process_does_what_torch_does(alone, model):
    losses, weights = reference(model)
    torch.testing.assert_close(torch.tensor(alone[model][0]), torch.tensor(losses), rtol=0.01, atol=0)
    start = {n: p.detach() for n, p in build(MODELS[model], (4, 8, 8), 10, seed=0).named_parameters()}
    assert distance(alone[model][1], weights) < 0.03 * distance(start, weights), "up to torch's bf16"


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_partition_takes_the_same_steps(pool, alone, size, stage):
    assert_same(pool(size).run(train_case, stage=stage, precision="fp32"), alone["transformer"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_any_partition_of_a_unet_does(pool, alone, stage):
    """But for cross-attention's queries and keys: over a class's one token it is 1 whatever they are, so their
    gradients are rounding alone, which Muon brings to full length."""
    losses, weights = pool(2).run(train_case, stage=stage, precision="fp32", model="unet")
    without = {n: w for n, w in alone["unet"][1].items() if ".attn2.to_q." not in n and ".attn2.to_k." not in n}
    assert_same((losses, weights), (alone["unet"][0], without))


def assert_same(run, alone):
    losses, weights = run
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone[0]), rtol=1e-5, atol=0)
    assert distance(as_tensors(weights), alone[1]) < 1e-4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_near(pool, alone, stage):
    losses, _ = pool(2).run(train_case, stage=stage, precision="bf16")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone["transformer"][0]), rtol=0.03, atol=0)
