"""The facts of a data set that outlive its shards: the manifest has them, and so does every checkpoint."""

import math
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldt.files import natural, real, schema_error
from ldt.nn.text_shape import TextShape

LARGEST_LATENT = 1 << 24  # numbers; far above any image's
EXAMPLE_LENGTH = 200  # characters of a caption that an example keeps

SCHEMA = {
    "latent_shape": lambda v: (
        isinstance(v, list) and len(v) == 3 and all(map(natural, v)) and 0 < math.prod(v) <= LARGEST_LATENT
    ),
    "classes": [str],
    "mean_C": [real],
    "std_C": [real],
    "autoencoder": str,
    "autoencoder_hash": str,
    "image_size": natural,
    "image_channels": natural,
}
TEXT_SCHEMA = {
    "encoder": str,
    "hash": str,
    "length": natural,
    "width": natural,
    "vocabulary": natural,
    "examples": [lambda v: isinstance(v, list) and len(v) == 2 and natural(v[0]) and isinstance(v[1], str)],
}
OPTIONAL_SCHEMA = {
    "class_counts": [natural],
    "mean_CHW": str,
    "std_CHW": str,
    "buckets": {...: {"latent_shape": SCHEMA["latent_shape"], "samples": natural}},
    "token": natural,
    "text": lambda v: v == {} or not schema_error(v, TEXT_SCHEMA),
}


@dataclass(frozen=True)
class LatentSpec:
    """What it takes to make images of a model's latents without the data that it was trained on.

    latent_shape: channels, height, width; mean_C, std_C: statistics over all posterior draws, with which latents are
    whitened; mean_CHW, std_CHW: of each element, base64 of float32 [C, H, W], with which they are whitened instead
    where these are not empty; image_size, image_channels: of the images behind them; class_counts: training samples of
    each class, empty in old checkpoints; text: what `ldt.models.text_encoder.describe` says of the encoder of the
    captions, with some examples [label, caption], empty for data without captions; buckets: latent shape and training
    samples of each bucket by name, where data have several shapes: latent_shape and image_size are then the largest's.
    token: features of the class token that a denoiser makes beside the latent (`align.token_weight`), 0 for none.
    image_size is the height of the images, whose width follows from the latents'.

    mean_CHW and std_CHW are a few megabytes in manifests whose checkpoints have gigabytes, and stay there: the hash of
    the manifest vouches for them, and every reader has them at hand.
    """

    latent_shape: tuple[int, int, int]
    classes: list[str]
    mean_C: list[float]
    std_C: list[float]
    autoencoder: str
    autoencoder_hash: str
    image_size: int
    image_channels: int
    class_counts: list[int] = field(default_factory=list)
    text: dict[str, Any] = field(default_factory=dict)
    mean_CHW: str = ""
    std_CHW: str = ""
    buckets: dict[str, dict[str, Any]] = field(default_factory=dict)
    token: int = 0

    @classmethod
    def from_json(cls, facts: Any) -> "LatentSpec":
        """The inverse of `to_json`; ValueError says what is not as it should be."""
        if wrong := schema_error(facts, SCHEMA):
            raise ValueError(wrong)
        present = {key: shape for key, shape in OPTIONAL_SCHEMA.items() if key in facts}
        if wrong := schema_error(facts, present):
            raise ValueError(wrong)
        known = {f.name: facts[f.name] for f in fields(LatentSpec) if f.name in facts}
        spec = LatentSpec(**known | {"latent_shape": tuple(facts["latent_shape"])})
        if not len(spec.mean_C) == len(spec.std_C) == spec.latent_shape[0]:
            raise ValueError(f"mean_C and std_C are not of {spec.latent_shape[0]} channels")
        for name, bucket in spec.buckets.items():
            if bucket["latent_shape"][0] != spec.latent_shape[0]:
                raise ValueError(f"bucket {name} has not {spec.latent_shape[0]} channels")
        for name in ("mean_CHW", "std_CHW") if spec.mean_CHW or spec.std_CHW else ():
            values = _unpack(getattr(spec, name), name)
            if len(values) != math.prod(spec.latent_shape) or not np.isfinite(values).all():
                raise ValueError(f"{name} is not {math.prod(spec.latent_shape)} numbers, one an element of the latents")
        return spec

    def to_json(self) -> dict[str, Any]:
        """The facts as they stand in manifests, without the fields that a subclass adds."""
        facts = {f.name: getattr(self, f.name) for f in fields(LatentSpec)} | {"latent_shape": list(self.latent_shape)}
        if not self.by_element:
            del facts["mean_CHW"], facts["std_CHW"]
        if not self.buckets:
            del facts["buckets"]
        if not self.token:
            del facts["token"]
        return facts

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.image_size, self.image_size * self.latent_shape[2] // self.latent_shape[1]

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """The latent shape of each bucket by name; of data without buckets the only one, under no name."""
        if not self.buckets:
            return {"": self.latent_shape}
        return {name: (c, h, w) for name, bucket in self.buckets.items() for c, h, w in [bucket["latent_shape"]]}

    def average(self, of_shape: Callable[[tuple[int, int, int]], float]) -> float:
        """The mean over training samples of what depends on a latent's shape."""
        if not self.buckets:
            return of_shape(self.latent_shape)
        counts = {name: bucket["samples"] for name, bucket in self.buckets.items()}
        return sum(counts[name] * of_shape(shape) for name, shape in self.shapes.items()) / sum(counts.values())

    @property
    def by_element(self) -> bool:
        """Whether each element of the latents has whitening statistics of its own, not only each channel."""
        return bool(self.mean_CHW)

    @cached_property
    def whitening(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation that latents are whitened with: [C, 1, 1] each, or [C, H, W] by element."""
        if not self.by_element:
            mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean_C, self.std_C))
            return mean, std
        mean, std = (_unpack(getattr(self, k), k).reshape(self.latent_shape) for k in ("mean_CHW", "std_CHW"))
        return mean, std

    @property
    def spec(self) -> "LatentSpec":
        """The facts as a `LatentSpec`, without the fields that a subclass adds."""
        return LatentSpec(**{f.name: getattr(self, f.name) for f in fields(LatentSpec)})

    @property
    def text_shape(self) -> TextShape | None:
        """Shape of an encoded caption; None for data without captions."""
        return TextShape(self.text["length"], self.text["width"], self.text["vocabulary"]) if self.text else None


def pack_statistics(values: ArrayLike) -> str:
    """Statistics of each element as `LatentSpec.mean_CHW` holds them."""
    return b64encode(np.asarray(values, "<f4").tobytes()).decode()


def _unpack(text: str, name: str) -> NDArray[np.float32]:
    try:
        return np.frombuffer(b64decode(text, validate=True), "<f4").astype(np.float32)
    except ValueError:
        raise ValueError(f"{name} is not base64 of float32") from None
