"""Schedules and objectives against their definitions, in float64."""

import math
import statistics
import warnings

import numpy as np
import pytest
import torch

from ldt import rng
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective, Prediction
from ldt.diffusion.schedules import SCHEDULES, step_of_time, time_of_step
from ldt.errors import InputError

PREDICTIONS = ("flow", "eps", "v", "x")
CONDITION = Condition(torch.zeros(6, dtype=torch.int64))


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    return x0, eps, torch.linspace(0.05, 0.95, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_slope_is_the_derivative(name):
    schedule = SCHEDULES[name]()
    t = torch.linspace(0.0503, 0.9503, 19, dtype=torch.float64)  # between the steps of discrete schedules
    h = 1e-6
    for value, slope in zip((schedule.alpha, schedule.sigma), schedule.slope(t), strict=True):
        torch.testing.assert_close(slope, (value(t + h) - value(t - h)) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_runs_from_data_to_noise(name):
    schedule = SCHEDULES[name]()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert schedule.alpha(ends)[0] == 1 and schedule.sigma(ends)[0] == 0
    assert schedule.alpha(ends)[1] < 0.07 and schedule.sigma(ends)[1] > 0.997


def test_linear_vp_is_the_limit_of_ddpm():
    """The product of (1 − β_i) over DDPM's 1000 steps from 1e-4 to 0.02 approaches α² in continuous time."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    discrete = torch.cumprod(1 - betas, 0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(SCHEDULES["linear_vp"]().alpha(t) ** 2, discrete, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["ddpm", "scaled_linear", "ldm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_schedules_are_diffusers(name, dtype):
    """At every step, from times of either precision; the mapping of steps to times and back is exact."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDPMScheduler
    first, last, kind = {
        "ddpm": (1e-4, 0.02, "linear"),
        "scaled_linear": (0.00085, 0.012, "scaled_linear"),
        "ldm": (0.0015, 0.0195, "scaled_linear"),
    }[name]
    theirs = DDPMScheduler(beta_start=first, beta_end=last, beta_schedule=kind).alphas_cumprod.double()
    k = torch.arange(1000)
    t = time_of_step(k).to(dtype)
    assert torch.equal(step_of_time(t), k.to(dtype))
    schedule = SCHEDULES[name]()
    torch.testing.assert_close(schedule.alpha(t).double() ** 2, theirs, rtol=3e-5, atol=1e-7)  # theirs is float32
    torch.testing.assert_close(schedule.sigma(t).double() ** 2, 1 - theirs, rtol=3e-5, atol=1e-7)
    exact = torch.cumprod(1 - schedule.betas, 0)
    torch.testing.assert_close(schedule.alpha(time_of_step(k)) ** 2, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ddpm", "scaled_linear", "ldm"])
def test_log_alpha_is_linear_between_steps(name):
    schedule, k = SCHEDULES[name](), torch.arange(999).double()
    low, high = schedule.alpha(time_of_step(k)).log(), schedule.alpha(time_of_step(k + 1)).log()
    for part in (0.25, 0.8):
        between = schedule.alpha(time_of_step(k + part)).log()
        torch.testing.assert_close(between, (1 - part) * low + part * high, rtol=1e-9, atol=1e-12)


def test_discrete_schedules_train_on_their_steps_alone():
    uniform = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    t = Objective(ObjectiveConfig(schedule="ddpm", timesteps="uniform")).timesteps(uniform)
    k = step_of_time(t)
    assert torch.equal(k.sort().values, torch.arange(1000).repeat_interleave(5).float())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", PREDICTIONS)
def test_min_snr_weighs_the_error_of_the_clean_latent(case, schedule, loss):
    """In every space the weighted loss is min(SNR, γ) times the squared error of x0."""
    x0, eps, t = case
    config = ObjectiveConfig(prediction="x", loss=loss, schedule=schedule, weighting="min_snr", min_snr_gamma=3.0)
    guess = torch.roll(x0, 1, 0)
    got = Objective(config).loss(lambda x, t_B, c: guess, x0, eps, t, CONDITION)
    s = SCHEDULES[schedule]()
    snr = (s.alpha(t) / s.sigma(t)) ** 2
    torch.testing.assert_close(got, snr.clamp(max=3.0) * (guess - x0).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "ddpm"])
def test_min_snr_has_the_papers_weights(case, schedule):
    *_, t = case
    s = SCHEDULES[schedule]()
    snr = (s.alpha(t) / s.sigma(t)) ** 2
    expected = {"eps": 1 / snr, "v": 1 / (snr + 1), "x": torch.ones_like(snr)}
    for kind, factor in expected.items():
        got = Objective(ObjectiveConfig(prediction=kind, schedule=schedule, weighting="min_snr")).weight(t)
        torch.testing.assert_close(got, snr.clamp(max=5) * factor)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", PREDICTIONS)
def test_conversions_agree_in_a_round_through_all_predictions(case, schedule, start):
    """From any prediction to (x0, ε), on to the next kind, and so on around: every stop tells the same."""
    x0, eps, t = case
    xt = _xt(case, schedule)
    s = SCHEDULES[schedule]()
    kinds = [PREDICTIONS[(PREDICTIONS.index(start) + i) % 4] for i in range(5)]
    p = Prediction(x0, eps)
    for kind in kinds:
        objective = Objective(ObjectiveConfig(prediction=kind, schedule=schedule))
        y = objective._combine(kind, p, t[:, None, None, None])
        p = objective.predict(y, xt, t)
    torch.testing.assert_close(p.x0_BCHW, x0)
    torch.testing.assert_close(
        p.eps_BCHW, (xt - s.alpha(t)[:, None, None, None] * x0) / s.sigma(t)[:, None, None, None]
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", PREDICTIONS)
def test_a_perfect_denoiser_has_no_loss_in_any_space(case, schedule, prediction, loss):
    x0, eps, t = case
    alpha, sigma = SCHEDULES[schedule]().alpha(t), SCHEDULES[schedule]().sigma(t)
    d_alpha, d_sigma = SCHEDULES[schedule]().slope(t)
    a, b = {"eps": (0, 1), "x": (1, 0), "v": (-sigma, alpha), "flow": (d_alpha, d_sigma)}[prediction]

    def column(c):
        return torch.as_tensor(c, dtype=torch.float64).expand(6)[:, None, None, None]

    def perfect(x, t_B, condition):
        torch.testing.assert_close(x, column(alpha) * x0 + column(sigma) * eps)
        return column(a) * x0 + column(b) * eps

    objective = Objective(ObjectiveConfig(prediction=prediction, loss=loss, schedule=schedule))
    loss_B = objective.loss(perfect, x0, eps, t, CONDITION)
    assert loss_B.shape == (6,)
    assert loss_B.max() < 1e-9  # the network's output passes through float32
    recovered = objective.predict(perfect(column(alpha) * x0 + column(sigma) * eps, t, None), _xt(case, schedule), t)
    torch.testing.assert_close(recovered.x0_BCHW, x0)
    torch.testing.assert_close(recovered.eps_BCHW, eps)


def _xt(case, schedule):
    x0, eps, t = case
    s = SCHEDULES[schedule]()
    return s.alpha(t)[:, None, None, None] * x0 + s.sigma(t)[:, None, None, None] * eps


def test_flow_target_is_noise_minus_data(case):
    x0, eps, t = case
    objective = Objective(ObjectiveConfig())
    loss_B = objective.loss(lambda x, t_B, c: torch.zeros_like(x), x0, eps, t, CONDITION)
    torch.testing.assert_close(loss_B, (eps - x0).square().mean((1, 2, 3)))


def test_conversions_stay_finite_where_a_prediction_says_nothing(case):
    x0, eps, _ = case
    for prediction, t in (("eps", 1.0), ("x", 0.0), ("flow", 0.0), ("v", 1.0)):
        objective = Objective(ObjectiveConfig(prediction=prediction))
        p = objective.predict(x0, eps, torch.full((6,), t, dtype=torch.float64))
        assert isinstance(p, Prediction) and all(v.isfinite().all() for v in p)


@pytest.mark.parametrize(("prediction", "t"), [("eps", 0.9989), ("x", 0.0011)])
def test_conversions_are_exact_up_to_the_last_thousandth(case, prediction, t):
    x0, eps, _ = case
    objective, t_B = Objective(ObjectiveConfig(prediction=prediction)), torch.full((6,), t, dtype=torch.float64)
    p = objective.predict(eps if prediction == "eps" else x0, (1 - t) * x0 + t * eps, t_B)
    torch.testing.assert_close(p.x0_BCHW, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p.eps_BCHW, eps, rtol=1e-9, atol=1e-9)


def test_logit_normal_times_have_their_quantiles():
    uniform = torch.from_numpy(rng.uniform(0, rng.Purpose.TIMESTEP, np.arange(40_000), 1)[:, 0])
    t = Objective(ObjectiveConfig(logit_mean=0.5, logit_std=1.5)).timesteps(uniform)
    z = (torch.logit(t.double()) - 0.5) / 1.5
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    assert abs(z.mean()) < 5 / math.sqrt(40_000)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / 40_000)


def test_logit_normal_times_rise_with_the_number_by_the_closed_formula():
    u = [1e-3, 0.2, 0.5, 0.9]
    t = Objective(ObjectiveConfig(logit_mean=0.5, logit_std=1.5)).timesteps(torch.tensor(u, dtype=torch.float64))
    expected = [1 / (1 + math.exp(-(0.5 + 1.5 * statistics.NormalDist().inv_cdf(x)))) for x in u]
    assert t.tolist() == pytest.approx(expected, rel=1e-6)


def test_uniform_times_are_the_numbers_given():
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    t = Objective(ObjectiveConfig(timesteps="uniform")).timesteps(u)
    torch.testing.assert_close(t.double(), u, rtol=0, atol=2e-7)
    assert t.min() > 0 and t.max() < 1


@pytest.mark.parametrize(
    ("shape", "base"), [((768, 16, 16), 4096.0), ((32, 8, 8), 4096.0), ((4, 4, 4), 1024.0), ((4, 4, 4), 16.0)]
)
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_shift_base_shifts_training_times_by_the_closed_formula(shape, base, timesteps):
    """t' = s·t/(1 + (s − 1)·t) with s = √(dim/base); for logit-normal times that is a mean of ½·ln(dim/base) more."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    s = math.sqrt(shape[0] * shape[1] * shape[2] / base)
    plain = ObjectiveConfig(timesteps=timesteps)
    shifted = ObjectiveConfig(timesteps=timesteps, shift_base=base)
    got = Objective(shifted, shape).timesteps(u).double()
    t = Objective(plain).timesteps(u).double()
    torch.testing.assert_close(got, s * t / (1 + (s - 1) * t), rtol=1e-6, atol=1e-7)
    if timesteps == "logit_normal":
        moved = ObjectiveConfig(logit_mean=0.5 * math.log(s * s))
        torch.testing.assert_close(got, Objective(moved).timesteps(u).double(), rtol=1e-6, atol=1e-7)


def test_latents_of_another_shape_have_their_own_shift():
    config = ObjectiveConfig(shift_base=16)
    assert Objective(config, (1, 4, 4)).at((4, 4, 4)).time_shift == Objective(config, (4, 4, 4)).time_shift == 2
    assert Objective(ObjectiveConfig()).at((4, 4, 4)).time_shift == 1


def test_a_shift_leaves_what_is_of_the_base_size_and_never_reaches_the_ends():
    u = torch.tensor([0.0, 0.3, 1 - 2**-53], dtype=torch.float64)
    same = Objective(ObjectiveConfig(timesteps="uniform", shift_base=4096), (4, 32, 32))
    assert torch.equal(same.timesteps(u), Objective(ObjectiveConfig(timesteps="uniform")).timesteps(u))
    large = Objective(ObjectiveConfig(timesteps="uniform", shift_base=1), (768, 16, 16)).timesteps(u)
    assert large.min() > 0 and large.max() < 1


def test_time_floor_is_the_velocity_loss_with_its_denominator_clamped(case):
    """Against the definition, in numpy: both velocities are (x_t − x0)/max(t, floor)."""
    x0, eps, _ = case
    t = torch.tensor([1e-6, 0.01, 0.04, 0.06, 0.5, 1.0], dtype=torch.float64)
    guess = torch.roll(x0, 1, 0)
    config = ObjectiveConfig(prediction="x", loss="flow", time_floor=0.05)
    got = Objective(config).loss(lambda x, t_B, c: guess, x0, eps, t, CONDITION)
    t_111 = t.numpy()[:, None, None, None]
    xt = (1 - t_111) * x0.numpy() + t_111 * eps.numpy()
    velocities = [(xt - x.numpy()) / np.maximum(t_111, 0.05) for x in (guess, x0)]
    expected = ((velocities[0] - velocities[1]) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(got.numpy(), expected, rtol=1e-6, atol=0)
    exact = Objective(ObjectiveConfig(prediction="x", loss="flow")).loss(lambda x, t_B, c: guess, x0, eps, t, CONDITION)
    torch.testing.assert_close(got[3:], exact[3:], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shift_base": -1.0}, "objective.shift_base=-1.0"),
        ({"shift_base": math.inf}, "objective.shift_base=inf"),
        ({"shift_base": 4096, "schedule": "ddpm"}, "rectified_flow, not of ddpm"),
        ({"time_floor": 1.0}, "objective.time_floor=1.0"),
        ({"time_floor": 0.05}, "needs objective.prediction=x, not flow"),
        ({"time_floor": 0.05, "prediction": "x"}, "needs objective.loss=flow, not same"),
        ({"time_floor": 0.05, "prediction": "x", "loss": "flow", "weighting": "min_snr"}, "weighting=constant"),
        ({"time_floor": 0.05, "prediction": "x", "loss": "flow", "schedule": "cosine"}, "schedule=rectified_flow"),
    ],
)
def test_shifts_and_floors_that_mean_nothing_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        ObjectiveConfig(**keys)


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="objective.condition_drop=1.5"):
        ObjectiveConfig(condition_drop=1.5)
    with pytest.raises(InputError, match="objective.logit_std=0"):
        ObjectiveConfig(logit_std=0)
    with pytest.raises(InputError, match="objective.min_snr_gamma=0"):
        ObjectiveConfig(min_snr_gamma=0)
