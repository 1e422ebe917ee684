"""A look at every image before anything is encoded: how large they are, and which can't be used.

All ranks share the blocks of images, and what a block has shown is kept, so that a look that was interrupted goes on.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldt import log
from ldt.data.images.source import ImageSource
from ldt.dist import World, all_gather, on_rank_zero, together
from ldt.errors import InputError, RunError
from ldt.files import hash_of, natural, parse_json, schema_error, write_json

logger = log.get_logger(__name__)
BLOCKS, MOST = 256, 1024  # as many blocks as there should be at least, of at most so many images
LOOKED = "looked-"  # begins the name of a directory in which the results of a look are kept among other files
OLD_S = 30 * 24 * 3600  # age of a look that is not kept any longer
SEEN = {"sizes": [[natural]], "reasons": {...: str}}


@dataclass(frozen=True)
class Seen:
    """Of some images: height and width, int32 [N, 2], 0 where one can't be used, and why by its number."""

    size_N2: NDArray[np.int32]
    reasons: dict[int, str]


def look(
    source: ImageSource, see: Callable[[int], tuple[int, int]], threads: int, world: World, kept: Path | None = None,
    skip: bool = False,
) -> Seen:  # fmt: skip
    """What `see` says of all images (collective). kept: the directory where it is kept until it is complete.

    skip: an image about which it raises an `InputError` is one that can't be used; otherwise that ends the look.
    """
    size = max(1, min(MOST, len(source) // BLOCKS))
    blocks = [range(start, min(start + size, len(source))) for start in range(0, len(source), size)]
    known = on_rank_zero(world, lambda: _known(kept, blocks) if kept else {})
    undone = [k for k in range(len(blocks)) if k not in known]

    def one(number: int) -> tuple[int, int, str]:
        try:
            return *see(number), ""
        except InputError as error:
            if not skip:
                raise
            return 0, 0, str(error)

    def mine() -> dict[int, Seen]:
        out: dict[int, Seen] = {}
        keeps = bool(kept)
        total = sum(len(blocks[k]) for k in undone)
        with ThreadPoolExecutor(threads) as readers, log.progress(total, "img", "look", show=world.rank == 0) as bar:
            for k in undone[world.rank :: world.size]:
                found = list(readers.map(one, blocks[k]))
                reasons = {i: why for i, (*_, why) in zip(blocks[k], found, strict=True) if why}
                out[k] = Seen(np.array([f[:2] for f in found], np.int32), reasons)
                if kept and keeps:
                    keeps = _keep(kept, k, out[k])
                bar.update(world.size * len(found))
        return out

    parts = {k: seen for part in (known, *all_gather(together(mine))) for k, seen in part.items()}
    ordered = [parts[k] for k in range(len(blocks))]
    reasons = {i: why for seen in ordered for i, why in seen.reasons.items()}
    return Seen(np.concatenate([seen.size_N2 for seen in ordered]), reasons)


def identity(source: ImageSource, *settings: object) -> str:
    """A hash of the images' names and sizes and of what else decides what a look sees: whose results may be kept."""
    images = (f"{source.key(i)} {source.size(i)}" for i in range(len(source)))
    return hash_of(chain([" ".join(map(str, settings))], images))


def _known(kept: Path, blocks: Sequence[range]) -> dict[int, Seen]:
    """The blocks that an earlier look has left; damaged ones are looked at again."""
    out = {}
    for k, numbers in enumerate(blocks):
        try:
            held = parse_json((kept / f"{k:06d}.json").read_bytes())
        except (OSError, ValueError):
            continue
        if schema_error(held, SEEN) or [len(pair) for pair in held["sizes"]] != [2] * len(numbers):
            continue
        reasons = {int(i): why for i, why in held["reasons"].items() if i.isdigit()}
        out[k] = Seen(np.array(held["sizes"], np.int32), reasons)
    return out


def remove_old(directory: Path) -> None:
    """Remove the looks in a directory with which nobody has gone on for long."""
    for path in directory.glob(f"{LOOKED}*"):
        with contextlib.suppress(OSError):  # somebody else removes it too
            if time.time() - path.stat().st_mtime > OLD_S:
                shutil.rmtree(path)


def _keep(kept: Path, k: int, seen: Seen) -> bool:
    """Keep what a block has shown; whether that could be done."""
    try:
        kept.mkdir(parents=True, exist_ok=True)
        write_json(kept / f"{k:06d}.json", {"sizes": seen.size_N2.tolist(), "reasons": seen.reasons})
    except (OSError, InputError, RunError) as error:  # it is a help, no more
        logger.warning("what the images look like can't be kept (%s)", error)
        return False
    return True
