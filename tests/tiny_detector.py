"""A detector that costs nothing."""

import torch

from ldt.metrics.detectors import Features


class MeanOfGrey:
    """One feature, so that its files are a page each."""

    name, score, hash, outputs = "grey", "fd_grey", "0", {"features": 1}

    def __call__(self, image_BHWC: torch.Tensor) -> Features:
        return Features(image_BHWC.float().mean((1, 2, 3))[:, None] / 255)
