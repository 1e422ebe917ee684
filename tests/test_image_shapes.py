"""The size of an image from its header alone: never another than that of the decoded image."""

import io
import shutil

import numpy as np
import pytest
import streaming_package
from PIL import ExifTags, Image, features

from ldt.data.images.bucket_rule import Size
from ldt.data.images.decode import HEADERS, decode, shape_of, upright
from ldt.data.images.open import open_images
from ldt.errors import InputError

FORMATS = ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO"]
OF_HEADERS = [name for name in HEADERS if name != "WEBP"]  # of which Pillow opens whole files alone


def file_of(kind: str, orientation: int = 0, height: int = 20, width: int = 12) -> bytes:
    """An image file with noise and, where its format has any, EXIF that says how it is turned."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))
    exif, out = Image.Exif(), io.BytesIO()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    keys = {"sizes": [(width, height)]} if kind == "ICO" else {}
    keys |= {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    image.save(out, kind, **({"exif": exif} if orientation else {}), **keys)
    return out.getvalue()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_that_of_the_decoded_image(kind, turn):
    assert features.check("webp")
    for orientation in range(9):
        content = file_of(kind, orientation)
        image = decode(content, "x")
        image = upright(image) if turn else image
        assert shape_of(content, "x", turn) == Size(image.height, image.width), orientation


def test_an_orientation_in_xmp_alone_counts_too():
    """As Pillow reads it where there is no EXIF."""
    image, out = Image.new("RGB", (12, 20)), io.BytesIO()
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image.save(out, "JPEG", xmp=packet)
    whole = upright(decode(out.getvalue(), "x"))
    assert shape_of(out.getvalue(), "x", True) == Size(whole.height, whole.width) == Size(12, 20)


@pytest.mark.parametrize("kind", OF_HEADERS)
def test_nothing_is_decoded_where_the_header_is_enough(kind):
    content = file_of(kind, 6, 200, 120)
    cut = content[: len(content) // 4]
    with pytest.raises(InputError, match="image x is not readable"):
        decode(cut, "x")
    assert shape_of(cut, "x", False) == Size(200, 120)
    if kind == "PNG":  # which may say after the pixels how it is turned
        with pytest.raises(InputError, match="image x is not readable"):
            shape_of(cut, "x", True)
    else:
        assert shape_of(cut, "x", True) == Size(120, 200)


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_what_has_no_header_is_named(content):
    with pytest.raises(InputError, match="image x is not readable"):
        shape_of(content, "x", False)


def write_mds(path, encoding, image):
    """As mosaicml-streaming writes them: pixels without a header (pil), or a file."""
    with streaming_package.load().MDSWriter(out=str(path), columns={"image": encoding, "label": "int"}) as writer:
        writer.write({"image": image, "label": 0})


def test_sources_of_every_kind_know_it(tmp_path):
    (tmp_path / "images" / "ant").mkdir(parents=True)
    (tmp_path / "images" / "ant" / "0.jpg").write_bytes(file_of("JPEG", 6))
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
    np.savez(tmp_path / "array.npz", arr_0=np.zeros((1, 20, 12, 3), np.uint8))
    write_mds(tmp_path / "pil", "pil", decode(file_of("PNG"), "x"))
    write_mds(tmp_path / "bytes", "bytes", file_of("JPEG", 6))
    for path, turn, expected in (
        (tmp_path / "images", True, Size(12, 20)),
        (tmp_path / "images", False, Size(20, 12)),
        (archive, True, Size(12, 20)),
        (tmp_path / "array.npz", True, Size(20, 12)),
        (tmp_path / "pil", True, Size(20, 12)),
        (tmp_path / "bytes", True, Size(12, 20)),
    ):
        assert open_images(str(path), turn=turn).shape(0) == expected
    assert open_images(str(tmp_path / "images"), turn=True, classes=["ant"]).shape(0) == Size(12, 20)
