"""Schedules and objectives against their definitions, in float64."""

import math

import numpy as np
import pytest
import torch

from ldt import rng
from ldt.diffusion.objectives import Objective, ObjectiveConfig, Prediction
from ldt.diffusion.schedules import SCHEDULES
from ldt.errors import InputError
from ldt.nn.condition import Condition

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
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    h = 1e-6
    for value, slope in zip((schedule.alpha, schedule.sigma), schedule.slope(t), strict=True):
        torch.testing.assert_close(slope, (value(t + h) - value(t - h)) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_runs_from_data_to_noise(name):
    schedule = SCHEDULES[name]()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert schedule.alpha(ends)[0] == 1 and schedule.sigma(ends)[0] == 0
    assert schedule.alpha(ends)[1] < 0.01 and schedule.sigma(ends)[1] > 0.999


def test_linear_vp_is_the_limit_of_ddpm():
    """The product of (1 − β_i) over DDPM's 1000 steps from 1e-4 to 0.02 approaches α² in continuous time."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    discrete = torch.cumprod(1 - betas, 0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(SCHEDULES["linear_vp"]().alpha(t) ** 2, discrete, rtol=0, atol=2e-3)


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


def test_logit_normal_times_have_their_quantiles():
    uniform = torch.from_numpy(rng.uniform(0, rng.Purpose.TIMESTEP, np.arange(40_000), 1)[:, 0])
    t = Objective(ObjectiveConfig(logit_mean=0.5, logit_std=1.5)).timesteps(uniform)
    z = (torch.logit(t.double()) - 0.5) / 1.5
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    assert abs(z.mean()) < 5 / math.sqrt(40_000)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / 40_000)


def test_uniform_times_are_the_numbers_given():
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    t = Objective(ObjectiveConfig(timesteps="uniform")).timesteps(u)
    torch.testing.assert_close(t.double(), u, rtol=0, atol=2e-7)
    assert t[0] > 0


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="objective.condition_drop=1.5"):
        ObjectiveConfig(condition_drop=1.5)
    with pytest.raises(InputError, match="objective.logit_std=0"):
        ObjectiveConfig(logit_std=0)
