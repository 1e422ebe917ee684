"""The keys of `ldt encode`."""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ldt.config_fields import check_seed, choice, path_field, required_path_field, section
from ldt.data.images.bucket_rule import Size
from ldt.errors import InputError

MOST_SIDE = 1 << 14  # pixels of what is encoded


@dataclass
class ImagesConfig:
    """`path`: a directory with one sub-directory a class; tar, zip or parquet files or MDS shards, by name, directory
    or pattern (`shards/{00000..00999}.tar`), local or at an fsspec address; or embedded:fashion_mnist.

    `size`: side in pixels that the autoencoder sees; `fit`: crop (resize and cut the middle) or pad (centre on black).
    `buckets`: instead of `size`, several sizes HEIGHTxWIDTH, such as [256x256,192x320]: each image goes to the one that
    keeps most of it (docs/own_data.md).
    `label`, `caption`: the ending of a member, the key of a .json, or the column that they come from; empty for what is
    usual. `classes`: encode only images of these, in this order; empty for all. `exif`: ignore, or turn images as
    cameras say. `on_error`: stop at an unreadable image, or skip it; then all are looked at first. `index_dir`: where
    the indexes of files are kept.
    """

    path: str = path_field(remote=True)
    size: int = 0
    buckets: list[str] = field(default_factory=list)
    fit: str = choice("crop", "pad")
    label: str = ""
    caption: str = ""
    classes: list[str] = field(default_factory=list)
    exif: str = choice("ignore", "turn")
    on_error: str = choice("stop", "skip")
    index_dir: str = path_field("~/.cache/ldt/images")

    def __post_init__(self) -> None:
        if self.buckets and self.size:
            raise InputError(f"images.size={self.size} and images.buckets are both given; leave one of them out")
        if repeated := [size for size, n in Counter(self.sizes).items() if n > 1]:
            raise InputError(f"images.buckets names {repeated[0]} twice; name it once")
        if (side := max(self.size, *chain(*self.sizes), 0)) > MOST_SIDE:
            raise InputError(f"a side of {side} pixels, in images.size or images.buckets, is more than {MOST_SIDE:,}")

    @property
    def sizes(self) -> list[Size]:
        """The buckets' sizes."""
        return [Size.parse(str(text), "images.buckets") for text in self.buckets]


@dataclass
class TextConfig:
    """`encoder`: bytes, or a text encoder of transformers' by name or path; empty stores no captions. The caption of
    `x.png` is the text of `x.txt` beside it, at most `length` tokens of it."""

    encoder: str = path_field()
    length: int = 64


@dataclass
class EncodeJob:
    """What to encode and how to store it.

    `dtype`: of the stored moments; `flips`: store the moments of the mirrored image too; `validation_fraction`: share
    of images held out into `<output>/validation`; `batch`: images per forward pass; `threads`: that decode images.
    `whitening`: by mean and deviation of each channel, or of each element as representation autoencoders have it.
    `index`: a directory of shards that another program wrote; it is checked and given a manifest, nothing is encoded.
    `latents`: instead of images, latents of this autoencoder in .npy, .npz or .safetensors; `latents_scale`: what the
    draws in fast-DiT's .npy were multiplied with; `latents_second`: what follows the mean in .npz, the logarithm of the
    variance or the standard deviation.
    `target`: the network whose features of patches are stored too, for `align.weight` in training: efficientnet_lite0
    or timm:NAME; `target_grid`: patches a side, as many as the denoiser has tokens; `target_weights`: a file of timm's.
    """

    images: ImagesConfig = section(ImagesConfig)
    latents: str = path_field()
    latents_scale: float = 0.18215
    latents_second: str = choice("log_variance", "std")
    text: TextConfig = section(TextConfig)
    target: str = ""
    target_grid: int = 16
    target_weights: str = path_field()
    autoencoder: str = required_path_field()
    output: str = path_field()
    index: str = path_field()
    format: str = choice("tar", "mds")
    dtype: str = choice("fp16", "bf16", "fp32")
    flips: bool = False
    shard_samples: int = 4096
    whitening: str = choice("channel", "element")
    validation_fraction: float = 0.02
    seed: int = 0
    batch: int = 64
    threads: int = 2

    def __post_init__(self) -> None:
        check_seed(self.seed)
        needed: dict[str, Any] = {"output": self.output}
        if not self.latents:
            needed |= {"images.path": self.images.path, "images.size": self.images.size or bool(self.images.buckets)}
        if self.latents and self.images.path:
            raise InputError("latents= takes the place of images.path; give one of them")
        for name, value in {"output": self.output, "images.path": self.images.path, "latents": self.latents}.items():
            if self.index and value:
                raise InputError(
                    f"{name}={value} cannot be combined with index=, which only indexes existing shards; leave one out"
                )
        if not 0 < self.latents_scale < math.inf:
            raise InputError(f"latents_scale={self.latents_scale} must be positive, such as 0.18215")
        for name, value in needed.items():
            if not value and not self.index:
                raise InputError(f"{name} is not set; give it in the config or as {name}=VALUE")
        if self.images.buckets and (self.latents or self.index):
            raise InputError("images.buckets sorts images; with latents= or index= leave it out")
        if self.images.buckets and self.whitening == "element":
            raise InputError(
                "whitening=element is by statistics of one latent shape, and images.buckets makes several; use "
                "whitening=channel"
            )
        if self.images.buckets and self.target:
            raise InputError(
                f"target={self.target} has one grid of patches, and images.buckets makes images of several; leave one "
                "of them out"
            )
        for name, value in {"latents": self.latents, "index": self.index}.items():
            if self.target and value:
                raise InputError(f"target={self.target} is made from images, and {name}={value} has none; leave it out")
        for name in ("shard_samples", "batch", "threads", "target_grid"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.validation_fraction <= 0.5:
            raise InputError(f"validation_fraction={self.validation_fraction} must be between 0 and 0.5")
