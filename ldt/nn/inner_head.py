"""The inner head of internal guidance (2512.24176): a second output, read in the middle of a Transformer.

It predicts the same as the last layer from what the first blocks have made, and both are trained. In sampling the
weaker inner prediction tells which way the deeper blocks moved, and `guidance_inner` goes further that way
(`ldt.diffusion.guidance`). It costs one layer and no second forward pass.
"""

from torch import Tensor, nn

from ldt.nn.block import Modulation, make_norm, modulate
from ldt.nn.config import ModelConfig


class InnerHead(nn.Module):
    """Tokens of the image [B, N, D] after some blocks → patches [B, N, P]; zero at first, as the last layer is."""

    def __init__(self, config: ModelConfig, output: int) -> None:
        super().__init__()
        modulated = config.conditioning == "adaln_zero"
        self.norm = make_norm(config, config.width, affine=not modulated)
        self.modulation = Modulation(config.width, 2 * config.width) if modulated else None
        self.unpatchify = nn.Linear(config.width, output * config.patch**2)

    def forward(self, h_BND: Tensor, modulation_B1D: Tensor | None) -> Tensor:
        h_BND = self.norm(h_BND)
        if self.modulation is not None:
            assert modulation_B1D is not None
            shift_B1D, scale_B1D = self.modulation(modulation_B1D).chunk(2, dim=-1)
            h_BND = modulate(h_BND, shift_B1D, scale_B1D)
        return self.unpatchify(h_BND)
