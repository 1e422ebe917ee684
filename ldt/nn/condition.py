"""What a denoiser is told besides the noisy latent and the time."""

from typing import NamedTuple

from torch import Tensor


class Condition(NamedTuple):
    """label_B: int64 [B], from 0 to the number of classes, the last meaning "no class" (the null label of guidance)."""

    label_B: Tensor
