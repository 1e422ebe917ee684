"""The loader against a memmap gather of the same samples, with StreamingDataset and webdataset beside it."""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldt import rng as rng_of_ldt
from ldt.data import philox
from ldt.data.batch import Batch, SampleDraws
from ldt.data.buffer import RankSlice
from ldt.data.digest import digest
from ldt.data.loader import LocationCache
from ldt.data.order import Order
from ldt.data.shards import LatentShards, open_shards
from ldt.data.stages import rate

sys.path.append(str(Path(__file__).parents[1] / "tests"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the data."""
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--shard-samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--latent", default="4x32x32", help="channels, height and width")
    parser.add_argument("--no-posterior", action="store_true", help="latents alone, without a deviation")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of each reader, hot cache, fp16 latents (16 KB a sample of 4x32x32), and ratios to the limit."""
    from shard_data import make_loader, write_shards

    channels, height, width = map(int, arguments.latent.split("x"))
    shape, posterior = (channels, height, width), not arguments.no_posterior
    counts = [arguments.shard_samples] * (arguments.samples // arguments.shard_samples)
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for format in ("tar", "mds"):
            write_shards(root / format, counts, format, "fp16", False, shape, posterior=posterior)
        row = (2 if posterior else 1) * channels * height * width
        out["memmap gather, samples/s"] = limit = _memmap(root / "gather.bin", arguments.samples, row)
        shards = {f: open_shards(root / f) for f in ("tar", "mds")}
        rng = np.random.default_rng(0)
        for format, opened in shards.items():
            for shard in range(len(counts)):
                opened.check(shard)
            out[f"{format} read() as float32, samples/s"] = _rate(
                lambda opened=opened: opened.read(  # type: ignore[misc]
                    rng.integers(0, len(counts), 256), rng.integers(0, arguments.shard_samples, 256)
                ),
                256,
            )
            with make_loader(opened, batch=arguments.batch, seed=0, threads=arguments.threads) as loader:
                steps = loader.steps()
                for _ in itertools.islice(steps, 8):
                    pass
                out[f"{format} loader, all draws, samples/s"] = _rate(lambda steps=steps: next(steps), arguments.batch)  # type: ignore[misc]
        out |= _parts(shards["tar"], root / "gather.bin", arguments.samples, row, arguments.batch)
        out["webdataset decode, samples/s"] = _webdataset(root / "tar")
        out["StreamingDataset[i], samples/s"] = _streaming(root / "mds", shards["mds"].manifest)
    ratios = {
        f"ratio: {k.removesuffix(', samples/s')}": v / limit
        for k, v in out.items()
        if "samples/s" in k and "memmap" not in k
    }
    return out | ratios


def _parts(shards: LatentShards, gathered: Path, samples: int, row: int, batch: int) -> dict[str, float]:
    """What one thread spends on a sample, in microseconds of CPU time, one part at a time: a loader's, and a gather's.

    Others that share the machine change it far less than samples a second.
    """
    shape = shards.manifest.latent_shape
    elements, rows = int(np.prod(shape)), Batch.padding(batch, shards.manifest, pin=False)
    order = Order(shards.manifest.counts, 0, batch, 8, 1 << 16)
    locations, steps = LocationCache(order, RankSlice.of(batch, 0, 1, 0)), itertools.count()
    first, draws = locations.of(0), SampleDraws(0, 0.1)
    draws.fill(rows, shards, first)
    normals = np.empty((batch, elements), np.float32)
    parts: dict[str, Callable[[], Any]] = {
        "locate": lambda: locations.of(batch * next(steps)),
        "read": lambda: shards.read(first.shard_n, first.sample_n),
        "one normal draw": lambda: philox.fill_normal(0, rng_of_ldt.Purpose.NOISE, first.key_n, normals),
        "digest": lambda: digest(rows, first.sample_n, rng_of_ldt.VERSION),
        "all of fill": lambda: draws.fill(rows, shards, first),
        "one normal draw, version 2": lambda: rng_of_ldt.fill_normal(0, rng_of_ldt.Purpose.NOISE, first.key_n, normals),
        "digest, version 2": lambda: digest(rows, first.sample_n, 2),
        "all of fill, version 2": lambda: SampleDraws(0, 0.1, version=2).fill(rows, shards, first),
    }
    spent = {name: _spent(action) / batch * 1e6 for name, action in parts.items()}
    gather = _spent(_gather(gathered, samples, row)) / 256 * 1e6
    thread = gather / (spent["locate"] + spent["all of fill"] + spent["digest"])
    named = {f"us/sample: {name}": value for name, value in (spent | {"memmap gather": gather}).items()}
    return named | {"ratio of CPU time: one loader thread": thread}


def _spent(action: Callable[[], Any], turns: int = 15) -> float:
    """The median of the CPU time that a call takes."""
    times = []
    for _ in range(turns):
        start = time.thread_time()
        action()
        times.append(time.thread_time() - start)
    return sorted(times)[turns // 2]


def _rate(action: Callable[[], Any], samples: int) -> float:
    return rate(lambda: action, samples, 1, 1.5)


def _memmap(path: Path, samples: int, row: int) -> float:
    np.random.default_rng(0).integers(0, 1 << 14, (samples, row), np.uint16).tofile(path)
    return _rate(_gather(path, samples, row), 256)


def _gather(path: Path, samples: int, row: int) -> Callable[[], Any]:
    """256 rows of `row` numbers of one flat file copied in random order into a reused batch."""
    data = np.memmap(path, np.float16, "r", shape=(samples, row))
    batch, rng = np.empty((256, row), np.float16), np.random.default_rng(0)
    return lambda: np.take(data, rng.integers(0, samples, 256), axis=0, out=batch)


def _webdataset(directory: Path) -> float:
    import webdataset

    names = sorted(str(p) for p in directory.glob("*.tar"))
    rows = iter(webdataset.WebDataset(names, shardshuffle=False).decode().to_tuple("moments.npy", "cls").batched(256))
    next(rows)
    start = time.perf_counter()
    done = sum(len(labels) for _, labels in itertools.islice(rows, 16))
    return done / (time.perf_counter() - start)


def _streaming(directory: Path, manifest: Any) -> float:
    import streaming_package  # type: ignore[import-not-found]

    from ldt.data.shards import mds

    streaming = streaming_package.load()
    table = manifest.table
    columns = ([n.decode() for n in table["name"]], table["bytes"].tolist(), table["samples"].tolist())
    hashes = [f"{h:016x}" for h in table["xxh64"].tolist()]
    (directory / "index.json").write_bytes(mds.library_index(*columns, hashes, manifest.layout))
    streaming.base.util.clean_stale_shared_memory()
    dataset, rng = (
        streaming.StreamingDataset(local=str(directory), batch_size=1, shuffle=False),
        np.random.default_rng(0),
    )
    return _rate(
        lambda: torch.from_numpy(np.stack([dataset[int(i)]["moments"] for i in rng.integers(0, len(dataset), 256)])),
        256,
    )
