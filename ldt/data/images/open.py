"""The images at a path: which kind of source it is, and its index, made once and kept."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ldt import log
from ldt.data.images import archives, blobs, mds_images, parquet
from ldt.data.images.blobs import Blob
from ldt.data.images.bucket_rule import Size, choose
from ldt.data.images.chosen import Chosen, of_classes
from ldt.data.images.embedded import CROPPED, EMBEDDED, CroppedFashionMNIST, FashionMNIST
from ldt.data.images.folder import ImageFolder
from ldt.data.images.labels_file import LABELS
from ldt.data.images.listing import Table
from ldt.data.images.members import USUAL, Fields, check_captions
from ldt.data.images.names import SUFFIXES, suffix
from ldt.data.images.npz import NpzImages
from ldt.data.images.source import ImageSource
from ldt.data.images.tree import Entry, open_tree
from ldt.errors import InputError, RunError
from ldt.files import write_atomic
from ldt.paths import is_remote

logger = log.get_logger(__name__)
VERSION = 3  # of what an index holds
THREADS = 8
MEASURED_TOGETHER = 4096  # images
INDEXERS: dict[str, Callable[[Blob, Fields], Table]] = {
    "tar": archives.index_tar,
    "zip": archives.index_zip,
    "parquet": parquet.index_parquet,
    "mds": mds_images.index_mds,
}
ARCHIVES = tuple(f".{kind}" for kind in INDEXERS)
MAGIC = {"zip": (b"PK\3\4", b"PK\5\6"), "parquet": (b"PAR1",)}
PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")  # gzip, zstd, bzip2, xz
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".mds.zstd", ".mds.gz", ".zst")


def open_images(
    path: str,
    fields: Fields = USUAL,
    index_dir: str = "",
    turn: bool = False,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> ImageSource:
    """The images at a path (docs/own_data.md lists what it may be).

    fields: where labels and captions come from. index_dir: where the indexes of files are kept, empty for nowhere.
    turn: turn images as their EXIF says. classes: only images of these, in this order; empty for all. seed: by which
    one of several captions is drawn.
    """
    source = _open(path, fields, index_dir)
    source.turn, source.seed = turn, seed
    return of_classes(source, classes) if classes else source


def index_share(path: str, fields: Fields, index_dir: str, rank: int, ranks: int) -> None:
    """Index this rank's share of the files, so that all find their indexes when they open the images."""
    if path.startswith("embedded:") or path.endswith(".npz"):
        return
    opened = _in_parallel(blobs.open_blob, _files(path)[rank::ranks])
    _in_parallel(lambda blob: _index(blob, kind_of(blob), fields, index_dir), opened)


def open_encoded(recipe: dict[str, Any]) -> ImageSource:
    """The images that data with this recipe were encoded from; `InputError` where they can't be told any more."""
    if "images.buckets" in recipe:
        return open_encoded_buckets(recipe)[Size(*recipe["images.size"])]
    return _encoded(recipe)


def open_encoded_buckets(recipe: dict[str, Any]) -> dict[Size, ImageSource]:
    """The images of all buckets, one of which has this recipe, by their sizes."""
    source, sizes = _encoded(recipe), [Size.parse(text, "images.buckets") for text in recipe["images.buckets"]]
    bucket_N = np.empty(len(source), np.int64)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(source), MEASURED_TOGETHER):
            numbers = range(start, min(start + MEASURED_TOGETHER, len(source)))
            shapes = pool.map(source.shape, numbers)
            bucket_N[numbers.start : numbers.stop] = [choose(shape, sizes, recipe["images.fit"]) for shape in shapes]
    return {size: Chosen(source, np.flatnonzero(bucket_N == k)) for k, size in enumerate(sizes)}


def _encoded(recipe: dict[str, Any]) -> ImageSource:
    """All images of a recipe, of which a bucket has some."""
    if recipe.get("unreadable images left out"):
        raise InputError(
            f"the data were encoded without the unreadable images of {recipe['images.path']}; give images that can all "
            "be read"
        )
    fields = Fields(recipe.get("images.label", ""), recipe.get("images.caption", ""))
    turn, classes = recipe.get("images.exif") == "turn", recipe.get("images.classes", ())
    return open_images(recipe["images.path"], fields, turn=turn, classes=classes, seed=recipe.get("seed", 0))


def _open(path: str, fields: Fields, index_dir: str) -> ImageSource:
    if path == EMBEDDED:
        return FashionMNIST()
    if path == CROPPED:
        return CroppedFashionMNIST()
    if path.startswith("embedded:"):
        raise InputError(f"there is no embedded image set {path}; known are {EMBEDDED} and {CROPPED}")
    if path.endswith(".npz") and not blobs.is_pattern(path):
        return NpzImages(path)
    files = _files(path)
    if not files:
        return ImageFolder(open_tree(path), fields)
    opened = _in_parallel(blobs.open_blob, files)
    kinds = [kind_of(blob) for blob in opened]
    if len(set(kinds)) > 1:
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise InputError(
            f"{path} mixes kinds of files: {files[0]} ({kinds[0]}) and {files[other]} ({kinds[other]}); give one kind "
            "by a pattern such as *.tar"
        )
    kind = kinds[0]
    tables = _in_parallel(lambda blob: _index(blob, kind, fields, index_dir), opened)
    return _source(path, kind, opened, tables, fields)


def _source(path: str, kind: str, opened: list[Blob], tables: list[Table], fields: Fields) -> ImageSource:
    beside = opened[0].name.rpartition("/")[0] or "."
    facts, sizes = [table.facts for table in tables], [len(table) for table in tables]
    table = Table.joined(tables)
    if kind in ("parquet", "mds"):
        table.facts = same_facts(opened, facts)
        of_columns = parquet.ParquetImages if kind == "parquet" else mds_images.MDSImages
        return of_columns(path, opened, table, beside)
    some = next((i for i, size in enumerate(sizes) if size), 0)
    table.facts = dict(facts[some])
    for blob, size, one in zip(opened, sizes, facts, strict=True):
        if size and one["labels"] != table.facts["labels"]:
            raise InputError(f"{blob.name} has no labels like those of {opened[some].name}; give files of one data set")
    places = [one[LABELS] for one in facts]
    table.facts |= {LABELS: places if any(places) else [], "unread": _unread(opened, facts)}
    check_captions(table, path, fields)
    return archives.ArchiveImages(path, opened, table, beside, kind == "zip", fields.caption)


def same_facts(opened: Sequence[Blob], facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all files, which must be the first one's; `InputError` names the one of another schema."""
    first = facts[0]
    for blob, one in zip(opened, facts, strict=True):
        other = next((k for k in first if one[k] != first[k] and k != parquet.LARGEST), "")
        if other:
            raise InputError(
                f"{blob.name} is of another schema than {opened[0].name} ({other}: {one[other]!r} and "
                f"{first[other]!r}); give files of one data set"
            )
    return first | {k: max(one[k] for one in facts) for k in first if k == parquet.LARGEST}


def _unread(opened: list[Blob], facts: list[dict[str, Any]]) -> list[str]:
    return [f"{blob.name}/{name}" for blob, one in zip(opened, facts, strict=True) for name in one["unread"]][:5]


def _files(path: str) -> list[str]:
    """The files that hold the images of a path; none for a directory that holds them itself."""
    if is_remote(path):
        blobs.filesystem(path)[0].invalidate_cache()  # it keeps its listings as long as the process lives
    if blobs.is_pattern(path):
        return blobs.expand(path)
    if not is_remote(path):
        if not Path(path).exists():
            raise InputError(
                f"image path {path} does not exist; give a directory of images, a tar, zip or parquet file, or "
                f"{EMBEDDED}"
            )
        if not Path(path).is_dir():
            return [path]
    elif blobs.without_query(path).endswith((*ARCHIVES, *COMPRESSED)):  # not asked for: it could be taken for a page
        return [path]
    entries = sorted(entry for entry in open_tree(path).entries() if not entry.name.startswith("."))
    if is_remote(path) and not entries:
        return [path]  # a file, or nothing
    return _archives(path.rstrip("/"), entries)


def _archives(path: str, entries: list[Entry]) -> list[str]:
    """The files in a directory that hold images, if it is one of those."""
    names = [entry.name for entry in entries]
    if any(entry.is_directory for entry in entries):  # img2dataset's parquet files lie beside its directories
        return []
    held = {kind: [n for n in names if n.endswith(f".{kind}")] for kind in INDEXERS}
    if held["tar"] and held["parquet"]:  # img2dataset's, of what it has loaded
        held["parquet"] = []
    found = [n for kind in INDEXERS for n in held[kind]]
    if class_tar := next((n for n in names if re.fullmatch(r"n\d{8}\.tar", n)), ""):  # ImageNet's, each of one class
        raise InputError(f"{path} holds archives such as {class_tar}, no images; unpack each as its class directory")
    packed = next((n for n in names if n.endswith(COMPRESSED)), "")
    if packed and not found:
        raise InputError(f"{path} holds compressed files such as {packed}; unpack them to .tar or .mds first")
    image = next((n for n in names if suffix(n) in SUFFIXES), "")
    if found and image:
        raise InputError(
            f"{path} mixes kinds of files: images such as {image}, and {found[0]}; move one of them, or give the "
            f"others by a pattern such as {path}/*.{found[0].rpartition('.')[2]}"
        )
    return [f"{path}/{n}" for n in found]


def kind_of(blob: Blob) -> str:
    """tar, zip, parquet or mds, by what a file begins with, and for MDS by its name."""
    head = blob.read(0, min(blob.size, 512))
    for kind, marks in MAGIC.items():
        if head.startswith(marks):
            return kind
    if head[257:262] == b"ustar" or (blob.name.endswith(".tar") and not head.strip(b"\0")):
        return "tar"
    if blob.name.endswith(".mds"):
        return "mds"
    if blob.name.endswith(".tar") or _is_old_tar(head):
        return "tar"
    if head.startswith(PACKED):
        raise InputError(f"{blob.name} is compressed as a whole; unpack it first, to a .tar for example")
    raise InputError(
        f"image path {blob.name} is neither a directory nor a tar, zip, parquet or .npz file or an MDS shard (it "
        f"begins with {head[:16]!r}); give one of these, or {EMBEDDED}"
    )


def _is_old_tar(head: bytes) -> bool:
    """Whether a block is the header of a tar file from before ustar: its checksum is right."""
    digits = head[148:156].strip(b"\0 ")
    return len(head) == 512 and digits.isdigit() and sum(head[:148]) + 8 * 32 + sum(head[156:]) == int(digits, 8)


def _index(blob: Blob, kind: str, fields: Fields, index_dir: str) -> Table:
    """The index of a file: from the directory of indexes, or made and put there."""
    if not index_dir:
        return INDEXERS[kind](blob, fields)
    key = f"{VERSION} {os.path.abspath(blob.name) if not is_remote(blob.name) else blob.name} {blob.stamp} {fields}"
    file = Path(index_dir).expanduser() / f"{xxhash.xxh3_128_hexdigest(key.encode('utf-8', 'surrogateescape'))}.npz"
    try:
        return Table.from_bytes(file.read_bytes())
    except Exception:  # not there, or damaged, over which numpy and zipfile raise a dozen types: index it again
        table = INDEXERS[kind](blob, fields)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, table.to_bytes())
    except (OSError, InputError, RunError) as error:  # it is a help, no more
        logger.warning("the index of %s can't be kept (%s)", blob.name, error)
    return table


def _in_parallel(action, items):  # type: ignore[no-untyped-def]
    """The results of an action on each item, in order; the first error in that order is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(action, items))
