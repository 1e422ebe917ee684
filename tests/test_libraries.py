"""Our shards in the libraries' own readers, and the libraries' shards in ours, with the real packages."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import streaming_package
import torch
import webdataset
from shard_data import make_loader, make_samples, write_shards

from ldt import cli
from ldt.data.shards import mds, open_shards
from ldt.data.shards.layout import Layout
from ldt.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
LAYOUT = Layout((2, 4, 4), "fp16", True)
COUNTS = [6, 6, 5]


@pytest.fixture
def index(autoencoder, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "1"}.get(name, "0"))
    return lambda directory: cli.main(["encode", f"index={directory}", f"autoencoder={autoencoder}"])


def write_foreign(directory, format, counts=COUNTS):
    """Shards by ShardWriter or MDSWriter; returns what is in them."""
    written = [make_samples(n, LAYOUT, seed=i) for i, n in enumerate(counts)]
    directory.mkdir(exist_ok=True)
    if format == "tar":
        with webdataset.ShardWriter(str(directory / "own-%04d.tar"), maxcount=counts[0], verbose=0) as writer:
            for k, (s, i) in enumerate((part, i) for part in written for i in range(len(part))):
                row = {"cls": int(s.label_n[i]), "moments.npy": s.moments_n2CHW[i]}
                writer.write({"__key__": f"a/{k:05d}"} | row | {"moments_flipped.npy": s.flipped_n2CHW[i]})
        return written
    streaming = streaming_package.load()
    array = "ndarray:float16:2,2,4,4"
    columns = {"label": "int", "moments": array, "moments_flipped": array}
    size = len(mds.pack(written[0], LAYOUT, 0)) + 8
    with streaming.MDSWriter(out=str(directory), columns=columns, hashes=["xxh64"], size_limit=size) as writer:
        for s in written:
            for i in range(len(s)):
                row = {"label": int(s.label_n[i]), "moments": s.moments_n2CHW[i]}
                writer.write(row | {"moments_flipped": s.flipped_n2CHW[i]})
    return written


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_their_shards_train_in_ldt(index, tmp_path, format, capsys):
    written = write_foreign(tmp_path / "own", format)
    with pytest.raises(InputError, match="index="):
        open_shards(tmp_path / "own")
    assert index(tmp_path / "own") == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'own'}\n")
    shards = open_shards(tmp_path / "own")
    assert shards.manifest.samples == sum(COUNTS) and shards.manifest.flips
    counts = shards.manifest.counts
    records = shards.read(np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts]))
    expected = np.concatenate([s.moments_n2CHW for s in written]).astype(np.float32)
    np.testing.assert_array_equal(records.moments_n2CHW, expected)
    assert records.label_n.tolist() == np.concatenate([s.label_n for s in written]).tolist()
    with make_loader(shards, batch=4, seed=0) as loader:
        step = next(iter(loader.steps()))
        assert torch.isfinite(step.micro_batches[0].latent_BCHW).all()


@pytest.mark.parametrize(("flips", "posterior"), [(False, True), (True, True), (False, False)])
def test_streaming_dataset_reads_our_mds(tmp_path, flips, posterior):
    streaming = streaming_package.load()
    written = write_shards(tmp_path, [7, 5], "mds", "fp16", flips, posterior=posterior)
    layout = Layout((4, 2, 2), "fp16", flips, posterior=posterior)
    table = open_shards(tmp_path).manifest.table
    names = [n.decode() for n in table["name"]]
    hashes = [f"{h:016x}" for h in table["xxh64"].tolist()]
    index = mds.library_index(names, table["bytes"].tolist(), table["samples"].tolist(), hashes, layout)
    (tmp_path / "index.json").write_bytes(index)
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(tmp_path), batch_size=1, shuffle=False, validate_hash="xxh64")
    rows = [dataset[i] for i in range(12)]
    for i, (s, k) in enumerate((part, k) for part in written for k in range(len(part))):
        assert rows[i]["label"] == s.label_n[k]
        np.testing.assert_array_equal(rows[i]["moments"], s.moments_n2CHW[k])
        if flips:
            np.testing.assert_array_equal(rows[i]["moments_flipped"], s.flipped_n2CHW[k])


def test_our_mds_is_byte_for_byte_theirs(tmp_path):
    written = write_foreign(tmp_path / "own", "mds", [6])
    assert (tmp_path / "own" / "shard.00000.mds").read_bytes()[:4] == (6).to_bytes(4, "little")
    theirs = mds.index(np.fromfile(tmp_path / "own" / "shard.00000.mds", np.uint8), LAYOUT, "x")
    ours_bytes = mds.pack(written[0], LAYOUT, 0)
    ours = mds.index(np.frombuffer(ours_bytes, np.uint8), LAYOUT, "x")
    np.testing.assert_array_equal(theirs.label_n, ours.label_n)
    body = (tmp_path / "own" / "shard.00000.mds").read_bytes()[int(theirs.moments_n[0]) - 8 :]
    assert body == ours_bytes[int(ours.moments_n[0]) - 8 :]


def npy(array, pickled=False):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=pickled)
    return out.getvalue()


def bad_tars():
    """Members of a tar, and what is said of it."""
    good = npy(np.full((2, 2, 4, 4), 0.5, np.float16))
    nan = npy(np.full((2, 2, 4, 4), np.nan, np.float16))
    objects = npy(np.array([{}] * 3), pickled=True)
    first = [("a.cls", b"1"), ("a.moments.npy", good)]
    yield [("/etc/b.cls", b"1"), *first], "outside of its directory"
    yield [*first, ("../b.cls", b"1")], "outside of its directory"
    yield [*first, ("a.pkl", pickle.dumps(1))], "pickle"
    yield [*first, ("b.cls", b"1")], "no .moments.npy"
    yield [*first, ("b.moments.npy", good)], "no .cls"
    yield [*first, *first], "twice"
    yield [*first, ("b.cls", b"x"), ("b.moments.npy", good)], "not a whole number"
    yield [*first, ("b.cls", b""), ("b.moments.npy", good)], "not a whole number"
    yield [*first, ("b.cls", b"1"), ("b.moments.npy", nan)], "not finite"
    yield [*first, ("b.cls", b"1"), ("b.moments.npy", good[:-2])], "not fp16"
    yield [*first, ("b.cls", b"1"), ("b.moments.npy", b"junk")], "not a readable"
    yield [*first, ("b.cls", b"1"), ("b.moments.npy", objects)], "objects"
    yield [("a.cls", b"1"), ("a.jpg", b"1")], "has no .moments.npy"
    yield [], "no samples"


@pytest.mark.parametrize("case", range(14))
def test_bad_tars_are_refused_by_name(index, tmp_path, capsys, case):
    members, said = list(bad_tars())[case]
    with tarfile.open(tmp_path / "own-0.tar", "w") as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    assert index(tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and "own-0.tar" in error
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_bad_directories_are_refused(index, tmp_path, capsys, format):
    write_foreign(tmp_path / "own", format)
    names = sorted(p.name for p in (tmp_path / "own").glob(f"*.{format}"))
    content = (tmp_path / "own" / names[0]).read_bytes()
    twice = tmp_path / "own" / f"zz.{format}"
    twice.write_bytes(content)
    assert index(tmp_path / "own") == 2 and "hold the same samples" in capsys.readouterr().err
    twice.unlink()
    other = tmp_path / "own" / ("x.mds" if format == "tar" else "x.tar")
    other.write_bytes(b"x")
    assert index(tmp_path / "own") == 2 and "both" in capsys.readouterr().err
    other.unlink()
    for bad in (b"", content[: len(content) // 2], content.rstrip(b"\0")[:-3]):
        (tmp_path / "own" / names[0]).write_bytes(bad)
        assert index(tmp_path / "own") == 2 and names[0] in capsys.readouterr().err
    assert index(tmp_path / "nowhere") == 2 and "nowhere" in capsys.readouterr().err
