"""`ldt encode index=DIR`: shards of other writers, whole or not, and what is said of those that are not."""

import os
import re
import shutil
import tarfile
import time

import numpy as np
import pytest
import streaming_package
import webdataset
from run_data import make_autoencoder
from shard_data import write_shards

from ldt.cli import main
from ldt.data.shards import Manifest, open_shards

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    make_autoencoder(path)
    return path


def sample(i, shape=SHAPE):
    rng = np.random.default_rng(i)
    moments = np.stack([rng.standard_normal(shape), 0.1 + rng.random(shape)]).astype(np.float32)
    return {"label": i % 3, "moments": moments}


def write_tars(root, counts=(5, 4), captions=False):
    """As webdataset writes them."""
    root.mkdir(parents=True, exist_ok=True)
    for k, count in enumerate(counts):
        with webdataset.TarWriter(f"{root}/{k:05d}.tar", mtime=0) as writer:
            for i in range(count):
                one = sample(100 * k + i)
                parts = {"cls": one["label"], "moments.npy": one["moments"]} | ({"txt": "words"} if captions else {})
                writer.write({"__key__": f"{k}{i:04d}", **parts})
    return root


def write_mds(root, columns, rows):
    """As mosaicml-streaming writes them."""
    with streaming_package.load().MDSWriter(out=str(root), columns=columns, hashes=["xxh64"]) as writer:
        for row in rows:
            writer.write(row)
    return root


def index(root, vae, *settings):
    return main(["encode", f"index={root}", f"autoencoder={vae}", "--quiet", *settings])


def test_a_dangling_link_is_no_smaller_data_set(vae, tmp_path, capsys):
    root = write_tars(tmp_path / "shards")
    moved = root / "00001.tar"
    moved.rename(tmp_path / "elsewhere.tar")
    moved.symlink_to(tmp_path / "elsewhere.tar")
    assert index(root, vae) == 0 and Manifest.load(root).samples == 9
    (tmp_path / "elsewhere.tar").unlink()
    assert index(root, vae) == 2
    assert "shard 00001.tar leads nowhere; restore it, or remove it" in capsys.readouterr().err
    moved.unlink()
    moved.mkdir()
    assert index(root, vae) == 2
    assert "shard 00001.tar is no file" in capsys.readouterr().err


def test_a_tar_of_a_directory_is_taken(vae, tmp_path):
    """`tar -C src -cf shard.tar .` has members `.` and `./key.cls`."""
    root = write_tars(tmp_path / "shards", counts=(6,))
    (tmp_path / "src").mkdir()
    with tarfile.open(root / "00000.tar") as archive:
        for member in archive:
            (tmp_path / "src" / member.name).write_bytes(archive.extractfile(member).read())
    (tmp_path / "again").mkdir()
    with tarfile.open(tmp_path / "again" / "00000.tar", "w") as archive:
        archive.add(tmp_path / "src", ".")
    assert index(root, vae) == 0 and index(tmp_path / "again", vae) == 0
    assert Manifest.load(root).samples == Manifest.load(tmp_path / "again").samples == 6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: (root / "a.tar.gz").write_bytes(b"x"), "neither .* but a.tar.gz; unpack compressed shards first"),
        (lambda root: (root / "a.mds.zstd").write_bytes(b"x"), "neither .* but a.mds.zstd; unpack compressed"),
        (lambda root: write_tars(root / "part1"), "neither .* but its directory part1 does; index each directory"),
        (lambda root: None, "neither .tar nor .mds shards; give the directory that they are in"),
    ],
)
def test_shards_that_are_elsewhere_are_pointed_at(vae, tmp_path, capsys, make, said):
    (tmp_path / "root").mkdir()
    make(tmp_path / "root")
    assert index(tmp_path / "root", vae) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_encoder_that_nothing_is_encoded_by_is_refused(vae, tmp_path, capsys):
    root = write_tars(tmp_path / "shards", captions=True)
    assert index(root, vae, "text.encoder=bytes") == 2
    assert "holds captions, but not what an encoder made of them, and nothing is encoded" in capsys.readouterr().err
    assert index(root, vae) == 0 and open_shards(root).captions(0, [0]) == ["words"]
    plain = write_tars(tmp_path / "plain")
    assert index(plain, vae, "text.encoder=bytes") == 2
    assert "holds no captions, and nothing is encoded" in capsys.readouterr().err


ARRAY = "ndarray:float32:2,4,8,8"


@pytest.mark.parametrize(
    ("columns", "change", "said"),
    [
        (
            {"label": "int", "moments": ARRAY, "name": "str"},
            {"name": "x"},
            "other than label, moments: name (str); write",
        ),
        ({"label": "int32", "moments": ARRAY}, {}, "other than label, moments: label (int32); write"),
        ({"moments": ARRAY}, {}, "other than label, moments: no label (int); write"),
    ],
)
def test_other_columns_of_mds_are_named(vae, tmp_path, capsys, columns, change, said):
    rows = [{k: v for k, v in (sample(i) | change).items() if k in columns} for i in range(4)]
    if columns.get("label") == "int32":
        rows = [row | {"label": np.int32(row["label"])} for row in rows]
    assert index(write_mds(tmp_path / "shards", columns, rows), vae) == 2
    error = capsys.readouterr().err
    assert said in error and "index it again" not in error


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_targets_of_an_unknown_network_are_refused(vae, tmp_path, capsys, format):
    """Nothing in a shard says which network they are of; left out in silence, `align.weight` would miss them."""
    write_shards(tmp_path, [5], format, latent_shape=SHAPE, target=(5, 2, 2))
    for file in ("manifest.json", "shards.npy"):
        (tmp_path / file).unlink()
    assert index(tmp_path, vae) == 2
    assert "holds features to align with (.target), and nothing in it says which network" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_captions_that_are_no_utf8_are_named(vae, tmp_path, capsys, format):
    if format == "mds":
        rows = [sample(i) | {"caption": "a caption"} for i in range(4)]
        root = write_mds(tmp_path / "shards", {"caption": "str", "label": "int", "moments": ARRAY}, rows)
    else:
        root = write_tars(tmp_path / "shards", counts=(4,), captions=True)
    path = sorted(root.glob(f"*.{format}"))[0]
    content, word = bytearray(path.read_bytes()), b"a caption" if format == "mds" else b"words"
    at = content.index(word, content.index(word) + 1)
    content[at] = 0xE9
    path.write_bytes(content)
    assert index(root, vae) == 2
    assert "is not UTF-8; write it again" in capsys.readouterr().err
    assert not (root / "manifest.json").exists()


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    for i in range(20):
        moments = np.random.default_rng(i).standard_normal((8, 8, 8)).astype(np.float32)
        np.savez(root / f"{i}.npz", moments=moments, label=i % 2)
    keys = [
        f"latents={root}",
        f"autoencoder={vae}",
        f"output={root}/out",
        "validation_fraction=0.25",
        "shard_samples=4",
    ]
    assert main(["encode", *keys, "shard_samples=4", "--quiet"]) == 0
    return root / "out"


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def cut_shard(path):
    shard = sorted(path.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-700])


def one_less(path):
    """A whole split, but not the one that was written with the data."""
    from ldt.data.shards.manifest import read_head

    head = read_head(path)
    shutil.copytree(path.parent, path.parent.parent / "again")
    shutil.rmtree(path)
    (path.parent.parent / "again" / "validation").rename(path.parent.parent / "spare")
    shutil.move(path.parent.parent / "again", path)
    assert head["samples"] == 5


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: (path / "manifest.json").unlink(), "validation holds shards but no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "is not readable as JSON"),
        (shutil.rmtree, "validation does not exist"),
        (empty, "has no manifest.json"),
        (cut_shard, "bytes instead of"),
        (one_less, "holds 15 samples of 5"),
    ],
)
def test_inspect_looks_at_the_held_out_split_too(encoded, tmp_path, capsys, spoil, said):
    shutil.copytree(encoded, tmp_path / "data")
    assert main(["inspect", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    assert "held-out samples             5" in printed and "whole" in printed
    spoil(tmp_path / "data" / "validation")
    assert main(["inspect", str(tmp_path / "data")]) == 1
    printed = capsys.readouterr().out
    assert "damaged: " in printed and f"{tmp_path}/data/validation" in printed and said in printed


def test_a_claim_ends_without_removing_another_ones(tmp_path, monkeypatch):
    """Whoever was taken for dead must not end the work of the one who took over."""
    from ldt.run import claims
    from ldt.run.claims import STALE_TIMEOUT_S, Claim

    monkeypatch.setattr(claims, "WATCH_PERIOD_S", 0.0)
    checkpoint = tmp_path / "000000000100"
    checkpoint.mkdir()
    first = Claim.take(checkpoint, "key")
    file = next(tmp_path.glob("*.claim-key"))
    with first:
        os.utime(file, (time.time() - 2 * STALE_TIMEOUT_S,) * 2)
        second = Claim.take(checkpoint, "key")
        content = file.read_text()
    assert second is not None and file.read_text() == content
    with second:
        pass
    assert not list(tmp_path.glob("*claim*"))
    with Claim.take(checkpoint, "key"):
        file.unlink()  # by hand
