"""Pictures for the report: sample grids, real images laid out like them, and each sample's nearest real images."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldt import log
from ldt.data.images import prepare
from ldt.data.images.open import open_encoded
from ldt.data.images.source import ImageSource
from ldt.data.shards.manifest import read_head
from ldt.data.split import Split
from ldt.errors import InputError
from ldt.image_files import class_rows, grid, read_cells
from ldt.reporting.history import History
from ldt.run.directory import NEWEST_CELLS

WIDEST = 1280
SMALL = 200_000
THUMBNAIL = 32
NEIGHBOURS = 3
THREADS = 4
Pixels = NDArray[np.uint8]


class Unavailable(Exception):
    """Raised with the reason, a sentence, why the page can't show real images."""


@dataclass(frozen=True)
class RealImages:
    """The images that a run's data were encoded from, as its autoencoder saw them, and how they were split."""

    source: ImageSource
    size: int
    channels: int
    fit: str
    split: Split
    path: str

    def read(self, i: int) -> Pixels:
        """Image i as uint8 [size, size, channels]."""
        return prepare(self.source.image(i), self.size, self.channels, self.fit)


@dataclass(frozen=True)
class Neighbours:
    """Samples with their nearest training images, and how near those are.

    rows: a sample, then its neighbours, nearest first; the samples nearest to any training image come first.
    row_distances: of each neighbour. distance_N: root mean square pixel difference (0 to 1) of each sample to its
    nearest training image, at most `THUMBNAIL` pixels a side; held_out_M: the same of real images that were not trained
    on. searched: how many training images were looked at, out of `of`.
    """

    rows: list[list[Pixels]]
    row_distances: list[list[float]]
    distance_N: NDArray[np.float64]
    held_out_M: NDArray[np.float64]
    searched: int
    of: int


def data_uri(picture: Image.Image) -> str:
    """A picture as data: URI; large ones are made narrower and stored as WebP."""
    picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    kind, content = "png", _encoded(picture, "PNG", optimize=True)
    if len(content) > SMALL:
        kind, content = "webp", _encoded(picture, "WEBP", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, format=kind, **options)
    return out.getvalue()


def open_picture(path: Path) -> Image.Image | None:
    """The picture in a file, or None if it isn't readable."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def choose(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def newest_cells(run: History, samples_seen: int) -> list[list[Pixels]]:
    """Rows of images uint8 [size, size, C] of the grid that was drawn then, the newest; `Unavailable` says why not."""
    try:
        image_NHWC, label_N, drawn = read_cells(run.path / NEWEST_CELLS)
    except FileNotFoundError:
        raise Unavailable(f"the images of its sample grids are not kept ({NEWEST_CELLS} is not there)") from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"the images of its newest sample grid can't be read ({error})") from None
    if drawn != samples_seen:
        raise Unavailable(f"{NEWEST_CELLS} is of {drawn:,} samples seen, the newest grid of {samples_seen:,}")
    return [list(row) for row in class_rows(image_NHWC, label_N)]


def open_real(run: History) -> RealImages:
    """The real images behind a run; `Unavailable` says why not."""
    path = (run.config.get("data") or {}).get("path") if isinstance(run.config.get("data"), dict) else None
    if not isinstance(path, str) or not path:
        raise Unavailable("the run's config names no data, or several sources")
    try:
        head = read_head(path)
        recipe = head.get("recipe") or {}
        if "images.path" not in recipe:
            raise Unavailable(f"the data in {path} do not say which images they were encoded from")
        source = open_encoded(recipe)
        encoded = recipe.get("number of images", len(source))
        if encoded != len(source):  # which of them were held out is no longer known
            raise Unavailable(f"{recipe['images.path']} has {len(source)} images now, of the {encoded} encoded")
        split = Split(len(source), float(recipe.get("validation_fraction", 0.0)), int(recipe.get("seed", 0)))
        size, channels = int(head["image_size"]), int(head["image_channels"])
        if head["latent_shape"][1] != head["latent_shape"][2]:
            raise Unavailable("the images that the data were encoded from are not square")
        real = RealImages(source, size, channels, recipe["images.fit"], split, recipe["images.path"])
        real.read(0)
    except (InputError, OSError, KeyError, TypeError, ValueError) as error:
        raise Unavailable(f"the images that the data were encoded from are not available here ({error})") from None
    return real


def check_alike(cells: list[list[Pixels]], real: RealImages) -> None:
    """`Unavailable` where samples and real images have other sizes or channels and can't be compared."""
    there = (real.size, real.size, real.channels)
    if cells[0][0].shape != there:
        raise Unavailable(f"samples are {cells[0][0].shape}, and the images of the data as encoded now {there}")


def real_rows(real: RealImages, like: list[list[Pixels]], by_class: bool) -> list[list[Pixels]]:
    """Training images in the layout of a sample grid: of class r in row r, or simply spread over the data."""
    if not by_class:
        ids = real.split.training(spread(real.split.training_samples, sum(map(len, like))))
        images = iter([real.read(int(i)) for i in ids])
        return [[next(images) for _ in row] for row in like]
    label_n = np.array([real.source.label(i) for i in range(len(real.source))])
    rows = []
    for r, row in enumerate(like):
        members = np.flatnonzero(label_n == r)
        rows.append([real.read(int(members[k])) for k in spread(len(members), len(row))])
    return rows


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` positions, evenly spread, in the middles of equal stretches."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def picture_of(rows: Sequence[Sequence[Pixels]]) -> Image.Image:
    """Rows of images as one picture."""
    return grid([np.stack(row) for row in rows if row])


def nearest(samples: list[Pixels], real: RealImages, most: int, shown: int = 12) -> Neighbours:
    """Look for each sample's nearest training images among at most `most`, spread evenly over the data.

    Held-out images go through the same search: what a model that copies nothing would score. The samples shown are
    those nearest to a training image.
    """
    ids = real.split.training(spread(real.split.training_samples, most))
    held_out = real.split.validation(spread(real.split.validation_samples, max(len(samples), 200)))
    train_ND = _thumbnails(real, ids, "nearest images")
    distance_SN = distances(np.stack([thumbnail(s) for s in samples]), train_ND)
    order_SK = np.argsort(distance_SN, axis=1, kind="stable")[:, :NEIGHBOURS]
    closest_S = distance_SN.min(1)
    first = np.argsort(closest_S, kind="stable")[:shown]
    rows = [[samples[s], *(real.read(int(ids[k])) for k in order_SK[s])] for s in first]
    row_distances = [[float(distance_SN[s, k]) for k in order_SK[s]] for s in first]
    held_out_M = np.empty(0)
    if len(held_out):
        held_out_M = distances(_thumbnails(real, held_out, "held-out images"), train_ND).min(1)
    return Neighbours(rows, row_distances, closest_S, held_out_M, len(ids), real.split.training_samples)


def _thumbnails(real: RealImages, ids: NDArray[np.int64], what: str) -> NDArray[np.float32]:
    with log.progress(len(ids), "img", what) as bar, ThreadPoolExecutor(THREADS) as threads:
        rows = []
        for row in threads.map(lambda i: thumbnail(real.read(int(i))), ids):
            rows.append(row)
            bar.update()
    return np.stack(rows)


def thumbnail(image_HWC: Pixels) -> NDArray[np.float32]:
    """Grey or colour values in 0..1 of an image made at most THUMBNAIL pixels a side: [D]."""
    side = image_HWC.shape[0]
    if side > THUMBNAIL:
        picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)
        image_HWC = np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return image_HWC.astype(np.float32).reshape(-1) / np.float32(255)


def distances(a_AD: NDArray[np.float32], b_BD: NDArray[np.float32], block: int = 1024) -> NDArray[np.float64]:
    """Root mean square difference of every pair: [A, B]."""
    a = a_AD.astype(np.float64)
    out = np.empty((len(a), len(b_BD)))
    for start in range(0, len(b_BD), block):  # float64 of all at once could be gigabytes
        b = b_BD[start : start + block].astype(np.float64)
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        out[:, start : start + block] = np.sqrt(np.clip(squares, 0, None) / a.shape[1])
    return out
