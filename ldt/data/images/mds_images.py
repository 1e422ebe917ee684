"""Images in MDS shards of mosaicml-streaming (version 2, not compressed), without needing that package.

File: sample count n (uint32), n + 1 offsets (uint32), a JSON description of the columns, the samples. A sample is the
sizes (uint32) of its columns of variable size, then the columns in alphabetical order.
"""

import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldt.data.images.blobs import Blob
from ldt.data.images.bucket_rule import Size
from ldt.data.images.decode import checked
from ldt.data.images.listed import SINGLE_CLASS, VALUE, ListedImages
from ldt.data.images.listing import Listing, Table
from ldt.data.images.members import Fields
from ldt.data.images.names import CAPTION_COLUMNS
from ldt.data.images.source import ImageSource
from ldt.errors import InputError

IMAGE_KINDS = ("jpeg", "png", "bytes", "pil")
INTEGERS = {"int": "<i8"} | {f"{u}int{8 * n}": f"<{u or 'i'}{n}" for u in ("", "u") for n in (1, 2, 4, 8)}


def index_mds(blob: Blob, fields: Fields) -> Table:
    """The images in a shard: their places, labels and captions."""
    n, offsets, columns = _head(blob)
    kinds = {name: kind for name, kind, _ in columns}
    image = next((c for c in ("image", *kinds) if kinds.get(c) in IMAGE_KINDS), "")
    if not image:
        raise InputError(
            f"{blob.name} has no column of images ({', '.join(IMAGE_KINDS)}); columns there: "
            f"{', '.join(f'{c} ({kind})' for c, kind in kinds.items())}"
        )
    for key, name in (("images.label", fields.label), ("images.caption", fields.caption)):
        if name and name not in kinds:
            raise InputError(f"{blob.name} has no {key}={name}; columns there: {', '.join(kinds)}")
    label = fields.label or next((c for c in ("label", "y", "class") if c in kinds), "")
    caption = fields.caption or next((c for c in CAPTION_COLUMNS if kinds.get(c) == "str"), "")
    if label and kinds[label] not in (*INTEGERS, "str"):
        raise InputError(f"{blob.name}: images.label={label} is {kinds[label]}; a whole number or a text is expected")
    listing = Listing()
    for i in range(n):
        sample = blob.read(int(offsets[i]), int(offsets[i + 1] - offsets[i]))
        place = _places(blob, i, sample, columns)
        value = SINGLE_CLASS
        if label:
            start, size = place[label]
            value = _value(sample[start : start + size], kinds[label], f"{blob.name}: the label of sample {i}")
        at, size = place[image]
        text = (-1, 0, 0)
        if caption and place[caption][1]:
            text = (int(offsets[i]) + place[caption][0], place[caption][1], 0)
        listing.add(f"{i:09d}", value, size, int(offsets[i]) + at, -1, text)
    table = listing.table()
    table.facts = {"labels": VALUE if label else "", "image": image, "label": label, "caption": caption}
    table.facts["encoding"] = kinds[image]
    return table


class MDSImages(ListedImages):
    """Images in MDS shards."""

    def __init__(self, where: str, blobs: Sequence[Blob], table: Table, beside: str) -> None:
        self._blobs = blobs
        super().__init__(where, table, beside)

    def name(self, i: int) -> str:
        return f"sample {int(self.names[i])} of {self._blob(i).name}"

    def key(self, i: int) -> str:
        return f"{int(self.table.numbers['part'][i])} {self.names[i]}"

    def image(self, i: int) -> Image.Image:
        return pixels(self.content(i), self.name(i)) if self.table.facts["encoding"] == "pil" else super().image(i)

    def shape(self, i: int) -> Size:
        return ImageSource.shape(self, i) if self.table.facts["encoding"] == "pil" else super().shape(i)

    def content(self, i: int) -> bytes:
        return self._blob(i).read(int(self.table.numbers["offset"][i]), int(self.table.numbers["size"][i]))

    def _captions(self, i: int) -> list[bytes]:
        n = self.table.numbers
        return [self._blob(i).read(int(n["caption_offset"][i]), int(n["caption_size"][i]))]

    def _blob(self, i: int) -> Blob:
        return self._blobs[int(self.table.numbers["part"][i])]


def pixels(content: bytes, name: str) -> Image.Image:
    """An image of the encoding `pil`: width, height and length of the mode's name (uint32), the mode, the pixels."""
    try:
        width, height, length = np.frombuffer(content[:12], "<u4").tolist()
        mode = content[12 : 12 + length].decode("ascii")
        image = Image.frombytes(mode, (width, height), content[12 + length :])
    except (ValueError, KeyError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"image {name} is not readable ({error}); write it again") from None
    return checked(image, name, mode[0] in "IF")


def _head(blob: Blob) -> tuple[int, np.ndarray, list[tuple[str, str, int | None]]]:
    """Number of samples, where each begins, and the columns (name, encoding, size if it is fixed)."""
    try:
        n = int(np.frombuffer(blob.read(0, 4), "<u4")[0])
        offsets = np.frombuffer(blob.read(4, 4 * (n + 1)), "<u4").astype(np.int64)
        facts = json.loads(blob.read(4 * (n + 2), int(offsets[0]) - 4 * (n + 2)))
        columns = list(zip(facts["column_names"], facts["column_encodings"], facts["column_sizes"], strict=True))
        if offsets[-1] != blob.size or (np.diff(offsets) < 0).any():
            raise ValueError("its offsets do not fit its size")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{blob.name} is not a whole MDS shard ({error}); make it again") from None
    return n, offsets, columns


def _places(
    blob: Blob, i: int, sample: bytes, columns: list[tuple[str, str, int | None]]
) -> dict[str, tuple[int, int]]:
    """Where each column of a sample lies in it, and how long it is."""
    variable = sum(size is None for _, _, size in columns)
    sizes = iter(np.frombuffer(sample[: 4 * variable], "<u4").tolist())
    at, out = 4 * variable, {}
    for name, _, fixed in columns:
        size = next(sizes, -1) if fixed is None else fixed
        out[name] = (at, size)
        at += size
    if at != len(sample) or any(size < 0 for _, size in out.values()):
        raise InputError(f"{blob.name} is damaged: sample {i} is not as long as its columns; make it again")
    return out


def _value(content: bytes, kind: str, what: str) -> str:
    if kind == "str":
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise InputError(f"{what} is not UTF-8 text; write it again") from None
    return str(int(np.frombuffer(content, INTEGERS[kind])[0]))
