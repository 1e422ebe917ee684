"""What there is to encode: the sources, the networks, and the output shards that are to come of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ldt import log
from ldt.data.images import prepare
from ldt.data.images.chosen import Chosen
from ldt.data.images.members import Fields
from ldt.data.images.open import index_share, open_images
from ldt.data.images.source import ImageSource
from ldt.data.latent_files import LatentFiles
from ldt.data.latent_sources import open_latents
from ldt.data.shard_files import VALIDATION
from ldt.data.shards.layout import Layout
from ldt.data.split import Split
from ldt.dist import World, all_gather, together
from ldt.encoding.config import EncodeJob
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder
from ldt.models.text_encoder import describe, load_text_encoder

EXAMPLES = 256
NAMES = "names of images (hash)"


@dataclass(frozen=True)
class Unit:
    """Samples [start, stop) of one split, which become one shard."""

    part: str  # "" for training, else a sub-directory of the output
    number: int
    start: int
    stop: int


class Plan:
    """The images or latents, the networks that they go through, and which sample becomes which place of which shard."""

    def __init__(self, config: EncodeJob, world: World) -> None:
        self.config, device = config, world.device
        self.autoencoder = Autoencoder.load(config.autoencoder).to(device)
        self.images: ImageSource | LatentFiles
        self.unreadable: list[tuple[str, str]] = []
        if config.latents:
            self.images = open_latents(config.latents, config.latents_scale, config.latents_second)
            shape = self.images.latent_shape
            if config.flips and not self.images.flips:
                raise InputError(f"flips=true needs images, and latents={config.latents} has none of mirrored ones")
            if shape[0] != self.autoencoder.latent_channels:
                raise InputError(
                    f"latents={config.latents} have {shape[0]} channels, autoencoder={config.autoencoder} makes "
                    f"{self.autoencoder.latent_channels}; give the autoencoder that they come from"
                )
            self.image_size = shape[1] * self.autoencoder.downsample
        else:
            wanted = config.images
            fields = Fields(wanted.label, wanted.caption)
            if world.size > 1:
                together(lambda: index_share(wanted.path, fields, wanted.index_dir, world.rank, world.size))
            self.images = open_images(wanted.path, fields, wanted.index_dir, wanted.exif == "turn")
            self.image_size = wanted.size
            self.autoencoder.check_size(self.image_size, self.image_size)
            down = self.autoencoder.downsample
            shape = (self.autoencoder.latent_channels, self.image_size // down, self.image_size // down)
            if wanted.on_error == "skip":
                self._leave_out_unreadable(world)
        encoder = config.text.encoder
        self.text = load_text_encoder(encoder, config.text.length, device) if encoder else None
        text_shape = self.text.shape if self.text else None
        has_text, posterior = self.text is not None, self.autoencoder.posterior
        self.layout = Layout(shape, config.dtype, config.flips, has_text, text_shape, posterior)
        self.split = Split(len(self.images), config.validation_fraction, config.seed)
        if self.split.training_samples == 0:
            raise InputError(f"{self.place} leaves no training images; lower validation_fraction")
        self._names_hash = hash_of(self.images.key(i) for i in range(len(self.images)))
        if self.text and not self.images.captioned:
            raise InputError(
                f"{self.place} has no captions for text.encoder={config.text.encoder}; put "
                "x.txt beside x.png, or leave text.encoder empty"
            )

    def _leave_out_unreadable(self, world: World) -> None:
        """Look at every image, all ranks together, and go on without those that can't be encoded."""
        mine: list[tuple[int, str]] = []
        numbers = range(world.rank, len(self.images), world.size)
        with log.progress(len(self.images), "img", "look", show=world.rank == 0) as bar:
            for number in numbers:
                try:
                    self.content(number)
                except InputError as error:
                    mine.append((number, str(error)))
                bar.update(world.size)
        bad = sorted(entry for part in all_gather(mine) for entry in part)
        assert isinstance(self.images, ImageSource)
        self.unreadable = [(self.images.key(number), reason) for number, reason in bad]
        if bad:
            self.images = Chosen(self.images, [number for number, _ in bad])

    def recipe(self) -> dict[str, Any]:
        """All that decides what the files hold."""
        config = self.config
        latents = {"latents": config.latents, "latents_scale": config.latents_scale} if config.latents else {}
        if config.latents and config.latents_second != "log_variance":
            latents["latents_second"] = config.latents_second
        text = {"text": describe(self.text)} if self.text else {}
        whitening = {"whitening": "element"} if config.whitening == "element" else {}
        chosen = {
            f"images.{k}": v for k in ("label", "caption", "exif", "on_error") if (v := getattr(config.images, k))
        }
        chosen = {k: v for k, v in chosen.items() if v not in ("ignore", "stop")}  # the defaults are not written
        left_out = {"unreadable images left out": len(self.unreadable)} if config.images.on_error == "skip" else {}
        return {
            **latents,
            **text,
            **whitening,
            **chosen,
            **left_out,
            "images.path": config.images.path,
            "images.size": config.images.size,
            "images.fit": config.images.fit,
            "number of images": len(self.images),
            NAMES: self._names_hash,
            "classes": list(self.images.classes),
            "autoencoder's hash": self.autoencoder.hash,
            "format": config.format,
            "dtype": config.dtype,
            "flips": config.flips,
            "shard_samples": config.shard_samples,
            "validation_fraction": config.validation_fraction,
            "seed": config.seed,
            "tf32": torch.backends.cudnn.allow_tf32,
            "batch": config.batch,  # the last bits of a latent depend on how many are in its batch
        }

    def source_of(self, unit: Unit) -> str:
        """The files that a unit is made of, by their names and sizes as they are now, as a hash."""
        images, text = self.images, self.text is not None
        return hash_of(
            f"{images.key(i)} {images.size(i)} {images.caption_size(i) if text else ''}"
            for i in self.image_numbers(unit, unit.start, unit.stop)
        )

    def source(self) -> str:
        """All files that are encoded, by their names and sizes as they are now, as a hash."""
        return hash_of(self.source_of(unit) for unit in self.units())

    @property
    def place(self) -> str:
        """Where the images or latents are."""
        return self.config.latents or self.config.images.path

    def caption_counts(self, captions: list[str]) -> dict[str, int]:
        """How many of these captions say something, are empty, and are cut at the encoder's length."""
        if self.text is None:
            return {}
        captioned = sum(bool(caption.strip()) for caption in captions)
        cut = sum(self.text.cuts(caption) for caption in captions)
        return {"captioned": captioned, "empty": len(captions) - captioned, "cut": cut}

    def units(self) -> list[Unit]:
        """All units, the held-out ones last."""
        size, out = self.config.shard_samples, []
        for part, samples in (("", self.split.training_samples), (VALIDATION, self.split.validation_samples)):
            starts = range(0, samples, size)
            out += [Unit(part, k, start, min(start + size, samples)) for k, start in enumerate(starts)]
        return out

    def image_numbers(self, unit: Unit, start: int, stop: int) -> list[int]:
        """Which images are samples [start, stop) of the unit's split."""
        place = self.split.validation if unit.part else self.split.training
        return place(np.arange(start, stop)).tolist()

    def load(self, batch: tuple[Unit, int, int]) -> tuple[NDArray[Any], list[int], list[str]]:
        """Prepared images uint8 [B, H, W, C], or moments, labels and captions of one batch."""
        numbers = self.image_numbers(*batch)
        captions = [self.images.caption(i) for i in numbers] if self.text else []
        return np.stack([self.content(i) for i in numbers]), [self.images.label(i) for i in numbers], captions

    def content(self, number: int) -> NDArray[Any]:
        """One prepared image, or the moments of one latent and its mirror image [views, 2 or 1, C, H, W]."""
        if isinstance(self.images, LatentFiles):
            moments = self.images.checked_moments(number)
            if not self.layout.posterior and moments[1].any():
                raise InputError(
                    f"latent {self.images.name(number)} has a standard deviation, and "
                    f"autoencoder={self.config.autoencoder} has no posterior; give the autoencoder that it comes from"
                )
            views = [moments, self.images.flipped(number)] if self.config.flips else [moments]
            return np.stack(views if self.layout.posterior else [view[:1] for view in views])
        wanted = self.config.images
        image = self.images.image(number)
        try:
            return prepare(image, wanted.size, self.autoencoder.image_channels, wanted.fit)
        except InputError as error:
            raise InputError(f"image {self.images.name(number)}: {error}") from None

    def moments(self, image_BHWC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, 2 or 1, C, H, W] of the images and, with flips, of their mirror images; moments stay as they are."""
        if self.config.latents:
            return image_BHWC.unbind(1)
        views = (image_BHWC, image_BHWC.flip(2)) if self.config.flips else (image_BHWC,)
        encoded = (self.autoencoder.encode(view) for view in views)
        return tuple(torch.stack([m for m in moments if m is not None], 1).cpu() for moments in encoded)

    def examples(self) -> list[tuple[int, str]]:
        """Label and beginning of the caption of some training images, evenly spaced: what samples are drawn of."""
        total = self.split.training_samples
        numbers = self.split.training(np.arange(min(EXAMPLES, total)) * total // min(EXAMPLES, total)).tolist()
        return [(self.images.label(i), self.images.caption(i)[:200]) for i in numbers]


def hash_of(lines: Iterable[str]) -> str:
    """128 bits of the lines in their order, as hexadecimal text."""
    digest = xxhash.xxh3_128()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
