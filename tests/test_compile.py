"""engine.compile changes the speed of a run, not the run."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from engine_reference import BATCH, LR, MODEL, OPTIMIZER, STEPS, data, loss_B, reference
from pool import Pool
from shard_data import write_shards
from training_cases import train_case

from ldt.diffusion.condition import Condition
from ldt.dist import World
from ldt.engine.config import EngineConfig
from ldt.engine.engine import Engine
from ldt.nn.build import build, compile_blocks


def compiled_case(world: World, stage: int) -> list[float]:
    """Losses of compiled steps on this rank's share."""
    engine = Engine(build(MODEL, (4, 8, 8), 10, seed=0), EngineConfig(stage, compile=True), OPTIMIZER, world, 1)
    mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
    losses = []
    for step in range(STEPS):
        batch = tuple(x[mine] for x in data(step))
        engine.gradients([batch], lambda d, b: loss_B(d, b).sum(), BATCH)
        losses.append(engine.apply(LR).result().loss)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] > 0, "nothing was compiled"
    assert frames["ok"] == frames["total"], "it fell back to eager code somewhere"
    return losses


@pytest.fixture(scope="module")
def fresh_pool() -> Iterator[Pool]:
    """Processes in which ZeRO-3 never ran eagerly: DeepSpeed leaves its own linear layer in torch behind it."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_blocks_train_as_eager_ones(fresh_pool, stage):
    losses = fresh_pool.run(compiled_case, stage=stage)
    expected = [loss for loss, _ in reference()[0]]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


def test_a_compiled_run_whose_blocks_are_recomputed_is_resumed_to_the_bit(fresh_pool, tmp_path):
    """And digests and losses are those of the eager run that keeps its activations."""
    write_shards(tmp_path / "data", [40, 23])

    def run(name: str, total: int, fast: bool) -> list[dict]:
        settings = [f"run_dir={tmp_path}/{name}", f"data.path={tmp_path}/data", f"train.total_samples={total}"]
        settings += [f"engine.compile={fast}", f"model.activation_checkpointing={fast}", "engine.zero_stage=2"]
        return fresh_pool.run(train_case, settings=settings)

    whole, _ = run("whole", 48, True), run("parts", 24, True)
    parts, eager = run("parts", 48, True), run("eager", 48, False)
    assert [r["attempt"] for r in parts] == [0] * 3 + [1] * 3
    for key in ("samples_seen", "digest", "loss", "grad_norm"):
        assert [r[key] for r in parts] == [r[key] for r in whole], key
    assert [r["digest"] for r in whole] == [r["digest"] for r in eager]
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in eager], rel=1e-5)


def buckets_case(world: World, shapes: list[tuple[int, int, int]]) -> tuple[list[float], int]:
    """How far compiled blocks are from eager ones at each latent shape, in turn, and how many codes that took."""
    counters = torch._dynamo.utils.counters
    eager, compiled = (build(dataclasses.replace(MODEL, depth=1), shapes[0], 10, seed=0) for _ in range(2))
    for model in (eager, compiled):
        torch.nn.init.normal_(model.unpatchify.weight, generator=torch.Generator().manual_seed(0))
    compile_blocks(compiled)
    counters.clear()
    far = []
    for shape in shapes + shapes:  # the second time nothing is compiled
        before = counters["frames"]["total"]
        x_BCHW = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        inputs = (x_BCHW, torch.tensor([0.2, 0.7]), Condition(torch.tensor([1, 2])))
        with torch.no_grad():
            far.append(float((compiled(*inputs) - eager(*inputs)).abs().max()))
    frames = counters["frames"]
    assert frames["ok"] == frames["total"], "it fell back to eager code somewhere"
    assert frames["total"] == before, "a shape was compiled twice"
    return far, frames["ok"]


def test_blocks_are_compiled_once_a_bucket(fresh_pool):
    far, codes = fresh_pool.run(buckets_case, shapes=[(4, 8, 8), (4, 4, 12)])
    assert max(far) < 1e-4
    assert codes == 2
