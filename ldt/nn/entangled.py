"""Entanglement with a frozen network's view of the whole image (REG, 2507.01467): one more token, denoised as well.

The token is what the network sees in the image as a whole. It is noised at the time of the latent, goes through the
blocks beside the image's tokens, and a layer of its own says how it was noised:

    latent x_t [B, C, H, W] ── patches ─────┐                                        ┌── prediction of the latent
    token  z_t [B, F] ── Linear(F, D) ──────┴── blocks, self-attention among all ────┴── norm, Linear(D, F): of z
    loss = that of the latent + weight · mean squared error of the token

In sampling it begins as noise too and is integrated with the latent, as one state of C·H·W + F numbers, so that every
sampler and every guidance treats both alike; in the end it is dropped.

The whole image's feature is the mean of the target's features over patches, which alignment's normalisation removes
(`ldt.nn.align`), so that shards with a target have all it takes. It is normalised over its features, as the class token
of DINOv2 is, which the paper uses: a function of the sample alone, with no statistics of the data to keep.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldt.diffusion.condition import Condition
from ldt.diffusion.objectives import Objective
from ldt.nn.block import OutputNorm
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import Rotation


class ClassToken(OutputNorm):
    """The layers around the blocks: z_t [B, F] → a token [B, 1, D], and that after the blocks → a prediction [B, F]."""

    def __init__(self, config: ModelConfig, features: int) -> None:
        super().__init__(config)
        self.embed = nn.Linear(features, config.width)
        self.predict = nn.Linear(config.width, features)
        nn.init.xavier_uniform_(self.embed.weight)
        for zero in (self.embed.bias, self.predict.weight, self.predict.bias):
            nn.init.zeros_(zero)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, token_BF: Tensor) -> Tensor:
        return self.embed(token_BF.to(self.embed.weight.dtype))[:, None]

    def read(self, h_B1D: Tensor, modulation_B1D: Tensor | None) -> Tensor:
        """What the blocks have made of it: [B, F]; zero at first, as the last layer is."""
        return self.predict(self.normed(h_B1D, modulation_B1D))[:, 0]


def with_unturned(rotation: Rotation) -> Rotation:
    """The rotation of one more token at the end, which has no position and does not turn."""
    cos_NE, sin_NE = rotation
    return F.pad(cos_NE, (0, 0, 0, 1), value=1.0), F.pad(sin_NE, (0, 0, 0, 1))


def token_of(target_BFGG: Tensor) -> Tensor:
    """The features' mean over patches, with mean 0 and variance 1 over the features, in float32: [B, F]."""
    mean_BF = target_BFGG.float().mean((2, 3))
    return F.layer_norm(mean_BF, mean_BF.shape[1:])


class Entangled:
    """A denoiser that is given the token of each sample, noised as the latent is, whatever else is asked of it."""

    def __init__(
        self, denoiser: Callable[..., Any], objective: Objective, target_BFGG: Tensor, noise_BF: Tensor
    ) -> None:
        self._denoiser, self._objective = denoiser, objective
        self._token_BF, self._noise_BF = token_of(target_BFGG), noise_BF
        self._loss_B: Tensor | None = None

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition, **options: Any) -> Any:
        clean, noise = (z_BF[:, :, None, None] for z_BF in (self._token_BF, self._noise_BF))
        noisy = self._objective.noised(clean, noise, t_B)
        *outputs, made_BF = self._denoiser(x_BCHW, t_B, condition, **options, token_BF=noisy[:, :, 0, 0])
        self._loss_B = self._objective.error(made_BF.float()[:, :, None, None], noisy, clean, noise, t_B)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def loss(self) -> Tensor:
        """The token's part of the last forward pass, its mean squared error over the features: [B]."""
        assert self._loss_B is not None, "no forward pass yet"
        return self._loss_B


class Joined:
    """A denoiser of latent and token as one state [B, 1, 1, C·H·W + F], as samplers and guidance see it.

    With an inner head, which says nothing of the token, its state has the last layer's token: `guidance_inner` leaves
    the token alone.
    """

    def __init__(self, denoiser: Callable[..., Any], latent_shape: Sequence[int]) -> None:
        self._denoiser, self._latent_shape = denoiser, latent_shape

    def __call__(self, state: Tensor, t_B: Tensor, condition: Condition, **options: Any) -> Any:
        token_BF = state[:, 0, 0, math.prod(self._latent_shape) :]
        *outputs, made_BF = self._denoiser(self.latent(state), t_B, condition, **options, token_BF=token_BF)
        states = [torch.cat([y_BCHW.flatten(1), made_BF], 1)[:, None, None] for y_BCHW in outputs]
        return tuple(states) if len(states) > 1 else states[0]

    def latent(self, state: Tensor) -> Tensor:
        """The state's latent: [B, C, H, W]."""
        return state[:, 0, 0, : math.prod(self._latent_shape)].reshape(-1, *self._latent_shape)
