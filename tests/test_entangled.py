"""REG's class token: made of the target, noised by keyed draws, denoised beside the image in training and in sampling,
the same at any world; and what can't have one is refused."""

import math

import numpy as np
import pytest
import torch
from plans import ROOT, planned
from run_data import randomised
from shard_data import write_shards
from torch.utils.flop_counter import FlopCounterMode
from training_cases import assert_same_run, refused_case, train_case, trained_in_parts

import ldt
from ldt import log, rng
from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.config import load
from ldt.convert import diffusers_dit
from ldt.data import philox
from ldt.data.batch import Batch, Located, SampleDraws
from ldt.data.digest import digest
from ldt.data.order import Order
from ldt.data.shards import open_shards
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig, SamplerConfig
from ldt.diffusion.guidance import Guide
from ldt.diffusion.objectives import Objective
from ldt.diffusion.samplers import SAMPLERS, sample, sampling_times
from ldt.errors import InputError
from ldt.nn import align
from ldt.nn.build import build
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.entangled import Entangled, Joined, token_of
from ldt.nn.sizes import flops
from ldt.nn.text_shape import TextShape
from ldt.rng import Purpose
from ldt.training.config import TrainJob

SHAPE, CLASSES, F = (4, 4, 6), 3, 5
FLOW = Objective(ObjectiveConfig())
KINDS = [
    {},
    {"conditioning": "adaln_zero"},
    {"inner_head": 1},
    {"long_skips": True, "depth": 3},
    {"positions": "learned"},
    {"positions": "sincos", "norm": "layer"},
    {"conditioning": "adaln_zero", "head": HeadConfig(1, 48, 2)},
    {"condition_on": "class_and_text"},
    {"value_residual": True, "activation_checkpointing": True},
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ the mathematics


def test_the_token_is_the_targets_mean_over_patches_normalised_over_features():
    target = (3 + 2 * normal(4, F, 3, 3)).half()
    mean = target.double().mean((2, 3))
    expected = (mean - mean.mean(1, keepdim=True)) / mean.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(token_of(target).double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(token_of(target)[2:], token_of(target[2:])), "of the sample alone"


@pytest.mark.parametrize("keys", KINDS, ids=str)
def test_latent_and_token_see_each_other_and_the_other_weights_stay(keys):
    config = ModelConfig(**{"width": 32, "depth": 2, "heads": 2} | keys)
    text = TextShape(3, vocabulary=257) if config.uses_text else None
    plain, model = (build(config, SHAPE, CLASSES, seed=1, text=text, token=token) for token in (0, F))
    own = {name for name, _ in model.named_parameters() if name.startswith("class_token.")}
    assert own and own == {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    for name, p in plain.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    x, token = normal(2, *SHAPE).requires_grad_(), normal(2, F).requires_grad_()
    words = torch.tensor([[7, 0, 0], [0, 0, 0]]) if text else None
    condition, inner = Condition(torch.tensor([0, 3]), words), {"inner": True} if config.inner_head else {}
    assert not model(x, torch.tensor([0.3, 0.8]), condition, token_BF=token, **inner)[-1].any(), "zero at first"
    image, *_, made = randomised(model)(x, torch.tensor([0.3, 0.8]), condition, token_BF=token, **inner)
    assert image.shape == x.shape and made.shape == token.shape
    for output in (image, made):
        for grad in torch.autograd.grad(output[0].sum(), (x, token), retain_graph=True):
            assert grad[0].any() and not grad[1].any(), "of the same sample alone"


def test_the_projector_reads_the_images_tokens_alone_and_the_token_comes_last():
    model = randomised(build(ModelConfig(width=32, depth=3, heads=2, inner_head=1), SHAPE, CLASSES, seed=0, token=F))
    align.add_projector(model, 32, 7, block=2, seed=3)
    inputs = normal(2, *SHAPE), torch.tensor([0.3, 0.8]), Condition(torch.tensor([0, 2]))
    outputs = model(*inputs, inner=True, aligned=True, token_BF=normal(2, F))
    assert [tuple(y.shape[1:]) for y in outputs] == [SHAPE, SHAPE, (7, 2, 3), (F,)]
    with pytest.raises(AssertionError):
        model(*inputs)


@pytest.mark.parametrize("prediction", ["flow", "v", "eps", "x"])
def test_the_loss_is_the_error_of_what_the_network_predicts_at_the_latents_time(prediction):
    objective = Objective(ObjectiveConfig(prediction=prediction, schedule="cosine"))
    target, noise, t, x = normal(6, F, 2, 2), normal(6, F, seed=1), torch.linspace(0.1, 0.9, 6), normal(6, *SHAPE)
    token, seen = token_of(target), []
    alpha, sigma = (f(t)[:, None] for f in (objective.schedule.alpha, objective.schedule.sigma))
    a, b = (c if c.ndim == 1 else c for c in objective._coefficients(prediction, t))
    right = a[:, None] * token + b[:, None] * noise

    def toy(x_BCHW, t_B, condition, token_BF, wrong=0.0):
        seen.append(token_BF)
        return x_BCHW, right + wrong

    net = Entangled(toy, objective, target, noise)
    assert net(x, t, Condition(torch.zeros(6, dtype=torch.int64))) is x
    torch.testing.assert_close(seen[0], alpha * token + sigma * noise)
    torch.testing.assert_close(net.loss(), torch.zeros(6), atol=1e-10, rtol=0)
    net(x, t, Condition(torch.zeros(6, dtype=torch.int64)), wrong=0.5)
    torch.testing.assert_close(net.loss(), torch.full((6,), 0.25))


# ------------------------------------------------------------------------------------------------------------- sampling


def coupled(x_BCHW, t_B, condition, token_BF, inner=False):
    """A velocity of each that reads the other, the class and the time; the null label is 3."""
    label_B1 = condition.label_B[:, None].to(x_BCHW)
    mean_B1 = x_BCHW.mean((1, 2, 3))[:, None]
    made_BF = token_BF * mean_B1 + (label_B1 - 1) * t_B[:, None]
    full = x_BCHW + (token_BF.sum(1, keepdim=True) * t_B[:, None] + label_B1)[:, :, None, None]
    return (full, 2 * x_BCHW, made_BF) if inner else (full, made_BF)


def joined_noise(seed=0):
    return normal(2, 1, 1, math.prod(SHAPE) + F, seed=seed).double()


def test_latent_and_token_are_integrated_together_with_guidance_on_both():
    """Against Euler's steps written out: class guidance of both in its interval, the inner head's of the latent."""
    config = SamplerConfig(sampler="euler", steps=5, guidance=2.0, guidance_inner=1.5, guidance_low=0.3)
    condition, state = Condition(torch.tensor([0, 2])), joined_noise()
    net = Joined(coupled, SHAPE)
    end = sample(net, FLOW, state, condition, 3, config, lambda step: state)
    x, z, times = net.latent(state), state[:, 0, 0, math.prod(SHAPE) :], sampling_times(5)
    null = Condition(torch.tensor([3, 3]))
    for t, s in zip(times[:-1], times[1:], strict=True):
        t_B = torch.full((2,), t).double()
        sides = []
        for told in (condition, null):
            full, inner, made = coupled(x, t_B, told, z, inner=True)
            sides.append((inner + 1.5 * (full - inner) if t > 0.3 else full, made))
        scale = 2.0 if t > 0.3 else 1.0
        slope_x, slope_z = (n + scale * (y - n) for y, n in zip(*sides, strict=True))
        x, z = x + (s - t) * slope_x, z + (s - t) * slope_z
    torch.testing.assert_close(net.latent(end), x)
    torch.testing.assert_close(end[:, 0, 0, math.prod(SHAPE) :], z)


def test_a_guide_is_left_behind_in_both():
    config, state = SamplerConfig(sampler="euler", steps=3), joined_noise()
    condition = Condition(torch.tensor([0, 2]))

    def half(x_BCHW, t_B, condition, token_BF):
        return tuple(y / 2 for y in coupled(x_BCHW, t_B, condition, token_BF))

    guide = Guide(half, FLOW, 3.0, "").seen_as(lambda net: Joined(net, SHAPE))
    ends = [
        sample(net, FLOW, state, condition, 3, config, lambda step: state, guide)
        for net, guide in (
            (Joined(coupled, SHAPE), guide),
            (Joined(lambda *a, **k: tuple(2 * y for y in coupled(*a, **k)), SHAPE), None),
        )
    ]
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"mean_flow"}))
def test_every_sampler_takes_the_joint_state(sampler):
    """Where nothing couples them, the latent goes as it does alone."""

    def apart(x_BCHW, t_B, condition, token_BF):
        return 0.5 * x_BCHW, 0.1 * token_BF

    state, config = joined_noise(), SamplerConfig(sampler=sampler, steps=4)
    condition, net = Condition(torch.tensor([0, 2])), Joined(apart, SHAPE)
    end = sample(net, FLOW, state, condition, 3, config, lambda step: joined_noise(step))
    parts = (net.latent(state), condition, 3, config, lambda step: net.latent(joined_noise(step)))
    alone = sample(lambda x, t_B, c: 0.5 * x, FLOW, *parts)
    torch.testing.assert_close(net.latent(end), alone)


# ----------------------------------------------------------------------------------------------------------- the draws


@pytest.mark.parametrize("version", rng.VERSIONS)
def test_its_noise_is_keyed_and_in_the_digest(tmp_path, version):
    write_shards(tmp_path, [40], target=(F, 1, 1))
    shards, numbers = open_shards(str(tmp_path)), {2: rng, 3: philox}[version]

    def drawn(token, first=0, count=40):
        key_n = np.arange(first, first + count)
        batch = Batch.padding(count, shards.manifest, False, target=True, token=token)
        draws = SampleDraws(3, target=True, token=token, version=version)
        draws.fill(batch, shards, Located(1000 + key_n, np.zeros(count, np.int64), key_n))
        return batch, digest(batch, key_n, version)

    (whole, a), (part, _), (plain, b) = drawn(True), drawn(True, 10, 5), drawn(False)
    expected = np.empty((40, F), np.float32)
    numbers.fill_normal(3, Purpose.TOKEN_NOISE, np.arange(1000, 1040), expected)
    assert np.array_equal(whole.token_noise_BF.numpy(), expected)
    assert torch.equal(whole.token_noise_BF[10:15], part.token_noise_BF)
    assert plain.token_noise_BF is None and torch.equal(plain.noise_BCHW, whole.noise_BCHW)
    whole.token_noise_BF[7, 2] += 1
    assert len({a, b, digest(whole, np.arange(40), version)}) == 3


# ----------------------------------------------------------------------------------------------------------- whole runs

REG = ["model.depth=3", "align.weight=0.5", "align.block=2", "align.until_samples=84", "align.token_weight=0.3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for format in ("tar", "mds"):
        write_shards(root / format, [40, 23], format, flips=True, latent_shape=(4, 4, 4), target=(F, 2, 2))
        write_shards(root / format / "validation", [20], format, latent_shape=(4, 4, 4), target=(F, 2, 2), seed=9)
    return root


@pytest.fixture(scope="module")
def reference(pool, data, tmp_path_factory):
    """With a token throughout, and aligned for 84 of 120 samples."""
    run = tmp_path_factory.mktemp("runs") / "reference"
    settings = [f"run_dir={run}", f"data.path={data}/tar", "engine.zero_stage=0", "train.total_samples=120", *REG]
    return run, pool(1).run(train_case, settings=settings)


@pytest.mark.parametrize(("ranks", "stage", "micro_batch"), [(1, 1, 3), (2, 0, 0), (2, 3, 1), (3, 2, 0)])
def test_training_is_the_same_at_any_world_and_stage(pool, data, reference, tmp_path, ranks, stage, micro_batch):
    """… also when another world ends what this one has begun."""
    settings = [f"run_dir={tmp_path}/run", f"data.path={data}/mds", f"engine.zero_stage={stage}", *REG]
    settings += [f"train.micro_batch={micro_batch}"]
    assert_same_run(trained_in_parts(pool, ranks, settings, 112, 120), reference[1])


def test_the_first_loss_is_that_of_the_formula(pool, data, tmp_path):
    """With and without alignment. A new model predicts 0, of which the token's loss is known from shards and draws."""
    shards = open_shards(str(data / "tar"))
    order = Order(shards.manifest.counts, 5, 8, 16, 65536)
    key = np.arange(8)
    flip = philox.uniform(5, Purpose.FLIP, key, 1)[:, 0] >= 0.5
    target = torch.from_numpy(shards.read(*order.locate(key), flip, target=True).target_n)
    noise = np.empty((8, F), np.float32)
    philox.fill_normal(5, Purpose.TOKEN_NOISE, key, noise)
    expected = float((torch.from_numpy(noise) - token_of(target)).square().mean())
    for align_weight, weights in ((0, (0, 0.7)), (0.5, (0.3, 1.0))):  # what is aligned has seen the token
        loss = []
        for weight in weights:
            settings = [f"run_dir={tmp_path}/{align_weight}-{weight}", f"data.path={data}/tar", *REG]
            settings += [f"align.weight={align_weight}", f"align.token_weight={weight}", "train.total_samples=8"]
            loss.append(pool(1).run(train_case, settings=settings)[0]["loss"])
        assert loss[1] - loss[0] == pytest.approx(0.7 * expected, rel=1e-4)


@pytest.mark.parametrize("times", [0, 4])
def test_validation_has_the_held_out_samples_own_tokens(pool, data, tmp_path, times):
    settings = ["log.validation_every_samples=8", f"log.validation_times={times}", "train.total_samples=8", *REG]
    for ranks in (1, 2):
        run = [f"run_dir={tmp_path}/{ranks}", f"data.path={data}/tar", *settings]
        pool(ranks).run(train_case, settings=run)
    one, two = (
        [r["validation_loss"] for r in log.read_jsonl(tmp_path / ranks / "metrics.jsonl") if "validation_loss" in r]
        for ranks in ("1", "2")
    )
    assert one == pytest.approx(two, rel=1e-5) and one


def test_checkpoints_and_exports_hold_it_and_start_other_runs(pool, data, reference, tmp_path):
    run = reference[0]
    loaded = load_denoiser(run)
    assert loaded.spec.token == F and loaded.denoiser.class_token.predict.weight.any()
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    exported = load_denoiser(tmp_path / "model")
    assert exported.spec == loaded.spec
    for (name, a), b in zip(loaded.denoiser.named_parameters(), exported.denoiser.parameters(), strict=True):
        assert torch.equal(a, b), name
    start = [f"data.path={data}/tar", f"train.init_from={run}", "train.total_samples=8", "optimizer.lr=1e-30"]
    pool(1).run(train_case, settings=[f"run_dir={tmp_path}/with", *start, *REG])
    begun = dict(load_denoiser(tmp_path / "with", "master").denoiser.named_parameters())
    assert all(torch.equal(a, begun[name]) for name, a in loaded.denoiser.named_parameters())
    without = [f"run_dir={tmp_path}/without", *start, "model.depth=3"]
    assert "train.init_fresh=[class_token] does without" in pool(1).run(refused_case, settings=without)
    pool(1).run(train_case, settings=[*without, "train.init_fresh=[class_token]"])
    assert load_denoiser(tmp_path / "without").denoiser.class_token is None


def test_images_are_drawn_with_it(pool, encode, tmp_path, capsys):
    """By previews, `ldt sample` and `ldt evaluate`, with an earlier age of the run as a guide; and the same alone."""
    data, run = tmp_path / "data", tmp_path / "run"
    assert encode(data, target="efficientnet_lite0", target_grid=2) == 0
    settings = [f"run_dir={run}", f"data.path={data}", "train.total_samples=16", "checkpoint.every_samples=8"]
    settings += ["align.token_weight=0.03", "optimizer.lr=3e-2", "log.samples_every_samples=8", "log.preview.steps=2"]
    pool(1).run(train_case, settings=settings)
    assert len(list((run / "samples").glob("*.png"))) == 2
    model, how = ldt.load(run), {"steps": 3, "guidance": 1.5, "block": 4}
    images = model.sample(8, **how)
    assert np.array_equal(model.sample(4, **how), images[:4]) and (model.sample(8, **how | {"seed": 1}) != images).any()
    assert (model.sample(8, **how, sampler="sde") != images).any()
    older = {"guide": str(run / "checkpoints" / "000000000008"), "guide_scale": 3.0}
    assert (model.sample(8, **how, **older) != images).any()
    for name, parameter in model._loaded.denoiser.class_token.named_parameters():
        if name == "embed.weight":
            parameter.data.zero_()
    assert (model.sample(8, **how) != images).any(), "the token says something to the image"
    plain = tmp_path / "plain"
    pool(1).run(train_case, settings=[f"run_dir={plain}", f"data.path={data}", "train.total_samples=8"])
    capsys.readouterr()
    assert main(["sample", str(run), f"guide={plain}", "guide_scale=2", "steps=2"]) == 2
    assert "must both denoise the same class token (align.token_weight), or neither" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- refused, and planned


def test_data_without_targets_are_refused(pool, tmp_path):
    write_shards(tmp_path / "plain", [40], latent_shape=(4, 4, 4))
    settings = [f"run_dir={tmp_path}/run", f"data.path={tmp_path}/plain", "align.token_weight=0.03"]
    said = pool(1).run(refused_case, settings=settings)
    assert f"align.token_weight=0.03 needs data with targets, and {tmp_path}/plain has none" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align.token_weight=-1"], "align.token_weight=-1.0 must be positive"),
        (["align.token_weight=0.03", "model.name=unet"], "it needs model.name=transformer and objective.mean_flow=0"),
        (["align.token_weight=0.03", "model.interval=true", "objective.mean_flow=0.5"], "it needs model.name="),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load(TrainJob, None, ["run_dir=x", "data.path=y", *settings])


def test_diffusers_is_refused(reference):
    loaded = load_denoiser(reference[0])
    config = ModelConfig(width=32, depth=2, heads=2, **diffusers_dit.NEEDED)
    with pytest.raises(InputError, match="it denoises a class token"):
        diffusers_dit.check(config, Objective(ObjectiveConfig(prediction="eps", schedule="ddpm")), loaded.spec)


@pytest.mark.parametrize("keys", [{}, {"conditioning": "adaln_zero"}, {"inner_head": 1}])
def test_the_formula_counts_what_torch_counts(keys):
    config = ModelConfig(width=48, depth=2, heads=4, **keys)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build(config, SHAPE, CLASSES, seed=0, token=F)
        inputs = torch.zeros(1, *SHAPE), torch.zeros(1), Condition(torch.zeros(1, dtype=torch.int64))
        model(*inputs, token_BF=torch.zeros(1, F), **({"inner": True} if config.inner_head else {}))
    assert flops(config, SHAPE, None, F) == counter.get_total_flops()


def test_the_plan_counts_it():
    """Where the data are not there, as features of a ViT-B."""
    path, shape = ROOT / "configs" / "study" / "reg.yaml", ("data.path=not_there", "latent=4x8x8")
    (config, on, _), (_, off, _) = (planned(path, *shape, f"align.token_weight={w}") for w in (0.03, 0))
    width, features = 192, 768
    assert on.parameters - off.parameters == 2 * width * features + 2 * width + features
    more = flops(config.model, (4, 8, 8), None, features) - flops(config.model, (4, 8, 8))
    assert on.flops - off.flops == more > 0
    assert on.sample_bytes == off.sample_bytes and on.sample_draws - off.sample_draws == features
