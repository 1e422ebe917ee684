"""How often a training step makes the host wait for the GPU: counted on CPU, where CUDA would wait."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ldt.diffusion.condition import Condition
from ldt.diffusion.schedules import SCHEDULES, make_schedule
from ldt.dist import World
from ldt.engine.config import EngineConfig, OptimizerConfig
from ldt.engine.engine import Engine
from ldt.nn.build import build
from ldt.nn.config import ModelConfig

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


class Waits(TorchDispatchMode):
    """Where values are read, and where the device is waited for."""

    def __init__(self, accelerator):
        super().__init__()
        self.places, self._accelerator = [], accelerator

    def __enter__(self):
        self._before = self._accelerator.synchronize, torch.Tensor.tolist
        self._accelerator.synchronize = lambda *a: self._note("synchronize")
        torch.Tensor.tolist = self._tolist()
        return super().__enter__()

    def __exit__(self, *error):
        self._accelerator.synchronize, torch.Tensor.tolist = self._before
        return super().__exit__(*error)

    def _tolist(self):
        def tolist(tensor):  # one wait, whatever it reads
            self._note("tolist")
            with _disable_current_modes():
                return self._before[1](tensor)

        return tolist

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS:
            self._note(func._schema.name)
        return func(*args, **(kwargs or {}))

    def _note(self, what):
        frames = [f for f in traceback.extract_stack() if "/deepspeed/" in f.filename or "/ldt/" in f.filename]
        self.places.append(f"{what} in {frames[-1].name}")


def waits_case(world: World, stage: int, precision: str, clip: float, muon: float) -> list[str]:
    from deepspeed.accelerator import get_accelerator

    model = build(ModelConfig(width=32, depth=2, heads=2), (4, 8, 8), 10, 0)
    engine = Engine(model, EngineConfig(stage, precision), OptimizerConfig(clip=clip, muon_lr=muon), world, 2)

    def batch():
        return torch.randn(2, 4, 8, 8), torch.rand(2), Condition(torch.randint(0, 11, (2,)))

    def step():
        batches = [batch(), batch()]
        engine.step(batches, lambda m, b: m(*b).float().square().sum(), 1e-3, 4, votes=(1, 2))

    for _ in range(3):
        step()
    with Waits(get_accelerator()) as waits:
        step()
    return waits.places


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
@pytest.mark.parametrize(("clip", "muon"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.03)], ids=["plain", "clip", "muon"])
def test_a_step_waits_once(pool, stage, precision, clip, muon):
    """For the loss, the norm and the votes, all in one: the check that decides whether the step counts."""
    ranks = 2 if precision == "fp32" and stage in (1, 2) else 1  # alone it would be stage 0
    assert pool(ranks).run(waits_case, stage=stage, precision=precision, clip=clip, muon=muon) == ["tolist in step"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_copies_nothing_to_the_device_at_each_step(name):
    schedule = make_schedule(name)
    moves = []

    class Moves(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            target = (kwargs or {}).get("device")
            if func._schema.name == "aten::_to_copy" and target is not None and target != args[0].device:
                moves.append(1)
            return func(*args, **(kwargs or {}))

    t_B = torch.rand(3, device="meta")  # a device that is not the CPU
    counts = []
    for _ in range(3):
        with Moves():
            schedule.alpha(t_B), schedule.sigma(t_B), schedule.slope(t_B)
        counts.append(len(moves))
    assert counts[0] == counts[1] == counts[2] <= 1
