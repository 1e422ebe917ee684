"""The UNet arm: diffusers' UNet2DConditionModel in latent-diffusion's shape (Rombach et al. 2112.10752).

Class and text are the tokens that every level's cross-attention sees; a Transformer has them in its sequence instead.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldt.diffusion.condition import Condition, text_mask
from ldt.errors import InputError
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import TextEmbedding, network_time
from ldt.nn.text_shape import TextShape


class UNet(nn.Module):
    """latent [B, C, H, W], time [B], condition → prediction [B, C, H, W]."""

    def __init__(
        self, config: ModelConfig, latent_shape: tuple[int, int, int], classes: int, text: TextShape | None = None
    ) -> None:
        super().__init__()
        self.config, self.channels = config, latent_shape[0]
        halvings = 2 ** (len(config.unet.multipliers) - 1)
        if latent_shape[1] % halvings or latent_shape[2] % halvings:
            raise InputError(
                f"model.unet.multipliers={config.unet.multipliers} halve the latent {len(config.unet.multipliers) - 1} "
                f"times, and its size {latent_shape[1]}x{latent_shape[2]} is not a multiple of {halvings}"
            )
        context = config.unet.context
        self.label = nn.Embedding(classes + 1, context) if config.uses_class else None  # last row: the null label
        self.text = TextEmbedding(text, context) if text else None
        self.net = _make(config, latent_shape)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        nn.init.zeros_(self.net.conv_out.weight)
        nn.init.zeros_(self.net.conv_out.bias)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        context, mask = [], []
        if self.label is not None:
            context.append(self.label(condition.label_B)[:, None])
            mask.append(torch.ones_like(condition.label_B, dtype=torch.bool)[:, None])
        if self.text is not None:
            assert condition.text is not None, "a denoiser of text needs text, zero for none"
            if self.label is None:  # an empty caption must leave something to look at: a position without content
                mask.append(F.pad(text_mask(condition.text)[:, 1:], (1, 0), value=True))
            else:
                mask.append(text_mask(condition.text))
            context.append(self.text(condition.text))
        dtype = self.net.conv_in.weight.dtype
        out_BCHW: Tensor = self.net(
            x_BCHW.to(dtype),
            network_time(t_B, self.config.time),
            torch.cat(context, dim=1).to(dtype),
            encoder_attention_mask=torch.cat(mask, dim=1) if self.text is not None else None,
            return_dict=False,
        )[0]
        return out_BCHW[:, : self.channels]


def _make(config: ModelConfig, latent_shape: tuple[int, int, int]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own dependencies while it is imported
        from diffusers import UNet2DConditionModel
    shape, levels = config.unet, len(config.unet.multipliers)
    channels = [shape.channels * m for m in shape.multipliers]
    net = UNet2DConditionModel(
        sample_size=latent_shape[1],
        in_channels=latent_shape[0],
        out_channels=latent_shape[0] * (2 if config.learned_sigma else 1),
        block_out_channels=channels,
        layers_per_block=shape.blocks,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=shape.context,
        attention_head_dim=[c // shape.head_channels for c in channels],  # its name for the number of heads
        norm_num_groups=shape.groups,
    )
    if config.activation_checkpointing:
        net.enable_gradient_checkpointing()
    return net
