"""What a shard directory holds and whether it is whole: for `ldt inspect`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldt.data.shard_files import RECIPE, TABLE
from ldt.data.shards.manifest import Manifest
from ldt.data.shards.reader import LatentShards
from ldt.data.shards.statistics import Sums
from ldt.errors import InputError, file_error

BLOCK = 1024


@dataclass(frozen=True)
class Summary:
    """facts: what the manifest says and what was measured, for printing; problems: what is wrong, empty when whole."""

    manifest: Manifest
    facts: dict[str, Any]
    problems: list[str]


def summarize(shards: LatentShards) -> Summary:
    """Read and hash every shard, and compare class counts and statistics with the manifest."""
    m, problems, sums = shards.manifest, [], []
    count_K = np.zeros(len(m.classes), np.int64)
    for shard, count in enumerate(m.counts.tolist()):
        try:
            for start in range(0, count, BLOCK):
                sample_n = np.arange(start, min(start + BLOCK, count))
                for flip in (False, True) if m.flips else (None,):
                    flip_n = None if flip is None else np.full(len(sample_n), flip)
                    records = shards.read(np.full(len(sample_n), shard), sample_n, flip_n)
                    sums.append(Sums.of(records.moments_n2CHW))
                count_K += np.bincount(records.label_n, minlength=len(count_K))
        except InputError as error:
            problems.append(str(error))
    if not problems and count_K.tolist() != m.class_counts:
        problems.append(f"{shards.path}: samples of each class are not those of the manifest; index it again")
    facts: dict[str, Any] = {
        "format": m.format,
        "samples": m.samples,
        "shards": len(m.counts),
        "shards whose hash is right": len(m.counts) - len(problems),
        "latents": f"{'x'.join(map(str, m.latent_shape))} {m.dtype}{', mirrored too' if m.flips else ''}"
        f"{'' if m.posterior else ', without a posterior'}",
        "bytes": int(m.table["bytes"].sum()),
        "autoencoder": f"{m.autoencoder} ({m.autoencoder_hash})",
        "images": f"{m.image_size} pixels, {m.image_channels} channels",
        "fingerprint": m.fingerprint,
        "whitening": "by element; of its channels:" if m.by_element else "by channel",
        "whitening mean": _text(m.mean_C),
        "whitening std": _text(m.std_C),
    }
    if m.target:
        facts["target"] = f"{m.target['name']} ({m.target['hash']}), {'x'.join(map(str, m.target['shape']))}"
    if sums and not problems:
        mean_C, std_C = Sums.total(sums).mean_std()
        facts |= {"measured mean": _text(mean_C), "measured std": _text(std_C)}
    facts |= {f"class {k}": f"{n:,}" for k, n in zip(m.classes[:20], m.class_counts, strict=False)}
    if len(m.classes) > 20:
        facts["further classes"] = len(m.classes) - 20
    return Summary(m, facts, problems)


def latents_to_show(shards: LatentShards, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Posterior means [n, C, H, W] and labels of samples spread evenly over the data."""
    total = shards.manifest.samples
    number_n = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    ends = np.cumsum(shards.manifest.counts)
    shard_n = np.searchsorted(ends, number_n, "right")
    records = shards.read(shard_n, number_n - (ends - shards.manifest.counts)[shard_n])
    return records.mean_nCHW, records.label_n


def is_shard_directory(path: Path) -> bool:
    """Whether a path looks like the output of `ldt encode`, damaged, unfinished or whole."""
    if not path.is_dir():
        return False
    try:
        names = os.listdir(path)
    except OSError as error:
        raise file_error(f"directory {path}", error, "check it") from None
    return any(name in (TABLE, RECIPE) or name.endswith((".tar", ".mds")) for name in names)


def _text(values: Sequence[float] | NDArray[np.float64]) -> str:
    return " ".join(f"{v:.5g}" for v in np.asarray(values).tolist())
