"""Any image model of the timm library as a detector, DINOv2 by default (Stein et al. 2306.04675 argue for it).

The pooled features in front of the classifier, of images brought to the model's own size (bicubic with antialiasing,
clipped to 0-255) and normalised by its own mean and deviation.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldt.errors import InputError
from ldt.metrics.weights import read_tensors


class TimmNet:
    """uint8 [B, 3, H, W] → pooled features [B, width]. weights: a local file, or empty for timm's own download."""

    def __init__(self, model: str, weights: str, device: torch.device | str) -> None:
        self.net = _create(model, weights).to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.width: int = self.net.num_features
        settings = self.net.pretrained_cfg
        self._size: tuple[int, int] = tuple(settings["input_size"][1:])
        self._mean, self._std = (torch.tensor(settings[k], device=device)[:, None, None] for k in ("mean", "std"))
        self.preprocessing = f"{model} bicubic-antialias-{self._size} clip {settings['mean']} {settings['std']}"

    @torch.inference_mode()
    def __call__(self, image_BCHW: Tensor) -> Tensor:
        features: Tensor = self.net(self.normalise(image_BCHW))
        return features

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """What the network sees of uint8 images."""
        x_BCHW = image_BCHW.to(self.device).float()
        x_BCHW = F.interpolate(x_BCHW, self._size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return (x_BCHW / 255 - self._mean) / self._std


def _create(model: str, weights: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import timm
        except ImportError as error:
            raise InputError(f"detector=timm needs timm ({error}); pip install timm") from None
    if model not in timm.list_models() and not timm.is_model(model.partition(".")[0]):
        raise InputError(f"model={model} is not a model of timm; see timm.list_models()")
    if not weights:
        return timm.create_model(model, pretrained=True, num_classes=0)
    state = read_tensors(Path(weights))
    net = timm.create_model(model, pretrained=False, num_classes=0)
    wanted = net.state_dict()
    missing = sorted(k for k in wanted if k not in state or state[k].shape != wanted[k].shape)
    if missing:
        raise InputError(
            f"detector weights {weights} are not those of {model}: {missing[0]} is missing or of another shape"
        )
    net.load_state_dict({k: state[k] for k in wanted})  # a classifier in the same file is ignored
    return net
