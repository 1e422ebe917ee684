"""What there is to encode: the input, the networks, and the output shards that are to come of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldt.data.images.source import ImageSource
from ldt.data.latent_files import LatentFiles
from ldt.data.latent_spec import EXAMPLE_LENGTH
from ldt.data.shard_files import VALIDATION
from ldt.data.shards.layout import TARGET_DTYPE, Layout
from ldt.data.split import Split
from ldt.dist import World
from ldt.encoding.config import EncodeJob
from ldt.encoding.encoded import EncodedBatch
from ldt.encoding.inputs import Input, open_input
from ldt.errors import InputError
from ldt.files import hash_of
from ldt.metrics.patch_features import make_patch_net
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


@dataclass(frozen=True)
class Loaded:
    """One batch of a unit as it was read: contents of its items [B, …], their labels, and with text their captions.

    files: names and sizes of the files just before they were read.
    """

    content: NDArray[Any]
    labels: list[int]
    captions: list[str]
    files: list[str]


class Plan:
    """The input, the networks that it goes through, and which sample becomes which place of which shard."""

    def __init__(self, config: EncodeJob, autoencoder: Autoencoder, input: Input, world: World) -> None:
        self.config, self.autoencoder, self.input = config, autoencoder, input
        encoder = config.text.encoder
        self.text = load_text_encoder(encoder, config.text.length, world.device) if encoder else None
        text_shape = self.text.shape if self.text else None
        has_text, posterior = self.text is not None, self.autoencoder.posterior
        self.patch_net = None
        if config.target:
            self.patch_net = make_patch_net(config.target, config.target_weights, config.target_grid, world.device)
        target = self.patch_net.shape if self.patch_net else None
        shape = self.input.latent_shape
        self.layout = Layout(shape, config.dtype, config.flips, has_text, text_shape, posterior, target)
        self.split = Split(len(self.source), config.validation_fraction, config.seed)
        if self.split.training_samples == 0:
            if bad := len(self.input.unreadable):
                raise InputError(f"none of the {bad:,} images in {self.input.path} can be read; look at one of them")
            raise InputError(f"{self.input.path} leaves no training images; lower validation_fraction")
        self._names_hash = hash_of(self.source.key(i) for i in range(len(self.source)))
        if self.text and not self.source.captioned:
            raise InputError(
                f"{self.input.path} has no captions for text.encoder={config.text.encoder}; put "
                "x.txt beside x.png, or leave text.encoder empty"
            )

    @classmethod
    def of(cls, config: EncodeJob, world: World) -> "Plan":
        """That of all images or latents (collective)."""
        autoencoder = Autoencoder.load(config.autoencoder).to(world.device)
        return cls(config, autoencoder, open_input(config, autoencoder, world), world)

    @property
    def source(self) -> ImageSource | LatentFiles:
        """The images or latents with their names, labels and captions."""
        return self.input.source

    def recipe(self) -> dict[str, Any]:
        """All that decides what the files hold."""
        config = self.config
        text = {"text": describe(self.text)} if self.text else {}
        whitening = {"whitening": "element"} if config.whitening == "element" else {}
        return {
            **self.input.recipe(),
            **text,
            **({"target": self.target()} if self.patch_net else {}),
            **whitening,
            "images.path": config.images.path,
            **({"images.buckets": list(config.images.buckets)} if config.images.buckets else {}),
            "images.size": list(self.input.size) if config.images.buckets else config.images.size,
            "images.fit": config.images.fit,
            "number of images": len(self.source),
            NAMES: self._names_hash,
            "classes": list(self.source.classes),
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

    def source_hash(self, unit: Unit) -> str:
        """The files that a unit is made of, by their names and sizes as they are now, as a hash."""
        return hash_of(self._files(self.image_numbers(unit, unit.start, unit.stop)))

    def _files(self, numbers: list[int]) -> list[str]:
        """A line for each image: the names and sizes of its files as they are now."""
        source, text = self.source, self.text is not None
        return [f"{source.key(i)} {source.size(i)} {source.caption_size(i) if text else ''}" for i in numbers]

    def whole_source_hash(self) -> str:
        """All files that are encoded, by their names and sizes as they are now, as a hash."""
        return hash_of(self.source_hash(unit) for unit in self.units())

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

    def load(self, batch: tuple[Unit, int, int]) -> Loaded:
        """Samples [start, stop) of a unit."""
        numbers = self.image_numbers(*batch)
        files = self._files(numbers)  # before they are read: one that changes meanwhile is then seen to have changed
        captions = [self.source.caption(i) for i in numbers] if self.text else []
        content = np.stack([self.input.content(i) for i in numbers])
        return Loaded(content, [self.source.label(i) for i in numbers], captions, files)

    def encode(self, loaded: Loaded) -> EncodedBatch:
        """A batch through the autoencoder, the text encoder and the network of the targets."""
        content = torch.from_numpy(loaded.content)
        moments, targets = self.input.moments(content), self._targets(content)
        text = self.text.encode(loaded.captions) if self.text else None
        return EncodedBatch(moments, loaded.labels, loaded.captions, text, loaded.files, targets)

    def _targets(self, image_BHWC: torch.Tensor) -> tuple[NDArray[np.float16], ...]:
        """With a `target` the features of patches [B, D, G, G] of the images and, with flips, of their mirror images.

        A mirror image's are its own: those of the image, mirrored, would not be what the network sees.
        """
        if self.patch_net is None:
            return ()
        views = (image_BHWC, image_BHWC.flip(2)) if self.config.flips else (image_BHWC,)
        return tuple(self.patch_net(view).cpu().numpy().astype(TARGET_DTYPE) for view in views)

    def target(self) -> dict[str, Any]:
        """What the manifest says of the targets."""
        net = self.patch_net
        return {"name": net.name, "hash": net.hash, "shape": list(net.shape), "dtype": "fp16"} if net else {}

    def examples(self) -> list[tuple[int, str]]:
        """Labels and beginnings of captions of some training images, evenly spaced; previews and samples use them."""
        total = self.split.training_samples
        numbers = self.split.training(np.arange(min(EXAMPLES, total)) * total // min(EXAMPLES, total)).tolist()
        return [(self.source.label(i), self.source.caption(i)[:EXAMPLE_LENGTH]) for i in numbers]
