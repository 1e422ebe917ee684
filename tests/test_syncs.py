"""A training step never makes the host wait for the GPU: reads are counted on CPU, where CUDA would wait."""

import contextlib
import traceback

import pytest
import torch
from shard_data import write_shards
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ldt.config import load
from ldt.diffusion import mean_flow
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.diffusion.schedules import SCHEDULES, make_schedule
from ldt.dist import World
from ldt.engine.config import EMAConfig, EngineConfig, OptimizerConfig
from ldt.engine.ema import ShardedEMA
from ldt.engine.engine import Engine, QueuedStep
from ldt.nn.attention import forward_differentiable
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob
from ldt.training.trainer import Trainer

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


class Waits(TorchDispatchMode):
    """Where values are read of what was computed meanwhile, and where the device is waited for. Host tensors that were
    there before can be read at once.
    """

    def __init__(self, accelerator):
        super().__init__()
        self.places, self.earlier, self._accelerator, self._written = [], [], accelerator, set()

    def __enter__(self):
        self._before = self._accelerator.synchronize, torch.Tensor.tolist
        self._accelerator.synchronize = lambda *a: self._note(self.places, "synchronize")
        torch.Tensor.tolist = self._tolist()
        return super().__enter__()

    def __exit__(self, *error):
        self._accelerator.synchronize, torch.Tensor.tolist = self._before
        return super().__exit__(*error)

    def _tolist(self):
        def tolist(tensor):  # one wait, whatever it reads
            self._note(self._list_for(tensor), "tolist")
            with _disable_current_modes():
                return self._before[1](tensor)

        return tolist

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS:
            self._note(self._list_for(args[0]), func._schema.name)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                with contextlib.suppress(RuntimeError):  # derivatives in forward mode that are zero have no memory
                    self._written.add(tensor.untyped_storage().data_ptr())
        return out

    def _list_for(self, tensor):
        return self.places if tensor.untyped_storage().data_ptr() in self._written else self.earlier

    def _note(self, places, what):
        frames = [f for f in traceback.extract_stack() if "/deepspeed/" in f.filename or "/ldt/" in f.filename]
        places.append(f"{what} in {frames[-1].name}")


def waits_case(
    world: World,
    stage: int,
    precision: str,
    clip: float = 0.0,
    muon: float = 0.0,
    micro_batches: int = 2,
    flow: bool = False,
) -> tuple[list[str], list[str]]:
    """Of a step as the training loop makes it: where it waits for its own results, and for those of the one before."""
    from deepspeed.accelerator import get_accelerator

    model = build(ModelConfig(width=32, depth=2, heads=2, interval=flow), (4, 8, 8), 10, 0)
    optimizer = OptimizerConfig(clip=clip, muon_lr=muon)
    engine = Engine(model, EngineConfig(stage, precision), optimizer, world, micro_batches)
    ema = ShardedEMA(EMAConfig(), [f.master for f in engine.partition.owned])
    bare = forward_differentiable(engine.bare)
    objective = Objective(ObjectiveConfig(mean_flow=0.5, mean_flow_guidance=1.5))

    def batch():
        return torch.randn(2, 4, 8, 8), torch.rand(2), Condition(torch.randint(0, 11, (2,)))

    def loss(denoiser, batch):
        if not flow:
            return denoiser(*batch).float().square().sum()
        x, t_B, condition = batch
        second_B = torch.tensor([0.0, 0.25])
        return mean_flow.loss(objective, denoiser, bare, x, x, t_B, second_B, 1, condition, 10).sum()

    def step(queued):
        engine.gradients([batch() for _ in range(micro_batches)], loss, 4)
        if queued is not None:
            queued.result()
        queued = engine.apply(1e-3, votes=(1, 2))
        ema.update(100, 4)
        return queued

    queued = None
    for _ in range(3):
        queued = step(queued)
    with Waits(get_accelerator()) as waits:
        step(queued)
    return waits.places, waits.earlier


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
@pytest.mark.parametrize(("clip", "muon"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.03)], ids=["plain", "clip", "muon"])
def test_a_step_never_waits_for_itself(pool, stage, precision, clip, muon):
    """What it reads is the result of the step before: loss, norm and votes, all in one."""
    ranks = 2 if precision == "fp32" and stage in (1, 2) else 1  # alone it would be stage 0
    waits = pool(ranks).run(waits_case, stage=stage, precision=precision, clip=clip, muon=muon)
    assert waits == [[], ["tolist in result"]]


def test_nor_does_a_single_micro_batch_in_bf16(pool):
    """For which another part of DeepSpeed is run."""
    waits = pool(1).run(waits_case, stage=1, precision="bf16", clip=1.0, micro_batches=1)
    assert waits == [[], ["tolist in result"]]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16")])
def test_mean_flow_waits_no_more_often(pool, stage, precision):
    waits = pool(1).run(waits_case, stage=stage, precision=precision, flow=True)
    assert waits == [[], ["tolist in result"]]


def order_case(world: World, settings: list[str]) -> str:
    """The order of events in a run: a step's passes are queued (g), it is applied (a), its result is read (r), or the
    state is saved (s).
    """
    events = []

    def noting(mark, function):
        def noted(*args, **kwargs):
            events.append(mark)
            return function(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, mark in (
            (Engine, "gradients", "g"),
            (Engine, "apply", "a"),
            (QueuedStep, "result", "r"),
            (Trainer, "_save", "s"),
        ):
            patch.setattr(owner, name, noting(mark, getattr(owner, name)))
        attempt(load(TrainJob, None, settings), world)
    return "".join(events)


def test_the_loop_reads_a_step_behind_the_passes_of_the_next(pool, tmp_path):
    """… unless something comes between the two that needs what was read."""
    write_shards(tmp_path / "data", [40, 24])
    settings = [f"run_dir={tmp_path}/run", f"data.path={tmp_path}/data", "model={width: 32, depth: 2, heads: 2}"]
    settings += ["train.global_batch=8", "train.total_samples=64", "engine.zero_stage=0", "checkpoint.every_samples=24"]
    order = pool(1).run(order_case, settings=settings)
    first, second, saved = "agr", "agr", "ars"
    assert order == "g" + first + second + saved + "g" + first + second + saved + "g" + first + saved


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
