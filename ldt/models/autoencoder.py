"""The autoencoder between images and latents: diffusers' AutoencoderKL, by hub name, local path or embedded.

Latents are the raw moments of its posterior (no scaling factor): whitening belongs to the data, not to the network.
"""

import importlib.resources
import json
import warnings
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from ldt.errors import InputError

EMBEDDED = "embedded:fashion_mnist"


class Autoencoder:
    """Images uint8 [B, H, W, C] ↔ latent moments float32 [B, C, H/f, W/f], f the `downsample` factor.

    hash: xxh64 of the weights in name order, whatever file they came from.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.image_channels: int = model.config.in_channels
        self.latent_channels: int = model.config.latent_channels
        self.downsample: int = 2 ** (len(model.config.block_out_channels) - 1)
        self.hash = _weights_hash(model)
        self.device = torch.device("cpu")

    @classmethod
    def load(cls, name_or_path: str) -> Self:
        """`embedded:fashion_mnist`, a directory in diffusers' layout, or a name on the model hub."""
        path: Any = name_or_path
        if name_or_path == EMBEDDED:
            path = importlib.resources.files("ldt") / "assets" / "autoencoder_fashion_mnist"
        elif name_or_path.startswith("embedded:"):
            raise InputError(f"there is no embedded autoencoder {name_or_path}; the only one is {EMBEDDED}")
        elif Path(name_or_path).is_dir():
            _check_directory(Path(name_or_path))
        elif Path(name_or_path).exists() or name_or_path.startswith(("/", ".", "~")):
            raise InputError(
                f"autoencoder {name_or_path} is not a directory; give one saved by diffusers, a hub name, or {EMBEDDED}"
            )
        return cls(name_or_path, _from_pretrained(name_or_path, str(path)))

    def to(self, device: torch.device | str) -> Self:
        """Move the network; returns itself."""
        self.device = torch.device(device)
        self.model.to(self.device, memory_format=torch.channels_last)
        return self

    @torch.inference_mode()
    def encode(self, image_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of uint8 images: float32 [B, C, H/f, W/f] each."""
        batch, height, width, channels = image_BHWC.shape
        if channels != self.image_channels or height % self.downsample or width % self.downsample:
            raise InputError(
                f"autoencoder {self.name} takes images with {self.image_channels} channels and sides divisible by "
                f"{self.downsample}, not {height}x{width} with {channels}; change images.size"
            )
        x_BCHW = image_BHWC.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.model.encode(x_BCHW).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.inference_mode()
    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images of raw latents: uint8 [B, H, W, C], rounded and clipped."""
        x_BCHW = self.model.decode(latent_BCHW.to(self.device)).sample.float()
        return ((x_BCHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _from_pretrained(name: str, path: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own dependencies while it is imported
        from diffusers import AutoencoderKL
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The `local_dir_use_symlinks`", UserWarning)  # diffusers to the hub
            model, loading = AutoencoderKL.from_pretrained(
                path, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except Exception as error:  # diffusers and the hub raise a dozen types; all mean that these weights can't be had
        reason = " ".join(str(error).split())[:200]
        looked = "" if Path(path).is_dir() else "; there is no such directory here, so the model hub was asked"
        raise InputError(
            f"autoencoder {name} can't be loaded as diffusers' AutoencoderKL from safetensors ({reason}){looked}; "
            f"give a hub name, a directory saved by diffusers, or {EMBEDDED}"
        ) from None
    _check_weights(name, model, loading)
    return model


def _check_directory(path: Path) -> None:
    config = path / "config.json"
    if not config.exists():
        raise InputError(f"autoencoder {path} has no config.json; give a directory saved by diffusers")
    try:
        kind = json.loads(config.read_bytes())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"autoencoder {path} has a config.json that names no class; save it with diffusers") from None
    if kind != "AutoencoderKL":
        raise InputError(f"autoencoder {path} is diffusers' {kind}; give an AutoencoderKL")


def _check_weights(name: str, model: Any, loading: dict[str, Any]) -> None:
    """diffusers only warns of tensors it did not find, and leaves them random: here that is an error."""
    for key, word in (("missing_keys", "lack"), ("unexpected_keys", "have an unknown")):
        if loading[key]:
            first, number = sorted(loading[key])[0], len(loading[key])
            raise InputError(
                f"the weights of autoencoder {name} {word} {first} ({number} such tensors), so they do not belong to "
                "its config.json; save both together with diffusers"
            )
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"autoencoder {name} has values in {key} that are not finite; get the weights again")


def _weights_hash(model: Any) -> str:
    digest = xxhash.xxh64()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
