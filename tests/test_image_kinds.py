"""One set of images in every form that people have it: the same order, labels, captions and latents."""

import json
import os
import resource
import shutil
import signal
import tarfile
import time
import zipfile

import forked
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from contents import files
from image_sets import (
    CLASSES,
    COUNT,
    KINDS,
    add,
    content,
    directory,
    edm2_zip,
    hf_parquet,
    imagefolder,
    make_samples,
    mds,
    web_tars,
)
from PIL import Image
from run_data import make_autoencoder

from ldt import rng
from ldt.cli import main
from ldt.data.images import Fields, open_images, prepare
from ldt.data.images.open import INDEXERS, index_share, open_encoded
from ldt.data.shards import Manifest
from ldt.errors import InputError


@pytest.fixture(scope="module")
def samples():
    return make_samples(COUNT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_in_every_kind(samples, tmp_path, kind):
    path = KINDS[kind](tmp_path / "set", samples)
    for _ in range(2):  # the second time from the kept index
        source = open_images(str(path), index_dir=str(tmp_path / "indexes"))
        assert len(source) == source.captioned == COUNT and list(source.classes) == CLASSES
        assert [source.label(i) for i in range(COUNT)] == [s[2] for s in samples]
        assert [source.caption(i) for i in range(COUNT)] == [s[3] for s in samples]
        for i, (_, image, *_) in enumerate(samples):
            assert source.content(i) == image and source.image(i).size[0] == 8
        assert not source.remarks()
        assert len({source.key(i) for i in range(COUNT)}) == COUNT


@pytest.mark.parametrize("kind", KINDS)
def test_some_classes_of_every_kind(samples, tmp_path, kind):
    path = str(KINDS[kind](tmp_path / "set", samples))
    source = open_images(path, classes=["cat", "ant"])
    wanted = [s for s in samples if not s[0].startswith("bee")]
    assert source.classes == ("cat", "ant") and len(source) == source.captioned == len(wanted)
    assert [source.label(i) for i in range(len(source))] == [0 if s[0].startswith("cat") else 1 for s in wanted]
    assert [source.caption(i) for i in range(len(source))] == [s[3] for s in wanted]
    for classes, said in ((["cat", "dog"], "has no class dog; it has ant, bee, cat"), (["cat", "cat"], "class twice")):
        with pytest.raises(InputError, match=said):
            open_images(path, classes=classes)


@pytest.mark.parametrize("kind", ["web tars", "zip", "parquet", "mds"])
def test_the_same_images_through_fsspec(samples, tmp_path, kind):
    local, memory = KINDS[kind](tmp_path / "set", samples), fsspec.filesystem("memory")
    files = [local] if local.is_file() else [p for p in local.iterdir() if p.is_file()]
    try:
        for path in [*files, tmp_path / "set" / "classes.txt"]:
            if path.exists():
                memory.pipe_file(f"/images/set/{path.name}", path.read_bytes())
        address = "memory://images/set" + (f"/{local.name}" if local.is_file() else "")
        for where in (address, f"file://{local}"):
            source = open_images(where)
            assert list(source.classes) == CLASSES and [source.label(i) for i in range(COUNT)] == [
                s[2] for s in samples
            ]
            assert [source.content(i) for i in range(COUNT)] == [s[1] for s in samples]
            assert source.caption(7) == samples[7][3]
    finally:
        memory.rm("/images", recursive=True)


def arguments(path, output, vae, *settings):
    keys = [f"images.path={path}", "images.size=32", f"autoencoder={vae}", f"output={output}", "shard_samples=20"]
    keys += ["text.encoder=bytes", "text.length=16", f"images.index_dir={output}-index", *settings]
    return ["encode", *keys, "--quiet"]


def encode(path, output, vae, *settings):
    return main(arguments(path, output, vae, *settings))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    make_autoencoder(path)
    return path


def test_every_kind_gives_the_same_fingerprint(tmp_path, vae):
    """500 images, in shards that end within files, row groups and batches."""
    samples, found = make_samples(500), {}
    for kind in ("directory", "web tars", "zip", "parquet", "mds", "csv"):
        root = tmp_path / kind.replace(" ", "-")
        root.mkdir()
        assert encode(KINDS[kind](root / "set", samples), root / "out", vae, "shard_samples=110") == 0
        found[kind] = Manifest.load(root / "out").fingerprint, Manifest.load(root / "out").caption_counts["captioned"]
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("kind", ["web tars", "zip", "parquet", "mds"])
def test_a_kill_while_encoding_leaves_the_same_files_in_the_end(samples, tmp_path, vae, kind):
    path, out = KINDS[kind](tmp_path / "set", samples), tmp_path / "two"
    assert encode(path, tmp_path / "one", vae, "shard_samples=2") == 0
    started = forked.start_ranks(2, "-m", "ldt", *arguments(path, out, vae, "shard_samples=2"))
    deadline = time.monotonic() + 100
    while len(list(out.glob("shard-*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    there = len(list(out.glob("shard-*.tar")))
    for process in started:
        process.kill()
    assert [process.wait(60) for process in started] == [-signal.SIGKILL] * 2
    assert 3 <= there < 25 and not (out / "manifest.json").exists()
    assert encode(path, out, vae, "shard_samples=2") == 0
    assert files(out) == files(tmp_path / "one")


def several(root, samples, kind):
    """The images with the captions that each has in a list: of the first none, of the second one."""
    root.mkdir()
    texts = [[f"{c} {k}" for k in range(min(i, 3))] for i, (*_, c) in enumerate(samples)]
    if kind == "parquet":
        columns = {"image": [s[1] for s in samples], "label": [s[2] for s in samples], "caption": texts}
        pyarrow.parquet.write_table(pyarrow.table(columns), root / "one.parquet", row_group_size=11)
        return root, Fields(), texts
    if kind == "jsonl":
        rows = [{"file_name": f"{i:05d}.png", "label": s[2], "text": texts[i]} for i, s in enumerate(samples)]
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for i, (_, image, *_) in enumerate(samples):
            (root / f"{i:05d}.png").write_bytes(image)
        return root, Fields(), texts
    with tarfile.open(root / "0.tar", "w") as archive:
        for i, ((_, image, label, _), text) in enumerate(zip(samples, texts, strict=True)):
            add(archive, f"{i:08d}.png", image)
            add(archive, f"{i:08d}.json", json.dumps({"said": ["", *text, 7], "label": label}).encode())
    return root, Fields("label", "said"), texts


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_one_of_several_captions_is_drawn_by_key(samples, tmp_path, kind):
    path, fields, texts = several(tmp_path / "set", samples, kind)
    drawn = {}
    for seed in (0, 0, 1):
        source = open_images(str(path), fields, seed=seed)
        drawn[seed] = [source.caption(i) for i in range(COUNT)]
        assert all(c in t if t else c == "" for c, t in zip(drawn[seed], texts, strict=True))
        assert source.captioned == COUNT - 1
        assert drawn[seed] == [source.caption(i) for i in range(COUNT)]
    assert drawn[0] != drawn[1] and {c[-1] for c in drawn[0][3:]} == set("012")
    bits = rng.bits(1, rng.Purpose.CAPTION, np.arange(COUNT), 1)[:, 0]
    assert drawn[1][5:] == [texts[i][int(bits[i] % np.uint64(3))] for i in range(5, COUNT)]
    recipe = {"images.path": str(path), "images.label": fields.label, "images.caption": fields.caption, "seed": 1}
    again = open_encoded(recipe)  # for scores: the captions that the data were encoded with
    assert [again.caption(i) for i in range(COUNT)] == drawn[1]
    some = open_images(str(path), fields, seed=1, classes=source.classes[1:])
    assert [some.caption(i) for i in range(len(some))] == drawn[1][COUNT - len(some) :]  # keyed by the image


def test_labels_and_captions_by_name(samples, tmp_path):
    root = web_tars(tmp_path / "set", samples, json_label="kind")
    source = open_images(str(root), Fields("kind", "caption"))
    assert [source.label(i) for i in range(COUNT)] == [s[2] for s in samples] and source.caption(3) == samples[3][3]
    plain = open_images(str(root))
    assert plain.classes == ("images",) and plain.captioned == 0
    for fields, said in [
        (Fields("nothing"), "has no images.label=nothing; endings there: .json, .png, keys in .json: caption, kind"),
        (
            Fields("", "nothing"),
            "has no images.caption=nothing; endings there: .json, .png, keys in .json: caption, kind",
        ),
    ]:
        with pytest.raises(InputError, match=said):
            open_images(str(root), fields)
    for path in (hf_parquet(tmp_path / "hf", samples), mds(tmp_path / "mds", samples)):
        with pytest.raises(InputError, match="has no images.caption=nothing; columns there: "):
            open_images(str(path), Fields("", "nothing"))
        with pytest.raises(InputError, match="has no images.label=nothing; columns there: "):
            open_images(str(path), Fields("nothing"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


def mixed(root, samples):
    web_tars(root, samples)
    shutil.move(edm2_zip(root / "z", samples), root / "set.zip")
    shutil.rmtree(root / "z")


def no_images(root, samples):
    web_tars(root, [(n, b"", label, c) for n, _, label, c in samples[:2]])
    with tarfile.open(root / "00000.tar", "w") as archive:
        add(archive, "a.txt", b"words")
        add(archive, "b.bin", b"words")


def some_labels(root, samples):
    web_tars(root, samples)
    with tarfile.open(root / "00001.tar", "w") as archive:
        add(archive, "00000017.png", samples[17][1])
        add(archive, "00000017.cls", b"1")
        add(archive, "00000018.png", samples[18][1])


def one_shard_without(root, samples):
    web_tars(root, samples)
    with tarfile.open(root / "00001.tar", "w") as archive:
        add(archive, "00000017.png", samples[17][1])


def few_names(root, samples):
    web_tars(root, samples)
    (root / "classes.txt").write_text("ant\nbee")


def strange_label(root, samples):
    web_tars(root, [(n, i, -1, c) for n, i, _, c in samples[:3]])


def other_schema(root, samples):
    hf_parquet(root, samples)
    pyarrow.parquet.write_table(pyarrow.table({"img": [samples[0][1]], "label": [0]}), root / "train-00010.parquet")


def no_image_column(root, samples):
    root.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"], "label": [0]}), root / "a.parquet")


def outside_zip(root, samples):
    root.mkdir()
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.writestr("../../evil.png", samples[0][1])


def twice_in_tar(root, samples):
    web_tars(root, samples[:3])
    with tarfile.open(root / "00000.tar", "a") as archive:
        add(archive, "00000001.png", samples[1][1])


def compressed(root, samples):
    root.mkdir()
    (root / "00000.tar.gz").write_bytes(b"\x1f\x8b")


def damaged(make, name):
    def spoil(root, samples):
        make(root, samples)
        cut(root / name)

    return spoil


def unnamed_row(root, samples):
    imagefolder(root, samples)
    (root / "metadata.jsonl").write_text('{"file_name": "nowhere.png"}\n')


def broken_row(root, samples):
    imagefolder(root, samples)
    (root / "metadata.jsonl").write_text('{"file_name": "00000.png"}\n{"text": 3}\n')


BAD = [
    (mixed, "mixes kinds of files: .*00000.tar .tar. and .*set.zip .zip."),
    (no_images, r"holds no images .* but 1 .bin, 1 .txt|holds no images .* but 1 .txt, 1 .bin"),
    (some_labels, "00001.tar: image 00000018 has no label .cls., and others have"),
    (one_shard_without, "00001.tar has no labels like those of .*00000.tar"),
    (few_names, "has 2 names, too few for label 2"),
    (strange_label, "has the label -1; labels are class numbers from 0"),
    (other_schema, "train-00010.parquet is of another schema than .*train-00000.parquet"),
    (no_image_column, "a.parquet has no column of image bytes .*; columns there: url .string., label .int64."),
    (outside_zip, "has a member outside of the archive, ../../evil.png"),
    (twice_in_tar, "has 00000001.png twice"),
    (compressed, "holds compressed files such as 00000.tar.gz; unpack them"),
    (damaged(web_tars, "00002.tar"), "00002.tar is cut or damaged|00002.tar is not a whole"),
    (damaged(edm2_zip, "set.zip"), "set.zip is not a whole zip file"),
    (damaged(hf_parquet, "train-00030.parquet"), "train-00030.parquet is not a whole parquet file"),
    (damaged(mds, "shard.00001.mds"), "shard.00001.mds is not a whole MDS shard"),
    (unnamed_row, "metadata.jsonl names nowhere.png, which is not there"),
    (broken_row, "metadata.jsonl: row 2 has no readable file_name"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_sources_are_named(samples, tmp_path, make, said):
    make(tmp_path / "set", samples)
    with pytest.raises(InputError, match=said):
        open_images(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{0}/{{00003..00001}}.tar", "counts down"),
        ("{0}/{{00001..00007}}.tar", "00003.tar"),
        ("{0}/*.nothing", "stands for no file"),
        ("memory://nowhere/a.tar", "does not exist; check the address"),
        ("nothing://nowhere/a.tar", "install fsspec's back-end"),
    ],
)
def test_patterns_and_addresses_that_lead_nowhere(samples, tmp_path, path, said):
    web_tars(tmp_path / "set", samples)
    with pytest.raises(InputError, match=said):
        open_images(path.format(tmp_path / "set"))


@pytest.mark.parametrize("kind", ["directory", "web tars", "parquet"])
def test_unreadable_images_stop_or_are_left_out(samples, tmp_path, vae, capsys, kind):
    spoiled = [(n, image[:60] if i in (3, 30) else image, k, c) for i, (n, image, k, c) in enumerate(samples)]
    path = KINDS[kind](tmp_path / "set", spoiled)
    assert encode(path, tmp_path / "out", vae) == 2
    assert "is not readable" in capsys.readouterr().err
    for _ in range(2):
        assert encode(path, tmp_path / "skipped", vae, "images.on_error=skip") == 0
    lines = [json.loads(line) for line in (tmp_path / "skipped" / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all("is not readable" in line["reason"] for line in lines)
    without = [s for i, s in enumerate(samples) if i not in (3, 30)]
    assert encode(directory(tmp_path / "good", without), tmp_path / "anew", vae) == 0
    assert Manifest.load(tmp_path / "skipped").fingerprint == Manifest.load(tmp_path / "anew").fingerprint
    assert Manifest.load(tmp_path / "skipped").recipe["unreadable images left out"] == 2


def test_some_classes_are_encoded_and_compared_with(samples, tmp_path, vae):
    assert encode(directory(tmp_path / "set", samples), tmp_path / "out", vae, "images.classes=[cat,ant]") == 0
    head = Manifest.load(tmp_path / "out")
    real = open_encoded(head.recipe)
    assert head.classes == ["cat", "ant"] == list(real.classes) and len(real) == head.recipe["number of images"]


def test_exif_turns_images_where_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert open_images(str(tmp_path)).image(0).size == (20, 10)
    assert open_images(str(tmp_path), turn=True).image(0).size == (10, 20)


def test_more_shards_than_open_files_are_allowed(samples, tmp_path):
    web_tars(tmp_path / "set", samples, per=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        source = open_images(str(tmp_path / "set"))
        assert [source.content(i) for i in range(COUNT)] == [s[1] for s in samples]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_image_is_some_bytes_of_arrays(tmp_path):
    """Nothing is a Python object an image: ten million are to fit."""
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "00000.tar", "w") as archive:
        for i in range(2000):
            add(archive, f"{i:09d}.jpg", b"x")
            add(archive, f"{i:09d}.txt", b"words")
    table = open_images(str(tmp_path / "set")).table
    held = [table.names.end_n, table.label_n, *table.numbers.values()]
    assert sum(a.nbytes for a in held) / len(table) + len("000000000.jpg") < 100


def test_names_in_several_shards_are_told(samples, tmp_path):
    web_tars(tmp_path / "set", samples, per=20)
    shutil.copy(tmp_path / "set" / "00001.tar", tmp_path / "set" / "00009.tar")
    said = open_images(str(tmp_path / "set")).remarks()
    assert len(said) == 1 and said[0].startswith("20 names stand in several files, such as 00000020.png")


def test_ranks_share_the_index_and_go_on_with_it(samples, tmp_path, monkeypatch):
    root, kept = web_tars(tmp_path / "set", samples, per=10), tmp_path / "kept"
    index_share(str(root), Fields(), str(kept), 0, 2)
    assert len(list(kept.iterdir())) == 3
    index_share(str(root), Fields(), str(kept), 1, 2)
    assert len(list(kept.iterdir())) == 5
    monkeypatch.setitem(INDEXERS, "tar", None)  # no file is looked at again
    source = open_images(str(root), index_dir=str(kept))
    assert [source.content(i) for i in range(COUNT)] == [s[1] for s in samples]
    monkeypatch.undo()
    with tarfile.open(root / "00001.tar", "w") as archive:  # a shard that changed is
        add(archive, "00000010.png", samples[3][1])
        add(archive, "00000010.cls", b"2")
    assert len(open_images(str(root), index_dir=str(kept))) == COUNT - 9
    for file in kept.iterdir():  # and so are damaged indexes
        file.write_bytes(file.read_bytes()[:100])
    assert len(open_images(str(root), index_dir=str(kept))) == COUNT - 9


def pillow(mode, format, **more):
    def make(path):
        Image.new(mode, (8, 8), **more).save(path, format)

    return make


def animation(path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def bomb(path):
    Image.new("1", (20000, 20000)).save(path)


def deep(path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("a.png", pillow("L", "PNG", color=77), [77, 77, 77]),
        ("a.jfif", pillow("RGB", "JPEG", color=(10, 10, 10)), [10, 10, 10]),
        ("a", pillow("RGB", "PNG", color=(1, 2, 3)), [1, 2, 3]),
        ("a.png", pillow("1", "PNG", color=1), [255, 255, 255]),
        ("a.gif", pillow("P", "GIF"), [0, 0, 0]),
        ("a.jpg", pillow("CMYK", "JPEG", color=(0, 0, 0, 0)), [255, 255, 255]),
        ("a.png", pillow("RGBA", "PNG", color=(9, 9, 9, 0)), [255, 255, 255]),
        ("a.png", pillow("LA", "PNG", color=(9, 0)), [255, 255, 255]),
        ("a.png", pillow("P", "PNG", color=0), [0, 0, 0]),
        ("a.png", lambda path: Image.new("P", (8, 8)).save(path, "PNG", transparency=0), [255, 255, 255]),
        ("a.tif", pillow("YCbCr", "TIFF", color=(255, 128, 128)), [255, 255, 255]),
        ("a.bmp", pillow("RGB", "BMP", color=(1, 2, 3)), [1, 2, 3]),
        ("a.ppm", pillow("RGB", "PPM", color=(1, 2, 3)), [1, 2, 3]),
        ("a.tiff", pillow("RGB", "TIFF", color=(1, 2, 3)), [1, 2, 3]),
        ("a.tga", pillow("RGB", "TGA", color=(1, 2, 3)), [1, 2, 3]),
        ("a.jp2", pillow("RGB", "JPEG2000", color=(50, 50, 50)), [50, 50, 50]),
        ("a.webp", pillow("RGB", "WEBP", color=(50, 50, 50)), [50, 50, 50]),
        ("a.png", lambda path: Image.new("RGB", (2, 3), (9, 9, 9)).save(path), [9, 9, 9]),
        ("a.png", animation, [255, 0, 0]),
        ("a.webp", animation, [255, 0, 0]),
        ("a.gif", animation, [255, 0, 0]),
        ("a.avif", pillow("RGB", "AVIF", color=(0, 0, 0)), [0, 0, 0]),
        ("a.png", deep, "more than 8 bits a channel; convert it"),
        ("a.tif", deep, "more than 8 bits a channel; convert it"),
        ("a.jp2", deep, "more than 8 bits a channel; convert it"),
        ("a.tif", pillow("LAB", "TIFF"), "colour mode LAB; convert it"),
        ("a.png", bomb, "is not readable .*decompression bomb"),
        ("a.png", lambda path: path.write_bytes(b""), "is not readable .it has 0 bytes"),
        ("a.jpg", lambda path: path.write_bytes(b"<!DOCTYPE html>"), "is not readable .Pillow knows no such format"),
        ("a.png", lambda path: path.write_bytes(content(0)[:100]), "is not readable"),
    ],
)
def test_the_table_of_images_that_are_not_plain(tmp_path, name, make, expected):
    """A row of docs/own_data.md each, in a directory, a tar, a zip, a parquet file and an MDS shard."""
    (tmp_path / "set").mkdir()
    make(tmp_path / "set" / name)
    bytes_ = (tmp_path / "set" / name).read_bytes()
    archives = [KINDS[kind](tmp_path / kind, [("x", bytes_, 0, "")]) for kind in ("web tars", "zip", "parquet", "mds")]
    for path in (tmp_path / "set", *archives):
        source = open_images(str(path))
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                source.image(0)
            continue
        pixel = prepare(source.image(0), 8, 3, "crop")[4, 4].astype(int)
        assert np.abs(pixel - expected).max() <= 2
