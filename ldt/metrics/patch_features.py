"""Features of an image's patches from a frozen network, with which a denoiser's tokens are aligned (`ldt.nn.align`).

efficientnet_lite0   112 features of the last layer at a sixteenth of the size, of images of 16 pixels a patch
timm:NAME            the last map or tokens of a model of timm at its own size, averaged to the grid
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldt.errors import InputError
from ldt.metrics.detectors import EfficientNetLite0Detector, TimmDetector, colour
from ldt.models import efficientnet


class PatchNet(Protocol):
    """A frozen network. shape: of its features, [D, G, G]; hash: of its weights and of what is done before."""

    name: str
    hash: str
    shape: tuple[int, int, int]

    def __call__(self, image_BHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, 1 or 3] → float32 [B, D, G, G] on the network's device."""
        ...


class _EfficientNet:
    """Every image is brought to 16·G pixels a side, so that a feature belongs to a patch; normalised as for scores."""

    def __init__(self, grid: int, device: torch.device | str) -> None:
        self.name, self.shape = "efficientnet_lite0", (efficientnet.MAP_WIDTH, grid, grid)
        self._detector = EfficientNetLite0Detector(device, size=efficientnet.MAP_STRIDE * grid)
        self.hash = self._detector.hash

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> Tensor:
        net: efficientnet.EfficientNetLite0 = self._detector.net
        return net.map_after(self._detector.normalise(image_BHWC), efficientnet.MAP_BLOCKS)


class _Timm:
    """Tokens of the class and registers are left out."""

    def __init__(self, model: str, weights: str, grid: int, device: torch.device | str) -> None:
        try:
            detector = TimmDetector(model, weights, device)
        except InputError as error:
            raise InputError(f"target=timm:{model}: {error}") from None
        self.name, self.hash, self._net = f"timm:{model}", detector.hash, detector.net
        self._grid = grid
        probe = self(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
        self.shape = (probe.shape[1], grid, grid)

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> Tensor:
        net: Any = self._net.net
        out = net.forward_features(self._net.normalise(colour(image_BHWC).permute(0, 3, 1, 2)))
        if out.ndim == 3:
            patch_BND = out[:, getattr(net, "num_prefix_tokens", 0) :]
            side = round(patch_BND.shape[1] ** 0.5)
            if side**2 != patch_BND.shape[1]:
                raise InputError(f"target={self.name} has {patch_BND.shape[1]} patches, no square; give another model")
            out = patch_BND.transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(out.float(), self._grid)


def make_patch_net(target: str, weights: str, grid: int, device: torch.device | str = "cpu") -> PatchNet:
    """The network that `target` names, for patches on a grid × grid. weights: a file, of timm's."""
    kind, _, model = target.partition(":")
    if target == "efficientnet_lite0":
        return _EfficientNet(grid, device)
    if kind == "timm" and model:
        return _Timm(model, weights, grid, device)
    raise InputError(f"target={target} is neither efficientnet_lite0 nor timm:NAME; choose one, or leave it empty")
