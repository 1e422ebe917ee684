"""Feature nets behind one interface: uint8 images in, features out, with a name and a hash for the record."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldt.errors import InputError
from ldt.metrics import inception
from ldt.metrics.timm_net import TimmNet
from ldt.models import efficientnet


class Features(NamedTuple):
    """What a detector sees in a batch of images, float32 on its device.

    feature_BD: the input of Fréchet and kernel distances; spatial_BS: a map of an inner layer, flattened (sFID);
    logit_BC: of a classifier (Inception Score).
    """

    feature_BD: Tensor
    spatial_BS: Tensor | None = None
    logit_BC: Tensor | None = None

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The features that the detector has, under the names of `Detector.outputs`."""
        named = zip(("features", "spatial", "logits"), self, strict=True)
        return {name: value.cpu().numpy() for name, value in named if value is not None}


class Detector(Protocol):
    """A frozen feature net, resizing and normalisation included.

    `score` is the name under which its Fréchet distance is reported; `hash` covers its weights and its preprocessing;
    `outputs` are the widths of what it gives.
    """

    name: str
    score: str
    outputs: dict[str, int]
    hash: str

    def __call__(self, image_BHWC: Tensor) -> Features:
        """Features of uint8 images [B, H, W, 1 or 3], on the device of the detector."""
        ...


class EfficientNetLite0Detector:
    """Pooled features of EfficientNet-Lite0, a stand-in for Inception that needs no download.

    Every image is resized to 96 × 96 (bicubic with antialiasing, clipped to 0-255, not rounded) and normalised by
    (x − 0.498) / 0.502. The size is small to be quick without a GPU and never changes, so scores stay comparable; only
    targets of alignment have another `size`. Grey images are repeated over three channels.
    """

    name = "efficientnet_lite0"
    score = "fd_efficientnet_lite0"  # never "fid": the numbers do not compare with Inception's
    outputs = {"features": efficientnet.HEAD}
    preprocessing = efficientnet.PREPROCESSING

    def __init__(self, device: torch.device | str = "cpu", size: int = 96) -> None:
        self.size = size
        self.hash = _file_hash(efficientnet.weights_path(), self.preprocessing.format(size))
        self.net = efficientnet.load().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> Features:
        return Features(self.net(self.normalise(image_BHWC)))

    def normalise(self, image_BHWC: Tensor) -> Tensor:
        """What the network sees of uint8 images: [B, 3, size, size]."""
        x_BCHW = colour(image_BHWC).to(self.device).permute(0, 3, 1, 2).float()
        return efficientnet.normalise(x_BCHW, (self.size, self.size))


class InceptionDetector:
    """FID's Inception with torch-fidelity's, pytorch-fid's or clean-fid's way to 299 × 299."""

    SCORES = {"tensorflow": "fid", "bilinear": "fid_bilinear", "clean": "fid_clean"}
    outputs = {"features": inception.POOL, "spatial": inception.SPATIAL, "logits": inception.LOGITS}

    def __init__(self, weights: str, resize: str, device: torch.device | str = "cpu") -> None:
        self.name = f"inception_{resize}"
        self.score = self.SCORES[resize]
        self.net = inception.Inception(weights, resize, device)
        self.hash = _tensors_hash(self.net.net.state_dict(), resize)

    def __call__(self, image_BHWC: Tensor) -> Features:
        return Features(*self.net(colour(image_BHWC).permute(0, 3, 1, 2).to(self.net.device)))


class TimmDetector:
    """A model of timm; see `ldt.metrics.timm_net`. Its score is `fd_<model>`."""

    def __init__(self, model: str, weights: str, device: torch.device | str = "cpu") -> None:
        self.net = TimmNet(model, weights, device)
        self.name = re.sub(r"\W+", "_", model)
        self.score = f"fd_{self.name}"
        self.outputs = {"features": self.net.width}
        self.hash = _tensors_hash(self.net.net.state_dict(), self.net.preprocessing)

    def __call__(self, image_BHWC: Tensor) -> Features:
        return Features(self.net(colour(image_BHWC).permute(0, 3, 1, 2)))


DETECTORS = ("efficientnet_lite0", "inception", "timm")


def make_detector(
    name: str, device: torch.device | str = "cpu", weights: str = "", resize: str = "tensorflow", model: str = ""
) -> Detector:
    """The detector of that name on a device. weights: of inception and timm; resize: of inception; model: of timm."""
    if name == "efficientnet_lite0":
        return EfficientNetLite0Detector(device)
    if name == "inception":
        return InceptionDetector(weights, resize, device)
    if name == "timm":
        return TimmDetector(model, weights, device)
    raise InputError(f"detector {name} is not one of {', '.join(DETECTORS)}; choose one of these")


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


def _tensors_hash(state: dict[str, Tensor], preprocessing: str) -> str:
    """SHA-256 of named tensors, whatever file they came from, and of the preprocessing."""
    digest = hashlib.sha256(preprocessing.encode())
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
