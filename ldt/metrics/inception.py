"""The Inception network of FID, through torch-fidelity's port, which resizes as TensorFlow 1 did.

Weights: a local file (`.pth` with torch-fidelity's or pytorch-fid's names, or safetensors) or its own download.
torch-fidelity unpickles the file it is given, so it only ever gets one that this module has written itself from
tensors that were read safely.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldt.errors import InputError
from ldt.metrics.weights import read_tensors

POOL, SPATIAL, LOGITS, SIZE = 2048, 2023, 1008, 299
SPATIAL_CHANNELS = 7  # of 192: ADM's evaluator takes the first 7 channels of mixed_6/conv, 7 × 17 × 17 numbers
BEFORE_SPATIAL = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
)
AFTER_SPATIAL = ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")


class Inception:
    """uint8 [B, 3, H, W] → pooled [B, 2048], spatial [B, 2023] (sFID's), logits without bias [B, 1008] (IS's).

    resize: `tensorflow` as in the original graph and torch-fidelity; `bilinear` as pytorch-fid; `clean` as clean-fid.
    """

    def __init__(self, weights: str, resize: str, device: torch.device | str) -> None:
        self.net = _build(_read(weights)).to(device)
        self.device = torch.device(device)
        self._prepare = RESIZE[resize]

    @torch.inference_mode()
    def __call__(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._prepare(image_BCHW).to(self.device)
        for name in BEFORE_SPATIAL:
            x = getattr(self.net, name)(x)
        # mixed_6 of the TensorFlow graph is Mixed_6d, its `conv` the 1 × 1 branch; there a tensor is [B, H, W, C]
        spatial = self.net.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        for name in AFTER_SPATIAL:
            x = getattr(self.net, name)(x)
        pooled = x.flatten(1)
        return pooled, spatial, pooled @ self.net.fc.weight.T


def _tensorflow(image_BCHW: Tensor) -> Tensor:
    resized = _import().interpolate_bilinear_2d_like_tensorflow1x(image_BCHW.float(), (SIZE, SIZE), align_corners=False)
    return (resized - 128) / 128


def _bilinear(image_BCHW: Tensor) -> Tensor:
    return 2 * F.interpolate(image_BCHW.float() / 255, (SIZE, SIZE), mode="bilinear", align_corners=False) - 1


def _clean(image_BCHW: Tensor) -> Tensor:
    """Pillow's antialiased bicubic on each channel as floats."""
    channels = [Image.fromarray(c) for c in image_BCHW.float().cpu().numpy().reshape(-1, *image_BCHW.shape[2:])]
    resized = np.stack([np.asarray(c.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for c in channels])
    return (torch.from_numpy(resized).view(*image_BCHW.shape[:2], SIZE, SIZE) - 128) / 128


RESIZE: dict[str, Callable[[Tensor], Tensor]] = {"tensorflow": _tensorflow, "bilinear": _bilinear, "clean": _clean}


def _read(weights: str) -> dict[str, Tensor]:
    """The state dict of a file, or of torch-fidelity's download if no file is named."""
    if not weights:
        module = _import()
        state: Any = torch.hub.load_state_dict_from_url(module.URL_INCEPTION_V3, weights_only=True)
        return state
    return read_tensors(Path(weights))


def _build(state: dict[str, Tensor]) -> Any:
    module = _import()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        try:
            return module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name
            )
        except RuntimeError as error:
            first = " ".join(str(error).split())[:160]
            raise InputError(f"the detector's weights are not those of Inception for FID ({first})") from None


def _import() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch_fidelity import feature_extractor_inceptionv3
        except ImportError as error:
            raise InputError(f"detector=inception needs torch-fidelity ({error}); pip install ldt-train[fid]") from None
    return feature_extractor_inceptionv3
