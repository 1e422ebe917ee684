"""engine.compile changes the speed of a run, not the run."""

from collections.abc import Iterator

import pytest
import torch
from pool import Pool
from test_engine import BATCH, LR, MODEL, OPTIMIZER, STEPS, data, loss_B, reference

from ldt.dist import World
from ldt.engine.config import EngineConfig
from ldt.engine.engine import Engine
from ldt.nn.build import build


def compiled_case(world: World, stage: int) -> list[float]:
    """Losses of compiled steps on this rank's share."""
    engine = Engine(build(MODEL, (4, 8, 8), 10, seed=0), EngineConfig(stage, compile=True), OPTIMIZER, world, 1)
    mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
    losses = []
    for step in range(STEPS):
        batch = tuple(x[mine] for x in data(step))
        losses.append(engine.step([batch], lambda d, b: loss_B(d, b).sum(), LR, BATCH).loss)
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
