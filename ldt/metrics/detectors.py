"""Feature nets behind one interface: uint8 images in, features out, with a name and a hash for the record."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldt.errors import InputError
from ldt.metrics import efficientnet


class Features(NamedTuple):
    """What a detector sees in a batch of images. feature_BD: float32 [B, D], the input of the Fréchet distance."""

    feature_BD: Tensor


class Detector(Protocol):
    """A frozen feature net, resizing and normalisation included.

    `score` is the name under which its Fréchet distance is reported; `hash` covers its weights and its preprocessing.
    """

    name: str
    score: str
    width: int
    hash: str

    def __call__(self, image_BHWC: Tensor) -> Features:
        """Features of uint8 images [B, H, W, 1 or 3], on the device of the detector."""
        ...


class EfficientNetLite0Detector:
    """Pooled features of EfficientNet-Lite0, a stand-in for Inception that needs no download.

    Every image is resized to 96 × 96 (bicubic with antialiasing, clipped to 0-255, not rounded) and normalised by
    (x − 0.498) / 0.502. The size is small to be quick without a GPU and never changes, so scores stay comparable.
    Grey images are repeated over three channels.
    """

    name = "efficientnet_lite0"
    score = "fd_efficientnet_lite0"  # never "fid": the numbers do not compare with Inception's
    width = efficientnet.HEAD
    size = 96
    preprocessing = "bicubic-antialias-96 clip (x-0.498)/0.502"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.hash = _file_hash(efficientnet.weights_path(), self.preprocessing)
        self.net = efficientnet.load().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> Features:
        return Features(self.net(self._normalise(image_BHWC)))

    def _normalise(self, image_BHWC: Tensor) -> Tensor:
        x_BCHW = colour(image_BHWC).to(self.device).permute(0, 3, 1, 2).float()
        size = (self.size, self.size)
        x_BCHW = F.interpolate(x_BCHW, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return (x_BCHW / 255 - 0.498) / 0.502


DETECTORS: dict[str, Callable[[torch.device | str], Detector]] = {
    EfficientNetLite0Detector.name: EfficientNetLite0Detector,
}


def make_detector(name: str, device: torch.device | str = "cpu") -> Detector:
    """The detector of that name on a device."""
    if name not in DETECTORS:
        raise InputError(f"detector {name} is not one of {', '.join(DETECTORS)}; choose one of these")
    return DETECTORS[name](device)


def colour(image_BHWC: Tensor) -> Tensor:
    """uint8 [B, H, W, 1 or 3] as [B, H, W, 3]."""
    if image_BHWC.dtype != torch.uint8:
        raise InputError(f"a detector takes 8-bit images, not {image_BHWC.dtype}; convert them to uint8 first")
    if image_BHWC.ndim != 4 or image_BHWC.shape[-1] not in (1, 3):
        raise InputError(
            f"a detector takes images [B, H, W, 1 or 3], not {list(image_BHWC.shape)}; drop the alpha channel first"
        )
    return image_BHWC.expand(-1, -1, -1, 3)


def _file_hash(path: Path, preprocessing: str) -> str:
    """SHA-256 of a weights file and of the words that describe what happens before the network."""
    digest = hashlib.sha256(preprocessing.encode())
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
