"""`ldt score`: any set of images against real ones, in every form that people have it, and two sets compared."""

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from pool import Pool
from run_data import shared_run

from ldt.cli import main
from ldt.data.images.open import open_images
from ldt.dist import World
from ldt.errors import InputError
from ldt.evaluation.sets import GROUPS, ScoreJob, half, score_sets, table
from ldt.log import read_jsonl
from ldt.metrics.detectors import Features, make_detector
from ldt.metrics.frechet import frechet_distance

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SCORE, KID = "fd_efficientnet_lite0", "kid_efficientnet_lite0"
COUNT = 45


def pixels(seed: int, count: int = COUNT, shade: int = 0) -> np.ndarray:
    """Smooth images: uint8 [count, 16, 16, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 200, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2) + np.uint8(shade)


def write_folder(directory: Path, image_NHWC: np.ndarray) -> Path:
    directory.mkdir(parents=True)
    for i, image in enumerate(image_NHWC):
        Image.fromarray(image).save(directory / f"{i:06d}.png")
    return directory


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("score") / "real", pixels(1, 60))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("score") / "made", pixels(2, shade=20))


@pytest.fixture
def job(tmp_path: Path, real: Path, made: Path) -> Callable[..., ScoreJob]:
    keys = {"images": str(made), "reference": str(real), "cache_dir": str(tmp_path / "cache"), "block": 8}
    return lambda **more: ScoreJob(**{**keys, "output": str(tmp_path / "scores.jsonl"), **more})


class TinyDetector:
    """Mean colours: three features, whose distances are known."""

    name, score, hash, outputs = "colour", "fd_colour", "0", {"features": 3}

    def __call__(self, image_BHWC: torch.Tensor) -> Any:
        return Features(image_BHWC.float().mean((1, 2)) / 255)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldt.evaluation.sets.make_detector", lambda *_: TinyDetector())


def as_tar(made: Path, to: Path) -> Path:
    with tarfile.open(to / "set.tar", "w") as archive:
        for file in sorted(made.iterdir()):
            archive.add(file, file.name)
    return to / "set.tar"


def as_zip(made: Path, to: Path) -> Path:
    with zipfile.ZipFile(to / "set.zip", "w") as archive:
        for file in sorted(made.iterdir()):
            archive.write(file, file.name)
    return to / "set.zip"


def as_parquet(made: Path, to: Path) -> Path:
    rows = {"image": [file.read_bytes() for file in sorted(made.iterdir())]}
    pyarrow.parquet.write_table(pyarrow.table(rows), to / "set.parquet")
    return to / "set.parquet"


def as_npz(made: Path, to: Path) -> Path:
    np.savez(to / "set.npz", arr_0=pixels(2, shade=20))
    return to / "set.npz"


def as_compressed_npz(made: Path, to: Path) -> Path:
    np.savez_compressed(to / "set.npz", arr_0=pixels(2, shade=20), arr_1=np.arange(COUNT) % 3)
    return to / "set.npz"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("form", [as_tar, as_zip, as_parquet, as_npz, as_compressed_npz])
def test_every_form_of_a_set_has_the_same_score(
    job: Callable[..., ScoreJob], made: Path, real: Path, tmp_path: Path, form: Callable[[Path, Path], Path]
) -> None:
    by_directory = score_sets(job(), ALONE)
    other = score_sets(job(images=str(form(made, tmp_path))), ALONE)
    for key in ("fd_colour", "moments_hash", "images_hash", "reference_hash", "images"):
        assert other[key] == by_directory[key], key
    back = score_sets(job(images=str(real), reference=str(form(made, tmp_path))), ALONE)
    assert back["fd_colour"] == pytest.approx(other["fd_colour"], rel=1e-6), (
        "and as the reference: the distance is symmetric"
    )


def test_the_score_is_that_of_the_images(job: Callable[..., ScoreJob]) -> None:
    """Once more by hand: all images in memory, numpy's mean and covariance."""
    detector = make_detector("efficientnet_lite0")
    x, y = (detector(torch.from_numpy(p)).feature_BD.double().numpy() for p in (pixels(2, shade=20), pixels(1, 60)))
    result = score_sets(job(), ALONE)
    expected = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert result[SCORE] == pytest.approx(expected, rel=1e-4)
    assert (result["images"], result["reference_images"], result["size"]) == (COUNT, 60, [16, 16])
    assert result["rank_deficient"] and result["detector_hash"] == detector.hash


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_what_sample_writes_scores_as_evaluate_says(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, form: str
) -> None:
    """To the last bit of mean and covariance, with latent shards as the reference."""
    run = Path(shutil.copytree(shared_run(tmp_path_factory), tmp_path / "run"))
    drawing, cache = ["sampler=euler", "steps=2", "block=8", "images=21"], f"cache_dir={tmp_path}/cache"
    assert main(["evaluate", str(run), f"evaluate.{cache}", *(f"evaluate.{k}" for k in drawing)]) == 0
    (expected,) = read_jsonl(run / "evaluations.jsonl")
    output = tmp_path / ("set.npz" if form == "npz" else "set")
    assert main(["sample", str(run), f"format={form}", f"output={output}", *drawing]) == 0
    shards, scores = run.parent / "shards", tmp_path / "scores.jsonl"
    shutil.copytree(shared_run(tmp_path_factory).parent / "shards", shards)
    assert main(["score", str(output), f"reference={shards}", "block=8", cache, f"output={scores}"]) == 0
    (result,) = read_jsonl(scores)
    assert result["moments_hash"] == expected["moments_hash"]
    assert result[SCORE] == pytest.approx(expected[SCORE], rel=1e-6)


def case_score(world: World, output: str, **keys: Any) -> dict[str, Any]:
    return score_sets(ScoreJob(**keys, output=output), world)


def test_bitwise_the_same_from_any_number_of_processes(
    real: Path, made: Path, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    other = write_folder(tmp_path / "other", pixels(3, shade=10))
    keys = {"images": str(made), "against": str(other), "reference": str(real), "block": 8, "halves": 4}
    keys["metrics"] = ["kernel", "mmd_rbf", "mind", "precision_recall"]
    results = []
    for size in (1, 2, 3):
        where = {"output": str(tmp_path / f"{size}" / "s.jsonl"), "cache_dir": str(tmp_path / f"{size}")}
        (tmp_path / f"{size}").mkdir()
        results.append(pool(size).run(case_score, **keys, **where))
        assert [p for p in (tmp_path / f"{size}").iterdir() if ".work" in p.name] == []
    assert [r["world_size"] for r in results] == [1, 2, 3]
    changing = {"world_size", "seconds", "time"}
    for other_result in results[1:]:
        assert {k: v for k, v in other_result.items() if k not in changing} == {
            k: v for k, v in results[0].items() if k not in changing
        }


def test_a_killed_job_goes_on(job: Callable[..., ScoreJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that it left are not made again, and nothing is left in the end."""
    seen = []

    class Dying:
        def __init__(self) -> None:
            real = make_detector("efficientnet_lite0")
            self.__dict__ |= {n: getattr(real, n) for n in ("name", "score", "outputs", "hash")} | {"net": real}

        def __call__(self, image_BHWC: torch.Tensor) -> Any:
            seen.append(len(image_BHWC))
            if len(seen) == 4:
                raise KeyboardInterrupt
            return self.net(image_BHWC)

    expected = score_sets(job(output=str(tmp_path / "elsewhere" / "s.jsonl")), ALONE)
    monkeypatch.setattr("ldt.evaluation.sets.make_detector", lambda *_: Dying())
    with pytest.raises(KeyboardInterrupt):
        score_sets(job(), ALONE)
    assert score_sets(job(), ALONE)[SCORE] == expected[SCORE]
    assert len(seen) == -(-COUNT // 8) + 1
    assert {*seen} == {8}, "whole blocks, the last one too: the last bits of features depend on the size of a batch"
    assert not list(tmp_path.glob(".score*"))


# ------------------------------------------------------------------------------------------------------- comparisons


def test_a_half_is_half_of_the_groups_and_keyed() -> None:
    ids = half(1000, 0, seed=0)
    assert len(ids) == 500 and (np.diff(ids) > 0).all()
    assert {int(i) // (1000 // GROUPS) for i in ids}.__len__() == GROUPS // 2
    assert np.array_equal(ids, half(1000, 0, seed=0))
    assert not np.array_equal(ids, half(1000, 1, seed=0)) and not np.array_equal(ids, half(1000, 0, seed=1))
    together = np.bincount(np.concatenate([half(1000, r, 0) for r in range(400)]), minlength=1000) / 400
    assert abs(together - 0.5).max() < 0.15, "every image as often as any other"


def test_a_half_spreads_as_much_as_a_new_set() -> None:
    """Of a mean, whose standard error is known: σ / √n."""
    x = np.random.default_rng(0).standard_normal(2000)
    spread = np.std([x[half(2000, r, 0)].mean() for r in range(400)])
    assert spread == pytest.approx(x.std() / 2000**0.5, rel=0.15)


@pytest.mark.usefixtures("quick")
def test_intervals_hold_no_difference_where_there_is_none(job: Callable[..., ScoreJob], tmp_path: Path) -> None:
    """Pairs of sets from one distribution: of 12 intervals one may miss zero; another distribution is told apart."""
    generator = np.random.default_rng(0)

    def write(shade: int) -> str:
        path = tmp_path / f"set{generator.integers(1 << 40)}.npz"
        np.savez(path, arr_0=generator.integers(shade, shade + 100, (200, 2, 2, 3), dtype=np.uint8))
        return str(path)

    real, missed = write(60), 0
    for _ in range(12):
        result = score_sets(job(images=write(50), against=write(50), reference=real, block=200, halves=60), ALONE)
        low, high = result["interval"]["fd_colour"]
        assert result["difference"]["fd_colour"] == pytest.approx((low + high) / 2, abs=1e-12)
        missed += not low < 0 < high
    assert missed <= 2
    result = score_sets(job(images=write(90), against=write(50), reference=real, block=200), ALONE)
    assert result["interval"]["fd_colour"][0] > 0, "further from the real ones, beyond doubt"


def test_by_the_command_line(
    made: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_folder(tmp_path / "other", pixels(3, shade=20))
    monkeypatch.chdir(tmp_path)
    words = [f"reference={real}", f"cache_dir={tmp_path}/cache"]
    assert main(["score", str(made), *words, "metrics=[frechet,kernel]"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["score", "images"] and said[1].split()[0] == SCORE and said[2].split()[0] == KID
    assert said[-1] == f"{COUNT} images of {made}: scores.jsonl"
    assert main(["score", str(made), f"against={other}", "halves=3", *words, "metrics=[kernel]"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "95 % interval" in said[0] and said[1].split()[0] == KID and " to " in said[1]
    alone, compared = read_jsonl(tmp_path / "scores.jsonl")
    assert "against" not in alone and compared["against"]["set"] == str(other)
    assert compared[KID] == alone[KID] and compared["halves"] == 3
    assert list(table(json.loads(json.dumps(compared)))) == said[:-1]


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.usefixtures("quick")
def test_a_set_may_be_elsewhere(job: Callable[..., ScoreJob], made: Path, tmp_path: Path) -> None:
    here, expected = fsspec.filesystem("memory"), score_sets(job(), ALONE)
    for form in (as_tar, as_npz):
        file = form(made, tmp_path)
        here.pipe_file(f"/bucket/{file.name}", file.read_bytes())
        result = score_sets(job(images=f"memory://bucket/{file.name}"), ALONE)
        assert result["moments_hash"] == expected["moments_hash"]
        assert score_sets(job(reference=f"memory://bucket/{file.name}"), ALONE)["reference_images"] == COUNT


@pytest.mark.usefixtures("quick")
def test_sizes_and_fits(job: Callable[..., ScoreJob], tmp_path: Path) -> None:
    """Real photographs of any size are brought to that of the set, or both to one that is given."""
    generator = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        size = (20 + i, 30, 3)
        Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(photos / f"{i}.png")
    with pytest.raises(InputError, match=r"0\.png is 30x20, and others are 16x16.*fit=crop or pad"):
        score_sets(job(reference=str(photos)), ALONE)
    assert score_sets(job(reference=str(photos), fit="crop"), ALONE)["reference_images"] == 12
    result = score_sets(job(images=str(photos), size=16, fit="crop"), ALONE)
    assert result["images"] == 12 and result["size"] == [16, 16]
    wide = write_folder(tmp_path / "wide", pixels(4).repeat(2, 2))
    assert score_sets(job(images=str(wide), reference=str(wide)), ALONE)["size"] == [16, 32]
    assert score_sets(job(images=str(wide), reference=str(photos), fit="crop"), ALONE)["size"] == [16, 32]
    with pytest.raises(InputError, match="holds images of 16x16 and .* of 32x16"):
        score_sets(job(against=str(wide)), ALONE)


def few(path: Path) -> None:
    write_folder(path, pixels(0, 1))


def of_two_sizes(path: Path) -> None:
    write_folder(path, pixels(0, 5))
    Image.new("RGB", (16, 17)).save(path / "000005.png")


def with_a_damaged_one(path: Path) -> None:
    write_folder(path, pixels(0, 5))
    (path / "000003.png").write_bytes(b"no image")


def deep(path: Path) -> None:
    path.mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(path / "0.png")


def only_text(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("no image")


def npz(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("set", lambda path: None, "does not exist"),
    "missing npz": ("set.npz", lambda path: None, "set.npz can't be used"),
    "empty": ("set", Path.mkdir, "holds no images"),
    "no images": ("set", only_text, "holds no images .*1 .txt"),
    "too few": ("set", few, "has 1 image, and metrics=frechet needs at least 2"),
    "two sizes": ("set", of_two_sizes, "000005.png is 16x17, and others are 16x16"),
    "a damaged image": ("set", with_a_damaged_one, "000003.png is not readable"),
    "16 bits": ("set", deep, "has more than 8 bits"),
    "a text file": ("set.txt", lambda path: path.write_text("no image"), "neither a directory nor a tar, zip"),
    "npz of another thing": ("set.npz", lambda path: npz(path, weights=np.zeros(3)), "arrays are weights"),
    "npz of floats": ("set.npz", lambda path: npz(path, arr_0=np.zeros((9, 4, 4, 3))), "no images but float64"),
    "npz of objects": ("set.npz", lambda path: npz(path, arr_0=np.array([{}, 1])), "set.npz is not readable"),
    "npz without a channel": ("set.npz", lambda path: npz(path, arr_0=np.zeros((9, 4, 4), np.uint8)), r"\[9, 4, 4\]"),
    "npz with alpha": ("set.npz", lambda path: npz(path, arr_0=np.zeros((9, 4, 4, 4), np.uint8)), "1 or 3"),
    "npz without images": ("set.npz", lambda path: npz(path, arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "no images but"),
    "npz with short labels": (
        "set.npz",
        lambda path: npz(path, arr_0=np.zeros((9, 4, 4, 3), np.uint8), arr_1=np.zeros(3, np.int64)),
        "labels are a number each",
    ),
    "no npz": ("set.npz", lambda path: path.write_bytes(b"PK\3\4 and no more"), "set.npz is not readable as .npz"),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", BAD)
def test_bad_sets_are_refused(job: Callable[..., ScoreJob], tmp_path: Path, name: str) -> None:
    file, write, message = BAD[name]
    write(tmp_path / file)
    with pytest.raises(InputError, match=message):
        score_sets(job(images=str(tmp_path / file)), ALONE)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [n for n in BAD if n != "npz of another thing"])
def test_bad_references_are_refused(job: Callable[..., ScoreJob], tmp_path: Path, name: str) -> None:
    file, write, _ = BAD[name]
    write(tmp_path / file)
    with pytest.raises(InputError):
        score_sets(job(reference=str(tmp_path / file)), ALONE)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["fid"]}, "metrics has fid, which is not one of"),
        ({"metrics": ["inception_score"]}, "needs a detector with logits"),
        ({"size": 16}, "needs fit=crop or pad"),
        ({"size": -1, "fit": "crop"}, "size=-1 must be positive"),
        ({"block": 0}, "block=0 must be at least 1"),
        ({"halves": 1}, "halves=1 must be at least 2"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"reference": "memory://somewhere/statistics.npz"}, "is read on local disks only"),
    ],
)
def test_impossible_settings_are_refused(job: Callable[..., ScoreJob], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_sets(job(**keys), ALONE)


@pytest.mark.usefixtures("quick")
def test_comparisons_that_can_not_be_made(job: Callable[..., ScoreJob], made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the set that is scored"):
        score_sets(job(against=str(made)), ALONE)
    small = write_folder(tmp_path / "small", pixels(5, 9))
    with pytest.raises(InputError, match="has 9 images, and a comparison needs 20 of each set"):
        score_sets(job(against=str(small)), ALONE)


@pytest.mark.usefixtures("quick")
def test_precision_needs_four_images(job: Callable[..., ScoreJob], real: Path, tmp_path: Path) -> None:
    three = write_folder(tmp_path / "three", pixels(5, 3))
    for keys in ({"images": str(three)}, {"images": str(real), "reference": str(three)}):
        with pytest.raises(InputError, match="three has 3 images, and metrics=precision_recall needs at least 4"):
            score_sets(job(metrics=["precision_recall"], **keys), ALONE)


def test_where_nothing_can_be_written(made: Path, real: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["score", str(made), f"reference={real}", f"output={tmp_path}"]) == 2
    assert "is a directory; give the path of a file" in capsys.readouterr().err


def test_images_of_an_npz_are_read_one_at_a_time(tmp_path: Path) -> None:
    image_NHWC = pixels(6)
    np.savez(tmp_path / "set.npz", arr_0=image_NHWC, arr_1=np.arange(COUNT) % 4)
    source = open_images(str(tmp_path / "set.npz"))
    assert len(source) == COUNT and source.classes == ("0", "1", "2", "3") and source.label(6) == 2
    assert np.array_equal(np.asarray(source.image(17)), image_NHWC[17])
    np.savez(tmp_path / "grey.npz", arr_0=np.asfortranarray(image_NHWC[..., :1]))
    grey = open_images(str(tmp_path / "grey.npz"))
    assert grey.image(3).mode == "L" and np.array_equal(np.asarray(grey.image(3)), image_NHWC[3, ..., 0])
