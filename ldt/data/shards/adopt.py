"""Shards that other programs wrote, checked sample by sample and given a manifest: `ldt encode index=DIR`."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ldt.data.shards import foreign_tar, mds
from ldt.data.shards.layout import Index, Layout, Samples
from ldt.data.shards.shard_writer import Sidecar
from ldt.data.shards.statistics import Sums
from ldt.errors import InputError, file_error
from ldt.files import MOST_CLASSES

BLOCK = 1024  # samples whose float32 copies are in memory at a time

FIND: dict[str, Callable[[NDArray[np.uint8], str], Layout]] = {"tar": foreign_tar.find_layout, "mds": mds.find_layout}
WALK: dict[str, Callable[[NDArray[np.uint8], Layout, str], Index]] = {"tar": foreign_tar.walk, "mds": mds.index}


def find_shards(directory: Path) -> tuple[str, list[str]]:
    """The one format of a directory and the names of its shards, sorted."""
    if not directory.is_dir():
        raise InputError(f"index={directory} is not a directory; give one with .tar or .mds shards")
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise file_error(f"index={directory}", error, "check it") from None
    found = {f: [n for n in names if n.endswith(f".{f}") and not n.startswith(".")] for f in FIND}
    present = [f for f in found if found[f]]
    if len(present) == 2:
        raise InputError(f"index={directory} holds both .tar and .mds shards; one format a directory can be indexed")
    if not present:
        raise InputError(f"index={directory} holds neither .tar nor .mds shards{_hint(directory, names)}")
    for name in found[present[0]]:
        if not (directory / name).is_file():
            what = "leads nowhere" if (directory / name).is_symlink() else "is no file"
            raise InputError(f"index={directory}: shard {name} {what}; restore it, or remove it from the directory")
    return present[0], found[present[0]]


def _hint(directory: Path, names: list[str]) -> str:
    """What a directory without shards holds instead, as advice for the message."""
    packed = next((n for n in names if re.search(r"\.(tar|mds)\.\w+$|\.tgz$", n)), "")
    if packed:
        return f", but {packed}; unpack compressed shards first (tar: gunzip, MDS: write them with compression=None)"
    nested = next((n for n in names if any(next((directory / n).glob(f"*.{f}"), None) for f in FIND)), "")
    if nested:
        return f", but its directory {nested} does; index each directory by itself, and train on data.sources"
    return "; give the directory that they are in"


def read_content(directory: Path, name: str) -> NDArray[np.uint8]:
    """The bytes of a whole shard."""
    try:
        return np.fromfile(directory / name, np.uint8)
    except OSError as error:
        raise file_error(f"shard {directory / name}", error, "restore it or remove it") from None


def read_layout(directory: Path, name: str, format: str) -> Layout:
    """The layout of the first shard, which all others must have."""
    return FIND[format](read_content(directory, name), str(directory / name))


def examine(directory: Path, name: str, format: str, layout: Layout, by_element: bool = False) -> Sidecar:
    """Check a whole shard and describe it. `class_counts` is as long as its largest label needs.

    by_element: whether its sums are those of each element, for whitening=element.
    """
    path = str(directory / name)
    content = read_content(directory, name)
    index = WALK[format](content, layout, path)
    if len(index) == 0:
        raise InputError(f"shard {path} holds no samples; remove it")
    if index.label_n.min() < 0:
        raise InputError(f"shard {path} has a negative label; labels are class numbers from 0")
    if index.label_n.max() >= MOST_CLASSES:
        raise InputError(f"shard {path} has the label {index.label_n.max()}; labels are class numbers from 0")
    offsets = [index.moments_n] + ([index.flipped_n] if index.flipped_n is not None else [])
    stored, sums = [], []
    for start_n in offsets:
        raw_nb = np.lib.stride_tricks.sliding_window_view(content, layout.moments_bytes)[start_n]
        for first in range(0, len(raw_nb), BLOCK):
            moments = layout.unpack(raw_nb[first : first + BLOCK])
            bad = ~np.isfinite(moments).reshape(len(moments), -1).all(1)
            bad |= (moments[:, 1:] < 0).reshape(len(moments), -1).any(1)
            if bad.any():
                raise InputError(
                    f"shard {path}: the moments of sample {first + int(bad.argmax())} are not finite or have a "
                    "negative standard deviation; moments are [mean, std], or [mean] of an autoencoder without a "
                    "posterior"
                )
            sums.append(Sums.of(moments, by_element))
        stored.append(raw_nb)
    captions, text_n = None, None
    if index.caption_n2 is not None:
        captions = [content[at : at + size].tobytes() for at, size in index.caption_n2.tolist()]
        _check_captions(captions, path)
    if index.text_n is not None:
        text_n = np.lib.stride_tricks.sliding_window_view(content, layout.text_bytes)[index.text_n]
        _check_text(text_n, layout, path)
    flipped = stored[1] if len(stored) > 1 else None
    content_hash = Samples(index.label_n, stored[0], flipped, captions, text_n).content_hash()
    total = Sums.total(sums)
    return Sidecar(
        name=name,
        bytes=len(content),
        samples=len(index),
        xxh64=f"{xxhash.xxh64_intdigest(content.data):016x}",
        content=f"{content_hash:016x}",
        class_counts=np.bincount(index.label_n).tolist(),
        first_C=total.first_C.tolist(),
        second_C=total.second_C.tolist(),
        elements=total.elements,
    )


def _check_captions(captions: list[bytes], path: str) -> None:
    for i, caption in enumerate(captions):
        try:
            caption.decode()
        except UnicodeDecodeError:
            raise InputError(f"shard {path}: the caption of sample {i} is not UTF-8; write it again") from None


def _check_text(text_nb: NDArray[np.uint8], layout: Layout, path: str) -> None:
    """Refuse tokens that the encoder does not have; a GPU would end the run over them without naming them."""
    assert layout.text is not None
    value_nm = np.ascontiguousarray(text_nb).view(layout.text_dtype)
    good = value_nm < layout.text.vocabulary if layout.text.vocabulary else np.isfinite(value_nm)
    bad = ~good.all(1)
    if bad.any():
        wanted = f"token numbers below {layout.text.vocabulary}" if layout.text.vocabulary else "finite"
        raise InputError(
            f"shard {path}: the encoded caption of sample {int(bad.argmax())} is not {wanted}; give the text.encoder "
            "that it was made by, or write it again"
        )


def refuse_duplicates(directory: Path, sidecars: list[Sidecar]) -> None:
    """Refuse shards of equal content: the same samples under two names would be trained on twice."""
    seen: dict[str, str] = {}
    for s in sidecars:
        if s.content in seen:
            raise InputError(f"{directory}: shards {seen[s.content]} and {s.name} hold the same samples; remove one")
        seen[s.content] = s.name
