"""Improved MeanFlow (2512.02012): the network predicts the velocity's average over an interval, and few steps sample.

On the rectified flow dx/dt = v the average u(x_t, t, r) = (x_t − x_r) / (t − r) takes a sample from t to r in one step.
At r = t it is v itself, so a model of u can still be sampled step by step. Differentiating (t − r)·u along the flow
gives v = u + (t − r)·du/dt, which is what is trained:

    V = u(x_t, t, r) + (t − r)·stop_gradient(u̇),   u̇ = ∂u/∂x·u(x_t, t, t) + ∂u/∂t,   loss = ‖V − (ε − x0)‖²

u̇ is one derivative in forward mode, without gradients, of the bare network: no hook of the training engine is crossed,
which is why ZeRO stage 3, whose hooks gather the weights, can't have it. It is computed for those samples alone whose
interval is not empty; the others are plain flow matching.

With guidance inside (MeanFlow 2505.13447, section 4.2) the network learns the flow that class guidance of a scale ω
makes: ε − x0 becomes u(x_t, t, t | no condition) + ω·(ε − x0 − u(x_t, t, t | no condition)) for samples that have their
condition, without a gradient. What it predicts under a condition is then guided already, by one evaluation.
"""

import functools
import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ldt.diffusion.condition import Condition, text_mask
from ldt.diffusion.objectives import Denoiser, Objective

SOFTENING = 0.01
"""The paper's c in the weight 1 / (‖V − v‖² + c), the norm over all numbers of a latent."""

FORWARD_PASSES = 3.0
"""What u̇ costs a sample: u at r = t, u, and its derivative."""


def forward_passes(share: float, guidance: float) -> float:
    """How many forward passes a sample costs on average beside those of flow matching.

    share, guidance: `objective.mean_flow` and `objective.mean_flow_guidance`.
    """
    return FORWARD_PASSES * share + (guidance != 1)


def interval(objective: Objective, uniform_B: Tensor, second_B: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r) with r ≤ t: two times of the objective in order, or one twice where `second_B` is 0."""
    first_B = objective.timesteps(uniform_B)
    other_B = torch.where(second_B > 0, objective.timesteps(second_B), first_B)
    return torch.maximum(first_B, other_B), torch.minimum(first_B, other_B)


def slope(denoiser: Callable[..., Tensor], x_BCHW: Tensor, t_B: Tensor, r_B: Tensor, condition: Condition) -> Tensor:
    """u̇, the derivative of u(x_t, t, r) by t along the network's own flow, at a fixed r: [B, C, H, W].

    denoiser: with attention that can be differentiated in forward mode (`forward_differentiable`).
    """
    _prepare_torch()
    with torch.no_grad():
        v_BCHW = denoiser(x_BCHW, t_B, condition).to(x_BCHW.dtype)
        slope_BCHW: Tensor = torch.func.jvp(
            lambda x_BCHW, t_B: denoiser(x_BCHW, t_B, condition, r_B=r_B),
            (x_BCHW, t_B),
            (v_BCHW, torch.ones_like(t_B)),
        )[1]
    return slope_BCHW


def guided(
    denoiser: Callable[..., Tensor],
    target_BCHW: Tensor,
    x_BCHW: Tensor,
    t_B: Tensor,
    condition: Condition,
    null_label: int,
    scale: float,
) -> Tensor:
    """The target as class guidance of this scale has it, without a gradient; as it is where there is no condition."""
    nothing = condition.unconditional(null_label)
    with torch.no_grad():
        null_BCHW = denoiser(x_BCHW, t_B, nothing).to(x_BCHW.dtype)
    told_B = condition.label_B != nothing.label_B
    if condition.text is not None:
        told_B = told_B | text_mask(condition.text).any(1)
    scale_B = torch.where(told_B, scale, 1.0).to(x_BCHW.dtype)
    return null_BCHW + scale_B[:, None, None, None] * (target_BCHW - null_BCHW)


@functools.cache
def _prepare_torch() -> None:
    """Import what torch needs for forward mode, which complains about a part of torch that it uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def loss(
    objective: Objective,
    denoiser: Denoiser,
    bare: Callable[..., Tensor],
    x0_BCHW: Tensor,
    eps_BCHW: Tensor,
    uniform_B: Tensor,
    second_B: Tensor,
    intervals: int,
    condition: Condition,
    null_label: int,
) -> Tensor:
    """The mean squared error of V of each sample in float32, with the gradient of its weighted error: [B].

    bare: the network without its wrapper, for `slope`; intervals: how many of `second_B` are above 0, which the host
    would have to wait for the device to know. The weighted errors are all nearly 1 and would say nothing in a log,
    which is why the value is not theirs.
    """
    t_B, r_B = interval(objective, uniform_B, second_B)
    xt_BCHW = objective.noised(x0_BCHW, eps_BCHW, t_B)
    u_BCHW = denoiser(xt_BCHW, t_B, condition, r_B=r_B).float()  # type: ignore[call-arg]
    if intervals:
        rows = (second_B <= 0).int().argsort(stable=True)[:intervals]
        told = Condition(condition.label_B[rows], None if condition.text is None else condition.text[rows])
        slope_bCHW = slope(bare, xt_BCHW[rows], t_B[rows], r_B[rows], told)
        change_bCHW = (t_B - r_B)[rows, None, None, None] * slope_bCHW
        u_BCHW = u_BCHW.index_add(0, rows, change_bCHW.float())
    target_BCHW = eps_BCHW - x0_BCHW
    if (scale := objective.config.mean_flow_guidance) != 1:
        target_BCHW = guided(bare, target_BCHW, xt_BCHW, t_B, condition, null_label, scale)
    square_BCHW = (u_BCHW - target_BCHW).square()
    weighted_B = square_BCHW.sum((1, 2, 3)) / (square_BCHW.detach().sum((1, 2, 3)) + SOFTENING)
    return square_BCHW.detach().mean((1, 2, 3)) + (weighted_B - weighted_B.detach())
