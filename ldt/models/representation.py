"""A representation autoencoder (RAE, Zheng et al. 2510.11690) that needs no download.

The latents are what a frozen EfficientNet-Lite0 sees in each patch of 8 × 8 pixels, and a small convolutional decoder
is trained to make the image of them (`tools/train_representation.py`). The encoder's weights come with their own
package, so a saved one holds its settings, the decoder and the statistics that the decoder normalises latents with.
"""

import json
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldt.files import parse_json, schema_error
from ldt.models import efficientnet

KIND = "EfficientNetRAE"  # the class that its config.json names
CONFIG, DECODER = "config.json", "decoder.safetensors"
MAGNIFIED = 2  # the network looks at images of so many times their size, where a patch is its own stride wide
ENLARGED = 4  # the side in pixels of what the decoder's last layer makes of one place
WIDTHS, GROUPS = (64, 80), 8  # the decoder's channels at a quarter and at an eighth of the images' size; of its norms
SCHEMA = {
    "image_channels": lambda v: v in (1, 3),
    "widths": lambda v: v == [*WIDTHS],
    "groups": lambda v: v == GROUPS,
}


class EfficientNetRAE(nn.Module):
    """Images [B, C, H, W] between −1 and 1 ↔ latents [B, 112, H/8, W/8]."""

    preprocessing = (
        f"grey three times, {efficientnet.RESIZED} x{MAGNIFIED} {efficientnet.SCALED}, block {efficientnet.MAP_BLOCKS}"
    )
    latent_channels = efficientnet.MAP_WIDTH
    downsample = efficientnet.MAP_STRIDE // MAGNIFIED
    image_channels: int
    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, image_channels: int = 1) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.encoder = efficientnet.load()
        self.decoder = _make_decoder(image_channels, self.latent_channels)
        self.register_buffer("mean_C11", torch.zeros(self.latent_channels, 1, 1))
        self.register_buffer("std_C11", torch.ones(self.latent_channels, 1, 1))

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """The latents of images."""
        height, width = x_BCHW.shape[2:]
        pixels_B3HW = ((x_BCHW + 1) * 127.5).expand(-1, 3, -1, -1)
        seen_B3HW = efficientnet.normalise(pixels_B3HW, (MAGNIFIED * height, MAGNIFIED * width))
        return self.encoder.map_after(seen_B3HW, efficientnet.MAP_BLOCKS)

    def normalise(self, latent_BCHW: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 in each channel, over the images that the decoder was trained on."""
        return (latent_BCHW - self.mean_C11) / self.std_C11

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """The images of latents."""
        image_BCHW: Tensor = self.decoder(self.normalise(latent_BCHW))
        return image_BCHW

    def save(self, directory: Path) -> None:
        """Settings, decoder and statistics, in half precision; the encoder is not stored."""
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            "_class_name": KIND,
            "image_channels": self.image_channels,
            "widths": WIDTHS,
            "groups": GROUPS,
        }
        (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        state = {k: v.half().contiguous() for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        save_file(state, directory / DECODER, {"format": "pt"})

    @classmethod
    def load(cls, directory: Path) -> tuple[Self, dict[str, list[str]]]:
        """A saved one, and which of its tensors were missing from the file or unknown; ValueError for bad settings."""
        settings = parse_json((directory / CONFIG).read_bytes())
        if wrong := schema_error(settings, SCHEMA, CONFIG):
            raise ValueError(wrong)
        model = cls(settings["image_channels"])
        state = {k: v.float() for k, v in load_file(directory / DECODER).items()}
        loading = model.load_state_dict(state, strict=False)
        missing = [key for key in loading.missing_keys if not key.startswith("encoder.")]
        return model, {"missing_keys": missing, "unexpected_keys": loading.unexpected_keys}


def _make_decoder(image_channels: int, channels: int) -> Any:
    """The decoder of diffusers' AutoencoderKL without attention; its last layer makes 4 × 4 pixels of each place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own dependencies while it is imported
        from diffusers.models.autoencoders.vae import Decoder
    decoder = Decoder(
        in_channels=channels,
        out_channels=ENLARGED**2 * image_channels,
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
    )
    return nn.Sequential(decoder, nn.PixelShuffle(ENLARGED))
