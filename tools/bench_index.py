"""The index of image shards: how long it takes and how much memory it needs, on tars with members of one byte."""

import argparse
import io
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from ldt.data.images.open import open_images

ENDINGS = (".jpg", ".txt", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the set."""
    parser.add_argument("--images", type=int, default=340_000, help="each of three members: .jpg, .txt and .json")
    parser.add_argument("--shards", type=int, default=34)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of all shards and of half of them, so that what an image takes is told from what a shard and a thread do."""
    per_shard, half = arguments.images // arguments.shards, arguments.shards // 2
    with tempfile.TemporaryDirectory() as directory:
        for k in range(arguments.shards):
            _write_shard(Path(directory) / f"{k:05d}.tar", k * per_shard, per_shard)
        some, _, some_peak = _index(f"{directory}/{{00000..{half - 1:05d}}}.tar")
        images, seconds, peak = _index(directory)
    slope = (peak - some_peak) / (images - some)
    return {
        "images": int(images),
        "members": int(images) * len(ENDINGS),
        "index, s": seconds,
        "peak above the start, MB": peak / 1e6,
        "the same of half of the shards, MB": some_peak / 1e6,
        "bytes for each further image": slope,
        "extrapolated to 10 million images, GB": (peak + slope * (10_000_000 - images)) / 1e9,
    }


def _index(path: str) -> tuple[float, float, float]:
    """Images, seconds, and the peak of resident memory above that of the start, in a process of its own."""
    result = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True, check=True)
    images, seconds, before, peak = map(float, result.stdout.split())
    return images, seconds, peak - before


def _write_shard(path: Path, first: int, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for i in range(first, first + count):
            for ending in ENDINGS:
                member = tarfile.TarInfo(f"{i:09d}{ending}")
                member.size = 1
                archive.addfile(member, io.BytesIO(b"1"))


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    before, start = _peak(), time.perf_counter()
    print(len(open_images(sys.argv[1])), time.perf_counter() - start, before, _peak())
