"""Image sources: the same images in the same order from a folder, a tar and the package; each bad input named."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import xxhash
from PIL import Image

from ldt.data.images import EMBEDDED, prepare
from ldt.data.images.open import open_images
from ldt.errors import InputError


def picture(seed, size=(28, 28), mode="L"):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode=None)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for i, name in enumerate(["cat/b.png", "cat/a.PNG", "ant/deep/z.png", "bee/1.webp"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, format="WEBP" if name.endswith("webp") else "PNG", lossless=True)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "empty").mkdir()
    return root


def pack(folder, path, change=None):
    with tarfile.open(path, "w") as archive:
        for p in sorted(folder.rglob("*"), reverse=True):
            archive.add(p, p.relative_to(folder).as_posix(), recursive=False)
        if change is not None:
            archive.addfile(change, io.BytesIO(b"x" * change.size))
    return path


def test_folder_and_tar_are_the_same_in_sorted_order(folder, tmp_path):
    sources = [open_images(str(folder)), open_images(str(pack(folder, tmp_path / "images.tar")))]
    for source in sources:
        assert source.classes == ("ant", "bee", "cat")
        assert [source.label(i) for i in range(len(source))] == [0, 1, 2, 2]
        names = [source.name(i).removeprefix(f"{source.where}/") for i in range(4)]
        assert names == ["ant/deep/z.png", "bee/1.webp", "cat/a.PNG", "cat/b.png"]
    for i in range(4):
        first, second = (np.asarray(s.image(i).convert("L")) for s in sources)
        assert np.array_equal(first, second)
    assert np.array_equal(np.asarray(sources[0].image(3)), np.asarray(picture(0)))


def test_a_flat_folder_is_one_class(tmp_path):
    picture(0).save(tmp_path / "a.png")
    source = open_images(str(tmp_path))
    assert source.classes == ("images",) and source.label(0) == 0


def test_the_embedded_set_is_fashion_mnist():
    source = open_images(EMBEDDED)
    assert len(source) == 10_000 and len(source.classes) == 10
    assert np.bincount([source.label(i) for i in range(len(source))]).tolist() == [1000] * 10
    pixels = np.stack([np.asarray(source.image(i)) for i in range(len(source))])
    assert source.classes[source.label(0)] == "Boot" and pixels[0].sum() == 33456  # the first test image
    # hashes of the data set's own files, past their headers
    assert xxhash.xxh64(pixels.tobytes()).hexdigest() == "52d5cf267209b007"
    labels = bytes(source.label(i) for i in range(len(source)))
    assert xxhash.xxh64(labels).hexdigest() == "440bcedb1e3e9174"


def test_embedded_folder_and_tar_give_the_same_images(tmp_path):
    embedded = open_images(EMBEDDED)
    for i in range(0, 10_000, 997):
        path = tmp_path / "folder" / embedded.classes[embedded.label(i)] / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        embedded.image(i).save(path)
    for path in (tmp_path / "folder", pack(tmp_path / "folder", tmp_path / "images.tar")):
        source = open_images(str(path))
        assert len(source) == 11
        for i in range(len(source)):
            number = int(source.name(i)[-9:-4])
            assert source.classes[source.label(i)] == embedded.classes[embedded.label(number)]
            assert np.array_equal(prepare(source.image(i), 32, 1, "pad"), prepare(embedded.image(number), 32, 1, "pad"))


@pytest.mark.parametrize("path", [EMBEDDED, "folder"])
def test_images_can_be_read_from_threads(path, folder):
    from concurrent.futures import ThreadPoolExecutor

    source = open_images(str(folder) if path == "folder" else path)
    order = [0, 3, 1, 2] * 20
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda i: np.asarray(source.image(i)).tobytes(), order))
    assert all(r == np.asarray(source.image(i)).tobytes() for r, i in zip(results, order, strict=True))


def test_pad_centres_on_black_without_resizing():
    image = picture(1)
    padded = prepare(image, 32, 1, "pad")
    assert padded.shape == (32, 32, 1)
    assert np.array_equal(padded[2:30, 2:30, 0], np.asarray(image))
    assert padded.sum() == np.asarray(image).sum()


@pytest.mark.parametrize(("size", "box"), [((64, 32), (16, 0, 48, 32)), ((32, 64), (0, 16, 32, 48))])
def test_crop_takes_the_middle(size, box):
    image = picture(2, size)
    assert np.array_equal(prepare(image, 32, 1, "crop")[..., 0], np.asarray(image.crop(box)))


def test_crop_halves_by_box_first():
    """An image of four times the size is averaged over 4 × 4 blocks, up to four roundings, by two halvings."""
    image = picture(3, (128, 128))
    expected = np.asarray(image, np.float64).reshape(32, 4, 32, 4).mean((1, 3))
    assert np.abs(prepare(image, 32, 1, "crop")[..., 0] - expected).max() <= 2


def test_crop_scales_the_short_side():
    """A ramp stays a ramp under bicubic scaling: away from the ends, each pixel has the value at its centre."""
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (24, 1)))  # 60 × 24, value 4x
    crop = prepare(ramp, 16, 1, "crop")[..., 0].astype(float)
    expected = 4 * (((40 - 16) // 2 + np.arange(16) + 0.5) * 1.5 - 0.5)  # scaled to 40 × 16
    assert np.abs(crop - expected).max() <= 1
    edge = Image.fromarray(np.repeat(np.array([[50, 200]], np.uint8), [12, 12], axis=1).repeat(24, 0))
    sharp = prepare(edge, 16, 1, "crop")
    assert sharp.min() < 50 and sharp.max() > 200  # bicubic overshoots where bilinear and box do not


def test_channels_and_transparency():
    grey = prepare(picture(4, (32, 32), "RGB"), 32, 1, "pad")
    assert grey.shape == (32, 32, 1)
    assert prepare(picture(5, (32, 32)), 32, 3, "pad").shape == (32, 32, 3)
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    assert (prepare(clear, 32, 3, "pad") == 255).all()


def test_an_image_too_large_to_pad_is_refused():
    with pytest.raises(InputError, match="64x64 does not fit into 32x32; use images.fit=crop"):
        prepare(picture(0, (64, 64)), 32, 1, "pad")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing", "missing does not exist"),
        (lambda d: d / "empty", "holds no images"),
        (lambda d: d / "packed", r"archives such as n01440764\.tar, no images; unpack"),
        (lambda d: d / "file.txt", "neither a directory nor a tar, zip, parquet or .npz file"),
        (lambda d: "embedded:mnist", "no embedded image set embedded:mnist"),
        (lambda d: d / "mixed", "both in class directories and outside of them, such as stray.png"),
        (lambda d: d / "mixed2", "both in class directories and outside of them, such as stray.png"),
    ],
)
def test_bad_sources_are_named(tmp_path, make, message):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "n01440764.tar").write_bytes(b"")
    for root, name in (("mixed", "class"), ("mixed2", "images")):
        (tmp_path / root / name).mkdir(parents=True)
        picture(0).save(tmp_path / root / name / "a.png")
        picture(0).save(tmp_path / root / "stray.png")
    with pytest.raises(InputError, match=message):
        open_images(str(make(tmp_path)))


def damaged_tiff():
    """Its strips' offsets are of the type double: Pillow raises a TypeError."""
    out = io.BytesIO()
    Image.new("1", (24, 24)).save(out, "TIFF")
    return out.getvalue().replace(b"\x11\x01\x04\x00", b"\x11\x01\x0c\x00")


@pytest.mark.parametrize("content", [b"", b"not a png", damaged_tiff(), None])
def test_an_unreadable_image_is_named(folder, content):
    path = folder / "ant/deep/z.png"
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    with pytest.raises(InputError, match="z.png is not readable"):
        open_images(str(folder)).image(0)


def deep_grey_png(path):
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60).save(path)


def deep_colour_png(path):
    """Pillow reads such a file as 8-bit RGB and can't write one."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + bytes(8 * 6)) * 8))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))


def deep_ppm(path):
    path.write_bytes(b"P6 8 8 65535\n" + bytes(8 * 8 * 6))


@pytest.mark.parametrize(
    ("write", "name"), [(deep_grey_png, "deep.png"), (deep_colour_png, "deep.png"), (deep_ppm, "deep.ppm")]
)
def test_sixteen_bit_images_are_named(tmp_path, write, name):
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} has more than 8 bits"):
        open_images(str(tmp_path)).image(0)


def test_other_colour_modes_are_named(tmp_path):
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    with pytest.raises(InputError, match="lab.tif has the colour mode LAB"):
        open_images(str(tmp_path)).image(0)


def test_linked_class_directories_count_and_loops_are_named(tmp_path):
    for path in ("set/ant", "elsewhere"):
        (tmp_path / path).mkdir(parents=True)
        picture(0).save(tmp_path / path / "a.png")
    (tmp_path / "set" / "bee").symlink_to(tmp_path / "elsewhere")
    assert open_images(str(tmp_path / "set")).classes == ("ant", "bee")
    (tmp_path / "set" / "ant" / "again").symlink_to(tmp_path / "set")
    with pytest.raises(InputError, match="again links back to"):
        open_images(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../outside.png", tarfile.REGTYPE, "outside of the archive, ../outside.png"),
        ("/etc/outside.png", tarfile.REGTYPE, "outside of the archive, /etc/outside.png"),
        ("cat/link.png", tarfile.SYMTYPE, "has a link, cat/link.png"),
    ],
)
def test_dangerous_members_are_refused(folder, tmp_path, name, kind, message):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, 1 if kind == tarfile.REGTYPE else 0
    member.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    with pytest.raises(InputError, match=message):
        open_images(str(pack(folder, tmp_path / "bad.tar", member)))


@pytest.mark.parametrize("cut", ["in the data", "before a header", "in a header", "a damaged header"])
def test_a_cut_or_damaged_tar_is_named(folder, tmp_path, cut):
    path = pack(folder, tmp_path / "bad.tar")
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]  # `pack` puts a file there
    content = bytearray(path.read_bytes())
    if cut == "a damaged header":
        content[last.offset + 150] ^= 255  # within its checksum
    else:
        at = {"in the data": last.offset_data + 1, "before a header": last.offset, "in a header": last.offset + 100}
        del content[at[cut] :]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad.tar is (cut or damaged|not a whole)"):
        open_images(str(path))


def test_hidden_and_system_files_are_no_images_and_their_directories_no_classes(folder, tmp_path):
    """What notebooks, network disks and macOS leave behind."""
    for name in (".ipynb_checkpoints/a.png", "@eaDir/b.png", "__MACOSX/cat/._a.PNG", "lost+found/c.png", ".d.png",
                 "cat/._b.png", "cat/.hidden/e.png", "bee/@eaDir/f.png"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"Mac OS X        ")
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    for source in (open_images(str(folder)), open_images(str(pack(folder, tmp_path / "images.tar")))):
        assert source.classes == ("ant", "bee", "cat") and len(source) == 4
        assert source.barren == () and {*source.left_out} == {"hidden", ".txt"}


def test_what_pillow_opens_is_taken_and_the_rest_is_told(tmp_path):
    root = tmp_path / "set"
    for name, format in (("a.gif", "GIF"), ("b.jfif", "JPEG"), ("c.jpe", "JPEG"), ("d.jp2", "JPEG2000"), ("e", "PNG"),
                         ("f.avif", "AVIF"), ("g.dib", "DIB"), ("h.tga", "TGA"), ("i.apng", "PNG")):  # fmt: skip
        (root / "some").mkdir(parents=True, exist_ok=True)
        picture(0, mode="RGB").save(root / "some" / name, format=format)
    (root / "some" / "README").write_text("words")
    (root / "some" / "clip.mp4").write_bytes(b"x")
    (root / "raw").mkdir()
    for name in ("1.heic", "2.heic", "3.CR2"):
        (root / "raw" / name).write_bytes(b"x")
    for source in (open_images(str(root)), open_images(str(pack(root, tmp_path / "images.tar")))):
        assert len(source) == 9 and all(source.image(i).size == (28, 28) for i in range(9))
        said = "; ".join(source.remarks())
        assert "2 .heic" in said and "1 .cr2" in said and "1 .mp4" in said and "1 without an ending" in said
        assert source.classes == ("some",) and "no class, as they hold no images: raw" in said


def test_labels_of_dataset_json(tmp_path):
    """As StyleGAN's, edm2's and REPA's tools write it: directories are not classes there."""
    root = tmp_path / "set"
    names = [f"0000{i // 3}/img{i:08d}.png" for i in range(6)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root / name)
    labels = root / "dataset.json"

    def opened():
        return [open_images(str(root)), open_images(str(pack(root, tmp_path / "images.tar")))]

    labels.write_text(json.dumps({"labels": [[n, i % 4] for i, n in reversed([*enumerate(names)])]}))
    for source in opened():
        assert [source.label(i) for i in range(6)] == [0, 1, 2, 3, 0, 1]
        assert source.classes == ("0", "1", "2", "3") and not source.remarks()
    labels.write_text(json.dumps({"labels": None}))
    assert all(source.classes == ("images",) for source in opened())
    for content, said in [
        ('{"labels": [["00000/img00000000.png", 1]]}', "no label for 00000/img00000001.png"),
        (json.dumps({"labels": [[n, -1] for n in names]}), "has -1 as the label of"),
        (json.dumps({"labels": [[n, [0, 1]] for n in names]}), r"has \[0, 1\] as the label of"),
        ("{", "is not readable"),
        ("[]", "is not readable"),
        ('{"labels": [1]}', "is not readable"),
    ]:
        labels.write_text(content)
        for path in (root, pack(root, tmp_path / "images.tar")):
            with pytest.raises(InputError, match=f"dataset.json .*{said}"):
                open_images(str(path))


def test_shards_of_img2dataset_are_no_classes(tmp_path):
    for k in range(2):
        (tmp_path / f"0000{k}").mkdir()
        (tmp_path / f"0000{k}_stats.json").write_text("{}")
        (tmp_path / f"0000{k}.parquet").write_bytes(b"PAR1")
        for i in range(2):
            stem = tmp_path / f"0000{k}" / f"0000{k}{i:04d}"
            picture(i).save(stem.with_suffix(".jpg"))
            stem.with_suffix(".txt").write_text(f"caption {k} {i}")
            stem.with_suffix(".json").write_text("{}")
    source = open_images(str(tmp_path))
    assert source.classes == ("images",) and source.captioned == len(source) == 4 and not source.remarks()
    assert [source.caption(i) for i in range(4)] == ["caption 0 0", "caption 0 1", "caption 1 0", "caption 1 1"]


def test_order_is_that_of_whole_names(tmp_path):
    """`a-b/1.png` comes before `a/1.png`, as in every release so far: encoded data depend on it."""
    for name in ("a/1.png", "a-b/1.png", "a/b/2.png", "a/b-c.png", "é/1.png", "Z/1.png", "a/\udce9.png"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(path)
    source = open_images(str(tmp_path / "set"))
    names = [source.key(i) for i in range(len(source))]
    assert names == sorted(names, key=lambda n: n.encode("utf-8", "surrogateescape")) and names[-2] == "a/\udce9.png"
    assert source.classes == ("Z", "a", "a-b", "é") and [source.label(i) for i in range(7)] == [0, 2, 1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it has 0 bytes"), (b"<html>404 Not Found</html>", "begins with b'<html>404 Not Fo'")],
)
def test_the_reason_is_one_that_helps(tmp_path, content, said):
    (tmp_path / "a\nb.png").write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        open_images(str(tmp_path)).image(0)
    assert "\n" not in str(error.value) and "a\\nb.png" in str(error.value) and "0x" not in str(error.value)
