"""The offline feature net: its architecture is the weights', its preprocessing is fixed, its hash says so."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image

from ldt.errors import InputError
from ldt.metrics.detectors import EfficientNetLite0Detector, colour, make_detector
from ldt.models import efficientnet


@pytest.fixture(scope="module")
def detector() -> EfficientNetLite0Detector:
    return EfficientNetLite0Detector()


def photo(size: int) -> torch.Tensor:
    """The portrait in uniform that matplotlib ships: uint8 [1, size, size, 3]."""
    with get_sample_data("grace_hopper.jpg") as f:
        image = Image.open(f).convert("RGB").crop((0, 0, 512, 512)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))[None]


def test_recognises_a_photo(detector: EfficientNetLite0Detector) -> None:
    x = (photo(224).permute(0, 3, 1, 2) / 255 - 0.498) / 0.502
    best = detector.net.classify(detector.net(x)).argmax().item()
    assert best == 652  # ImageNet: military uniform


def independent_features(x: torch.Tensor) -> torch.Tensor:
    """The network again, as one loop over the weights file with the running statistics folded into scale and shift."""
    w = torch.load(efficientnet.weights_path(), weights_only=True)

    def conv(x: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        kernel = w[name + ".weight"]
        k, size = kernel.shape[-1], x.shape[-1]
        out = (size + stride - 1) // stride
        total = max((out - 1) * stride + k - size, 0)
        low, high = total // 2, total - total // 2
        y = F.conv2d(F.pad(x, (low, high, low, high)), kernel, stride=stride, groups=groups)
        scale = w[norm + ".weight"] / (w[norm + ".running_var"] + 1e-3).sqrt()
        shift = w[norm + ".bias"] - w[norm + ".running_mean"] * scale
        return y * scale[:, None, None] + shift[:, None, None]

    x = conv(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    for i in range(16):
        b, y = f"_blocks.{i}", x
        if f"{b}._expand_conv.weight" in w:
            y = conv(y, f"{b}._expand_conv", f"{b}._bn0").clamp(0, 6)
        y = conv(y, f"{b}._depthwise_conv", f"{b}._bn1", strides.get(i, 1), y.shape[1]).clamp(0, 6)
        y = conv(y, f"{b}._project_conv", f"{b}._bn2")
        x = x + y if x.shape == y.shape else y
    return conv(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))


def test_agrees_with_an_independent_forward(detector: EfficientNetLite0Detector) -> None:
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = detector.net(x)
    assert ours.shape == (2, 1280) == (2, detector.outputs["features"])
    assert torch.allclose(ours, independent_features(x), rtol=1e-3, atol=1e-4)


def test_grey_is_repeated_and_size_is_free(detector: EfficientNetLite0Detector) -> None:
    grey = photo(64)[..., :1]
    assert torch.equal(detector(grey).feature_BD, detector(grey.repeat(1, 1, 1, 3)).feature_BD)
    large, small = detector(photo(256)).feature_BD, detector(photo(96)).feature_BD
    assert F.cosine_similarity(large, small).item() > 0.95


def test_resize_is_pillows_bicubic_without_rounding(detector: EfficientNetLite0Detector) -> None:
    image = photo(256)
    channels = [Image.fromarray(image[0, ..., c].numpy().astype(np.float32)) for c in range(3)]  # mode F keeps floats
    theirs = np.stack([np.asarray(c.resize((96, 96), Image.Resampling.BICUBIC)) for c in channels]).clip(0, 255)
    ours = (detector.normalise(image)[0].numpy() * 0.502 + 0.498) * 255
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_the_hash_covers_weights_and_preprocessing(
    detector: EfficientNetLite0Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_detector("efficientnet_lite0").hash == detector.hash
    monkeypatch.setattr(EfficientNetLite0Detector, "preprocessing", "another")
    assert EfficientNetLite0Detector().hash != detector.hash


def test_score_is_not_called_fid(detector: EfficientNetLite0Detector) -> None:
    assert detector.score == "fd_efficientnet_lite0"


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="8-bit"):
        colour(torch.zeros(1, 4, 4, 3))
    with pytest.raises(InputError, match="alpha"):
        colour(torch.zeros(1, 4, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="resnet"):
        make_detector("resnet")
