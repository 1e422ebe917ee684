"""`ldt encode images.buckets=…`: every image in the bucket that keeps most of it, nothing stretched, all resumable."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from contents import files
from encoding_cases import encode_case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldt import cli
from ldt.data.images import open_encoded, prepare
from ldt.data.images.bucket_rule import Size, choose, is_enlarged, kept
from ldt.data.shards import Manifest, open_shards
from ldt.data.shards.buckets import read_buckets
from ldt.errors import InputError
from ldt.log import read_jsonl
from ldt.models.autoencoder import Autoencoder

BUCKETS = ["8x8", "16x16", "8x12", "12x8"]  # height first
SHAPES = [(8, 8)] * 5 + [(20, 19)] * 4 + [(9, 13)] * 6 + [(30, 20)] * 5 + [(5, 9)] * 3
EXPECTED = ["8x8"] * 5 + ["16x16"] * 4 + ["8x12"] * 6 + ["12x8"] * 5 + ["8x12"] * 3
sides = st.integers(1, 60)
some_sizes = st.lists(st.builds(Size, sides, sides), min_size=1, max_size=5, unique=True)


@given(st.builds(Size, sides, sides), some_sizes)
@example(Size(1, 1), [Size(2, 1), Size(1, 2)])  # as much is left of it by both
@settings(deadline=None)
def test_the_bucket_keeps_most_and_enlarges_only_where_it_must(image, buckets):
    chosen = buckets[choose(image, buckets, "crop")]
    for other in buckets:
        assert kept(image, other) <= kept(image, chosen)
        if kept(image, other) == kept(image, chosen):  # of these the largest that it fills, else the smallest
            larger = other.height * other.width - chosen.height * chosen.width
            if is_enlarged(image, chosen):
                assert is_enlarged(image, other) and larger >= 0
            else:
                assert is_enlarged(image, other) or larger <= 0


@given(st.builds(Size, sides, sides), some_sizes)
@settings(deadline=None)
def test_padding_takes_the_smallest_bucket_that_holds_the_image(image, buckets):
    holding = [b for b in buckets if b.height >= image.height and b.width >= image.width]
    if not holding:
        with pytest.raises(InputError, match=rf"{image.width}x{image.height} .* fits into none of images.buckets"):
            choose(image, buckets, "pad")
    else:
        chosen = buckets[choose(image, buckets, "pad")]
        assert chosen in holding and all(chosen.height * chosen.width <= b.height * b.width for b in holding)


def test_what_a_crop_keeps_is_what_it_cuts_off():
    assert kept(Size(10, 20), Size(8, 8)) == Fraction(1, 2)
    assert kept(Size(30, 20), Size(12, 8)) == 1
    assert kept(Size(8, 8), Size(8, 12)) == kept(Size(8, 8), Size(12, 8)) == Fraction(2, 3)


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (40, 10)])
def test_nothing_is_stretched(size):
    """A disc stays one: as wide as high, whatever it is cropped to."""
    y, x = np.mgrid[:96, :96] - 47.5
    image = Image.fromarray(np.where(x**2 + y**2 < 12**2, 255, 0).astype(np.uint8))
    pixels = prepare(image, size, 1, "crop")[..., 0] > 127
    assert pixels.shape == size
    scale = max(size) / 96
    height, width = pixels.any(1).sum(), pixels.any(0).sum()
    assert abs(height - min(24 * scale, size[0])) <= 2 and abs(width - min(24 * scale, size[1])) <= 2


def test_padding_centres_and_never_resizes():
    image = Image.fromarray(np.full((4, 6), 200, np.uint8))
    pixels = prepare(image, (8, 12), 1, "pad")[..., 0]
    assert (pixels[2:6, 3:9] == 200).all() and pixels.sum() == 24 * 200
    with pytest.raises(InputError, match="an image of 6x4 does not fit into 4x8"):
        prepare(image, (8, 4), 1, "pad")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SHAPES):
        directory = root / ("ant", "bee")[i % 2]
        directory.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width), np.uint8)).save(directory / f"{i:03d}.png")
    return root


@pytest.fixture
def arguments(images, autoencoder, tmp_path):
    def make(out: Path, **changes: object) -> list[str]:
        given = {
            "images.path": images, "images.buckets": f"[{','.join(BUCKETS)}]", "images.fit": "crop",
            "autoencoder": autoencoder, "output": out, "shard_samples": 2, "validation_fraction": 0.2,
            "images.index_dir": tmp_path / "index",
        }  # fmt: skip
        return [f"{key}={value}" for key, value in (given | changes).items()]

    return make


def test_every_image_is_in_its_bucket_once_cropped_and_encoded(arguments, images, autoencoder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["encode", *arguments(out, dtype="fp32")]) == 0
    said = capsys.readouterr()
    assert "bucket 8x12: 9 images, " in said.err and "3 enlarged" in said.err
    assert said.out.splitlines()[-1] == f"latent shards: {out}"
    found = read_buckets(out)
    assert list(found) == BUCKETS
    network = Autoencoder.load(str(autoencoder))
    by_name = sorted(images.rglob("*.png"))
    for name in BUCKETS:
        shards = open_shards(out / name)
        height, width = map(int, name.split("x"))
        assert shards.manifest.latent_shape == (2, height // 2, width // 2)
        assert shards.manifest.fingerprint == found[name]
        assert shards.manifest.classes == ["ant", "bee"]
        mine = [p for p in by_name if EXPECTED[int(p.stem)] == name]
        assert shards.manifest.recipe["number of images"] == len(mine)
        encoded = [open_encoded(shards.manifest.recipe).key(i) for i in range(len(mine))]
        assert encoded == [p.relative_to(images).as_posix() for p in mine]  # as the reference of a score
        held_out = open_shards(out / name / "validation")
        assert shards.manifest.samples + held_out.manifest.samples == len(mine)
        means = [part.read(*_all(part)).mean_nCHW for part in (shards, held_out)]
        pixels = np.stack([prepare(Image.open(p), (height, width), 1, "crop") for p in mine])

        theirs = network.encode(torch.from_numpy(pixels))[0].numpy()
        ours = np.concatenate(means)
        order = [int(np.abs(theirs - latent).max((1, 2, 3)).argmin()) for latent in ours]
        assert sorted(order) == list(range(len(mine)))
        assert ours == pytest.approx(theirs[order], abs=1e-4)
    crops = json.loads((out / "buckets.json").read_text())["recipe"]["images"]
    assert crops["12x8"] == {"images": 5, "enlarged": 0, "kept": 1.0}
    assert crops["8x12"]["enlarged"] == 3


def _all(shards):
    counts = shards.manifest.counts
    return np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])


def test_any_number_of_ranks_and_a_restart_make_the_same_files(pool, arguments, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    pool(1).run(encode_case, settings=arguments(one))
    pool(3).run(encode_case, settings=arguments(two))
    assert files(two) == files(one)
    before = files(two)
    shutil.rmtree(two / "12x8")  # as if it had been stopped before that one
    pool(2).run(encode_case, settings=arguments(two))
    assert files(two) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images.buckets": "[8x8,oops]"}, "images.buckets has 'oops', which is not HEIGHTxWIDTH"),
        ({"images.buckets": "[8x8,8x8]"}, "images.buckets names 8x8 twice"),
        ({"images.buckets": "[8x8,7x8]"}, "sides divisible by 2, not 7x8"),
        ({"images.size": 8}, "images.size=8 and images.buckets are both given"),
        ({"whitening": "element"}, "whitening=element is by statistics of one latent shape"),
        ({"target": "efficientnet_lite0"}, "target=efficientnet_lite0 has one grid of patches, and images.buckets"),
        ({"images.fit": "pad"}, "fits into none of images.buckets=8x8,16x16,8x12,12x8"),
    ],
)
def test_wrong_buckets_are_refused(arguments, tmp_path, capsys, changes, words):
    assert cli.main(["encode", *arguments(tmp_path / "out", **changes)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.fixture
def spoiled(images, tmp_path):
    """The images and three that can't be read: one without a header, one cut off after it, one too large to pad."""
    copy = shutil.copytree(images, tmp_path / "spoiled")
    noise = np.random.default_rng(1).integers(0, 255, (12, 8), np.uint8)
    (copy / "ant" / "no_image.png").write_bytes(b"no image")
    Image.fromarray(noise).save(copy / "ant" / "cut.png")
    content = (copy / "ant" / "cut.png").read_bytes()
    (copy / "ant" / "cut.png").write_bytes(content[: len(content) // 2])
    return copy


def test_unreadable_images_are_skipped_where_asked(pool, arguments, spoiled, tmp_path, capsys, monkeypatch):
    """The rest is as if they had never been there; each is named with its reason, once."""
    assert cli.main(["encode", *arguments(tmp_path / "stopped", **{"images.path": spoiled})]) == 2
    assert f"image {spoiled}/ant/no_image.png is not readable" in capsys.readouterr().err
    out, plain, skip = tmp_path / "out", tmp_path / "plain", {"images.path": spoiled, "images.on_error": "skip"}
    with monkeypatch.context() as patch:
        patch.setattr("ldt.encoding.buckets._why_unreadable", lambda *_: pytest.fail("asked a second time"))
        assert cli.main(["encode", *arguments(out, **skip)]) == 0
    said = capsys.readouterr().err
    assert f"left out: 1 image, named with the reasons in {out}/left_out.jsonl" in said
    assert f"left out: 1 image, named with the reasons in {out}/12x8/left_out.jsonl" in said
    left = {path: list(read_jsonl(path)) for path in sorted(out.rglob("left_out.jsonl"))}
    assert [(path.parent.name, line["image"]) for path, lines in left.items() for line in lines] == [
        ("12x8", "ant/cut.png"),
        ("out", "ant/no_image.png"),
    ]
    assert all("is not readable" in line["reason"] for lines in left.values() for line in lines)
    assert cli.main(["encode", *arguments(plain)]) == 0
    for name in BUCKETS:
        ours, theirs = (Manifest.load(root / name) for root in (out, plain))
        assert ours.samples == theirs.samples and ours.recipe["images.on_error"] == "skip"
        with pytest.raises(InputError, match="encoded without the unreadable images"):
            open_encoded(ours.recipe)
    assert list(read_buckets(out).values()) == list(read_buckets(plain).values()), "the same samples"
    ranks = tmp_path / "ranks"
    pool(2).run(encode_case, settings=arguments(ranks, **skip))
    assert read_buckets(ranks) == read_buckets(out)
    assert {p: c for p, c in files(ranks).items() if "left" in p} == {
        p: c for p, c in files(out).items() if "left" in p
    }


def test_what_was_skipped_before_is_not_skipped_when_asked_to_stop(arguments, spoiled, tmp_path, capsys):
    """What an interrupted encoding has measured counts for the same settings alone."""
    out = tmp_path / "out"
    assert cli.main(["encode", *arguments(out, **{"images.path": spoiled, "images.on_error": "skip"})]) == 0
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("sizes-"):
            path.unlink()
    capsys.readouterr()
    assert cli.main(["encode", *arguments(out, **{"images.path": spoiled})]) == 2
    assert f"image {spoiled}/ant/no_image.png is not readable" in capsys.readouterr().err


def test_images_that_no_bucket_holds_are_skipped_where_asked(arguments, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["encode", *arguments(out, **{"images.fit": "pad", "images.on_error": "skip"})]) == 0
    lines = list(read_jsonl(out / "left_out.jsonl"))
    assert len(lines) == SHAPES.count((20, 19)) + SHAPES.count((30, 20))
    assert all("fits into none of images.buckets=8x8,16x16,8x12,12x8" in line["reason"] for line in lines)


def test_other_buckets_want_another_output(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["encode", *arguments(out)]) == 0
    before = files(out)
    for buckets, words in (("[8x8,8x12]", "holds 12x8, which is none of"), (f"[{','.join(BUCKETS)},6x6]", "6x6")):
        capsys.readouterr()
        assert cli.main(["encode", *arguments(out, **{"images.buckets": buckets})]) == 2
        assert words in capsys.readouterr().err
        assert files(out) == before


def test_an_empty_bucket_is_left_out_and_said(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["encode", *arguments(out, **{"images.buckets": f"[{','.join(BUCKETS)},4x40]"})]) == 0
    assert "bucket 4x40: no image belongs there, and it is left out" in capsys.readouterr().err
    assert "4x40" not in read_buckets(out)
