"""The autoencoder between images and latents: one of diffusers' by hub name or local path, or an embedded one.

Latents are raw (no scaling factor): whitening belongs to the data, not to the network. `autoencoder_kinds` says how
each class is used.
"""

import importlib.resources
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from ldt.errors import InputError, by_reason
from ldt.models import representation
from ldt.models.autoencoder_kinds import KINDS

EMBEDDED = "embedded:fashion_mnist"
EMBEDDED_REPRESENTATION = "embedded:fashion_mnist_representation"
ASSETS = {EMBEDDED: "autoencoder_fashion_mnist", EMBEDDED_REPRESENTATION: "representation_fashion_mnist"}


class Autoencoder:
    """Images uint8 [B, H, W, C] ↔ latents float32 [B, C, H/f, W/f], f the `downsample` factor.

    kind: the name of its class; posterior: whether latents have a standard deviation beside their mean; hash: xxh64 of
    the weights in name order, whatever files they came from, and of what is done to images before.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.kind = name, type(model).__name__
        self.model = model.eval().requires_grad_(False)
        self._adapter = KINDS[self.kind](self.model)
        self.image_channels = self._adapter.image_channels
        self.latent_channels = self._adapter.latent_channels
        self.downsample = self._adapter.downsample
        self.posterior = self._adapter.posterior
        self.hash = _weights_hash(model, self._adapter.preprocessing)
        self.device = torch.device("cpu")

    @classmethod
    def load(cls, name_or_path: str) -> Self:
        """An embedded one (`ASSETS`), a directory that diffusers or our tools saved, or a name on the model hub."""
        path = Path(name_or_path)
        if name_or_path in ASSETS:
            path = Path(str(importlib.resources.files("ldt") / "assets" / ASSETS[name_or_path]))
        elif name_or_path.startswith("embedded:"):
            raise InputError(f"there is no embedded autoencoder {name_or_path}; known are {' and '.join(ASSETS)}")
        if path.is_dir() and _kind_in(path) == representation.KIND:
            return cls(name_or_path, _from_our_own(name_or_path, path))
        if path.is_dir():
            return cls(name_or_path, _from_pretrained(name_or_path, str(path)))
        if path.exists() or name_or_path.startswith(("/", ".", "~")):
            raise InputError(
                f"autoencoder {name_or_path} is not a directory; give one saved by diffusers, a hub name, or {EMBEDDED}"
            )
        return cls(name_or_path, _from_pretrained(name_or_path, name_or_path))

    def to(self, device: torch.device | str) -> Self:
        """Move the network; returns itself."""
        self.device = torch.device(device)
        flat = all(p.ndim <= 4 for p in self.model.parameters())  # those for video have no such memory format
        self.model.to(self.device, memory_format=torch.channels_last if flat else torch.preserve_format)
        return self

    def check_size(self, height: int, width: int) -> None:
        """`InputError` for images of a size that the network can't take."""
        only, factor = self._adapter.image_size, self.downsample
        if only and (height, width) != (only, only):
            raise InputError(
                f"autoencoder {self.name} takes images of {only}x{only} alone, not {height}x{width}; set "
                f"images.size={only}"
            )
        if min(height, width) < 1 or height % factor or width % factor:
            raise InputError(
                f"autoencoder {self.name} takes images with sides divisible by {factor}, not {height}x{width}; change "
                "images.size"
            )

    @torch.inference_mode()
    def encode(self, image_BHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and, with a posterior, standard deviation of uint8 images' latents: float32 [B, C, H/f, W/f] each."""
        batch, height, width, channels = image_BHWC.shape
        if channels != self.image_channels:
            raise InputError(
                f"autoencoder {self.name} takes images with {self.image_channels} channels, not {channels}"
            )
        self.check_size(height, width)
        x_BCHW = image_BHWC.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean_BCHW, std_BCHW = self._adapter.encode(x_BCHW)
        return mean_BCHW.float(), None if std_BCHW is None else std_BCHW.float()

    @torch.inference_mode()
    def decode(self, latent_BCHW: Tensor, at_once: int = 0) -> Tensor:
        """Images of raw latents: uint8 [B, H, W, C], rounded and clipped.

        at_once: how many the network decodes together, 0 for all; its memory and the last bits depend on it.
        """
        slices = latent_BCHW.to(self.device).split(at_once or len(latent_BCHW))
        return torch.cat([self._decode(slice_BCHW) for slice_BCHW in slices])

    def _decode(self, latent_BCHW: Tensor) -> Tensor:
        x_BCHW = self._adapter.decode(latent_BCHW).float()
        return ((x_BCHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _from_pretrained(name: str, path: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own dependencies while it is imported
        import diffusers
        from diffusers.utils import logging as words
    verbosity = words.get_verbosity()
    words.set_verbosity_error()  # it warns of attributes that it saved itself; what matters is checked below
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The `local_dir_use_symlinks`", UserWarning)  # diffusers to the hub
            kind = diffusers.AutoencoderKL.load_config(path).get("_class_name")  # of any kind
            if kind not in KINDS:
                raise InputError(_unknown(name, kind))
            if kind == "AutoencoderRAE" and importlib.util.find_spec("transformers") is None:
                raise InputError(
                    f"autoencoder {name} is an {kind}, which needs transformers; pip install ldt-train[text]"
                )
            model, loading = getattr(diffusers, kind).from_pretrained(
                path, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except InputError:
        raise
    except Exception as error:  # diffusers and the hub raise a dozen types; all mean that these weights can't be had
        reason = " ".join(str(error).split())[:200]
        looked = "" if Path(path).is_dir() else "; there is no such directory here, so the model hub was asked"
        raise by_reason(
            f"autoencoder {name} can't be loaded as one of diffusers' from safetensors ({reason}){looked}; "
            f"give a hub name, a directory saved by diffusers, or {EMBEDDED}",
            error,
        ) from None
    finally:
        words.set_verbosity(verbosity)
    _check_weights(name, model, loading)
    return model


def _from_our_own(name: str, path: Path) -> representation.EfficientNetRAE:
    try:
        model, loading = representation.EfficientNetRAE.load(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise by_reason(
            f"autoencoder {name} can't be loaded ({reason}); make it again with tools/train_representation.py", error
        ) from None
    _check_weights(name, model, loading)
    return model


def _unknown(name: str, kind: Any) -> str:
    return f"autoencoder {name} is diffusers' {kind}; give one of {', '.join(KINDS)}"


def _kind_in(path: Path) -> str:
    """The class of a saved autoencoder."""
    config = path / "config.json"
    if not config.exists():
        raise InputError(f"autoencoder {path} has no config.json; give a directory saved by diffusers")
    try:
        kind = json.loads(config.read_bytes())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"autoencoder {path} has a config.json that names no class; save it with diffusers") from None
    if kind not in KINDS:
        raise InputError(_unknown(str(path), kind))
    return str(kind)


def _check_weights(name: str, model: Any, loading: dict[str, Any]) -> None:
    """diffusers only warns of tensors it did not find, and leaves them random: here that is an error."""
    for key, word in (("missing_keys", "lack"), ("unexpected_keys", "have an unknown")):
        if loading[key]:
            first, number = sorted(loading[key])[0], len(loading[key])
            raise InputError(
                f"the weights of autoencoder {name} {word} {first} ({number} such tensors), so they do not belong to "
                "its config.json; save both together again"
            )
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"autoencoder {name} has values in {key} that are not finite; get the weights again")


def _weights_hash(model: Any, preprocessing: str) -> str:
    digest = xxhash.xxh64(preprocessing.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
