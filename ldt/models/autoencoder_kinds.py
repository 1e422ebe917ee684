"""One adapter for each kind of autoencoders, diffusers' and our own, all with the same few methods.

An adapter takes and gives images between −1 and 1. Latents are raw, without any scaling factor of the kind's own:
whitening belongs to the data. Nothing is drawn at random: networks are in evaluation mode, where RAE adds no noise.
"""

from typing import Any

from torch import Tensor

from ldt.errors import InputError
from ldt.models import representation


class KL:
    """AutoencoderKL and AutoencoderKLFlux2: a Gaussian posterior.

    posterior: whether `encode` gives a deviation beside the mean; image_size: the only side that it takes, 0 for any
    multiple of `downsample`; preprocessing: what it does to images that its weights and class don't say.
    """

    posterior = True
    image_size = 0
    preprocessing = ""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.image_channels: int = model.config.in_channels
        self.latent_channels: int = model.config.latent_channels
        self.downsample: int = 2 ** (len(model.config.block_out_channels) - 1)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and, with a posterior, standard deviation of the latents."""
        posterior = self.model.encode(x_BCHW).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images of latents."""
        return self.model.decode(latent_BCHW).sample


class QwenImage(KL):
    """AutoencoderKLQwenImage: made for video, of which an image is the first frame."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.image_channels = model.config.input_channels
        self.latent_channels = model.config.z_dim
        self.downsample = 2 ** len(model.config.temperal_downsample)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        posterior = self.model.encode(x_BCHW[:, :, None]).latent_dist
        return posterior.mean[:, :, 0], posterior.std[:, :, 0]

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        return self.model.decode(latent_BCHW[:, :, None]).sample[:, :, 0]


class DC(KL):
    """AutoencoderDC: deep compression (2410.10733), without a posterior."""

    posterior = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.image_channels = model.config.in_channels
        self.latent_channels = model.config.latent_channels
        self.downsample = 2 ** (len(model.config.encoder_block_out_channels) - 1)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.encode(x_BCHW).latent, None


class Tiny(DC):
    """AutoencoderTiny: a small copy of another autoencoder's means."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.image_channels = model.config.in_channels
        self.latent_channels = model.config.latent_channels
        self.downsample = 2 ** (len(model.config.num_encoder_blocks) - 1)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.encode(x_BCHW).latents, None


class RAE(DC):
    """AutoencoderRAE (2510.11690): the tokens of a frozen vision encoder, of images of one size between 0 and 1."""

    def __init__(self, model: Any) -> None:
        if not model.config.reshape_to_2d:
            raise InputError("an AutoencoderRAE with reshape_to_2d=false has no grid of latents; save it with true")
        self.model = model
        self.image_channels = model.config.num_channels
        self.latent_channels = model.config.encoder_hidden_size
        self.downsample = model.decoder_patch_size
        self.image_size = model.decoder_image_size

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.encode((x_BCHW + 1) / 2).latent, None

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        return 2 * self.model.decode(latent_BCHW).sample - 1


class EfficientNetRAE(DC):
    """Ours: features of EfficientNet-Lite0 and a decoder, see `ldt.models.representation`."""

    def __init__(self, model: representation.EfficientNetRAE) -> None:
        self.model = model
        self.image_channels: int = model.image_channels
        self.latent_channels, self.downsample = model.latent_channels, model.downsample
        self.preprocessing = model.preprocessing

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.encode(x_BCHW), None

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        image_BCHW: Tensor = self.model.decode(latent_BCHW)
        return image_BCHW


KINDS: dict[str, type[KL]] = {
    "AutoencoderKL": KL,
    "AutoencoderDC": DC,
    "AutoencoderRAE": RAE,
    "AutoencoderKLFlux2": KL,
    "AutoencoderKLQwenImage": QwenImage,
    "AutoencoderTiny": Tiny,
    representation.KIND: EfficientNetRAE,
}
"""By the name of the class, which a saved autoencoder's config.json has."""
