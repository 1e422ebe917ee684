"""Latent shards: what is written comes back, in both formats, and damage is named."""

import io
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from shard_data import CLASSES, make_samples, write_shards

from ldt.data.shards import mds, open_shards, tar
from ldt.data.shards.layout import Layout
from ldt.errors import InputError

FORMATS = pytest.mark.parametrize("format", ["tar", "mds"])


@FORMATS
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("flips", [False, True])
def test_what_was_written_comes_back_in_the_order_asked(tmp_path, format, dtype, flips):
    written = write_shards(tmp_path, [5, 1, 9], format, dtype, flips)
    shards = open_shards(tmp_path)
    shard = np.array([2, 0, 1, 2, 2, 0])
    sample = np.array([8, 4, 0, 0, 8, 1])
    flip = np.array([True, False, True, False, False, True]) if flips else None
    records = shards.read(shard, sample, flip)
    for i in range(len(shard)):
        source = written[shard[i]]
        stored = source.flipped_n2CHW if flips and flip[i] else source.moments_n2CHW
        bits = torch.from_numpy(stored[sample[i]])
        expected = (bits.view(torch.bfloat16) if dtype == "bf16" else bits).float().numpy()
        np.testing.assert_array_equal(records.moments_n2CHW[i], expected)
        assert records.label_n[i] == source.label_n[sample[i]]
    np.testing.assert_array_equal(records.mean_nCHW, records.moments_n2CHW[:, 0])
    np.testing.assert_array_equal(records.std_nCHW, records.moments_n2CHW[:, 1])


def test_the_fingerprint_is_of_the_data_and_not_of_the_format(tmp_path):
    for format in ("tar", "mds"):
        write_shards(tmp_path / format, [4, 3], format)
    write_shards(tmp_path / "other", [3, 4], "tar")
    tar_, mds_, other = (open_shards(tmp_path / d).manifest.fingerprint for d in ("tar", "mds", "other"))
    assert tar_ == mds_ != other


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files to the collector
@pytest.mark.parametrize("flips", [False, True])
def test_webdataset_reads_our_tar(tmp_path, flips):
    written = write_shards(tmp_path, [7], "tar", "fp16", flips)[0]
    dataset = webdataset.WebDataset(str(tmp_path / "shard-00000000.tar"), shardshuffle=False).decode()
    samples = list(dataset)
    assert [s["cls"] for s in samples] == written.label_n.tolist()
    np.testing.assert_array_equal(np.stack([s["moments.npy"] for s in samples]), written.moments_n2CHW)
    if flips:
        np.testing.assert_array_equal(np.stack([s["moments_flipped.npy"] for s in samples]), written.flipped_n2CHW)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
@pytest.mark.parametrize("latent_shape", [(4, 1, 1), (4, 8, 8), (3, 5, 7)])
def test_tar_index_agrees_with_the_standard_library(count, latent_shape):
    layout = Layout(latent_shape, "fp32", flips=True)
    content = tar.pack(make_samples(count, layout), layout, first=95)
    index = tar.index(np.frombuffer(content, np.uint8), layout, "x")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
        assert len(index) == count and len(members) == 3 * count
        for i in range(count):
            cls, moments, flipped = members[3 * i : 3 * i + 3]
            assert moments.name == f"{95 + i:010d}.moments.npy"
            assert index.label_n[i] == int(archive.extractfile(cls).read())
            assert index.moments_n[i] + layout.moments_bytes == moments.offset_data + moments.size
            assert index.flipped_n[i] + layout.moments_bytes == flipped.offset_data + flipped.size


@FORMATS
def test_labels_of_any_width(format):
    layout = Layout((4, 2, 2), "fp16", flips=False)
    samples = make_samples(300, layout, classes=1_000_000)
    module = {"tar": tar, "mds": mds}[format]
    index = module.index(np.frombuffer(module.pack(samples, layout, 0), np.uint8), layout, "x")
    np.testing.assert_array_equal(index.label_n, samples.label_n)


@FORMATS
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty", "missing"])
def test_a_damaged_shard_is_named_and_nothing_of_it_returned(tmp_path, format, damage):
    write_shards(tmp_path, [6, 6], format)
    path = tmp_path / f"shard-00000001.{format}"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    elif damage == "cut":
        del content[-9:]
    elif damage == "grow":
        content += b"x"
    path.write_bytes(b"" if damage == "empty" else content)
    if damage == "missing":
        path.unlink()
    shards = open_shards(tmp_path)
    shards.read([0], [3])
    with pytest.raises(InputError, match="shard-00000001"):
        shards.read([0, 1], [3, 3])


@FORMATS
def test_a_shard_cut_while_in_use_is_named(tmp_path, format):
    write_shards(tmp_path, [6], format)
    shards = open_shards(tmp_path)
    shards.read([0], [5])
    path = tmp_path / f"shard-00000000.{format}"
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size // 3)
    with pytest.raises(InputError, match="shard-00000000"):
        shards.read([0], [5])


def test_bad_manifests(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        open_shards(tmp_path)
    write_shards(tmp_path, [2])
    head, table = tmp_path / "manifest.json", tmp_path / "shards.npy"
    good_head, good_table = head.read_text(), table.read_bytes()
    for bad, said in [
        (good_head[:40], "not readable"),
        (good_head.replace('"version": 2', '"version": 99'), "version 99"),
        (good_head.replace("ldt latent shards", "x"), "not a manifest"),
        (good_head.replace(CLASSES[0], "wolf"), "does not belong to its own hash"),
        (good_head.replace('"fp16"', '"fp7"'), "damaged"),
    ]:
        head.write_text(bad)
        with pytest.raises(InputError, match=said):
            open_shards(tmp_path)
    head.write_text(good_head)
    table.write_bytes(good_table[:-3])
    with pytest.raises(InputError, match=r"shards\.npy is damaged"):
        open_shards(tmp_path)
    table.unlink()
    with pytest.raises(InputError, match=r"shards\.npy is missing"):
        open_shards(tmp_path)
    head.unlink()
    with pytest.raises(InputError, match="index="):
        open_shards(tmp_path)
