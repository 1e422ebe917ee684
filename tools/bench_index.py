"""The index of images: how long it takes and how much memory it needs, on files of one byte in several layouts."""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldt.data.images.open import open_images

ENDINGS = (".jpg", ".txt", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the set."""
    parser.add_argument("--images", type=int, default=340_000, help="each of three members: .jpg, .txt and .json")
    parser.add_argument("--shards", type=int, default=34)
    parser.add_argument(
        "--kind", choices=WRITERS, default="tar", help="tars, edm2's zips, or Hugging Face's imagefolder"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of all shards and of half of them, so that what an image takes is told from what a shard and a thread do."""
    per_shard, half = arguments.images // arguments.shards, arguments.shards // 2
    with tempfile.TemporaryDirectory() as directory:
        some, whole = Path(directory) / "some", Path(directory) / "all"
        for path, shards in ((some, half), (whole, arguments.shards)):
            path.mkdir()
            WRITERS[arguments.kind](path, shards, per_shard)
        _, _, some_peak = _index(some)
        images, seconds, peak = _index(whole)
    slope = (peak - some_peak) / (images - half * per_shard)
    return {
        "images": int(images),
        "index, s": seconds,
        "peak above the start, MB": peak / 1e6,
        "the same of half of the shards, MB": some_peak / 1e6,
        "bytes for each further image": slope,
        "extrapolated to 10 million images, GB": (peak + slope * (10_000_000 - images)) / 1e9,
    }


def _index(path: Path) -> tuple[float, float, float]:
    """Images, seconds, and the peak of resident memory above that of the start, in a process of its own."""
    result = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True, check=True)
    images, seconds, before, peak = map(float, result.stdout.split())
    return images, seconds, peak - before


def _write_tars(directory: Path, shards: int, per_shard: int) -> None:
    """Three members an image: .jpg, .txt and .json."""
    for k in range(shards):
        with tarfile.open(directory / f"{k:05d}.tar", "w") as archive:
            for i in range(k * per_shard, (k + 1) * per_shard):
                for ending in ENDINGS:
                    member = tarfile.TarInfo(f"{i:09d}{ending}")
                    member.size = 1
                    archive.addfile(member, io.BytesIO(b"1"))


def _write_zips(directory: Path, shards: int, per_shard: int) -> None:
    """One zip file, whose dataset.json has the labels."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(shards * per_shard)]
    with zipfile.ZipFile(directory / "set.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"1")
        archive.writestr("dataset.json", json.dumps({"labels": [[name, i % 1000] for i, name in enumerate(names)]}))


def _write_folder(directory: Path, shards: int, per_shard: int) -> None:
    """All images in one directory, with captions of 60 letters."""
    with (directory / "metadata.jsonl").open("w") as rows:
        for i in range(shards * per_shard):
            (directory / f"{i:09d}.jpg").write_bytes(b"1")
            rows.write(json.dumps({"file_name": f"{i:09d}.jpg", "text": f"{i:060d}", "label": i % 1000}) + "\n")


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "tar": _write_tars,
    "zip": _write_zips,
    "imagefolder": _write_folder,
}


def _peak() -> int:
    """Bytes; not `getrusage`, whose maximum takes over that of the process before `exec`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    before, start = _peak(), time.perf_counter()
    print(len(open_images(sys.argv[1])), time.perf_counter() - start, before, _peak())
