"""The commands' work from Python: load a model once, then sample, encode, decode, evaluate (docs/api.md).

Settings are the keys of the commands (`ldt sample --help`, `ldt evaluate --help`), and so are the mistakes: an
`InputError` names the key. Arrays are numpy's.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ldt.checkpoint.load import Loaded, load_denoiser
from ldt.commands.evaluate import EvaluateJob, evaluate
from ldt.commands.sample import SampleJob, draw
from ldt.config import from_dict
from ldt.dist import SLOWEST_RANK_TIMEOUT, discover, process_group
from ldt.errors import InputError
from ldt.paths import local_path
from ldt.sampling.draw import image_model, load_guide, resized

__all__ = ["Model", "load"]

BATCH = 50  # images that go through the autoencoder at once


def load(
    path: str | Path,
    *,
    weights: str = "ema",
    precision: str = "fp32",
    compile: bool = False,
    device: str | torch.device | None = None,
) -> "Model":
    """The newest checkpoint of a run, a checkpoint, or an exported model, ready for use.

    `weights`: ema or master; `precision`: fp32 or bf16; `compile`: the denoiser's blocks with torch.compile; `device`:
    empty for the GPU where there is one.
    """
    where = torch.device(device) if device is not None else discover().device
    return Model(load_denoiser(local_path(path), weights, where), precision, where, compile)


class Model:
    """A trained denoiser with its autoencoder, and its text encoder if it has one.

    Image i is a function of the checkpoint, the settings and (seed, i), the same as `ldt sample` draws.
    """

    def __init__(self, loaded: Loaded, precision: str, device: torch.device, compiled: bool = False) -> None:
        self._loaded, self._precision = loaded, precision
        self._images = image_model(loaded, precision, device, compiled)
        self._mean, self._std = loaded.spec.whitening

    def __repr__(self) -> str:
        return f"<ldt.Model {self.path} at {self.samples_seen:,} samples, {len(self.classes)} classes>"

    @property
    def path(self) -> Path:
        """The checkpoint, or the exported model's directory."""
        return self._loaded.path

    @property
    def samples_seen(self) -> int:
        return self._loaded.samples_seen

    @property
    def classes(self) -> list[str]:
        return list(self._loaded.spec.classes)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that it was trained with."""
        return self._loaded.config

    def sample(
        self, images: int = 16, *, classes: Sequence[str] = (), prompts: Sequence[str] = (), **settings: Any
    ) -> NDArray[np.uint8]:
        """New images, uint8 [N, H, W, C]. settings: seed, sampler, steps, guidance and other keys of `ldt sample`."""
        for key in ("weights", "precision", "compile"):
            if key in settings:
                raise InputError(f"{key}= is decided when the model is loaded; give it to ldt.load")
        keys = {"run": str(self.path), "images": images, "classes": list(classes), "prompts": list(prompts)}
        config = from_dict(SampleJob, keys | {"precision": self._precision} | settings, "the arguments")
        model = replace(self._images, guide=load_guide(config, self._loaded, self._images.device))
        model = resized(model, self._loaded.config, config.size)
        blocks, _ = draw(model, self._loaded.config, config)
        return np.concatenate(list(blocks))

    def encode(self, images: ArrayLike) -> NDArray[np.float32]:
        """Latents as training sees them, whitened posterior means [N, C, h, w], of uint8 images [N, H, W, C]."""
        image_NHWC = np.asarray(images)
        if image_NHWC.dtype != np.uint8 or image_NHWC.ndim != 4:
            raise InputError(f"images are {image_NHWC.dtype} {image_NHWC.shape}; give uint8 [N, H, W, C]")
        parts = torch.from_numpy(np.ascontiguousarray(image_NHWC)).split(BATCH)
        mean_NCHW = torch.cat([self._images.autoencoder.encode(part)[0].cpu() for part in parts])
        return (mean_NCHW.numpy() - self._mean) / self._std

    def decode(self, latents: ArrayLike) -> NDArray[np.uint8]:
        """Images uint8 [N, H, W, C] of whitened latents [N, C, h, w]."""
        latent_NCHW = np.asarray(latents, np.float32)
        if latent_NCHW.ndim != 4 or latent_NCHW.shape[1] != len(self._mean):
            raise InputError(f"latents are {latent_NCHW.shape}; give [N, {len(self._mean)}, h, w]")
        parts = torch.from_numpy(latent_NCHW * self._std + self._mean).split(BATCH)
        return torch.cat([self._images.autoencoder.decode(part).cpu() for part in parts]).numpy()

    def evaluate(self, images: int = 50_000, **settings: Any) -> dict[str, Any]:
        """Scores with all that they depend on, as in evaluations.jsonl, where they are written too.

        settings: reference, fit, detector, metrics, sampler and the other keys of `evaluate`. All processes of a
        launcher share the work; those but the first get an empty mapping.
        """
        keys = {"images": images, "precision": self._precision} | settings
        config = from_dict(EvaluateJob, {"run": str(self.path), "evaluate": keys}, "the arguments")
        with process_group(timeout=SLOWEST_RANK_TIMEOUT) as world:
            results = evaluate(config, world)
        return results[0] if results else {}
