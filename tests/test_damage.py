"""Hundreds of flips and cuts over every file of a shard directory: detected or harmless, never silent."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
from contents import seen_by_training
from shard_data import make_samples, write_shards

from ldt.data.shards import adopt
from ldt.data.shards.layout import Layout
from ldt.data.shards.shard_writer import PACK, Origin, ShardWriter, read_sidecar, sidecar_path
from ldt.data.shards.statistics import Sums
from ldt.errors import InputError

CASES = 60  # per file


def damaged(good):
    """(offset, content) of CASES cuts, flipped bits and overwritten bytes at random places."""
    rng = np.random.default_rng(len(good))
    for case in range(CASES):
        at, bad = int(rng.integers(len(good))), bytearray(good)
        if case % 3 == 0:
            del bad[at:]
        elif case % 3 == 1:
            bad[at] ^= 1 << int(rng.integers(8))
        else:
            bad[at : at + 8] = rng.bytes(8)
        yield at, bytes(bad)


@pytest.mark.parametrize("file", ["shard", "manifest.json", "shards.npy"])
@pytest.mark.parametrize("format", ["tar", "mds"])
def test_every_flip_and_cut_is_detected_or_harmless(tmp_path, format, file):
    write_shards(tmp_path, [5, 4, 6], format)
    path = tmp_path / (f"shard-00000001.{format}" if file == "shard" else file)
    good, expected = path.read_bytes(), seen_by_training(tmp_path)
    detected = 0
    for case, (at, bad) in enumerate(damaged(good)):
        path.write_bytes(bad)
        try:
            assert seen_by_training(tmp_path) == expected, f"{path.name}: case {case} at byte {at} went unnoticed"
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
        seen_by_training(tmp_path)
    one.rename(tmp_path / f"renamed.{format}")
    with pytest.raises(InputError, match=r"shard-00000001.*missing"):
        seen_by_training(tmp_path)
    one.mkdir()
    with pytest.raises(InputError, match="shard-00000001"):
        seen_by_training(tmp_path)
    one.rmdir()
    one.write_bytes(keep)
    seen_by_training(tmp_path)


def test_a_damaged_sidecar_counts_as_none(tmp_path):
    """Nothing else vouches for its statistics until the manifest is there."""
    layout = Layout((4, 2, 2), "fp16", False)
    samples = make_samples(9, layout)
    sums = Sums.of(layout.unpack(samples.moments_n2CHW.view(np.uint8)))
    ShardWriter(tmp_path, "tar", layout, 3).write("shard-00000000.tar", samples, sums, Origin(0))
    path = sidecar_path(tmp_path, "shard-00000000.tar")
    good, expected = path.read_bytes(), read_sidecar(tmp_path, "shard-00000000.tar")
    assert expected is not None and expected.samples == 9
    for at, bad in itertools.chain(
        damaged(good), [(0, b"[]"), (0, b"3"), (0, b"{}"), (0, b"[" * 10_000), (0, b"\xff")]
    ):
        path.write_bytes(bad)
        assert read_sidecar(tmp_path, "shard-00000000.tar") in (None, expected), at
    path.write_bytes(good)
    (tmp_path / "shard-00000000.tar").unlink()
    assert read_sidecar(tmp_path, "shard-00000000.tar") is None


@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("format", ["tar", "mds"])
def test_damage_in_foreign_shards_ends_in_a_sentence(tmp_path, format, captions):
    """They carry no hash, so not every flip can be seen; but whatever is there, indexing ends, and in one sentence."""
    layout = Layout((4, 2, 2), "fp16", False, captions)
    samples = make_samples(6, layout)
    if captions:
        samples = replace(samples, captions=[b"", b"a red boot", "Ä".encode(), b"x" * 100_000, b"coat", b"y" * 513])
    good, path = PACK[format](samples, layout, 0), tmp_path / f"own.{format}"
    path.write_bytes(good)
    assert adopt.examine(tmp_path, path.name, format, adopt.read_layout(tmp_path, path.name, format)).samples == 6
    refused = 0
    for at, bad in damaged(good if not captions else good[:6000]):
        path.write_bytes(bad + (good[6000:] if captions and at % 2 else b""))
        try:
            adopt.examine(tmp_path, path.name, format, adopt.read_layout(tmp_path, path.name, format))
        except InputError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > CASES / 4
