"""Images of several sizes and aspect ratios: sorted into buckets, each of which is encoded as data of its own.

Which image belongs to which bucket is a function of its size and of `images.buckets` (`ldt.data.images.bucket_rule`).
The sizes are measured by all ranks together, from the files' headers where these are enough, and kept in the output, so
that a restart does not measure again. Every bucket is then a directory with its own shards, manifest and held-out
split, as resumable as any; `buckets.json`, which names them, comes last.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt import log
from ldt.data.images.bucket_rule import Size, choose, is_enlarged, kept
from ldt.data.images.chosen import Chosen
from ldt.data.images.source import ImageSource
from ldt.data.shard_files import BUCKETS
from ldt.data.shards.buckets import write_buckets
from ldt.data.shards.manifest import Manifest
from ldt.dist import World, broadcast, on_rank_zero
from ldt.encoding.config import EncodeJob, ImagesConfig
from ldt.encoding.encoder import LEFT_OUT, Encoder, say_left_out, write_left_out
from ldt.encoding.inputs import ImageInput, open_source
from ldt.encoding.look import Seen, identity, look
from ldt.encoding.plan import Plan
from ldt.errors import InputError, by_reason
from ldt.files import load_npy, write_npy
from ldt.models.autoencoder import Autoencoder
from ldt.progress import pluralize

logger = log.get_logger(__name__)
SIZES = "sizes-"  # and the identity of the look at the images: their heights and widths, int32 [N, 2]
PARTS = ".parts"  # ends the directory of what has been measured so far


@dataclass(frozen=True)
class Bucket:
    """Some of the images, and the size that they are brought to. facts: what that does to them, as it is recorded."""

    size: Size
    source: ImageSource
    facts: dict[str, Any]


def encode_buckets(config: EncodeJob, world: World) -> None:
    """Encode every bucket of the images, one after another, and list them (collective)."""
    output, sizes = Path(config.output), config.images.sizes
    on_rank_zero(world, lambda: _claim(output, [str(size) for size in sizes]))
    source = open_source(config, world)
    buckets, unsorted = sort(source, measure(source, config, output, world), config.images)
    if world.rank == 0:
        for line in describe(buckets, sizes):
            logger.info("%s", line)
        say_left_out(output, unsorted)
    on_rank_zero(world, lambda: write_left_out(output, unsorted))
    autoencoder = Autoencoder.load(config.autoencoder).to(world.device)

    def plan_of(bucket: Bucket) -> Plan:
        images = ImageInput(config, autoencoder, bucket.source, bucket.size, world, len(unsorted))
        return Plan(config, autoencoder, images, world)

    plans = [plan_of(bucket) for bucket in buckets]
    for bucket, plan in zip(buckets, plans, strict=True):
        Encoder(config, world, plan, output / str(bucket.size)).run()

    def finish() -> None:
        manifests = {str(b.size): Manifest.load(output / str(b.size)) for b in buckets}
        crops = {str(b.size): b.facts for b in buckets}
        wanted = config.images
        recipe = {"images.path": wanted.path, "images.buckets": list(wanted.buckets), "images.fit": wanted.fit}
        write_buckets(output, manifests, recipe | {"images": crops})

    on_rank_zero(world, finish)
    if world.rank == 0:
        training = sum(plan.split.training_samples for plan in plans)
        held_out = sum(plan.split.validation_samples for plan in plans)
        print(f"{training:,} training and {held_out:,} held-out images in {len(buckets)} buckets")
        print(f"next: ldt train configs/buckets.yaml data.path={output}")
        print(f"latent shards: {output}")


def _claim(output: Path, names: list[str]) -> None:
    """Refuse an output that holds something else, such as buckets of other sizes."""
    there = sorted(p.name for p in output.iterdir()) if output.is_dir() else []
    for name in there:
        if name not in (*names, BUCKETS, LEFT_OUT) and not name.startswith(SIZES):
            raise InputError(
                f"output={output} already holds {name}, which is none of images.buckets={','.join(names)}; choose "
                "another output or delete it"
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise by_reason(f"output={output} can't be made ({error.strerror}); choose another place", error) from None


def measure(source: ImageSource, config: EncodeJob, output: Path, world: World) -> Seen:
    """Height and width of every image, 0 × 0 where one can't be read and is skipped (collective).

    `InputError` names one that can't be read. What an earlier start has measured comes without reasons.
    """
    wanted = config.images
    name = on_rank_zero(world, lambda: identity(source, wanted.exif, wanted.on_error))
    file = output / f"{SIZES}{name}.npy"
    known = broadcast(_read(file, len(source)) if world.rank == 0 else None)
    if known is not None:
        return Seen(known, {})

    parts, skip = file.with_suffix(PARTS), wanted.on_error == "skip"
    seen = look(source, source.shape, config.threads, world, parts, skip)

    def keep() -> None:
        write_npy(file, seen.size_N2)
        for old in output.glob(f"{SIZES}*"):
            if old.suffix == PARTS:
                shutil.rmtree(old)
            elif old != file:
                old.unlink()

    on_rank_zero(world, keep)
    return seen


def _read(file: Path, images: int) -> NDArray[np.int32] | None:
    """What was measured before, if it is there and whole."""
    try:
        with file.open("rb") as f:
            found: NDArray[np.int32] = load_npy(f)
    except (OSError, ValueError):
        return None
    return found if found.shape == (images, 2) and found.dtype == np.int32 else None


def sort(source: ImageSource, seen: Seen, wanted: ImagesConfig) -> tuple[list[Bucket], list[tuple[str, str]]]:
    """The buckets that have images, in the order of `wanted.sizes`; names of images that have none, and why not.

    `InputError` instead of the latter unless they are to be skipped.
    """
    sizes, fit = wanted.sizes, wanted.fit
    different, inverse = np.unique(seen.size_N2, axis=0, return_inverse=True)
    images = [Size(*pair) for pair in different.tolist()]
    chosen, reasons = [], {}
    for image in images:
        try:
            chosen.append(choose(image, sizes, fit) if image.height else -1)
        except InputError as error:
            if wanted.on_error != "skip":
                raise
            chosen.append(-1)
            reasons[image] = str(error)
    counts = np.bincount(inverse.ravel(), minlength=len(images)).tolist()
    bucket_N, out = np.array(chosen)[inverse.ravel()], []
    for k, size in enumerate(sizes):
        here = [(image, n) for image, n, c in zip(images, counts, chosen, strict=True) if c == k]
        total = sum(n for _, n in here)
        if not total:
            continue
        facts: dict[str, Any] = {"images": total}
        if fit == "crop":
            facts["enlarged"] = sum(n for s, n in here if is_enlarged(s, size))
            facts["kept"] = round(float(sum(n * kept(s, size) for s, n in here) / total), 4)
        out.append(Bucket(size, Chosen(source, np.flatnonzero(bucket_N == k)), facts))

    def reason(i: int) -> str:
        found = seen.reasons.get(i) or reasons.get(Size(*seen.size_N2[i].tolist()))
        return found or _why_unreadable(source, i)

    return out, [(source.key(i), reason(i)) for i in np.flatnonzero(bucket_N < 0).tolist()]


def _why_unreadable(source: ImageSource, i: int) -> str:
    try:
        source.shape(i)
    except InputError as error:
        return str(error)
    return "could not be read when it was measured; to have it too, encode into a new output"


def describe(buckets: list[Bucket], sizes: list[Size]) -> Iterator[str]:
    """A line about every bucket, also about those that are empty."""
    there = {bucket.size: bucket.facts for bucket in buckets}
    for size in sizes:
        if size not in there:
            yield f"bucket {size}: no image belongs there, and it is left out"
            continue
        facts = there[size]
        more = ""
        if "kept" in facts:
            more = f", {facts['kept']:.1%} of them kept on average by cropping, {facts['enlarged']:,} enlarged"
        yield f"bucket {size}: {pluralize(facts['images'], 'image', 'images')}{more}"
