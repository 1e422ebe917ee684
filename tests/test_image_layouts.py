"""What lies beside images: labels and captions in side files, JSON keys, metadata, dataset.json, whatever holds it."""

import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import streaming_package
from bench_index import WRITERS
from image_sets import KINDS, add, content, directory, edm2_zip, imagefolder, mds, web_tars
from PIL import Image

from ldt.data.images import Fields, blobs, listing, open_images
from ldt.data.images import parquet as parquet_images
from ldt.data.images.blobs import LocalBlob
from ldt.data.images.decode import _is_deep
from ldt.data.images.listing import Names
from ldt.data.images.zip_directory import entries
from ldt.errors import InputError


def as_directory(root, members):
    for name, data in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def as_tar(root, members):
    root.mkdir(parents=True)
    with tarfile.open(root / "0.tar", "w") as archive:
        for name, data in members:
            add(archive, name, data)
    return str(root)


def as_zip(root, members):
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "0.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return str(root)


def in_memory(root, members):
    for name, data in members:
        fsspec.filesystem("memory").pipe_file(f"/layouts{root}/{name}", data)
    return f"memory://layouts{root}"


@pytest.fixture(autouse=True)
def clean_memory():
    yield
    memory = fsspec.filesystem("memory")
    if memory.exists("/layouts"):
        memory.rm("/layouts", recursive=True)


FORMS = [as_directory, as_tar, as_zip, in_memory]


@pytest.mark.parametrize("form", FORMS)
def test_labels_and_captions_beside_images(tmp_path, form):
    """By ending in letters of either case, by one of two dots, and by JSON key: alike from directories and archives."""
    names = ["a", "b", "c"]
    facts = [{"said": f"{n} by key", "kind": "xyx"[i]} for i, n in enumerate(names)]
    members = [(f"{n}.png", content(i)) for i, n in enumerate(names)]
    members += [(name, f"{name[0]} by ending".encode()) for name in ("a.txt", "b.Txt", "c.TXT")]
    members += [(f"{n}.long.txt", f"{n} by two dots".encode()) for n in names]
    members += [(f"{n}.json", json.dumps(f).encode()) for n, f in zip(names, facts, strict=True)]
    members += [(f"{n}.cls", str(i).encode()) for i, n in enumerate(names)]
    path = form(tmp_path / "set", members)
    for fields, labels, by in [
        (Fields(), ["0", "1", "2"], "ending"),
        (Fields("kind", "said"), ["x", "y", "x"], "key"),
        (Fields("", "long.txt"), ["0", "1", "2"], "two dots"),
    ]:
        source = open_images(path, fields)
        assert [source.classes[source.label(i)] for i in range(3)] == labels
        assert [source.caption(i) for i in range(3)] == [f"{n} by {by}" for n in names] and source.captioned == 3
        assert all(source.caption_size(i) > 0 for i in range(3))
    for fields, said in [
        (Fields("nothing"), "has no images.label=nothing; endings there: .cls, .json, .long.txt|.png, .txt"),
        (Fields("", "nothing"), "has no images.caption=nothing; endings there: .*, keys in .json: said, kind"),
    ]:
        with pytest.raises(InputError, match=said):
            open_images(path, fields)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_json_beside_an_image_may_hold(tmp_path, form):
    def opened(*facts, fields=Fields("kind", "said")):  # noqa: B008
        members = [(f"{i}.png", content(i)) for i in range(len(facts))]
        members += [(f"{i}.json", text.encode()) for i, text in enumerate(facts)]
        return open_images(form(tmp_path / str(len(list(tmp_path.iterdir()))) / str(id(facts)), members), fields)

    some = opened('{"kind": 1, "said": "x"}', '{"kind": 0}', '{"kind": 1, "said": null}')
    assert [some.label(i) for i in range(3)] == [1, 0, 1] and some.captioned == 1 and some.caption(2) == ""
    for facts, said in [
        (('{"kind": 1, "said": "x"}', '{"said": "y"}'), "image 1 has no label .kind., and others have"),
        (('{"said": "x"}', '{"kind": 1}'), "image 0 has no label .kind., and others have"),
        (('{"kind": [1]}',), r"0.json has \[1\] as kind; a whole number or a name is expected"),
        (("{",), "0.json is not readable as JSON"),
        (("[]",), "0.json holds no keys"),
    ]:
        with pytest.raises(InputError, match=said):
            opened(*facts)


def test_a_shard_without_captions_is_no_mistake(tmp_path):
    """Nor is one without images: only if no image has any is the name wrong."""
    (tmp_path / "set").mkdir()
    for k, facts in enumerate([None, {"said": "x", "kind": 0}, {"said": None, "kind": 1}]):
        with tarfile.open(tmp_path / "set" / f"{k}.tar", "w") as archive:
            if facts:
                add(archive, f"{k}.png", content(k))
                add(archive, f"{k}.json", json.dumps(facts).encode())
    source = open_images(str(tmp_path / "set"), Fields("kind", "said"))
    assert [source.caption(i) for i in range(2)] == ["x", ""] and source.captioned == 1
    with pytest.raises(InputError, match="set has no images.caption=words; .*keys in .json: said, kind"):
        open_images(str(tmp_path / "set"), Fields("kind", "words"))


def labels_zip(path, first, labels):
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(4):
            archive.writestr(f"{first:05d}/img{i:08d}.png", content(i))
        if labels:
            pairs = [[f"{first:05d}/img{i:08d}.png", label] for i, label in enumerate(labels)]
            archive.writestr("dataset.json", json.dumps({"name": "x", "labels": pairs, "more": [1, {}]}, indent=1))


def test_each_of_several_zips_has_its_own_labels(tmp_path):
    (tmp_path / "set").mkdir()
    for k, labels in enumerate([[0, 1, 0, 2], [2, 2, 1, 0]]):
        labels_zip(tmp_path / "set" / f"{k}.zip", 0, labels)  # of the same names, too
    source = open_images(str(tmp_path / "set"))
    assert [source.label(i) for i in range(8)] == [0, 1, 0, 2, 2, 2, 1, 0] and source.classes == ("0", "1", "2")
    labels_zip(tmp_path / "set" / "1.zip", 1, None)
    with pytest.raises(InputError, match=r"1.zip has no dataset.json, and others of .*set have"):
        open_images(str(tmp_path / "set"))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_below_an_address(tmp_path, kind):
    samples = [(f"{'ab'[i % 2]}/{i}", content(i), i % 2, f"caption {i}") for i in range(6)]
    root = imagefolder(tmp_path / "set", samples, kind)
    path = in_memory(Path("/remote"), [(p.name, p.read_bytes()) for p in root.iterdir()])
    here, there = open_images(str(root)), open_images(path)
    for source in (here, there):
        assert source.classes == ("a", "b") and [source.caption(i) for i in range(6)] == [s[3] for s in samples]
    assert [there.content(i) for i in range(6)] == [here.content(i) for i in range(6)]
    assert [there.size(i) for i in range(6)] == [here.size(i) for i in range(6)]


METADATA = [
    ("jsonl", '{"file_name": "0.png", "text": "a"}\n' * 2, "names 0.png twice; write one row"),
    ("jsonl", '{"file_name": "0.png", "label": [1]}\n', r"row 1 has \[1\] as label; a whole number or a name"),
    ("jsonl", '{"file_name": "0.png", "label": 1}\n{"file_name": "1.png"}\n', "has no label for 1.png; add it"),
    ("jsonl", '{"file_name": "../0.png"}\n', "row 1 names ../0.png, which is outside of its directory"),
    ("jsonl", '{"file_name": "9.png"}\n', "names 9.png, which is not there"),
    ("jsonl", '{"file_name": "notes.md"}\n', "names notes.md, which is no image by its ending"),
    ("jsonl", "\n", "names no images"),
    ("jsonl", "[]\n", "row 1 has no readable file_name"),
    ("csv", "file_name,label\n0.png,a\n1.png\n", "has no label for 1.png; add it"),
    ("csv", "file_name;label\n0.png;a\n", "row 1 has no readable file_name"),
    ("csv", b"file_name,text\n0.png,caf\xe9\n", "is not UTF-8 text"),
]


@pytest.mark.parametrize("form", [as_directory, in_memory])
@pytest.mark.parametrize(("kind", "rows", "said"), METADATA)
def test_bad_metadata_is_named(tmp_path, form, kind, rows, said):
    members = [(f"{i}.png", content(i)) for i in range(2)] + [("notes.md", b"words")]
    text = rows if isinstance(rows, bytes) else rows.encode()
    path = form(tmp_path / "set", [*members, (f"metadata.{kind}", text)])
    with pytest.raises(InputError, match=f"metadata.{kind}.*{said}"):
        open_images(path)


def test_metadata_says_which_images_and_may_differ_from_row_to_row(tmp_path):
    rows = '{"file_name": "./a/0.png"}\n{"file_name": "a/1.png", "caption": "one\u2028line", "more": 1}\n'
    path = as_directory(tmp_path / "set", [(f"a/{i}.png", content(i)) for i in range(3)])
    (tmp_path / "set" / "metadata.jsonl").write_text(rows)
    source = open_images(path)
    assert [source.key(i) for i in range(len(source))] == ["a/0.png", "a/1.png"] and source.classes == ("a",)
    assert source.captioned == 1 and source.caption(1) == "one\u2028line"
    assert "1 images that metadata.jsonl does not name" in "; ".join(source.remarks())


@pytest.mark.parametrize("form", FORMS)
def test_metadata_that_is_not_read_is_said(tmp_path, form):
    path = form(tmp_path / "set", [("train/0.png", content(0)), ("train/metadata.jsonl", b'{"file_name": "0.png"}')])
    assert "train/metadata.jsonl is not read: metadata.jsonl and metadata.csv are" in "; ".join(
        open_images(path).remarks()
    )


@pytest.mark.parametrize("form", [as_directory, in_memory])
def test_images_beside_archives_are_not_passed_over(tmp_path, form):
    archive = Path(as_tar(tmp_path / "other", [("a.png", content(0))])) / "0.tar"
    path = form(tmp_path / "set", [("x.png", content(1)), ("0.tar", archive.read_bytes())])
    with pytest.raises(InputError, match=r"mixes kinds of files: images such as x.png, and 0.tar; .*\*.tar"):
        open_images(path)
    assert len(open_images(f"{path}/*.tar")) == 1


def test_patterns_of_choices_and_directories(tmp_path):
    root = web_tars(tmp_path / "set", [(f"x/{i}", content(i), 0, "c") for i in range(40)])
    chosen = open_images(f"{root}/0000{{2,0}}.tar")
    assert [chosen.key(0), len(chosen)] == ["00000034.png", 6 + 17]
    assert len(open_images(f"{tmp_path}/{{set,set}}/{{00000..00001}}.tar")) == 4 * 17
    with pytest.raises(InputError, match="stands for directories such as .*set; give the one that holds them"):
        open_images(f"{tmp_path}/s*")
    (tmp_path / "one.tar.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(InputError, match="one.tar.gz is compressed as a whole; unpack it"):
        open_images(f"{tmp_path}/one.tar.gz")


# ------------------------------------------------------------------------------------------------------- whole tables


BAD_IMAGES = [
    (b"", "it has 0 bytes"),
    (b"<html>404</html>", "Pillow knows no such format"),
    (content(0)[:70], "is not readable"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_are_named_in_every_kind(tmp_path, kind):
    deep = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep, "PNG")
    other = io.BytesIO()
    Image.new("LAB", (8, 8)).save(other, "TIFF")
    bad = [*BAD_IMAGES, (deep.getvalue(), "more than 8 bits a channel"), (other.getvalue(), "colour mode LAB")]
    samples = [(f"{['ant', 'bee', 'cat'][i % 3]}/{i:05d}", data, i % 3, "c") for i, (data, _) in enumerate(bad)]
    path = str(KINDS[kind](tmp_path / "set", samples))
    if kind in ("pattern", "glob"):
        path = str(tmp_path / "set")
    source = open_images(path)
    assert len(source) == len(bad), "none is left out"
    said = dict(bad)
    for i in range(len(source)):
        with pytest.raises(InputError, match=f"image .*{said[source.content(i)]}") as error:
            source.image(i)
        assert source.name(i) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_hidden_files_and_other_endings_in_every_form(tmp_path, form):
    members = [("cat/a.png", content(0)), ("cat/._a.png", b"Mac OS X"), ("__MACOSX/cat/b.png", b"x")]
    members += [("cat/.DS_Store", b"x"), ("cat/Thumbs.db", b"x"), ("raw/1.heic", b"x"), ("cat/plain", content(1))]
    source = open_images(form(tmp_path / "set", members))
    assert [source.key(i) for i in range(len(source))] == ["cat/a.png", "cat/plain"] and source.classes == ("cat",)
    said = "; ".join(source.remarks())
    assert "1 .heic" in said and " hidden" in said and "no class, as they hold no images: raw" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [("../x.png", "outside of the archive, ../x.png"), ("/etc/x.png", "outside"), (r"..\x.png", "out")],
)
def test_members_of_zips_outside_and_links_are_refused(tmp_path, name, said):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, content(0))
    with pytest.raises(InputError, match=said):
        open_images(str(tmp_path / "a.zip"))
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match=r"b.zip has a link, link.png"):
        open_images(str(tmp_path / "b.zip"))


def test_headers_that_say_more_than_eight_bits():
    """Files with the headers of 8-bit ones changed: Pillow writes no deeper ones and scales what it reads."""
    for kind, mark, at, value in (("JPEG2000", b"\xff\x4f\xff\x51", 42, 15), ("AVIF", b"av1C", 6, 64 + 12)):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, kind)
        data = bytearray(out.getvalue())
        image = Image.open(io.BytesIO(bytes(data)))
        assert not _is_deep(image, bytes(data))
        data[data.index(mark) + at] = value
        assert _is_deep(image, bytes(data))


def test_mds_of_raw_pixels(tmp_path):
    """The encoding `pil`, and shards that do not agree."""
    images = [Image.open(io.BytesIO(content(i))).convert(mode) for i, mode in enumerate(["RGB", "L", "P", "I;16"])]
    with streaming_package.load().MDSWriter(out=str(tmp_path / "a"), columns={"image": "pil", "label": "int"}) as out:
        for i, image in enumerate(images):
            out.write({"image": image, "label": i})
    source = open_images(str(tmp_path / "a"))
    for i in (0, 1):
        assert source.image(i).mode == images[i].mode
        assert np.array_equal(np.asarray(source.image(i)), np.asarray(images[i]))
    with pytest.raises(InputError, match="sample 3 of .*mds has more than 8 bits"):
        source.image(3)
    mds(tmp_path / "b", [("x", content(0), 0, "c")])
    (tmp_path / "a" / "shard.00009.mds").write_bytes((tmp_path / "b" / "shard.00000.mds").read_bytes())
    with pytest.raises(InputError, match=r"shard.00009.mds is of another schema than .*shard.00000.mds"):
        open_images(str(tmp_path / "a"))


def test_what_parquet_files_are_taken_for_is_said(tmp_path, monkeypatch):
    columns = {"photo": [content(0), content(1)], "mask": [b"x", b"y"], "label": [0, 1]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=1)
    assert open_images(str(tmp_path)).remarks() == ["images are the column photo; mask may hold some too"]
    monkeypatch.setattr(parquet_images, "KEPT", 100)
    source = open_images(str(tmp_path))
    assert "GB of images, which are read at once; write the files again with row_group_size" in source.remarks()[1]
    assert [source.content(i) for i in (0, 1, 0)] == [content(0), content(1), content(0)]
    assert len(source._groups) == 1


# ------------------------------------------------------------------------------------------ arrays in place of objects


@pytest.mark.parametrize("large", [False, True])
def test_the_directory_of_a_zip_is_what_zipfile_reads(tmp_path, monkeypatch, large):
    if large:  # 64-bit numbers wherever they may be
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    path = tmp_path / "a.zip"
    path.write_bytes(b"#!/bin/sh\n" * 7)  # what unpacks itself begins with a program
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK and so on" * 9
        for i, name in enumerate(["a.png", "dir/é.png", "dir/", "日本.jpg", "b"]):
            info = zipfile.ZipInfo(name)
            info.external_attr, info.comment = 0o100644 << 16, b"c" * i
            archive.writestr(info, content(i), zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as archive:
        expected = [
            (
                e.filename,
                e.flag_bits,
                e.compress_type,
                e.compress_size,
                e.file_size,
                e.header_offset,
                e.external_attr >> 16,
            )
            for e in archive.infolist()
        ]
    assert [tuple(e) for e in entries(LocalBlob(path))] == expected
    whole = path.read_bytes()
    at = whole.rindex(b"PK\1\2")
    for spoiled in (whole[:-150], whole[:at] + b"PK\1\3" + whole[at + 4 :], whole[100:]):
        path.write_bytes(spoiled)
        with pytest.raises((ValueError, struct.error, InputError)):
            list(entries(LocalBlob(path)))


def test_names_are_found_taken_and_counted_in_arrays():
    words = [f"{'x' * (i * 7 % 40)}/{i % 13}" for i in range(9000)]
    names, order = Names.of(words), np.random.default_rng(0).permutation(9000)
    taken = names.take(order)
    assert list(taken) == [words[i] for i in order.tolist()]
    wanted = Names.of(["nothing", *(words[i] for i in (17, 8999, 3)), ""])
    last = {word: i for i, word in enumerate(words)}
    assert names.positions(wanted).tolist() == [last.get(w, -1) for w in wanted]
    assert names.depths().tolist() == [w.count("/") for w in words] and len(Names.of([]).positions(wanted)) == 5
    assert Names.of(["a", "b", "a", "b", "b"]).repeated().tolist() == [2, 3, 4]


@pytest.mark.parametrize("kind", WRITERS)
def test_no_image_has_a_python_object_of_its_own(tmp_path, monkeypatch, kind):
    """With labels, captions and all. An object for each entry of a zip takes 613 bytes more, one for each row 774."""
    monkeypatch.setattr(listing, "CHUNK", 256)  # what is handled at a time is not to be taken for what grows
    monkeypatch.setattr(listing, "FEW", 64)
    monkeypatch.setattr(blobs, "AHEAD", 1 << 16)
    peaks = []
    for count in (1000, 3000):
        (tmp_path / str(count)).mkdir()
        WRITERS[kind](tmp_path / str(count), 2, count // 2)
        tracemalloc.start()
        source = open_images(str(tmp_path / str(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(source) == count
    assert (peaks[1] - peaks[0]) / 2000 < 450


def test_directories_edm2_and_web_tars_agree(tmp_path):
    """Whatever names the labels, an image has the same one."""
    samples = [(f"{['ant', 'bee', 'cat'][i % 3]}/{i:05d}", content(i), i % 3, f"c{i}") for i in range(12)]
    found = []
    for make in (directory, edm2_zip, web_tars, imagefolder):
        (tmp_path / make.__name__).mkdir()
        source = open_images(str(make(tmp_path / make.__name__ / "set", samples)))
        found.append(
            {source.content(i): (source.classes[source.label(i)], source.caption(i)) for i in range(len(source))}
        )
    assert all(one == found[0] for one in found) and len(found[0]) == 12
