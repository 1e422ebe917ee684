"""Validation at fixed times: the same quantity for every objective, against closed forms, and in a run's log."""

import itertools
import json
import math

import forked
import numpy as np
import pytest
import torch
from shard_data import write_shards

from ldt.cli import main
from ldt.data.batch import SampleDraws
from ldt.data.loader import RankSlice, ValidationLoader
from ldt.data.shards import open_shards
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.fixed_times import FixedTimes
from ldt.diffusion.objectives import Objective
from ldt.errors import InputError
from ldt.training.config import LogConfig
from ldt.training.monitor import fixed_time_loss

SCHEDULES = ("rectified_flow", "cosine", "linear_vp", "ddpm", "scaled_linear", "ldm")
PREDICTIONS = ("flow", "eps", "v", "x")
K, SHAPE = 8, (4, 16, 16)
NO_CONDITION = Condition(label_B=torch.zeros(1, dtype=torch.int64))


def objective_of(prediction, schedule, **keys):
    return Objective(ObjectiveConfig(prediction=prediction, schedule=schedule, **keys))


def ideal(objective):
    """The denoiser that is best where latents are standard normal: the mean of its target at x_t, and no more.

    E x0 = α x_t / (α² + σ²), and E ε likewise with σ, as x_t is a sum of independent normal numbers.
    """

    def denoiser(xt_BCHW, t_B, condition):
        t = t_B[:, None, None, None]
        alpha, sigma = objective.schedule.alpha(t), objective.schedule.sigma(t)
        a, b = objective._coefficients(objective.config.prediction, t)
        y = (a * alpha + b * sigma) * xt_BCHW / (alpha**2 + sigma**2)
        return torch.where(torch.isfinite(y), y, 0.0)  # flow at t = 0 of a schedule whose slope is unbounded there

    return denoiser


def losses_of(objective, denoiser, samples=64):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn((2, samples, *SHAPE), generator=generator)
    times = FixedTimes(objective, K)
    loss_B = times.loss(denoiser, x0, eps, torch.arange(samples), NO_CONDITION)
    return torch.stack([loss_B[k::K].mean() for k in range(K)])


def test_the_loss_of_an_ideal_model_has_a_closed_form():
    """Given τ x_t says all of one direction of (x0, ε) and nothing of the other: 1 / ((1 − τ)² + τ²) is left."""
    tau = torch.arange(K) / K
    expected = 1 / ((1 - tau) ** 2 + tau**2)
    objective = objective_of("flow", "rectified_flow")
    torch.testing.assert_close(losses_of(objective, ideal(objective)), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(("prediction", "schedule"), list(itertools.product(PREDICTIONS, SCHEDULES)))
def test_it_is_the_same_quantity_for_every_objective(prediction, schedule):
    """The same ideal model, said in another prediction and on another schedule, has the same loss at each time."""
    reference, other = objective_of("flow", "rectified_flow"), objective_of(prediction, schedule)
    torch.testing.assert_close(
        losses_of(other, ideal(other)), losses_of(reference, ideal(reference)), rtol=2e-3, atol=0
    )


def test_weights_and_times_of_training_play_no_part():
    plain = objective_of("x", "rectified_flow")
    other = objective_of("x", "rectified_flow", loss="flow", time_floor=0.05, logit_mean=2.0)
    torch.testing.assert_close(losses_of(other, ideal(plain)), losses_of(plain, ideal(plain)))
    weighted = objective_of("eps", "ddpm", weighting="min_snr", timesteps="uniform")
    unweighted = objective_of("eps", "ddpm")
    torch.testing.assert_close(losses_of(weighted, ideal(weighted)), losses_of(unweighted, ideal(unweighted)))


@pytest.mark.parametrize("prediction", ["flow", "eps", "v"])
def test_who_knows_the_noise_has_no_loss_at_any_time(prediction):
    """Also at the data themselves, where these predictions say what the noise is: their answer counts."""
    objective = objective_of(prediction, "rectified_flow")
    x0, eps = torch.randn((2, K, *SHAPE), generator=torch.Generator().manual_seed(0))

    def knowing(xt_BCHW, t_B, condition):
        a, b = objective._coefficients(prediction, t_B[:, None, None, None])
        return a * x0 + b * eps

    loss_B = FixedTimes(objective, K).loss(knowing, x0, eps, torch.arange(K), NO_CONDITION)
    torch.testing.assert_close(loss_B, torch.zeros(K), rtol=0, atol=1e-6)


def test_a_prediction_of_the_data_counts_at_the_data_though_it_leaves_the_noise_open():
    """Who says 0 there is wrong by x0, besides the noise that nobody can tell: ε is taken to be answered by 0."""
    x0, eps = torch.randn((2, 1, *SHAPE), generator=torch.Generator().manual_seed(0))
    times = FixedTimes(objective_of("x", "rectified_flow"), K)
    loss_B = times.loss(lambda xt, t, condition: 0 * xt, x0, eps, torch.tensor([0]), NO_CONDITION)
    torch.testing.assert_close(loss_B, (eps - x0).square().mean((1, 2, 3)))


def test_the_time_is_that_of_the_number_and_padding_is_the_first():
    objective, numbers = objective_of("flow", "rectified_flow"), torch.tensor([0, K, 3 * K, -1, 1, K + 1])
    x0, eps = (v.expand(6, *SHAPE) for v in torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0)))
    loss = FixedTimes(objective, K).loss(ideal(objective), x0, eps, numbers, NO_CONDITION).tolist()
    assert loss[0] == loss[1] == loss[2] == loss[3] != loss[4] == loss[5]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_have_the_noise_of_the_rectified_flow(schedule):
    times = FixedTimes(objective_of("v", schedule), K)
    tau = torch.arange(K, dtype=torch.float64) / K
    ratio = times.objective.schedule.sigma(times.t_K) / times.objective.schedule.alpha(times.t_K)
    torch.testing.assert_close(ratio, tau / (1 - tau), rtol=1e-6, atol=1e-9)
    assert times.t_K[0] == 0, "the data themselves"
    if schedule == "rectified_flow":
        torch.testing.assert_close(times.t_K, tau)


def test_more_noise_than_a_schedule_has_is_refused():
    with pytest.raises(InputError, match=r"noise than objective.schedule=scaled_linear ends with; give at most 15"):
        FixedTimes(objective_of("eps", "scaled_linear"), 16)
    assert FixedTimes(objective_of("eps", "scaled_linear"), 15).count == 15
    assert FixedTimes(objective_of("flow", "rectified_flow"), 1000).count == 1000


@pytest.mark.parametrize("count", [1, -8])
def test_counts_that_are_none(count):
    with pytest.raises(InputError, match=f"log.validation_times={count} must be at least 2, such as 8, or 0"):
        LogConfig(validation_times=count)


# --------------------------------------------------------------------------------------------------- over a data set


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_each_time_has_as_many_samples(tmp_path, micro_batch):
    """21 held-out samples at 4 times: the first 20 count, five at each time, by their numbers and keyed noise."""
    write_shards(tmp_path / "data", [13, 8])
    shards = open_shards(tmp_path / "data")
    objective, seen = objective_of("flow", "rectified_flow"), []

    def denoiser(xt_BCHW, t_B, condition):
        seen.extend(t_B.tolist())
        return torch.zeros_like(xt_BCHW)

    share, draws = RankSlice.of(21, 0, 1, micro_batch), SampleDraws(5)
    with ValidationLoader(shards, draws, share) as loader:
        result = fixed_time_loss(loader, FixedTimes(objective, 4), lambda batch: denoiser, torch.device("cpu"))
    with ValidationLoader(shards, draws, share) as loader:
        batches = [b.rows(0, int(b.weight_B.sum())) for b in map(_copied, loader.batches())]
    x0, eps = (torch.cat([getattr(b, n) for b in batches]) for n in ("latent_BCHW", "noise_BCHW"))
    error = (eps - x0).square().mean((1, 2, 3))[:20]
    assert result["validation_loss_by_time"] == pytest.approx([float(error[k::4].mean()) for k in range(4)], rel=1e-6)
    assert result["validation_loss"] == pytest.approx(float(error.mean()), rel=1e-6)
    assert result["validation_times"] == 4
    assert seen[:6] == [0, 0.25, 0.5, 0.75, 0, 0.25][: len(seen[:6])]


def case_loss(world, data):
    objective = objective_of("flow", "rectified_flow")
    share = RankSlice.of(21, world.rank, world.size, 2)
    with ValidationLoader(open_shards(data), SampleDraws(5), share) as loader:
        times = FixedTimes(objective, 4)
        return fixed_time_loss(
            loader, times, lambda batch: lambda x, t, condition: x * t[:, None, None, None], world.device
        )


def test_any_number_of_ranks_has_the_same_loss(tmp_path, pool):
    write_shards(tmp_path / "data", [13, 8])
    one, two, three = (pool(n).run(case_loss, data=str(tmp_path / "data")) for n in (1, 2, 3))
    for other in (two, three):
        assert other["validation_loss_by_time"] == pytest.approx(one["validation_loss_by_time"], rel=1e-12)


def _copied(batch):
    return type(batch)(**{name: value.clone() for name, value in batch.tensors()})


SETTINGS = [
    "model={width: 32, depth: 1, heads: 2}", "train.global_batch=8", "train.total_samples=16",
    "log.every_samples=8", "log.validation_every_samples=8",
]  # fmt: skip


def test_a_run_logs_it(tmp_path, capsys):
    write_shards(tmp_path / "data", [20, 12])
    write_shards(tmp_path / "data" / "validation", [9])
    where = [f"run_dir={tmp_path}/run", f"data.path={tmp_path}/data"]
    assert main(["train", *where, *SETTINGS, "log.validation_times=10"]) == 2
    assert "holds 9 samples, fewer than log.validation_times=10" in capsys.readouterr().err
    words = ["-m", "ldt", "train", *where, *SETTINGS, "log.validation_times=4"]
    assert forked.run(*words).returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["samples_seen"] for line in validated] == [8, 16]
    for line in validated:
        assert line["validation_times"] == 4 == len(line["validation_loss_by_time"])
        assert line["validation_loss"] == pytest.approx(np.mean(line["validation_loss_by_time"]))
        assert all(math.isfinite(x) for x in line["validation_loss_by_time"])
