"""What a denoiser is told besides the noisy latent and the time."""

from typing import NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """label_B: int64 [B], from 0 to the number of classes, the last meaning "no class" (the null label of guidance).

    text: token numbers int64 [B, M], or features float [B, M, F]; a position that is all zero is padding, and a
    caption of padding alone means "no text".
    """

    label_B: Tensor
    text: Tensor | None = None

    def unconditional(self, null_label: int) -> "Condition":
        """The same batch without class and text."""
        text = None if self.text is None else torch.zeros_like(self.text)
        return Condition(torch.full_like(self.label_B, null_label), text)

    def followed_by(self, other: "Condition") -> "Condition":
        """This batch and then the other, joined along B."""
        assert (self.text is None) == (other.text is None)
        text = None if self.text is None or other.text is None else torch.cat([self.text, other.text])
        return Condition(torch.cat([self.label_B, other.label_B]), text)


def text_mask(text: Tensor) -> Tensor:
    """Where there is text: bool [B, M]."""
    return text != 0 if text.ndim == 2 else (text != 0).any(-1)
