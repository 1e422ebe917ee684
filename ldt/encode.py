"""Encode images into latent shards: posterior moments, labels and a manifest.

Runs on one process or many (torchrun, srun): each output shard is a unit of its own, so any number of processes give
the same files, and running the command again after a stop or a kill goes on with the shards that are missing.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ldt import log
from ldt.autoencoder import Autoencoder
from ldt.config import choice, required, section
from ldt.data.ahead import ahead
from ldt.data.images import ImageSource, open_images, prepare
from ldt.data.latent_files import LatentFiles, open_latents
from ldt.data.shards import adopt, mds
from ldt.data.shards.layout import Layout, Samples
from ldt.data.shards.manifest import HEAD, VALIDATION, Manifest, make_table, read_head
from ldt.data.shards.statistics import Sums
from ldt.data.shards.unit import Sidecar, read_sidecar, shard_name, sidecar_path, write_unit
from ldt.data.split import Split
from ldt.dist import World, all_gather, broadcast, process_group
from ldt.errors import InputError
from ldt.files import parse_json, remove_unfinished, write_atomic
from ldt.nn.condition import TextShape
from ldt.text import describe, load_text_encoder

logger = log.get_logger(__name__)
EXAMPLES = 256
RECIPE = "encode.json"  # marks a directory that is being encoded; gone when it is whole

T = TypeVar("T")


@dataclass
class ImagesConfig:
    """`path`: a directory with one sub-directory a class, a .tar of the same, or embedded:fashion_mnist.

    `size`: side in pixels that the autoencoder sees; `fit`: crop (resize and cut the middle) or pad (centre on black).
    """

    path: str = ""
    size: int = 0
    fit: str = choice("crop", "pad")


@dataclass
class TextConfig:
    """`encoder`: bytes, or a text encoder of transformers' by name or path; empty stores no captions. The caption of
    `x.png` is the text of `x.txt` beside it, at most `length` tokens of it."""

    encoder: str = ""
    length: int = 64


@dataclass
class Config:
    """What to encode and how to store it.

    `dtype`: of the stored moments; `flips`: store the moments of the mirrored image too; `validation_fraction`: share
    of images held out into `<output>/validation`; `batch`: images per forward pass; `threads`: that decode images.
    `index`: a directory of shards that another program wrote; it is checked and given a manifest, nothing is encoded.
    `latents`: instead of images, a tree of .npy or .npz latents of this autoencoder; `latents_scale`: what the draws in
    .npy were multiplied with.
    """

    images: ImagesConfig = section(ImagesConfig)
    latents: str = ""
    latents_scale: float = 0.18215
    text: TextConfig = section(TextConfig)
    autoencoder: str = required()
    output: str = ""
    index: str = ""
    format: str = choice("tar", "mds")
    dtype: str = choice("fp16", "bf16", "fp32")
    flips: bool = False
    shard_samples: int = 4096
    validation_fraction: float = 0.02
    seed: int = 0
    batch: int = 64
    threads: int = 2

    def __post_init__(self) -> None:
        needed: dict[str, Any] = {"output": self.output}
        if not self.latents:
            needed |= {"images.path": self.images.path, "images.size": self.images.size}
        if self.latents and (self.images.path or self.flips):
            raise InputError("latents= takes the place of images.path, and flips=true needs images; give one of them")
        if self.latents_scale <= 0:
            raise InputError(f"latents_scale={self.latents_scale} must be positive, such as 0.18215")
        for name, value in needed.items():
            if not value and not self.index:
                raise InputError(f"{name} is not set; give it in the config or as {name}=VALUE")
        for name in ("shard_samples", "batch", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.validation_fraction <= 0.5:
            raise InputError(f"validation_fraction={self.validation_fraction} must be between 0 and 0.5")


@dataclass(frozen=True)
class Unit:
    """Samples [start, stop) of one split, which become one shard."""

    part: str  # "" for training, else a sub-directory of the output
    number: int
    start: int
    stop: int


def run(config: Config) -> int:
    """Encode; returns the exit code."""
    with process_group() as world:
        log.configure(world.rank)
        if config.index:
            _index(config, world)
        else:
            _Encoder(config, world).run()
    return 0


def _index(config: Config, world: World) -> None:
    """Check every sample of shards written elsewhere, divided among ranks, and write their manifest."""
    directory = Path(config.index)
    autoencoder = Autoencoder.load(config.autoencoder)
    format, names = _on_rank_zero(world, lambda: adopt.find_shards(directory))
    layout = _on_rank_zero(world, lambda: adopt.read_layout(directory, names[0], format))
    if layout.latent_shape[0] != autoencoder.latent_channels:
        raise InputError(
            f"index={directory} holds latents of {layout.latent_shape[0]} channels, autoencoder={config.autoencoder} "
            f"makes {autoencoder.latent_channels}; give the autoencoder that they come from"
        )
    text: dict[str, Any] = {}
    if layout.text:
        if not config.text.encoder:
            raise InputError(f"index={directory} holds encoded captions; say by what, as in text.encoder=bytes")
        text = describe(load_text_encoder(config.text.encoder, layout.text.length, world.device)) | {"examples": []}
        layout = replace(layout, text=TextShape(text["length"], text["width"], text["vocabulary"]))
    mine: list[Sidecar] = []
    message = ""
    try:
        mine = [adopt.examine(directory, name, format, layout) for name in names[world.rank :: world.size]]
    except InputError as error:
        message = str(error)
    _raise_first(message)
    sidecars = sorted((s for part in all_gather(mine) for s in part), key=lambda s: s.name)

    def finish() -> None:
        adopt.refuse_duplicates(directory, sidecars)
        classes = adopt.class_names(directory, max(len(s.class_counts) for s in sidecars) - 1)
        counts = np.zeros(len(classes), np.int64)
        for s in sidecars:
            counts[: len(s.class_counts)] += s.class_counts
        mean_C, std_C = Sums.total(s.sums for s in sidecars).mean_std()
        Manifest(
            format=format,
            latent_shape=layout.latent_shape,
            dtype=layout.dtype,
            flips=layout.flips,
            classes=classes,
            class_counts=counts.tolist(),
            mean_C=mean_C,
            std_C=std_C,
            autoencoder=config.autoencoder,
            autoencoder_hash=autoencoder.hash,
            image_size=layout.latent_shape[1] * autoencoder.downsample,
            image_channels=autoencoder.image_channels,
            table=make_table([s.row for s in sidecars]),
            recipe={"index": True},
            captions=layout.captions,
            text=text,
        ).save(directory)
        samples = sum(s.samples for s in sidecars)
        print(f"{samples:,} samples in {len(sidecars):,} {format} shards checked and indexed")
        print(f"latent shards: {directory}")

    _on_rank_zero(world, finish)


class _Encoder:
    """The sources, the plan, and this rank's part of the work."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.output = config, world, Path(config.output)
        self.autoencoder = Autoencoder.load(config.autoencoder).to(world.device)
        self.images: ImageSource | LatentFiles
        if config.latents:
            self.images = open_latents(config.latents, config.latents_scale)
            shape = self.images.latent_shape
            if shape[0] != self.autoencoder.latent_channels:
                raise InputError(
                    f"latents={config.latents} have {shape[0]} channels, autoencoder={config.autoencoder} makes "
                    f"{self.autoencoder.latent_channels}; give the autoencoder that they come from"
                )
            self.image_size = shape[1] * self.autoencoder.downsample
        else:
            self.images, self.image_size = open_images(config.images.path), config.images.size
            down = self.autoencoder.downsample
            if self.image_size < 1 or self.image_size % down:
                raise InputError(
                    f"images.size={self.image_size} must be a multiple of {down}, the autoencoder's downsampling"
                )
            shape = (self.autoencoder.latent_channels, self.image_size // down, self.image_size // down)
        encoder = config.text.encoder
        self.text = load_text_encoder(encoder, config.text.length, world.device) if encoder else None
        text_shape = self.text.shape if self.text else None
        self.layout = Layout(shape, config.dtype, config.flips, self.text is not None, text_shape)
        self.split = Split(len(self.images), config.validation_fraction, config.seed)
        if self.split.training_samples == 0:
            source = config.latents or config.images.path
            raise InputError(f"{source} leaves no training images; lower validation_fraction")
        if self.text and not any(self.images.caption(i) for i in range(len(self.images))):
            raise InputError(
                f"{config.latents or config.images.path} has no captions for text.encoder={config.text.encoder}; put "
                "x.txt beside x.png, or leave text.encoder empty"
            )

    def run(self) -> None:
        complete = _on_rank_zero(self.world, self._claim_output)
        if not complete:
            mine = self._units()[self.world.rank :: self.world.size]
            _raise_first(self._error_of(mine))
            _on_rank_zero(self.world, self._finish)
        if self.world.rank == 0:
            self._report(complete)

    def _error_of(self, units: list[Unit]) -> str:
        """Encode; the text of the user's mistake that was found, or nothing."""
        try:
            self._encode(units)
        except InputError as error:
            if self.world.size > 1:  # the others may take hours to come to the same place
                logger.error("%s", error)
            return str(error)
        return ""

    def _recipe(self) -> dict[str, Any]:
        """All that decides what the files hold."""
        config = self.config
        latents = {"latents": config.latents, "latents_scale": config.latents_scale} if config.latents else {}
        text = {"text": describe(self.text)} if self.text else {}
        return {
            **latents,
            **text,
            "images.path": config.images.path,
            "images.size": config.images.size,
            "images.fit": config.images.fit,
            "number of images": len(self.images),
            "classes": list(self.images.classes),
            "autoencoder's hash": self.autoencoder.hash,
            "format": config.format,
            "dtype": config.dtype,
            "flips": config.flips,
            "shard_samples": config.shard_samples,
            "validation_fraction": config.validation_fraction,
            "seed": config.seed,
            "batch": config.batch,  # the last bits of a latent depend on how many are in its batch
        }

    def _claim_output(self) -> bool:
        """Whether the output is complete already; else make it ours, or refuse what is there."""
        marker = self.output / RECIPE
        if (self.output / HEAD).exists():
            self._compare(read_head(self.output)["recipe"])
            self._clean_up()
            return True
        if marker.exists():
            try:
                recipe = dict(parse_json(marker.read_bytes()))
            except (ValueError, TypeError):
                raise InputError(f"{marker} is damaged; remove {self.output} and encode again") from None
            self._compare(recipe)
        elif self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise InputError(f"output={self.output} has something else in it; choose an empty or a new directory")
        parts = [self.output] + ([self.output / VALIDATION] if self.split.validation_samples else [])
        try:
            for directory in parts:
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output={self.output} can't be made ({error.strerror}); choose another place") from None
        write_atomic(marker, json.dumps(self._recipe(), indent=1).encode())
        return False

    def _compare(self, other: dict[str, Any]) -> None:
        mine = self._recipe()
        changed = [f"{k}: {other.get(k)!r} there, {mine.get(k)!r} now" for k in mine if mine[k] != other.get(k)]
        if changed:
            raise InputError(
                f"output={self.output} was encoded with other settings ({'; '.join(changed)}); "
                "choose another output or delete it"
            )

    def _units(self) -> list[Unit]:
        """All units, the held-out ones last."""
        size, out = self.config.shard_samples, []
        for part, samples in (("", self.split.training_samples), (VALIDATION, self.split.validation_samples)):
            starts = range(0, samples, size)
            out += [Unit(part, k, start, min(start + size, samples)) for k, start in enumerate(starts)]
        return out

    def _encode(self, units: list[Unit]) -> None:
        """Decode ahead in threads, encode, and write each finished shard in a thread of its own."""
        todo = [u for u in units if self._sidecar(u) is None]
        batches = [
            (u, i, min(i + self.config.batch, u.stop)) for u in todo for i in range(u.start, u.stop, self.config.batch)
        ]
        total = sum(u.stop - u.start for u in todo)
        bar = log.progress(total, "img", "encode", show=self.world.rank == 0)
        parts: list[tuple[torch.Tensor, ...]] = []
        labels: list[int] = []
        captions: list[str] = []
        texts: list[NDArray[np.generic]] = []
        writing: Future[None] | None = None
        with bar, ThreadPoolExecutor(self.config.threads) as readers, ThreadPoolExecutor(1) as writer:
            loaded = ahead(readers, self._load, batches, 2 * self.config.threads)
            for (unit, _, stop), (content, label_n, caption_n) in loaded:
                parts.append(self._moments(torch.from_numpy(content)))
                labels += label_n
                captions += caption_n
                if self.text:
                    texts.append(self.text.encode(caption_n))
                bar.update(len(label_n))
                if stop == unit.stop:
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(self._write, unit, parts, labels, captions, texts)
                    parts, labels, captions, texts = [], [], [], []
            if writing is not None:
                writing.result()

    def _load(self, batch: tuple[Unit, int, int]) -> tuple[NDArray[Any], list[int], list[str]]:
        """Prepared images uint8 [B, H, W, C], or moments, labels and captions of one batch."""
        numbers = self._image_numbers(*batch)
        captions = [self.images.caption(i) for i in numbers] if self.text else []
        return np.stack([self._content(i) for i in numbers]), [self.images.label(i) for i in numbers], captions

    def _image_numbers(self, unit: Unit, start: int, stop: int) -> list[int]:
        place = self.split.validation if unit.part else self.split.training
        return place(np.arange(start, stop)).tolist()

    def _content(self, number: int) -> NDArray[Any]:
        if isinstance(self.images, LatentFiles):
            return self.images.checked_moments(number)
        wanted = self.config.images
        image = self.images.image(number)
        try:
            return prepare(image, wanted.size, self.autoencoder.image_channels, wanted.fit)
        except InputError as error:
            raise InputError(f"image {self.images.name(number)}: {error}") from None

    def _moments(self, image_BHWC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, 2, C, H, W] of the images and, with flips, of their mirror images; moments stay as they are."""
        if self.config.latents:
            return (image_BHWC,)
        views = (image_BHWC, image_BHWC.flip(2)) if self.config.flips else (image_BHWC,)
        return tuple(torch.stack(self.autoencoder.encode(view), 1).cpu() for view in views)

    def _write(
        self,
        unit: Unit,
        parts: list[tuple[torch.Tensor, ...]],
        labels: list[int],
        captions: list[str],
        texts: list[NDArray[np.generic]],
    ) -> None:
        """Round, check and write one shard; runs in the writer's thread."""
        stored = [self.layout.pack(torch.cat(view)) for view in zip(*parts, strict=True)]
        sums = []
        for packed in stored:
            for start in range(0, len(packed), 256):  # bounds the memory of float64 copies
                block = self.layout.unpack(packed[start : start + 256].view(np.uint8))
                bad = ~np.isfinite(block).reshape(len(block), -1).all(1)
                if bad.any():
                    at = unit.start + start + int(bad.argmax())
                    name = self.images.name(self._image_numbers(unit, at, at + 1)[0])
                    raise InputError(
                        f"the latent of image {name} is not finite in {self.layout.dtype}; use dtype=fp32 or check the "
                        "autoencoder"
                    )
                sums.append(Sums.of(block))
        samples = Samples(
            np.array(labels, np.int64),
            stored[0],
            stored[1] if self.config.flips else None,
            [caption.encode() for caption in captions] if self.text else None,
            np.concatenate(texts) if texts else None,
        )
        name, directory = shard_name(unit.number, self.config.format), self.output / unit.part
        classes = len(self.images.classes)
        write_unit(directory, name, samples, Sums.total(sums), self.layout, self.config.format, classes, unit.start)

    def _sidecar(self, unit: Unit) -> Sidecar | None:
        return read_sidecar(self.output / unit.part, shard_name(unit.number, self.config.format))

    def _finish(self) -> None:
        """Assert that every sample is there once, then write the manifests, the training one last."""
        units = self._units()
        sidecars = {u: self._sidecar(u) for u in units}
        for unit, sidecar in sidecars.items():
            if sidecar is None or sidecar.samples != unit.stop - unit.start:
                raise InputError(
                    f"shard {unit.number} of {self.output / unit.part} has vanished; run the command again"
                )
        done = [(u, s) for u, s in sidecars.items() if s is not None]
        training = [s for u, s in done if not u.part]
        mean_C, std_C = Sums.total(s.sums for s in training).mean_std()  # of training data for both splits
        held_out = [s for u, s in done if u.part]
        if held_out:
            self._save_manifest(self.output / VALIDATION, held_out, mean_C, std_C)
        self._save_manifest(self.output, training, mean_C, std_C)
        self._clean_up()

    def _save_manifest(
        self, directory: Path, sidecars: list[Sidecar], mean_C: NDArray[np.float64], std_C: NDArray[np.float64]
    ) -> None:
        config = self.config
        if config.format == "mds":
            columns = ([s.name for s in sidecars], [s.bytes for s in sidecars], [s.samples for s in sidecars])
            index = mds.library_index(*columns, [s.xxh64 for s in sidecars], self.layout)
            write_atomic(directory / "index.json", index)
        Manifest(
            format=config.format,
            latent_shape=self.layout.latent_shape,
            dtype=config.dtype,
            flips=config.flips,
            classes=list(self.images.classes),
            class_counts=np.sum([s.class_counts for s in sidecars], axis=0).tolist(),
            mean_C=mean_C,
            std_C=std_C,
            autoencoder=config.autoencoder,
            autoencoder_hash=self.autoencoder.hash,
            image_size=self.image_size,
            image_channels=self.autoencoder.image_channels,
            table=make_table([s.row for s in sidecars]),
            recipe=self._recipe(),
            captions=self.text is not None,
            text=describe(self.text) | {"examples": self._examples()} if self.text else {},
        ).save(directory)

    def _examples(self) -> list[tuple[int, str]]:
        """Label and beginning of the caption of some training images, evenly spaced: what samples are drawn of."""
        total = self.split.training_samples
        numbers = self.split.training(np.arange(min(EXAMPLES, total)) * total // min(EXAMPLES, total)).tolist()
        return [(self.images.label(i), self.images.caption(i)[:200]) for i in numbers]

    def _clean_up(self) -> None:
        """Remove what only an unfinished encoding needs."""
        for unit in self._units():
            name = shard_name(unit.number, self.config.format)
            sidecar_path(self.output / unit.part, name).unlink(missing_ok=True)
        for directory in {self.output / u.part for u in self._units()}:
            remove_unfinished(directory)
        (self.output / RECIPE).unlink(missing_ok=True)

    def _report(self, complete: bool) -> None:
        training, held_out = self.split.training_samples, self.split.validation_samples
        print(f"{training:,} training and {held_out:,} held-out images{' were already' if complete else ''} encoded")
        example = "text/emoji" if self.text else "fashion_mnist"
        print(f"next: ldt train configs/{example}.yaml data.path={self.output}")
        print(f"latent shards: {self.output}")


def _on_rank_zero(world: World, action: Callable[[], T]) -> T:
    """Rank 0 acts; every rank gets the result or raises the same InputError."""
    outcome: tuple[Any, str] = (None, "")
    if world.rank == 0:
        try:
            outcome = action(), ""
        except InputError as error:
            outcome = None, str(error)
    result, message = broadcast(outcome)
    if message:
        raise InputError(message)
    return result


def _raise_first(message: str) -> None:
    """Every rank waits for all others, then all raise the first rank's error, if any."""
    messages = [m for m in all_gather(message) if m]
    if messages:
        raise InputError(messages[0])
