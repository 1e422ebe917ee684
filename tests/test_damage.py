"""Hundreds of flips and cuts over every file of a shard directory: detected or harmless, never silent."""

import shutil

import numpy as np
import pytest
from shard_data import write_shards

from ldt.data.shards import open_shards
from ldt.errors import InputError

CASES = 60  # per file


def everything(directory):
    """All that training could see of the data."""
    shards = open_shards(directory)
    m = shards.manifest
    shard = np.repeat(np.arange(len(m.counts)), m.counts)
    records = shards.read(shard, np.concatenate([np.arange(n) for n in m.counts]))
    return (
        m.fingerprint, m.classes, m.class_counts, m.mean_C.tolist(), m.std_C.tolist(), m.autoencoder_hash, m.image_size,
        m.image_channels, m.autoencoder, m.recipe, records.label_n.tolist(), records.moments_n2CHW.tobytes(),
    )  # fmt: skip


@pytest.mark.parametrize("file", ["shard", "manifest.json", "shards.npy"])
@pytest.mark.parametrize("format", ["tar", "mds"])
def test_every_flip_and_cut_is_detected_or_harmless(tmp_path, format, file):
    write_shards(tmp_path, [5, 4, 6], format)
    path = tmp_path / (f"shard-00000001.{format}" if file == "shard" else file)
    good, expected = path.read_bytes(), everything(tmp_path)
    rng = np.random.default_rng(len(good))
    detected = 0
    for case in range(CASES):
        at = int(rng.integers(len(good)))
        bad = bytearray(good)
        if case % 3 == 0:
            del bad[at:]
        elif case % 3 == 1:
            bad[at] ^= 1 << int(rng.integers(8))
        else:
            bad[at : at + 8] = rng.bytes(8)
        path.write_bytes(bad)
        try:
            assert everything(tmp_path) == expected, f"{path.name}: case {case} at byte {at} went unnoticed"
        except InputError as error:
            assert path.name in str(error)
            detected += 1
    assert detected > CASES * 0.9


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_shards_that_moved_are_named(tmp_path, format):
    write_shards(tmp_path, [5, 4, 6], format)
    one, two = (tmp_path / f"shard-0000000{i}.{format}" for i in (1, 2))
    keep = one.read_bytes()
    shutil.copy(two, one)  # a duplicate in another's place
    with pytest.raises(InputError, match="shard-00000001"):
        everything(tmp_path)
    one.rename(tmp_path / f"renamed.{format}")
    with pytest.raises(InputError, match=r"shard-00000001.*missing"):
        everything(tmp_path)
    one.mkdir()
    with pytest.raises(InputError, match="shard-00000001"):
        everything(tmp_path)
    one.rmdir()
    one.write_bytes(keep)
    everything(tmp_path)
