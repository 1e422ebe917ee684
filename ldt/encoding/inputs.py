"""What is encoded: images, or latents that another project has encoded already. `open_input` decides which."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldt.data.images import prepare
from ldt.data.images.bucket_rule import Size
from ldt.data.images.chosen import Chosen
from ldt.data.images.members import Fields
from ldt.data.images.open import index_share, open_images
from ldt.data.images.source import ImageSource
from ldt.data.latent_files import LatentFiles
from ldt.data.latent_sources import open_latents
from ldt.dist import World, on_rank_zero, together
from ldt.encoding.config import EncodeJob
from ldt.encoding.look import LOOKED, identity, look, remove_old
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder


class Input(ABC):
    """Numbered items of a source, and how one of them becomes moments.

    path: where the items are; size: height and width in pixels of what the autoencoder sees; latent_shape: (C, H, W);
    unreadable: names of images that are left out, and why.
    """

    path: str
    source: ImageSource | LatentFiles
    size: Size
    latent_shape: tuple[int, int, int]
    unreadable: list[tuple[str, str]]

    @abstractmethod
    def content(self, number: int) -> NDArray[Any]:
        """What is read of one item, in the reading threads: an array of the same shape for every item."""

    @abstractmethod
    def moments(self, content: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The moments [B, 2 or 1, C, H, W] of a batch of contents and, with flips, those of the mirrored images."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """The settings of this input that decide what the shards hold, without those that have their default."""


class ImageInput(Input):
    """Images that go through the autoencoder; a content is uint8 [H, W, C].

    without: how many images are left out before, for they belong to no bucket.
    """

    def __init__(
        self,
        config: EncodeJob,
        autoencoder: Autoencoder,
        source: ImageSource,
        size: Size,
        world: World,
        without: int = 0,
    ) -> None:
        self._config, self._autoencoder, self._without = config, autoencoder, without
        self.source: ImageSource = source
        self.path, self.size, self.unreadable = config.images.path, size, []
        autoencoder.check_size(*size)
        down = autoencoder.downsample
        self.latent_shape = (autoencoder.latent_channels, size.height // down, size.width // down)
        if config.images.on_error == "skip":
            self._leave_out_unreadable(world)

    def content(self, number: int) -> NDArray[Any]:
        wanted = self._config.images
        image = self.source.image(number)
        try:
            return prepare(image, self.size, self._autoencoder.image_channels, wanted.fit)
        except InputError as error:
            raise InputError(f"image {self.source.name(number)}: {error}") from None

    def moments(self, content: torch.Tensor) -> tuple[torch.Tensor, ...]:
        views = (content, content.flip(2)) if self._config.flips else (content,)
        encoded = (self._autoencoder.encode(view) for view in views)
        return tuple(torch.stack([m for m in moments if m is not None], 1).cpu() for moments in encoded)

    def recipe(self) -> dict[str, Any]:
        wanted = self._config.images
        chosen = {f"images.{key}": getattr(wanted, key) for key in ("label", "caption", "exif", "on_error", "classes")}
        out = {key: value for key, value in chosen.items() if value and value not in ("ignore", "stop")}
        left_out = self._without + len(self.unreadable)
        return out | ({"unreadable images left out": left_out} if wanted.on_error == "skip" else {})

    def _leave_out_unreadable(self, world: World) -> None:
        """Look at every image, all ranks together, and go on without those that can't be encoded."""
        config, source = self._config, self.source
        wanted = config.images

        def see(number: int) -> tuple[int, int]:
            return self.content(number).shape[:2]

        settings = (wanted.fit, wanted.exif, self.size, self._autoencoder.image_channels)
        name = on_rank_zero(world, lambda: identity(source, *settings))
        kept = Path(wanted.index_dir).expanduser() / f"{LOOKED}{name}" if wanted.index_dir else None
        if kept:
            on_rank_zero(world, lambda: remove_old(kept.parent))
        reasons = look(source, see, config.threads, world, kept, skip=True).reasons
        self.unreadable = [(source.key(number), reasons[number]) for number in sorted(reasons)]
        if reasons:
            self.source = Chosen(source, np.delete(np.arange(len(source)), sorted(reasons)))


class LatentInput(Input):
    """Moments that stand in files; a content is [views, 2 or 1, C, H, W], where a second view is the mirrored image."""

    def __init__(self, config: EncodeJob, autoencoder: Autoencoder) -> None:
        self._config, self._posterior = config, autoencoder.posterior
        self.path, self.unreadable = config.latents, []
        self.source: LatentFiles = open_latents(config.latents, config.latents_scale, config.latents_second)
        self.latent_shape = self.source.latent_shape
        self.size = Size(*(side * autoencoder.downsample for side in self.latent_shape[1:]))
        if config.flips and not self.source.flips:
            raise InputError(f"flips=true needs images, and latents={config.latents} has none of mirrored images")
        if self.latent_shape[0] != autoencoder.latent_channels:
            raise InputError(
                f"latents={config.latents} have {self.latent_shape[0]} channels, autoencoder={config.autoencoder} "
                f"makes {autoencoder.latent_channels}; give the autoencoder that they come from"
            )

    def content(self, number: int) -> NDArray[Any]:
        views = self.source.views(number, self._config.flips)
        if not self._posterior and views[0][1].any():
            raise InputError(
                f"latent {self.source.name(number)} has a standard deviation, and autoencoder="
                f"{self._config.autoencoder} has no posterior; give the autoencoder that it comes from"
            )
        return np.stack(views if self._posterior else [view[:1] for view in views])

    def moments(self, content: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return content.unbind(1)

    def recipe(self) -> dict[str, Any]:
        config = self._config
        second = {"latents_second": config.latents_second} if config.latents_second != "log_variance" else {}
        return {"latents": config.latents, "latents_scale": config.latents_scale, **second}


def open_input(config: EncodeJob, autoencoder: Autoencoder, world: World) -> Input:
    """The latents of `latents=`, else the images of `images.path` (collective)."""
    if config.latents:
        return LatentInput(config, autoencoder)
    side = config.images.size
    return ImageInput(config, autoencoder, open_source(config, world), Size(side, side), world)


def open_source(config: EncodeJob, world: World) -> ImageSource:
    """The images of `images.path`; archives are indexed by all ranks together (collective)."""
    wanted = config.images
    fields = Fields(wanted.label, wanted.caption)
    if world.size > 1:
        together(lambda: index_share(wanted.path, fields, wanted.index_dir, world.rank, world.size))
    turn = wanted.exif == "turn"
    return open_images(wanted.path, fields, wanted.index_dir, turn, wanted.classes, config.seed)
