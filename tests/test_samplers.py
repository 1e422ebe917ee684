"""Samplers against the closed-form solution on Gaussian data, in float64."""

import math
import warnings

import pytest
import torch

from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig, SamplerConfig
from ldt.diffusion.guidance import as_predict, class_guided
from ldt.diffusion.objectives import Objective, Prediction
from ldt.diffusion.samplers import SAMPLERS, sample, sampling_times
from ldt.diffusion.schedules import SCHEDULES, Schedule, make_schedule
from ldt.errors import InputError

MEAN, STD = 0.7, 0.4
ORDER = {"euler": 1, "heun": 2, "ddim": 1, "dpmpp_2m": 2}
STOCHASTIC = ("ddpm", "sde", "dpmpp_2m_sde")


def gaussian_predict(schedule: Schedule, calls: list[float] | None = None):
    """E[x0 | x_t] and E[ε | x_t] for data N(MEAN, STD²)."""

    def predict(x: torch.Tensor, t: float) -> Prediction:
        if calls is not None:
            calls.append(t)
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        deviation = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(MEAN + alpha * STD**2 * deviation, sigma * deviation)

    return predict


def exact(schedule: Schedule, x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """The probability-flow ODE from t to s: deviations scale like the marginal standard deviation."""

    def marginal(time: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = (f(torch.tensor(time, dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
        return alpha * MEAN, (alpha**2 * STD**2 + sigma**2).sqrt()

    (mean_t, std_t), (mean_s, std_s) = marginal(t), marginal(s)
    return mean_s + std_s * (x - mean_t) / std_t


def noise(n: int = 64) -> torch.Tensor:
    return torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule_name", ["rectified_flow", "cosine", "linear_vp"])  # discrete ones have kinks
@pytest.mark.parametrize("name", ORDER)
def test_convergence_order_on_gaussian_data(name: str, schedule_name: str) -> None:
    """On the whole way for the solvers in t; for the one in λ on a stretch where λ is finite, as its theory asks."""
    schedule = make_schedule(schedule_name)
    high, low = (0.95, 0.05) if name == "dpmpp_2m" else (1.0, 0.0)
    errors = []
    for steps in (80, 160, 320):
        times = [low + (high - low) * t for t in sampling_times(steps)]
        end = SAMPLERS[name](gaussian_predict(schedule), schedule, noise(), times, no_noise)
        errors.append((end - exact(schedule, noise(), high, low)).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders[-1] == pytest.approx(ORDER[name], abs=0.15), (errors, orders)


def test_every_sampler_has_a_tested_order() -> None:
    assert {*ORDER, *STOCHASTIC, "mean_flow"} == set(SAMPLERS)  # exact in any number of steps: tests/test_mean_flow.py


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", ORDER)
def test_the_whole_way_ends_at_the_data(name: str, schedule_name: str) -> None:
    schedule = make_schedule(schedule_name)
    end = SAMPLERS[name](gaussian_predict(schedule), schedule, noise(), sampling_times(200), no_noise)
    assert (end - exact(schedule, noise(), 1, 0)).abs().max() < 0.05


def no_noise(step: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def moments(name: str, schedule: Schedule, steps: int) -> tuple[float, float]:
    """Exact mean and standard deviation of a stochastic sampler's results on Gaussian data, without drawing any.

    There every step is linear, so the end is A·x1 + B + Σ c_k·z_k. Rows of the batch read off B, A + B and B + c_k.
    """
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1

    def impulse(step: int) -> torch.Tensor:
        z = torch.zeros_like(x)
        z[2 + step] = 1
        return z

    end = SAMPLERS[name](gaussian_predict(schedule), schedule, x, sampling_times(steps), impulse).flatten()
    start = float(schedule.sigma(torch.ones((), dtype=torch.float64)))
    variance = ((end[1] - end[0]) * start) ** 2 + (end[2:] - end[0]).square().sum()
    return float(end[0]), float(variance.sqrt())


@pytest.mark.parametrize("schedule_name", ["rectified_flow", "cosine"])  # these end in pure noise, as samplers assume
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_the_moments_of_the_data(name: str, schedule_name: str) -> None:
    schedule = make_schedule(schedule_name)
    errors = [abs(moments(name, schedule, n)[1] - STD) for n in (100, 200, 400)]
    assert abs(moments(name, schedule, 400)[0] - MEAN) < 0.01
    assert errors[-1] < 0.02 * STD
    order = math.log2(errors[-2] / errors[-1])
    assert order > 0.85, (errors, order)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_drawn_number_matters_but_those_of_the_last_step(name: str) -> None:
    schedule, steps = make_schedule("cosine"), 6
    drawn: list[int] = []

    def recording(step: int) -> torch.Tensor:
        drawn.append(step)
        return torch.ones(1, 1, 1, 1, dtype=torch.float64)

    times = sampling_times(steps)
    end = SAMPLERS[name](gaussian_predict(schedule), schedule, noise(1), times, recording)
    assert drawn == list(range(steps - 1))
    without = SAMPLERS[name](gaussian_predict(schedule), schedule, noise(1), times, lambda k: torch.zeros(1, 1, 1, 1))
    assert end > without, "noise is added: images of a seed stay what they are"


class Discrete:
    """A diffusers scheduler's α and σ at its integer steps: t = (step + 1) / 1000, and pure data at 0."""

    def __init__(self, cumulative: torch.Tensor) -> None:
        self.square = torch.cat([torch.ones(1, dtype=torch.float64), cumulative.double()])

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self.square[(t * 1000).round().long()].sqrt()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.square[(t * 1000).round().long()]).sqrt()

    def slope(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("not needed")


@pytest.mark.parametrize(("name", "theirs"), [("ddim", "DDIMScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler")])
def test_agreement_with_diffusers(name: str, theirs: str) -> None:
    """The same model outputs give the same trajectory as diffusers' scheduler."""
    settings = {"timestep_spacing": "trailing"}
    settings |= {"clip_sample": False} if name == "ddim" else {"solver_order": 2, "final_sigmas_type": "zero"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers and numpy 2 quarrel about __array__
        import diffusers

        scheduler = getattr(diffusers, theirs)(num_train_timesteps=1000, **settings)
        scheduler.set_timesteps(20)
    schedule = Discrete(scheduler.alphas_cumprod)

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(x) * (0.3 + 0.5 * t) + 0.1 * x

    x = noise()
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, (int(timestep) + 1) / 1000), timestep, x).prev_sample

    def predict(x: torch.Tensor, t: float) -> Prediction:
        time = torch.tensor(t, dtype=torch.float64)
        eps = network(x, t)
        return Prediction((x - schedule.sigma(time) * eps) / schedule.alpha(time), eps)

    times = [(int(i) + 1) / 1000 for i in scheduler.timesteps] + [0.0]
    ours = SAMPLERS[name](predict, schedule, noise(), times, no_noise)
    torch.testing.assert_close(ours, x.double(), rtol=1e-5, atol=1e-5)


def test_calls_of_the_network() -> None:
    schedule = make_schedule("rectified_flow")
    for name, expected in (("euler", 8), ("heun", 15), ("ddim", 8), ("dpmpp_2m", 8)):
        calls: list[float] = []
        SAMPLERS[name](gaussian_predict(schedule, calls), schedule, noise(1), sampling_times(8), no_noise)
        assert len(calls) == expected
        assert min(calls) > 0, "never asked at t = 0, where some predictions say nothing"


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_go_from_noise_to_data(shift: float) -> None:
    times = sampling_times(10, shift)
    assert times[0] == 1 and times[-1] == 0 and len(times) == 11
    assert times == sorted(times, reverse=True)
    assert times[5] == pytest.approx(shift / (1 + shift))
    assert sampling_times(4) == [1, 0.75, 0.5, 0.25, 0], "even without a shift"


class Marked:
    """A denoiser whose output tells the label it was given, and which records every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def __call__(self, x: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
        self.calls.append((len(x), t_B[0].item()))
        return x * 0 + condition.label_B.to(x.dtype)[:, None, None, None]


def test_guidance_combines_on_all_channels_in_one_call() -> None:
    denoiser = Marked()
    x = torch.zeros(3, 4, 2, 2)
    label_B = torch.tensor([1, 2, 3])
    y = class_guided(denoiser, null_label=10, scale=2.5)(x, torch.full((3,), 0.5), Condition(label_B))
    expected = 10 + 2.5 * (label_B - 10.0)
    assert torch.equal(y, expected[:, None, None, None].expand(3, 4, 2, 2))
    assert denoiser.calls == [(6, 0.5)]


def test_guidance_only_inside_its_interval() -> None:
    denoiser = Marked()
    config = SamplerConfig(guidance=2.0, guidance_low=0.25, guidance_high=0.75)
    predict = as_predict(denoiser, Objective(ObjectiveConfig()), Condition(torch.tensor([1])), 10, config)
    for t in (1.0, 0.75, 0.5, 0.25, 0.1):
        predict(torch.zeros(1, 1, 1, 1), t)
    assert [n for n, _ in denoiser.calls] == [1, 2, 2, 1, 1]


def test_no_guidance_costs_no_second_half() -> None:
    denoiser = Marked()
    condition = Condition(torch.tensor([0, 1]))
    sample(denoiser, Objective(ObjectiveConfig()), noise(2).float(), condition, 10, SamplerConfig(steps=3), no_noise)
    assert {n for n, _ in denoiser.calls} == {2}


def test_a_shift_by_the_latents_size_holds_in_sampling_and_multiplies_with_the_samplers_own() -> None:
    """Against the closed formula, at the times that the denoiser sees: s = √(C·H·W / base) · shift."""
    denoiser, shape = Marked(), (768, 16, 16)
    objective = Objective(ObjectiveConfig(shift_base=4096), shape)
    config = SamplerConfig(sampler="euler", steps=5, shift=1.5)
    sample(denoiser, objective, torch.zeros(1, *shape), Condition(torch.tensor([0])), 10, config, no_noise)
    s = 1.5 * (768 * 16 * 16 / 4096) ** 0.5
    even = [1 - i / 5 for i in range(5)]
    assert [t for _, t in denoiser.calls] == pytest.approx([s * t / (1 + (s - 1) * t) for t in even], rel=1e-6)


def test_sampling_starts_with_as_much_noise_as_the_schedule_ends_with() -> None:
    """σ(1) is 0.998 in Stable Diffusion's; what is missing there is data of 0."""
    seen: list[torch.Tensor] = []

    def denoiser(x: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen.append(x)
        return x

    objective = Objective(ObjectiveConfig(schedule="scaled_linear", prediction="eps"))
    condition = Condition(torch.zeros(64, dtype=torch.int64))
    sample(denoiser, objective, noise(), condition, 10, SamplerConfig(sampler="euler", steps=2), no_noise)
    torch.testing.assert_close(seen[0], noise() * math.sqrt(1 - torch.prod(1 - objective.schedule.betas)))


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "x"])
def test_every_prediction_leads_to_the_data(prediction: str) -> None:
    """The optimal network of each kind, through the objective's conversion, samples the same data."""
    objective = Objective(ObjectiveConfig(prediction=prediction, schedule="cosine"))
    optimal = gaussian_predict(objective.schedule)

    def denoiser(x: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
        p = optimal(x, t_B[0].item())
        t = t_B[:, None, None, None]
        alpha, sigma = objective.schedule.alpha(t), objective.schedule.sigma(t)
        d_alpha, d_sigma = objective.schedule.slope(t)
        return {
            "eps": p.eps_BCHW,
            "x": p.x0_BCHW,
            "v": alpha * p.eps_BCHW - sigma * p.x0_BCHW,
            "flow": d_alpha * p.x0_BCHW + d_sigma * p.eps_BCHW,
        }[prediction]

    label_B = torch.zeros(len(noise()), dtype=torch.int64)
    end = sample(
        denoiser, objective, noise(), Condition(label_B), 1, SamplerConfig(sampler="heun", steps=100), no_noise
    )
    expected = SAMPLERS["heun"](optimal, objective.schedule, noise(), sampling_times(100), no_noise)
    # eps says nothing about x0 at t = 1, which spoils the first of the 100 steps a little
    assert torch.allclose(end, expected, rtol=0, atol=4e-3 if prediction == "eps" else 1e-9)


@pytest.mark.parametrize(
    "mistake", [{"steps": 0}, {"shift": 0.0}, {"guidance_low": 0.5, "guidance_high": 0.5}, {"guidance_high": 1.5}]
)
def test_impossible_settings_are_refused(mistake: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(mistake))):
        SamplerConfig(**mistake)  # type: ignore[arg-type]
