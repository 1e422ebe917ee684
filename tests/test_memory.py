"""What autograd keeps, predicted without content and counted in real passes; what follows for micro-batches."""

import dataclasses
import json

import pytest
import torch
from shard_data import write_shards

from ldt.config import load
from ldt.diffusion.condition import Condition
from ldt.dist import World
from ldt.engine import memory
from ldt.errors import InputError
from ldt.nn.build import build, checkpoint_blocks
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.text_shape import TextShape
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob

SHAPE = (4, 8, 8)
TRANSFORMER = ModelConfig(width=64, depth=4, heads=2)
MODELS = {
    "transformer": TRANSFORMER,
    "adaln": dataclasses.replace(TRANSFORMER, conditioning="adaln_zero", positions="sincos"),
    "text": dataclasses.replace(TRANSFORMER, condition_on="class_and_text"),
    "values": dataclasses.replace(TRANSFORMER, value_residual=True),
    "head": dataclasses.replace(TRANSFORMER, head=HeadConfig(depth=2, width=96, heads=2)),
    "head inner": dataclasses.replace(TRANSFORMER, inner_head=2, head=HeadConfig(depth=1, width=96, heads=2)),
    "inner": dataclasses.replace(TRANSFORMER, inner_head=2),
    "inner adaln": dataclasses.replace(TRANSFORMER, conditioning="adaln_zero", inner_head=2),
    "skips": dataclasses.replace(TRANSFORMER, long_skips=True),
    "unet": load(
        TrainJob, None, ["run_dir=x", "data.path=x", "model={name: unet, unet: {channels: 16, head_channels: 8}}"]
    ).model,
}
TEXT = TextShape(6, vocabulary=257)


def counted_bytes(config, samples, recomputed, precision):
    """Bytes of distinct storages that a real forward pass saves."""
    model = build(config, SHAPE, 3, seed=0, text=TEXT)
    if precision == "bf16":
        model.bfloat16()
    checkpoint_blocks(model, recomputed)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    words = torch.zeros(samples, TEXT.length, dtype=torch.int64) if config.uses_text else None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        condition = Condition(torch.zeros(samples, dtype=torch.int64), words)
        inputs = (torch.zeros(samples, *SHAPE), torch.zeros(samples), condition)
        outputs = model(*inputs, inner=True) if config.inner_head else (model(*inputs),)
        _loss = sum(y.square().mean() for y in outputs)
    return sum(s.nbytes() for pointer, s in saved.items() if pointer not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_a_real_pass_saves(name, precision):
    cost = memory.activations(MODELS[name], SHAPE, 3, TEXT, precision)
    for samples in (1, 5):
        assert cost.kept * samples == pytest.approx(counted_bytes(MODELS[name], samples, 0, precision), rel=0.02)
        assert cost.recomputed * samples == pytest.approx(
            counted_bytes(MODELS[name], samples, cost.blocks, precision), rel=0.02
        )
    if name != "unet":
        half = counted_bytes(MODELS[name], 3, 2, precision)
        assert cost.of(3, 2) - 3 * cost.saves[0] == pytest.approx(half, rel=0.04)


def test_cudas_norms_save_less():
    """What the fused kernel saves of a bf16 activation is itself and a number a row; the CPU's saves float32 copies."""
    model = ModelConfig(width=1024, depth=4, heads=16)  # rms norms and qk_norm
    plain = dataclasses.replace(model, norm="layer", qk_norm=False)
    cpu, cuda = (memory.activations(model, (4, 32, 32), 1000, None, "bf16", kind).kept for kind in ("cpu", "cuda"))
    tokens, blocks = 258, 4
    copies = 3 * 2  # of a bf16 tensor in float32
    normed = 4 * tokens * 1024 * 2  # two norms, queries and keys
    assert cpu - cuda == pytest.approx(blocks * (copies - 1) * normed, rel=0.25)
    same = [memory.activations(plain, (4, 32, 32), 1000, None, "bf16", kind).kept for kind in ("cpu", "cuda")]
    assert same[0] == same[1]


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm(8), torch.nn.RMSNorm(8, elementwise_affine=False)])
def test_the_stand_in_saves_the_input_and_a_number_a_row(norm):
    saved = []
    memory._fuse_norms(norm)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        norm(torch.zeros(3, 5, 8, requires_grad=True))
    assert sorted(saved) == ([8] if norm.weight is not None else []) + [15, 120]


def test_a_budget_recomputes_no_more_blocks_than_it_must():
    cost = memory.Activations(kept=1000, saves=(100,) * 8)
    assert cost.blocks_to_recompute(4, 4000) == 0
    for budget in range(1300, 4000, 90):
        blocks = cost.blocks_to_recompute(4, budget)
        assert cost.of(4, blocks) <= budget < cost.of(4, blocks - 1)
    assert cost.blocks_to_recompute(1, 1e9, at_least=8) == 8
    with pytest.raises(InputError, match="a micro-batch of 4 keeps 1.2e-06 GB of activations even with every block"):
        cost.blocks_to_recompute(4, 1100)
    assert cost.largest(64, 10_500) == 10 and cost.largest(4, 10_500) == 4
    assert cost.largest(64, 900) == 3, "only by recomputing"
    assert cost.largest(64, 100) == 1


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharding_saves_what_zero_says(precision, micro_batches):
    """At many ranks only what is not sharded is left: ZeRO's Ψ·(weights) at stages 1 and 2, nothing at 3; and in bf16
    at stage 1 the gradients, where several micro-batches are added up.
    """
    width = 2 if precision == "bf16" else 4
    for stage, left in ((1, width), (2, width), (3, 0)):
        many = memory.state_bytes(10**9, stage, precision, 1 << 20, 2, micro_batches).persistent
        gradients = 4 if (stage, precision, micro_batches) == (1, "bf16", 2) else 0
        assert many / 1e9 == pytest.approx(left + gradients, abs=1e-3)
        alone = memory.state_bytes(10**9, stage, precision, 1, 2, micro_batches).persistent
        weights = 0 if precision == "fp32" and stage < 3 else width  # one process runs these as stage 0
        assert alone / 1e9 == pytest.approx(weights + gradients + 4 + 8 + 8)
    assert memory.state_bytes(10**9, 0, "fp32", 4, averages=2).persistent / 1e9 == pytest.approx(4 + 8 + 2)


def train_case(world: World, settings: list[str]) -> None:
    attempt(load(TrainJob, None, settings), world)


def test_it_changes_nothing_but_memory(pool, tmp_path, caplog):
    """micro_batch=auto under a budget: smaller micro-batches, recomputed blocks, the same run."""
    write_shards(tmp_path / "data", [40])
    settings = [
        "model={width: 64, depth: 4, heads: 2}", f"data.path={tmp_path / 'data'}", "train.global_batch=12",
        "train.total_samples=48", "log.every_samples=12",
    ]  # fmt: skip
    cost = memory.activations(TRANSFORMER, (4, 2, 2), 3, None, "fp32")
    runs = {
        "plain": [],
        "auto": ["train.micro_batch=auto"],
        "budget": ["train.micro_batch=auto", f"engine.activation_memory_gb={2.5e-9 * cost.kept}"],
        "tight": ["train.micro_batch=3", f"engine.activation_memory_gb={3.1e-9 * cost.of(1, 4)}"],
    }
    logs = {}
    for name, more in runs.items():
        pool(2).run(train_case, settings=[*settings, f"run_dir={tmp_path / name}", *more])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logs[name] = [(r["digest"], r["loss"]) for r in map(json.loads, lines)]
    for name in runs:
        assert [d for d, _ in logs[name]] == [d for d, _ in logs["plain"]], name
        assert [x for _, x in logs[name]] == pytest.approx([x for _, x in logs["plain"]], rel=1e-5), name
