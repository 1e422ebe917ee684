"""Improved MeanFlow: the mean velocity of a Gaussian is its fixed point, its derivative is right, and runs are the same
at any world."""

import numpy as np
import pytest
import torch
from plans import ROOT, planned
from run_data import randomised, shared_run
from shard_data import write_shards
from training_cases import assert_same_run, train_case, trained_in_parts

from ldt import rng
from ldt.cli import main
from ldt.config import load
from ldt.data.batch import Batch, Located, SampleDraws
from ldt.data.digest import digest
from ldt.data.shards import open_shards
from ldt.diffusion import mean_flow
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig, SamplerConfig
from ldt.diffusion.objectives import Objective
from ldt.diffusion.samplers import sample
from ldt.errors import InputError
from ldt.nn.attention import forward_differentiable
from ldt.nn.build import build
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.text_shape import TextShape
from ldt.training.config import TrainJob

STD = 0.4
FLOW = Objective(ObjectiveConfig(mean_flow=0.25))


def spread(t):
    """Variance of x_t where the data are normal with deviation STD."""
    return t**2 + (1 - t) ** 2 * STD**2


def velocity(x, t):
    return x * (t - (1 - t) * STD**2) / spread(t)


def gaussian(x_BCHW, t_B, condition, r_B=None):
    """The mean velocity over [r, t] of Gaussian data: x_t scales like its deviation."""
    t, r = (v[:, None, None, None] for v in (t_B, t_B if r_B is None else r_B))
    moved = x_BCHW * (1 - (spread(r) / spread(t)).sqrt()) / (t - r).clamp(min=1e-12)
    return torch.where(t > r, moved, velocity(x_BCHW, t))


def guided_towards(condition, x_BCHW):
    return condition.label_B[:, None, None, None].to(x_BCHW)


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 1, 2, 2, dtype=torch.float64, generator=generator)
    t_B = torch.rand(64, dtype=torch.float64, generator=generator)
    r_B = t_B * torch.rand(64, dtype=torch.float64, generator=generator)
    return STD * x0, eps, t_B, r_B, Condition(torch.zeros(64, dtype=torch.int64))


def test_the_mean_velocity_is_the_fixed_point(draws):
    """u + (t − r)·u̇ is the velocity of the marginal, which no other prediction from x_t can better."""
    x0, eps, t_B, r_B, condition = draws
    t, r = t_B[:, None, None, None], r_B[:, None, None, None]
    xt = (1 - t) * x0 + t * eps
    v = gaussian(xt, t_B, condition, r_B) + (t - r) * mean_flow.slope(gaussian, xt, t_B, r_B, condition)
    torch.testing.assert_close(v, velocity(xt, t), rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_mean_squared_error_with_the_gradient_of_the_weighted_one(draws):
    x0, eps, t_B, _, condition = draws
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def denoiser(x_BCHW, t_B, condition, r_B=None):
        return scale * gaussian(x_BCHW, t_B, condition, r_B)

    second_B = torch.where(torch.arange(64) % 4 == 0, 0.3, 0.0).double()
    uniform_B = t_B.clamp(0.01, 0.99)
    losses = mean_flow.loss(FLOW, denoiser, denoiser, x0, eps, uniform_B, second_B, 16, condition, 1)
    t_B, r_B = mean_flow.interval(FLOW, uniform_B, second_B)
    assert torch.equal(r_B < t_B, second_B > 0)
    t, r = t_B[:, None, None, None], r_B[:, None, None, None]
    xt = (1 - t) * x0 + t * eps
    fixed = (t - r) * mean_flow.slope(denoiser, xt, t_B, r_B, condition)  # of all samples; t − r = 0 for the others
    error = denoiser(xt, t_B, condition, r_B).float() + fixed - (eps - x0)
    torch.testing.assert_close(losses, error.square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    square = error.square().sum((1, 2, 3))
    (expected,) = torch.autograd.grad((square / (square.detach() + 0.01)).sum(), scale)
    (gradient,) = torch.autograd.grad(losses.sum(), scale)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_without_a_second_time_it_is_flow_matching(draws):
    x0, eps, t_B, _, condition = draws
    losses = mean_flow.loss(FLOW, gaussian, gaussian, x0, eps, t_B, torch.zeros(64), 0, condition, 1)
    plain = FLOW.loss(gaussian, x0, eps, FLOW.timesteps(t_B), condition)
    torch.testing.assert_close(losses, plain)


def test_the_derivative_is_told_of_each_samples_own_text(draws):
    """u = t²·w of a word w alone: u + (t − r)·2t·w is what the loss compares, where there is an interval."""
    x0, eps, t_B, r_B, _ = draws

    def reader(x_BCHW, t_B, condition, r_B=None):
        return 0 * x_BCHW + (t_B.square() * condition.text[:, 0])[:, None, None, None]

    word_B = torch.arange(64, dtype=torch.float64) / 16
    condition = Condition(torch.zeros(64, dtype=torch.int64), word_B[:, None])
    second_B = torch.where(torch.arange(64) % 2 == 0, r_B.clamp(min=0.01), 0.0)
    t_B, r_B = mean_flow.interval(FLOW, t_B, second_B)
    u_B = t_B.square() * word_B + (t_B - r_B) * 2 * t_B * word_B
    expected = (u_B[:, None, None, None] - (eps - x0)).square().mean((1, 2, 3))
    losses = mean_flow.loss(FLOW, reader, reader, x0, eps, draws[2], second_B, 32, condition, 0)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ guidance inside

SCALE, NOTHING = 1.5, 1
GUIDED = Objective(ObjectiveConfig(mean_flow=0.25, mean_flow_guidance=SCALE))
NULL_STD = 0.8  # of the data without a condition, label NOTHING


def logarithm(t, std):
    """Of the deviation of x_t; the velocity of normal data is its derivative times x."""
    return 0.5 * (t**2 + (1 - t) ** 2 * std**2).log()


def guided_gaussian(x_BCHW, t_B, condition, r_B=None):
    """The exact mean velocity of guidance between two Gaussians; without a condition that of the wider one alone."""
    t, r = (v[:, None, None, None] for v in (t_B, t_B if r_B is None else r_B))
    scale = torch.where(condition.label_B == NOTHING, 0.0, SCALE)[:, None, None, None].double()

    def grown(t):
        return scale * logarithm(t, STD) + (1 - scale) * logarithm(t, NULL_STD)

    def slope(t, std):
        return (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2)

    here = scale * slope(t, STD) + (1 - scale) * slope(t, NULL_STD)
    moved = (1 - (grown(r) - grown(t)).exp()) / (t - r).clamp(min=1e-12)
    return x_BCHW * torch.where(t > r, moved, here)


def test_guidance_inside_has_the_guided_mean_velocity_as_its_fixed_point(draws):
    """Of that one what is left is the spread of ε − x0 around its mean, by the scale; none of it can be learned."""
    x0, eps, t_B, _, _ = draws
    label_B = torch.arange(64) % 2
    x0 = x0 * torch.where(label_B == NOTHING, NULL_STD / STD, 1.0)[:, None, None, None]
    second_B = torch.where(torch.arange(64) % 3 == 0, 0.3, 0.0).double()
    condition = Condition(label_B)
    losses = mean_flow.loss(GUIDED, guided_gaussian, guided_gaussian, x0, eps, t_B, second_B, 22, condition, NOTHING)
    t = mean_flow.interval(GUIDED, t_B, second_B)[0].double()[:, None, None, None]
    xt, std = (1 - t) * x0 + t * eps, torch.where(label_B == NOTHING, NULL_STD, STD)[:, None, None, None]
    mean = xt * (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2)
    factor = torch.where(label_B == NOTHING, 1.0, SCALE)[:, None, None, None]
    expected = (factor * (mean - (eps - x0))).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)


def test_one_evaluation_then_draws_what_guidance_draws_in_many_steps():
    """400 steps of class guidance between the unguided velocities end where one step of the guided ones does."""

    def unguided(x_BCHW, t_B, condition):
        t = t_B[:, None, None, None]
        std = torch.where(condition.label_B == NOTHING, NULL_STD, STD)[:, None, None, None]
        return x_BCHW * (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2)

    noise = torch.randn(16, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = (noise, Condition(torch.zeros(16, dtype=torch.int64)), NOTHING)
    one = SamplerConfig(sampler="mean_flow", steps=1)
    many = SamplerConfig(sampler="heun", steps=400, guidance=SCALE)
    end = sample(guided_gaussian, GUIDED, *parts, one, lambda step: noise)
    torch.testing.assert_close(end, sample(unguided, GUIDED, *parts, many, lambda step: noise), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(end, noise * STD**SCALE * NULL_STD ** (1 - SCALE), rtol=1e-9, atol=1e-9)


def test_captions_are_conditions_of_guidance_inside():
    """A sample that kept either class or caption is guided, one that lost both is not; no gradient goes that way."""
    text = torch.tensor([[3, 0], [0, 0], [3, 0], [0, 0]])
    condition = Condition(torch.tensor([0, 0, NOTHING, NOTHING]), text)
    weight = torch.tensor(2.0, requires_grad=True)

    def denoiser(x_BCHW, t_B, condition):
        assert not condition.text.any() and (condition.label_B == NOTHING).all()
        return weight * x_BCHW

    x, target = torch.ones(4, 1, 1, 1), torch.full((4, 1, 1, 1), 5.0)
    ours = mean_flow.guided(denoiser, target, x, torch.ones(4), condition, NOTHING, SCALE)
    assert ours.flatten().tolist() == [6.5, 6.5, 6.5, 5.0] and not ours.requires_grad


TEXT = TextShape(5, vocabulary=257)
MODELS = {
    "in_context": ({}, None),
    "adaln_zero": ({"conditioning": "adaln_zero", "norm": "layer", "mlp": "gelu", "positions": "sincos"}, None),
    "uvit": ({"long_skips": True, "positions": "learned", "output_convolution": True, "init": "uvit"}, None),
    "head": ({"head": HeadConfig(1, 64, 2), "value_residual": True, "activation_checkpointing": True}, None),
    "text": ({"condition_on": "class_and_text"}, TEXT),
    "reference": ({"attention": "reference", "time": "unit"}, None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_derivative_of_a_network_agrees_with_differences(kind):
    keys, text = MODELS[kind]
    model = build(ModelConfig(width=32, depth=3, heads=2, interval=True, **keys), (4, 4, 4), 3, seed=0, text=text)
    model = randomised(model).double().requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64, generator=generator)
    t, r = torch.tensor([[0.2, 0.5, 0.9], [0.1, 0.5, 0.0]], dtype=torch.float64)
    words = torch.tensor([[5, 6, 0, 0, 0], [1, 2, 3, 4, 5], [0] * 5]) if text else None
    condition, h = Condition(torch.tensor([0, 3, 1]), words), 1e-6
    slope = mean_flow.slope(forward_differentiable(model), x, t, r, condition)
    with torch.no_grad():
        v = model(x, t, condition)
        ahead, behind = (model(x + d * v, t + d, condition, r_B=r) for d in (h, -h))
    difference = (ahead - behind) / (2 * h)
    assert not slope.requires_grad
    assert (slope - difference).norm() / difference.norm() < 1e-5


def test_r_is_seen_only_by_a_model_of_intervals_and_r_equal_to_t_is_no_interval():
    plain, told = (ModelConfig(width=32, depth=2, heads=2, interval=i) for i in (False, True))
    model = randomised(build(told, (4, 4, 4), 3, seed=0))
    x, t, condition = torch.randn(2, 4, 4, 4), torch.tensor([0.4, 0.8]), Condition(torch.tensor([0, 1]))
    at_t = model(x, t, condition)
    assert torch.equal(model(x, t, condition, r_B=t), at_t)
    assert not torch.allclose(model(x, t, condition, r_B=0.5 * t), at_t)
    names = {name for name, _ in model.named_parameters()}
    assert names - {n for n, _ in build(plain, (4, 4, 4), 3, seed=0).named_parameters()} == {
        f"interval.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_steps_is_exact_on_a_linear_flow(steps):
    noise = torch.randn(16, 1, 2, 2, dtype=torch.float64)
    config = SamplerConfig(sampler="mean_flow", steps=steps)
    end = sample(gaussian, FLOW, noise, Condition(torch.zeros(16, dtype=torch.int64)), 1, config, lambda step: noise)
    torch.testing.assert_close(end, STD * noise, rtol=1e-9, atol=1e-9)


def test_class_guidance_extrapolates_the_mean_velocities():
    """As of any prediction: from no class through the class, over the same interval."""

    def toy(x_BCHW, t_B, condition, r_B=None):
        return (t_B - r_B)[:, None, None, None] * (1 + guided_towards(condition, x_BCHW)) + 0 * x_BCHW

    noise, condition = torch.zeros(2, 1, 1, 1, dtype=torch.float64), Condition(torch.tensor([0, 1]))
    config = SamplerConfig(sampler="mean_flow", steps=1, guidance=1.5)
    end = sample(toy, FLOW, noise, condition, 2, config, lambda step: noise)
    torch.testing.assert_close(end.flatten(), -torch.tensor([3 + 1.5 * (1 - 3), 3 + 1.5 * (2 - 3)]).double())


def test_the_draws_are_keyed_and_as_many_as_asked(tmp_path):
    write_shards(tmp_path, [400])
    shards = open_shards(str(tmp_path))

    def drawn(share, first=0, count=400):
        batch, key_n = (
            Batch.padding(count, shards.manifest, False, mean_flow=share > 0),
            np.arange(first, first + count),
        )
        SampleDraws(3, mean_flow=share).fill(batch, shards, Located(key_n, np.zeros(count, np.int64), key_n))
        return batch, digest(batch, key_n, rng.VERSION)

    (whole, a), (part, _), (more, b), (plain, c) = drawn(0.25), drawn(0.25, 100, 50), drawn(0.5), drawn(0.0)
    has = whole.second_B > 0
    assert torch.equal(whole.second_B[100:150], part.second_B)
    assert 0.18 < has.float().mean() < 0.32 and 0.4 < whole.second_B[has].mean() < 0.6
    assert torch.equal(more.second_B[has], whole.second_B[has]), "a larger share only adds to these samples"
    assert plain.second_B is None and torch.equal(plain.uniform_B, whole.uniform_B)
    assert len({a, b, c}) == 3, "the digest sees them"


# ----------------------------------------------------------------------------------------------------------- whole runs

MEAN_FLOW = ["model.interval=true", "objective.mean_flow=0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [40, 23], latent_shape=(4, 4, 4))
    return path


@pytest.fixture(scope="module")
def reference(pool, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "reference"
    settings = [f"run_dir={run}", f"data.path={data}", "engine.zero_stage=0", "train.total_samples=120", *MEAN_FLOW]
    return run, pool(1).run(train_case, settings=settings)


@pytest.mark.parametrize(("ranks", "stage", "micro_batch"), [(1, 2, 3), (2, 0, 0), (2, 1, 1), (3, 2, 0)])
def test_training_is_the_same_at_any_world_and_stage(pool, data, reference, tmp_path, ranks, stage, micro_batch):
    """… also when another world ends what this one has begun."""
    placement = [f"run_dir={tmp_path}/run", f"data.path={data}", f"engine.zero_stage={stage}", *MEAN_FLOW]
    placement += [f"train.micro_batch={micro_batch}"]
    assert_same_run(trained_in_parts(pool, ranks, placement, 80, 120), reference[1])


def test_with_guidance_inside_too(pool, data, tmp_path):
    settings = [f"data.path={data}", *MEAN_FLOW, "objective.mean_flow_guidance=1.5", "train.total_samples=80"]
    one = pool(1).run(train_case, settings=[*settings, f"run_dir={tmp_path}/one", "engine.zero_stage=0"])
    placement = ["engine.zero_stage=2", "train.micro_batch=3"]
    two = pool(2).run(train_case, settings=[*settings, *placement, f"run_dir={tmp_path}/two"])
    assert_same_run(one, two)
    plain = [*settings, "objective.mean_flow_guidance=1", "train.total_samples=16", f"run_dir={tmp_path}/plain"]
    other = pool(1).run(train_case, settings=plain)
    assert [r["digest"] for r in other] == [r["digest"] for r in one[:2]], "it draws nothing"
    assert abs(other[1]["loss"] / one[1]["loss"] - 1) > 1e-3


def test_bfloat16_and_compiled_blocks_train_alike(pool, data, reference, tmp_path):
    placement = [f"data.path={data}", "train.total_samples=40", *MEAN_FLOW]
    for change, tolerance in (("engine.precision=bf16", 0.05), ("engine.compile=true", 1e-3)):
        settings = [f"run_dir={tmp_path}/{change}", *placement, "engine.zero_stage=1", change]
        ours = pool(1).run(train_case, settings=settings)
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in reference[1][:5]], rel=tolerance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.mean_flow=0.25"], "objective.mean_flow=0.25 needs a model that is told of intervals"),
        ([*MEAN_FLOW, "engine.zero_stage=3"], "needs the whole weights on every rank for its derivative"),
        ([*MEAN_FLOW, "objective.prediction=v"], "objective.mean_flow=0.5 needs objective.prediction=flow, not v"),
        ([*MEAN_FLOW, "objective.weighting=min_snr"], "needs objective.weighting=constant"),
        ([*MEAN_FLOW, "model.inner_head=1"], "model.interval=true needs"),
        ([*MEAN_FLOW, "model.name=unet"], "model.interval=true needs model.name=transformer"),
        (["objective.mean_flow=1.5"], "must be a share of the samples"),
        (
            ["objective.mean_flow_guidance=1.5"],
            "guidance=1.5 needs objective.mean_flow=0.0 and",
        ),
        (
            [*MEAN_FLOW, "objective.mean_flow_guidance=2", "objective.condition_drop=0"],
            "condition_drop=0.0 above 0",
        ),
        ([*MEAN_FLOW, "objective.mean_flow_guidance=-1"], "guidance=-1.0 must be positive, such as 1.5, or 1 for off"),
        (["log.preview.sampler=mean_flow"], "log.preview.sampler=mean_flow needs model.interval=true"),
        (["evaluate.sampler=mean_flow", "evaluate.guidance_inner=1.5"], "which guidance_inner=1.5 has none of"),
        (["evaluate.sampler=mean_flow", "evaluate.guide=x", "evaluate.guide_scale=2"], "guide=x may not know"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load(TrainJob, None, ["run_dir=x", "data.path=y", *settings])


def test_the_sampler_refuses_a_model_without_intervals(tmp_path_factory, capsys):
    run = shared_run(tmp_path_factory)
    assert main(["sample", str(run), "sampler=mean_flow", "steps=1", "images=4"]) == 2
    assert "was trained without objective.mean_flow" in capsys.readouterr().err


def test_the_plan_counts_the_derivative():
    """Of a quarter of the samples three forward passes more, in which attention counts as four."""
    path = ROOT / "configs" / "study" / "mean_flow.yaml"
    (_, _, on), (_, _, off) = planned(path, "nodes=1"), planned(path, "nodes=1", "objective.mean_flow=0")
    assert on.products == pytest.approx(off.products * 3.75 / 3)
    assert on.attention == pytest.approx(off.attention * 4.5 / 3.5)
    assert on.between > off.between and on.memory == off.memory
    guided = planned(path, "nodes=1", "objective.mean_flow_guidance=1.5")[2]
    assert guided.products == pytest.approx(off.products * 4.75 / 3)
    assert guided.attention == pytest.approx(off.attention * 5.5 / 3.5)
