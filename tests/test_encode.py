"""`ldt encode`: every image once, the same files whoever encodes, nothing half-written under a final name."""

import json
import resource
import shutil
import tarfile
import time

import forked
import numpy as np
import pytest
import torch
from contents import files
from encoding_cases import CLASSES
from PIL import Image

from ldt import cli
from ldt.data.images import prepare
from ldt.data.images.open import open_images
from ldt.data.shards import open_shards, open_validation
from ldt.data.shards.manifest import head_hash
from ldt.data.split import Split
from ldt.encoding.plan import Plan
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder

UNFINISHED_END = "ldt.encoding.encoder.Encoder._finish"


@pytest.mark.parametrize("format", ["tar", "mds"])
@pytest.mark.parametrize("flips", [False, True])
def test_every_image_is_there_once_with_its_moments(encode, images, autoencoder, tmp_path, format, flips):
    out = tmp_path / "out"
    assert encode(out, format=format, flips=flips, dtype="fp32") == 0
    source, model = open_images(str(images)), Autoencoder.load(str(autoencoder))
    split = Split(len(source), 0.2, 0)
    numbers = {out: split.training(np.arange(18)), open_validation(out): split.validation(np.arange(5))}
    assert sorted(np.concatenate(list(numbers.values()))) == list(range(23))
    for directory, expected in numbers.items():
        shards = open_shards(directory)
        assert shards.manifest.classes == CLASSES
        shard = np.repeat(np.arange(len(shards.manifest.counts)), shards.manifest.counts)
        sample = np.concatenate([np.arange(n) for n in shards.manifest.counts])
        records = shards.read(shard, sample)
        assert records.label_n.tolist() == [source.label(i) for i in expected]
        assert shards.manifest.class_counts == np.bincount(records.label_n, minlength=3).tolist()
        pixels = torch.from_numpy(np.stack([prepare(source.image(i), 8, 1, "pad") for i in expected]))
        mean, std = model.encode(pixels)
        np.testing.assert_allclose(records.mean_nCHW, mean, atol=1e-5)
        np.testing.assert_allclose(records.std_nCHW, std, atol=1e-5)
        if flips:
            flipped = shards.read(shard, sample, np.ones(len(shard), bool))
            np.testing.assert_allclose(flipped.mean_nCHW, model.encode(pixels.flip(2))[0], atol=1e-5)
    assert not [p for p in files(out) if p.endswith("tar.json") or "unfinished" in p or "encode.json" in p]


@pytest.mark.parametrize("flips", [False, True])
def test_whitening_statistics_are_those_of_posterior_draws(encode, tmp_path, flips):
    out = tmp_path / "out"
    assert encode(out, flips=flips, dtype="bf16") == 0
    shards = open_shards(out)
    shard = np.repeat(np.arange(len(shards.manifest.counts)), shards.manifest.counts)
    sample = np.concatenate([np.arange(n) for n in shards.manifest.counts])
    views = [shards.read(shard, sample, np.full(len(shard), f) if flips else None) for f in range(1 + flips)]
    mean = np.concatenate([v.mean_nCHW for v in views]).astype(np.float64)
    std = np.concatenate([v.std_nCHW for v in views])
    draws = mean + std * np.random.default_rng(0).standard_normal((2000, *mean.shape))
    np.testing.assert_allclose(shards.manifest.mean_C, draws.mean((0, 1, 3, 4)), atol=0.01)
    np.testing.assert_allclose(shards.manifest.std_C, draws.std((0, 1, 3, 4)), rtol=0.01)


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_two_processes_after_an_interruption_write_the_same_files(encode, tmp_path, format):
    assert encode(tmp_path / "one", format=format) == 0
    expected = files(tmp_path / "one")
    out = tmp_path / "two"
    assert encode(out, format=format) == 0
    # back to what a kill leaves behind: no manifest, some sidecars, a shard without one, a sidecar without shard
    broken = sorted(p for p in out.rglob(f"shard-*.{format}"))
    for path in [*out.rglob("manifest.json"), *out.rglob("shards.npy"), *out.rglob("index.json"), broken[1]]:
        path.unlink()
    broken[0].write_bytes(b"torn")
    (out / "shard-00000002.tar.host-1.unfinished").write_bytes(b"torn")
    recipe = open_shards(tmp_path / "one").manifest.recipe
    (out / "encode.json").write_text(json.dumps(recipe))
    ranks = forked.run_ranks(2, "-m", "ldt", *encode.arguments(out, format=format), timeout=120)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert ranks[0].stdout.endswith(f"{out}\n") and ranks[1].stdout == ""
    assert files(out) == expected


UNEVEN = """
import datetime, sys, time
from ldt import cli, dist
from ldt.encoding.plan import Plan
load, meet = Plan.load, dist._meet
def met(*arguments):  # from here on: a busy machine may need longer than that to come together
    store = meet(*arguments)
    dist.TIMEOUT = datetime.timedelta(seconds=1)
    return store
dist._meet = met
def slow(self, batch):
    print("unit", batch[0].part, batch[0].number, file=sys.stderr)
    time.sleep(0.5)
    return load(self, batch)
Plan.load = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_what_is_left_is_divided_anew_and_the_slower_one_is_waited_for(encode, tmp_path, monkeypatch):
    """Every other shard is missing, as a slow rank of two leaves it; it takes longer than ranks otherwise wait."""
    assert encode(tmp_path / "one") == 0
    out = tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr(UNFINISHED_END, stop)
        assert encode(out) == 130  # interrupted
    for name in ("shard-00000000", "shard-00000002", "validation/shard-00000000"):
        (out / f"{name}.tar.json").unlink()
    ranks = forked.run_ranks(2, "-c", UNEVEN, *encode.arguments(out, threads=1), timeout=120)
    said = [rank.stderr for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert all("unit" in text for text in said), said
    assert files(out) == files(tmp_path / "one")


@pytest.mark.parametrize("format", ["tar", "mds"])
def test_what_is_damaged_before_the_end_is_done_again(encode, tmp_path, monkeypatch, format):
    """Stopped before its manifest; then a shard is gone, one cut, a sidecar gone, one damaged, two swapped."""
    assert encode(tmp_path / "one", format=format, shard_samples=2) == 0
    out = tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr(UNFINISHED_END, stop)
        assert encode(out, format=format, shard_samples=2) == 130  # interrupted
    shards = sorted(out.glob(f"shard-*.{format}"))
    sidecars = [p.with_name(f"{p.name}.json") for p in shards]
    assert len(shards) == 9 and all(p.exists() for p in sidecars)
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    sidecars[2].unlink()
    sidecars[3].write_bytes(sidecars[3].read_bytes().replace(b"1", b"2"))
    four, five = sidecars[4].read_bytes(), sidecars[5].read_bytes()
    sidecars[4].write_bytes(five)
    sidecars[5].write_bytes(four)
    assert encode(out, format=format, shard_samples=2) == 0
    assert files(out) == files(tmp_path / "one")


def stop(*_):
    raise KeyboardInterrupt


def test_again_is_complete_and_other_settings_are_refused(encode, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(out) == 0
    before = files(out)
    capsys.readouterr()
    assert encode(out, threads=3) == 0
    assert "already" in capsys.readouterr().out
    assert encode(out, dtype="fp32", shard_samples=4, batch=7) == 2
    message = capsys.readouterr().err
    assert (
        "dtype: 'fp16' there, 'fp32' now" in message
        and "shard_samples" in message
        and "batch" in message
        and "format" not in message
    )
    assert files(out) == before


def test_it_says_what_it_is_going_to_encode(encode, images, tmp_path, capsys):
    """A directory one level too high is a wrong set of classes; an interrupted encoding tells how far it came."""
    assert encode(tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "23 images in 3 classes (ant, …) into 5 shards of 2×4×4\n" in said.err and "deeper" not in said.err
    assert f"next: ldt inspect {tmp_path}/out grid=" in said.out
    high = tmp_path / "high"
    shutil.copytree(images, high / "train")
    assert encode(tmp_path / "out2", **{"images.path": high}) == 0
    said = capsys.readouterr().err
    assert "23 images in 1 class (train) into" in said
    assert "such as train/ant/000.png: they are of class train; if the classes are further down, stop" in said


def test_a_thousand_classes_are_compared_but_not_listed(encode, tmp_path, capsys):
    for root, count in (("a", 40), ("b", 39)):
        for k in range(count):
            (tmp_path / root / f"n{k:04d}").mkdir(parents=True)
            Image.new("L", (8, 8), k).save(tmp_path / root / f"n{k:04d}" / "0.png")
    assert encode(tmp_path / "out", **{"images.path": tmp_path / "a"}) == 0
    capsys.readouterr()
    assert encode(tmp_path / "out", **{"images.path": tmp_path / "b"}) == 2
    error = capsys.readouterr().err
    assert "classes: 40 from 'n0000' to 'n0039' there, 39 from 'n0000' to 'n0038' now" in error and "n0020" not in error


def test_mistakes_leave_nothing_under_a_final_name(encode, images, tmp_path, capsys):
    broken = tmp_path / "broken"
    (broken / "ant").mkdir(parents=True)
    for i in range(12):
        Image.new("L", (8, 8), i).save(broken / "ant" / f"{i:02d}.png")
    (broken / "ant" / "11.png").write_bytes(b"\x89PNG\r\n")
    large = tmp_path / "large" / "ant"
    large.mkdir(parents=True)
    Image.new("L", (9, 8)).save(large / "wide.png")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    for name in ("a.png", "b.jpg"):
        (unreadable / name).write_bytes(b"x")
    for settings, said in [
        ({"images.path": broken}, "11.png"),
        ({"images.path": large.parent, "validation_fraction": 0}, "wide.png"),
        ({"images.path": empty}, "empty"),
        ({"images.path": unreadable, "images.on_error": "skip"}, "none of the 2 images in"),
        ({"images.path": tmp_path / "absent"}, "absent"),
        ({"images.size": 9}, "not 9x9; change images.size"),
        ({"autoencoder": tmp_path / "none"}, "none"),
        ({"shard_samples": 0}, "shard_samples=0"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"index": taken}, "cannot be combined with index="),
        ({"validation_fraction": 0.9}, "validation_fraction=0.9"),
        ({"format": "zip"}, "format=zip"),
        ({"dtype": "fp8"}, "dtype=fp8"),
        ({"output": taken}, "already holds other files"),
        ({"output": taken / "thesis.tex" / "x"}, "thesis.tex"),
    ]:
        out = settings.get("output", tmp_path / "out")
        assert encode(**({"output": out} | settings)) == 2, settings
        error = capsys.readouterr().err
        *before, last = error.strip().split("\n")
        assert said in last and all(" into " in line for line in before), error  # what is to be encoded, then why not
        assert not (tmp_path / "out" / "manifest.json").exists()
        if (tmp_path / "out").exists():  # what was begun is not mistaken for data
            with pytest.raises(InputError, match="not completely encoded"):
                open_shards(tmp_path / "out")
            assert cli.main(["inspect", str(tmp_path / "out")]) == 1
            assert capsys.readouterr().out.startswith("unfinished: ")
            shutil.rmtree(tmp_path / "out")
    assert (taken / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(("total", "fraction"), [(1, 0.0), (10, 0.0), (23, 0.2), (1000, 0.05), (7, 0.5), (3, 0.1)])
def test_split_is_a_partition_that_takes_its_share_everywhere(total, fraction):
    split = Split(total, fraction, seed=4)
    training = split.training(np.arange(split.training_samples))
    held_out = split.validation(np.arange(split.validation_samples))
    assert len(held_out) == round(total * fraction)
    assert sorted([*training, *held_out]) == list(range(total))
    assert (np.diff(training) > 0).all()
    if total > 20:
        assert np.diff(held_out).max() <= 2 * total / len(held_out) + 1
        assert not np.array_equal(held_out, Split(total, fraction, seed=5).validation(np.arange(len(held_out))))


def test_one_image_of_each_stretch_is_held_out_and_it_may_be_any():
    drawn = np.stack([Split(15, 0.2, seed).validation(np.arange(3)) for seed in range(100)])
    for stretch in range(3):
        assert set(drawn[:, stretch].tolist()) == set(range(5 * stretch, 5 * stretch + 5))
    assert {int(Split(5, 0.2, seed).validation(0)) for seed in range(50)} == set(range(5)), "the only one, too"


def test_golden_split():
    """A resumed encoding and a report draw the held-out images again: no change may make them others."""
    assert Split(40, 0.2, seed=4).validation(np.arange(8)).tolist() == [3, 9, 10, 15, 24, 26, 30, 36]


@pytest.mark.parametrize(("format", "goal", "ranks"), [("tar", 1, 1), ("mds", 4, 3)])  # goal: shards there at the kill
def test_a_killed_rank_leaves_the_same_files_in_the_end(encode, tmp_path, format, goal, ranks):
    assert encode(tmp_path / "one", format=format, shard_samples=2) == 0
    expected, out = files(tmp_path / "one"), tmp_path / "two"
    arguments = encode.arguments(out, format=format, shard_samples=2)
    processes = forked.start_ranks(2, "-m", "ldt", *arguments)
    deadline = time.monotonic() + 60
    while len(list(out.glob(f"shard-*.{format}"))) < goal and time.monotonic() < deadline:
        time.sleep(0.002)
    processes[goal % 2].kill()
    for p in processes:
        p.kill()
    if ranks == 1:
        assert encode(out, format=format, shard_samples=2) == 0
    else:
        again = forked.run_ranks(ranks, "-m", "ldt", *arguments, timeout=120)
        assert [rank.returncode for rank in again] == [0] * ranks
    assert files(out) == expected


def test_a_full_disk_is_said_and_the_next_run_goes_on(encode, tmp_path, capsys):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert encode(out) == 1  # there may be room later
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "make room" in capsys.readouterr().err
    assert not list(out.glob("*.tar")) and not list(out.glob("*.unfinished"))
    assert encode(out) == 0


def small_set(root, count=12):
    for i in range(count):
        (root / "ant").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), np.uint8)).save(root / "ant" / f"{i:02d}.png")
    return root


def repack(root, path):
    with tarfile.open(path, "w") as archive:
        archive.add(root, ".")
    return path


@pytest.mark.parametrize("kind", ["directory", "tar"])
@pytest.mark.parametrize("complete", [False, True])
def test_other_images_under_the_same_number_are_another_set(encode, tmp_path, capsys, monkeypatch, kind, complete):
    """One removed and another added: by their number and their classes alone it would seem to be the same set."""
    root, out = small_set(tmp_path / "set"), tmp_path / "out"
    path = root if kind == "directory" else repack(root, tmp_path / "set.tar")
    with monkeypatch.context() as patch:
        if not complete:
            patch.setattr(UNFINISHED_END, stop)
        assert encode(out, **{"images.path": path}) == (0 if complete else 130)
    before = files(out)
    (root / "ant" / "09.png").rename(root / "ant" / "00a.png")
    if kind == "tar":
        repack(root, path)
    capsys.readouterr()
    assert encode(out, **{"images.path": path}) == 2
    assert "names of images (hash): " in capsys.readouterr().err
    assert files(out) == before


def test_replaced_images_are_encoded_again_and_a_complete_output_is_told(encode, tmp_path, capsys, monkeypatch):
    root, out = small_set(tmp_path / "set"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(UNFINISHED_END, stop)
        assert encode(out, **{"images.path": root}) == 130
    Image.new("L", (8, 8), 200).save(root / "ant" / "03.png")
    assert encode(out, **{"images.path": root}) == 0
    assert encode(tmp_path / "anew", **{"images.path": root}) == 0
    assert files(out) == files(tmp_path / "anew")
    Image.new("L", (8, 8), 100).save(root / "ant" / "04.png")
    capsys.readouterr()
    assert encode(out, **{"images.path": root}) == 2
    assert "whose files have other sizes now; choose another output" in capsys.readouterr().err


def test_an_image_that_changes_after_it_was_read_is_encoded_again(tmp_path, monkeypatch, encode):
    """Its shard was vouched for by its size at the time of writing: a restart took the old content for the new."""
    images, read = small_set(tmp_path / "images"), Plan.load

    def load(self, batch):
        loaded = read(self, batch)
        if 0 in self.image_numbers(*batch):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / "ant" / "00.png")
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "load", load)
        patch.setattr(UNFINISHED_END, stop)
        assert encode(tmp_path / "out", **{"images.path": images}) == 130
    assert encode(tmp_path / "out", **{"images.path": images}) == 0
    assert encode(tmp_path / "new", **{"images.path": images}) == 0
    assert files(tmp_path / "out") == files(tmp_path / "new")


def test_settings_that_are_left_out_are_compared_too(encode, tmp_path, capsys):
    root = small_set(tmp_path / "set")
    for i in range(11):
        (root / "ant" / f"{i:02d}.txt").write_text("" if i == 3 else "x" * i)
    text = {"images.path": root, "text.encoder": "bytes", "text.length": 8, "validation_fraction": 0}
    assert encode(tmp_path / "out", **text) == 0
    said = capsys.readouterr()
    assert "11 of 12 images have a caption" in said.err
    assert "captions: 9 images have one, 3 have none or an empty one, 2 are cut at text.length=8" in said.out
    assert open_shards(tmp_path / "out").manifest.caption_counts == {"captioned": 9, "empty": 3, "cut": 2}
    assert encode(tmp_path / "out", **text | {"text.encoder": ""}) == 2
    assert "text: {'encoder': 'bytes'" in capsys.readouterr().err
    (root / "ant" / "05.txt").write_text("another caption")
    assert encode(tmp_path / "out", **text) == 2
    assert "whose files have other sizes now" in capsys.readouterr().err


def test_encodings_of_before_names_were_looked_at_are_complete(encode, tmp_path, capsys):
    """Manifests of earlier versions have no hash of names: nothing can be said against them."""
    root, out = small_set(tmp_path / "set"), tmp_path / "out"
    assert encode(out, **{"images.path": root}) == 0
    head = json.loads((out / "manifest.json").read_text())
    del head["recipe"]["names of images (hash)"], head["source"]
    (out / "manifest.json").write_text(json.dumps(head | {"head_xxh64": head_hash(head)}))
    capsys.readouterr()
    assert encode(out, **{"images.path": root}) == 0
    assert "already encoded" in capsys.readouterr().out
