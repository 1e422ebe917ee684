"""Every kind of denoiser trains under DeepSpeed, on one rank and on two, and its checkpoint loads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shard_data import write_shards
from training_cases import assert_same_run, config_case, refused_case, train_case

from ldt.checkpoint.load import load_denoiser
from ldt.config import load
from ldt.diffusion.condition import Condition
from ldt.diffusion.samplers import sample
from ldt.nn.entangled import Joined
from ldt.training.config import TrainJob

UNET = "{name: unet, unet: {channels: 16, multipliers: [1, 2], blocks: 1, head_channels: 8, context: 12}}"
DIT = "{width: 32, depth: 2, heads: 2, conditioning: adaln_zero, positions: sincos, norm: layer, qk_norm: false,"
UVIT = "{width: 32, depth: 3, heads: 2, long_skips: true, positions: learned, time_embedding: sinusoids,"
ARMS = {
    "unet": (UNET, "flow", "rectified_flow"),
    "dit": (DIT + " mlp: gelu, time: steps, learned_sigma: true, activation_checkpointing: true}", "eps", "ddpm"),
    "head": (DIT + " head: {depth: 1, width: 48, heads: 2}, activation_checkpointing: true}", "x", "rectified_flow"),
    "uvit": (UVIT + " mlp: gelu_erf, qkv_bias: false, output_convolution: true, init: uvit}", "eps", "scaled_linear"),
}


CONFIGS = sorted(p for d in ("study", "recipes") for p in (Path(__file__).parents[1] / "configs" / d).glob("*.yaml"))
SMALL = [
    "model={width: 48, depth: 3, heads: 2}",
    "model.unet={channels: 16, blocks: 1, head_channels: 8, context: 12}",
    "model.head={width: 48, heads: 2}",
    "train={global_batch: 8, total_samples: 16}",
    "optimizer.warmup_samples=8",
    "engine={precision: fp32, compile: false}",
    "log={every_samples: 8, validation_every_samples: 0, samples_every_samples: 0}",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [40, 23], latent_shape=(4, 4, 4))
    return path


@pytest.mark.parametrize("arm", ARMS)
def test_arms_train_the_same_on_one_rank_and_on_two(pool, data, tmp_path, arm):
    model, prediction, schedule = ARMS[arm]
    settings = [f"model={model}", f"objective={{prediction: {prediction}, schedule: {schedule}, weighting: min_snr}}"]
    settings += [f"data.path={data}", "train.total_samples=80"]
    one = pool(1).run(train_case, settings=[*settings, f"run_dir={tmp_path}/one", "engine.zero_stage=1"])
    two = pool(2).run(train_case, settings=[*settings, f"run_dir={tmp_path}/two", "engine.zero_stage=3"])
    assert_same_run(one, two, rel=2e-4)
    loaded = [load_denoiser(tmp_path / name, "master").denoiser for name in ("one", "two")]
    x, t, label = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7]), Condition(torch.tensor([0, 3]))
    with torch.no_grad():
        a, b = (net(x, t, label) for net in loaded)
    assert a.shape == x.shape and a.any()
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_kernels_that_cannot_run_here_are_refused_before_training(pool, data, tmp_path):
    settings = [f"data.path={data}", "train.total_samples=80", f"run_dir={tmp_path}/run"]
    said = pool(1).run(refused_case, settings=[*settings, "model.attention=flash"])
    assert "model.attention=flash runs on CUDA in half precision, not on cpu in torch.float32" in said
    said = pool(1).run(refused_case, settings=[*settings, "model.name=unet", "model.attention=reference"])
    assert "model.attention=reference is the transformer's; model.name=unet takes auto or sdpa" in said
    said = pool(1).run(refused_case, settings=[*settings, "model.patch=3"])
    assert "model.patch=3 does not divide the latent size 4x4" in said


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_arm_of_the_study_and_every_recipe_runs(pool, tmp_path, path):
    """Two steps of a small model, and an image by the config's own sampler and guidance."""
    write_shards(tmp_path / "data", [40], latent_shape=(4, 8, 8), target=(5, 4, 4))
    settings = [*SMALL, f"run_dir={tmp_path}/run", f"data.path={tmp_path}/data"]
    settings += ["model.inner_head=1"] if load(TrainJob, path).model.inner_head else []
    pool(1).run(config_case, path=str(path), settings=settings)
    loaded, evaluate = load_denoiser(tmp_path / "run"), load(TrainJob, path).evaluate
    denoiser, noise = loaded.denoiser, torch.randn(2, 4, 8, 8)
    if loaded.spec.token:
        denoiser, noise = Joined(denoiser, (4, 8, 8)), torch.randn(2, 1, 1, 256 + loaded.spec.token)
    with torch.no_grad():
        arguments = (noise, Condition(torch.tensor([0, 2])), 3, replace(evaluate, steps=2), lambda step: noise)
        image = sample(denoiser, loaded.objective, *arguments)
    assert image.shape == noise.shape and image.isfinite().all()
