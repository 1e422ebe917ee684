"""The keys of objectives and samplers."""

import math
from dataclasses import dataclass

from ldt.config_fields import choice
from ldt.errors import InputError


@dataclass
class ObjectiveConfig:
    """`loss` names the space of the squared error; `same` compares what the network predicts.

    `timesteps` are drawn in t; the discrete schedules (ddpm, scaled_linear, ldm) round them up to their next step.
    `logit_mean` m above 0 trains more where there is more noise; it shifts the times by e^m, as `shift` when sampling.
    `weighting` min_snr is Hang et al. 2303.09556: the error of the clean latent counts min(SNR, `min_snr_gamma`).
    `shift_base` (0: off; 4096 in RAE, Zheng et al. 2510.11690) shifts the times of training and of sampling by
    s = √(C·H·W / shift_base), because more numbers a latent survive more noise: t becomes s·t / (1 + (s − 1)·t).
    `time_floor` (0: off; 0.05 in RAEv2, 2605.18324) belongs to x predictions compared as flow: the velocity is
    (x_t − x0) / max(t, time_floor), for both sides of the loss, whose weight 1/t² would be unbounded at the data.
    `mean_flow` (0: off; 0.25): the share of samples of which the mean velocity over an interval is learned, so that
    `sampler=mean_flow` needs few steps (improved MeanFlow, Geng et al. 2512.02012). `mean_flow_guidance` (1: off; 1.5):
    the scale of class guidance that its target contains, so that one evaluation draws a guided image (2505.13447).
    """

    prediction: str = choice("flow", "eps", "v", "x")
    loss: str = choice("same", "flow", "eps", "v", "x")
    schedule: str = choice("rectified_flow", "cosine", "linear_vp", "ddpm", "scaled_linear", "ldm")
    timesteps: str = choice("logit_normal", "uniform")
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: str = choice("constant", "min_snr")
    min_snr_gamma: float = 5.0
    shift_base: float = 0.0
    time_floor: float = 0.0
    condition_drop: float = 0.1
    mean_flow: float = 0.0
    mean_flow_guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.condition_drop <= 1:
            raise InputError(f"objective.condition_drop={self.condition_drop} must be a probability between 0 and 1")
        if self.logit_std <= 0:
            raise InputError(f"objective.logit_std={self.logit_std} must be positive")
        if self.min_snr_gamma <= 0:
            raise InputError(f"objective.min_snr_gamma={self.min_snr_gamma} must be positive, such as 5")
        if not 0 <= self.shift_base < math.inf:
            raise InputError(f"objective.shift_base={self.shift_base} must be positive, such as 4096, or 0 for off")
        if self.shift_base and self.schedule != "rectified_flow":
            raise InputError(
                f"objective.shift_base={self.shift_base} shifts the times of objective.schedule=rectified_flow, not of "
                f"{self.schedule}; set it to 0, or change the schedule"
            )
        if not 0 <= self.time_floor < 1:
            raise InputError(f"objective.time_floor={self.time_floor} must be a time below 1, such as 0.05, or 0")
        if not 0 <= self.mean_flow <= 1:
            raise InputError(f"objective.mean_flow={self.mean_flow} must be a share of the samples, such as 0.25, or 0")
        self._check_mean_flow_guidance()
        plain = {"schedule": "rectified_flow", "weighting": "constant"}
        self._check_needs("time_floor", {"prediction": "x", "loss": "flow", **plain})
        self._check_needs("mean_flow", {"prediction": "flow", "loss": "same", **plain})

    def _check_mean_flow_guidance(self) -> None:
        scale = self.mean_flow_guidance
        if not 0 < scale < math.inf:
            raise InputError(f"objective.mean_flow_guidance={scale} must be positive, such as 1.5, or 1 for off")
        if scale != 1 and not (self.mean_flow and self.condition_drop):
            raise InputError(
                f"objective.mean_flow_guidance={scale} needs objective.mean_flow={self.mean_flow} and "
                f"objective.condition_drop={self.condition_drop} above 0, such as 0.25 and 0.1: it is part of the "
                "former's target, and by the latter the network learns what there is without a condition"
            )

    def _check_needs(self, option: str, needed: dict[str, str]) -> None:
        """`InputError` if the option is on and the others are not as it needs them."""
        for key, value in needed.items():
            if getattr(self, option) and getattr(self, key) != value:
                raise InputError(
                    f"objective.{option}={getattr(self, option)} needs objective.{key}={value}, not "
                    f"{getattr(self, key)}; change that, or set objective.{option}=0"
                )


@dataclass
class SamplerConfig:
    """The keys of a sampler: how it gets from noise to data.

    `mean_flow` is for models trained with `objective.mean_flow`, which it samples in 1, 2 or 4 steps.

    `guidance` and `guidance_inner` of 1 are none: how far to go from no condition and from the inner head
    (`model.inner_head`). Outside (`guidance_low`, `guidance_high`] of t the prediction is used alone.
    `shift` s moves the times to s·t / (1 + (s − 1)·t): above 1 spends more steps where there is more noise.
    """

    sampler: str = choice("heun", "euler", "ddim", "ddpm", "dpmpp_2m", "sde", "dpmpp_2m_sde", "mean_flow")
    steps: int = 25
    guidance: float = 1.0
    guidance_inner: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be at least 1")
        if self.shift <= 0:
            raise InputError(f"shift={self.shift} must be positive; 1 leaves the times as they are")
        if not 0 <= self.guidance_low < self.guidance_high <= 1:
            raise InputError(
                f"guidance_low={self.guidance_low} and guidance_high={self.guidance_high} must be "
                "two times in increasing order between 0 (data) and 1 (noise)"
            )
        if self.sampler == "mean_flow" and self.guidance_inner != 1:
            raise InputError(
                f"sampler=mean_flow takes mean velocities, which guidance_inner={self.guidance_inner} has none of; "
                "leave guidance_inner=1"
            )
