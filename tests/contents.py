"""What directories, shards and loaders hold, to be compared."""

import hashlib
from pathlib import Path

import numpy as np

from ldt.data.shards import open_shards


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def everything(directory: Path) -> dict[str, str]:
    """Each name under a directory, with a hash of its content."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "directory"
        for p in directory.rglob("*")
    }


def seen_by_training(directory):
    """All that training could see of the data."""
    shards = open_shards(directory)
    m = shards.manifest
    shard = np.repeat(np.arange(len(m.counts)), m.counts)
    records = shards.read(shard, np.concatenate([np.arange(n) for n in m.counts]))
    return (
        m.fingerprint, m.classes, m.class_counts, m.mean_C, m.std_C, m.autoencoder_hash, m.image_size,
        m.image_channels, m.autoencoder, m.recipe, records.label_n.tolist(), records.moments_n2CHW.tobytes(),
    )  # fmt: skip


def assert_same_rows(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for name in row:
            np.testing.assert_array_equal(row[name], other[name], err_msg=name)
