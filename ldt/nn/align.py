"""Alignment with a frozen network's features of the same image (REPA, 2410.06940) in iREPA's way (2512.10794).

A 3 × 3 convolution reads the image's tokens after some block and says what the other network sees in each patch. What
it is compared with is normalised over the patches first, so that only the image's layout is left:

    tokens after block K [B, D, G, G] ── 3 × 3 convolution ── [B, F, G, G] ─┐
    target [B, F, G, G] ── minus its mean over patches, over its deviation ─┴─ 1 − cosine, mean over patches

The projector is trained with the denoiser and left behind with the training: no sampling and no export has it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREFIX = "projector."
"""Names of its parameters begin so; whoever reads weights for sampling leaves them out."""


class Projector(nn.Module):
    """Tokens [B, D, G, G] after `block` blocks → features [B, F, G, G]."""

    def __init__(self, width: int, features: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.convolution = nn.Conv2d(width, features, 3, padding=1)

    def forward(self, token_BDGG: Tensor) -> Tensor:
        return self.convolution(token_BDGG)


def add_projector(denoiser: nn.Module, width: int, features: int, block: int, seed: int) -> None:
    """Give a Transformer its projector, whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.projector = Projector(width, features, block)


def normalised(target_BFGG: Tensor) -> Tensor:
    """The target without its mean over patches, in units of its deviation over them, in float32."""
    target_BFGG = target_BFGG.float()
    target_BFGG = target_BFGG - target_BFGG.mean((2, 3), keepdim=True)
    return target_BFGG / (target_BFGG.square().mean((2, 3), keepdim=True).sqrt() + 1e-6)


def distance(feature_BFGG: Tensor, target_BFGG: Tensor) -> Tensor:
    """1 − cosine between the features and the normalised target, mean over patches, in float32: [B]."""
    cosine_BGG = F.cosine_similarity(feature_BFGG.float(), normalised(target_BFGG), dim=1, eps=1e-6)
    return 1 - cosine_BGG.mean((1, 2))


class Aligned:
    """A denoiser whose one forward pass also keeps what its projector says, whatever the objective asks of it."""

    def __init__(self, denoiser: Callable[..., Any]) -> None:
        self._denoiser = denoiser
        self._feature_BFGG: Tensor | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        *outputs, self._feature_BFGG = self._denoiser(*arguments, **options, aligned=True)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def distance(self, target_BFGG: Tensor) -> Tensor:
        """Of the last forward pass: [B]."""
        assert self._feature_BFGG is not None, "no forward pass yet"
        return distance(self._feature_BFGG, target_BFGG)
