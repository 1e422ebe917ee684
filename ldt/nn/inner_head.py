"""The inner head of internal guidance (2512.24176): a second output, read in the middle of a Transformer.

It predicts the same as the last layer from what the first blocks have made, and both are trained. In sampling the
weaker inner prediction tells which way the deeper blocks moved, and `guidance_inner` goes further that way
(`ldt.diffusion.guidance`). It costs one layer and no second forward pass.
"""

from torch import Tensor, nn

from ldt.nn.block import OutputNorm
from ldt.nn.config import ModelConfig


class InnerHead(OutputNorm):
    """Tokens of the image [B, N, D] after some blocks → patches [B, N, P]; zero at first, as the last layer is."""

    def __init__(self, config: ModelConfig, output: int) -> None:
        super().__init__(config)
        self.unpatchify = nn.Linear(config.width, output * config.patch**2)

    def forward(self, h_BND: Tensor, modulation_B1D: Tensor | None) -> Tensor:
        return self.unpatchify(self.normed(h_BND, modulation_B1D))
