"""Every file we read, damaged in every way we know: it is refused in a sentence or harmless, never a bare traceback.

Hashes are made right again where they would hide the rest (`seal`). What is raised here is what a user would see: a
command turns `InputError` and `RunError` into one line and an exit code, and everything else would be a bug.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from contents import seen_by_training
from damage import byte_damage, json_damage, line_damage
from PIL import Image
from run_data import shared_run
from safetensors.torch import load_file
from shard_data import write_shards

from ldt import log
from ldt.checkpoint.load import load_denoiser, read_weights
from ldt.checkpoint.manifest import Damaged
from ldt.cli import main
from ldt.commands.report import ReportJob, gallery
from ldt.config import to_yaml
from ldt.convert import weights as foreign
from ldt.data.images import prepare
from ldt.data.images.open import open_images
from ldt.data.latent_sources import open_latents
from ldt.data.shards.adopt import examine, read_layout
from ldt.data.shards.manifest import Manifest, head_hash
from ldt.data.shards.shard_writer import HASH, Sidecar, read_sidecar, sidecar_hash
from ldt.errors import InputError
from ldt.evaluation import follow
from ldt.evaluation.scorer import _read_result, derive_jsonl
from ldt.metrics import reference
from ldt.reporting.curves import make_charts
from ldt.reporting.history import read_history
from ldt.reporting.page import make_page
from ldt.reporting.reach import VALIDATION, reaches
from ldt.run import directory, outcome, owner
from ldt.training.config import DataConfig, TrainJob

CASES = 60  # of each kind for each file


def survives(file: Path, damages: Iterable[bytes | str], act: Callable[[], Any], least: float = 0.0) -> None:
    """Put each damaged content into the file and act; `least`: the share that must have been refused."""
    good, refused, cases = file.read_bytes(), 0, 0
    for bad in damages:
        file.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        cases += 1
        try:
            act()
        except (InputError, Damaged) as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(
                f"{file.name} in case {cases - 1}: {type(error).__name__}: {error}\n{bad!r}"
            ) from error
    file.write_bytes(good)
    assert refused >= least * cases, f"only {refused} of {cases} cases were refused"


def as_text(values: Iterable[Any]) -> Iterable[str]:
    return (json.dumps(value) for value in values)


@pytest.fixture
def run_dir(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a line of everything."""
    run = Path(shutil.copytree(shared_run(tmp_path_factory), tmp_path / "run"))
    for world_size in (1, 2):
        config = TrainJob(run_dir=str(run), data=DataConfig(path=str(tmp_path / "shards")))
        directory.prepare(run, to_yaml(config), world_size)
    outcome.begin(run)
    outcome.write_outcome(run, outcome.DONE, 2000, "trained to the end")
    step = {"lr": 1e-3, "grad_norm": 0.5, "images_per_second": 9.0, "world_size": 1, "data_wait_fraction": 0.1}
    for i in range(1, 6):
        also = {"loss": 1 / i, "time": 1.8e9 + 60 * i, "attempt": 0, "digest": "ab", "peak_memory": 10**9}
        log.append_jsonl(run / "metrics.jsonl", {"samples_seen": 400 * i, **step, **also})
    held_out = {"validation_loss": 0.5, "validation_loss_by_time": [0.1, None], "time": 1.8e9 + 400, "attempt": 0}
    log.append_jsonl(run / "metrics.jsonl", {"samples_seen": 2000, **held_out})
    (run / "evaluations").mkdir()
    score = {"samples_seen": 2000, "fd_x": 9.0, "images": 9, "sampler": "euler", "steps": 1, "checkpoint_hash": "x"}
    score |= {"reference_hash": "y", "detector": "x", "rank_deficient": True, "world_size": 1, "time": 1.8e9}
    (run / "evaluations" / "one.json").write_text(json.dumps(score))
    derive_jsonl(run / "evaluations.jsonl")
    return run


def seal_checkpoint(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_bytes()
    (checkpoint / "manifest.xxh64").write_text(xxhash.xxh64(text).hexdigest())


def test_checkpoints(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "000000002000"
    manifest, weights = checkpoint / "manifest.json", checkpoint / "rank-00000-of-00001.safetensors"
    expected = read_weights(checkpoint, "ema")[0]

    def sealed() -> None:
        seal_checkpoint(checkpoint)
        main(["inspect", str(checkpoint)])
        load_denoiser(checkpoint)

    def unsealed() -> None:
        got = read_weights(checkpoint, "ema")[0]
        assert all(torch.equal(got[k], expected[k]) for k in expected)

    facts, seal = json.loads(manifest.read_bytes()), (checkpoint / "manifest.xxh64").read_bytes()
    for file in (manifest, weights, checkpoint / "manifest.xxh64"):
        survives(file, byte_damage(file.read_bytes(), CASES // 3), unsealed, least=0.9)
    survives(manifest, as_text(json_damage(facts, 3 * CASES)), sealed, least=0.8)
    survives(manifest, byte_damage(manifest.read_bytes(), CASES), sealed, least=0.8)
    good = manifest.read_text()

    def whatever_the_hash() -> None:
        content = weights.read_bytes()
        entry = facts["files"][weights.name] | {"bytes": len(content), "xxh64": xxhash.xxh64(content).hexdigest()}
        manifest.write_text(json.dumps(facts | {"files": {weights.name: entry}}))
        sealed()

    survives(weights, byte_damage(weights.read_bytes(), CASES), whatever_the_hash)
    manifest.write_text(good)
    (checkpoint / "manifest.xxh64").write_bytes(seal)
    load_denoiser(checkpoint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"../../elsewhere": {"bytes": 0, "xxh64": "", "ranges": {}}}}, "outside of the checkpoint"),
        ({"parameters": {"one": [2, 3]}, "files": {}}, "0 elements of one are held, not 6"),
        ({"parameters": {"one": [2**40, 2**40]}}, "holds patchify.weight"),
        ({"config": {"model": {"depth": 10**9}, "objective": {}}}, "model.depth=1000000000 must be at most"),
        ({"config": {"model": {"width": 10**9}, "objective": {}}}, "model.width=1000000000 must be at most"),
        (
            {"config": {"model": {"width": 1 << 17, "heads": 2}, "objective": {}}},
            "does not fit its own config: parameter",
        ),
    ],
)
def test_a_checkpoint_that_lies_is_refused_before_it_fills_the_memory(run_dir: Path, change: Any, said: str) -> None:
    checkpoint = run_dir / "checkpoints" / "000000002000"
    facts = json.loads((checkpoint / "manifest.json").read_bytes())
    (checkpoint / "manifest.json").write_text(json.dumps(facts | change))
    seal_checkpoint(checkpoint)
    with pytest.raises(InputError, match=said):
        load_denoiser(checkpoint)


def test_exported_models(run_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert main(["export", str(run_dir), "--to", str(model)]) == 0
    about, weights = model / "model.json", model / "model.safetensors"
    facts = json.loads(about.read_bytes())
    expected = load_file(weights)
    survives(about, byte_damage(about.read_bytes(), CASES // 2), lambda: load_denoiser(model))
    survives(about, as_text(json_damage(facts, 2 * CASES)), lambda: load_denoiser(model), least=0.3)

    def unsealed() -> None:
        got = dict(load_denoiser(model).denoiser.state_dict())
        assert all(torch.equal(got[k], expected[k]) for k in expected)

    survives(weights, byte_damage(weights.read_bytes(), CASES // 3), unsealed, least=0.9)


def test_what_a_run_writes(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "SILENCE_TIMEOUT_S", 0.0)
    whole = run_dir / "metrics.jsonl"

    def status() -> None:
        assert main(["status", str(run_dir)]) in (0, 1, 2)

    def report() -> None:
        history = read_history(run_dir, "run")
        pictures = gallery(history, ReportJob(runs=["run"], neighbours=0), tmp_path, "")
        make_page([history], make_charts([history]), [pictures], "x", reaches([history], {VALIDATION: 0.1}))

    def resume() -> None:
        copy = Path(shutil.copy(whole, tmp_path / "copy.jsonl"))
        log.keep_jsonl_until(copy, "samples_seen", 1000)

    def both() -> None:
        status()
        report()

    def score() -> None:
        _read_result(run_dir / "evaluations" / "one.json", "x")
        derive_jsonl(run_dir / "evaluations.jsonl")

    def ended() -> None:
        outcome.verdict(run_dir, 0)
        follow._has_ended(run_dir, "")
        both()

    def take() -> None:
        owner._take(run_dir / "owner.json")

    me = {"token": "x", "host": "h", "pid": 1, "machine": "m", "born": "1", "job": "", "restart": "0", "time": 1.8e9}
    (run_dir / "owner.json").write_text(json.dumps(me))
    for name, act in (("metrics.jsonl", both), ("environment.jsonl", both), ("evaluations.jsonl", report)):
        content = (run_dir / name).read_text()
        survives(run_dir / name, byte_damage(content.encode(), CASES // 3), act)
        survives(run_dir / name, line_damage(content, CASES // 2), act)
    survives(whole, line_damage(whole.read_text(), CASES), resume, least=0.01)
    survives(whole, byte_damage(whole.read_bytes(), CASES), resume, least=0.2)
    for name, act in (("outcome.json", ended), ("owner.json", take), ("evaluations/one.json", score)):
        content = (run_dir / name).read_text()
        survives(run_dir / name, byte_damage(content.encode(), CASES // 3), act)
        survives(run_dir / name, as_text(json_damage(json.loads(content), CASES // 2)), act)
    survives(run_dir / "config.yaml", byte_damage((run_dir / "config.yaml").read_bytes(), CASES // 3), both)


class FourFeatures:
    """Of a detector, what `reference.load` looks at."""

    name, hash, outputs = "four", "z", {"features": 4, "spatial": 3}


def test_reference_statistics(tmp_path: Path) -> None:
    made_by = {"images": "x", "detector": "four", "hash": "q", "detector_hash": "z"}
    good: dict[str, Any] = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    good |= {"count": np.int64(5), "made_by": np.array(json.dumps(made_by))}
    file, features = tmp_path / "four.npz", tmp_path / "four.features.npy"

    def read() -> None:
        reference.load(file, FourFeatures())  # type: ignore[arg-type]

    for save in (np.savez, np.savez_compressed):
        save(file, **good)
        read()
        survives(file, byte_damage(file.read_bytes(), 3 * CASES), read, least=0.5)
    odd = (
        np.zeros((2, 2)),
        np.array("x"),
        np.array(["a"] * 4),
        np.zeros(4, complex),
        np.zeros(4, "V3"),
        np.full(4, np.nan),
    )
    for key in good:
        for value in odd:
            np.savez(file, **good | {key: value})
            survives(file, [file.read_bytes()], read)
    for bad in json_damage(made_by, CASES):
        np.savez(file, **good | {"made_by": np.array(json.dumps(bad))})
        survives(file, [file.read_bytes()], read)
    np.save(features, np.zeros((5, 4), np.float32))
    held = reference.Reference({}, 1, "x", file)
    survives(features, byte_damage(features.read_bytes(), CASES), held.features, least=0.3)


@pytest.mark.parametrize(("format", "posterior"), [("tar", True), ("mds", True), ("tar", False), ("mds", False)])
def test_shards_whose_hashes_are_right(tmp_path: Path, format: str, posterior: bool) -> None:
    write_shards(tmp_path, [5, 4], format, posterior=posterior, by_element=not posterior)
    head, table, shard = (tmp_path / n for n in ("manifest.json", "shards.npy", f"shard-00000001.{format}"))
    facts, good = json.loads(head.read_bytes()), Manifest.load(tmp_path)

    def look() -> None:
        main(["inspect", str(tmp_path)])
        seen_by_training(tmp_path)

    def seal(changed: dict[str, Any]) -> str:
        return json.dumps(changed | {"head_xxh64": head_hash(changed)} if isinstance(changed, dict) else changed)

    def table_is_right() -> None:
        head.write_text(seal(facts | {"table_xxh64": xxhash.xxh64_hexdigest(table.read_bytes())}))
        look()

    def shard_is_right() -> None:
        content, rows = shard.read_bytes(), good.table.copy()
        rows["bytes"][1], rows["xxh64"][1] = len(content), xxhash.xxh64_intdigest(content)
        replace(good, table=rows).save(tmp_path)
        look()

    def adopt() -> None:
        examine(tmp_path, shard.name, format, read_layout(tmp_path, shard.name, format))

    survives(head, map(seal, json_damage(facts, 2 * CASES)), look, least=0.7)
    survives(table, byte_damage(table.read_bytes(), CASES), table_is_right, least=0.9)
    good.save(tmp_path)
    survives(shard, byte_damage(shard.read_bytes(), CASES), shard_is_right, least=0.4)
    survives(shard, byte_damage(shard.read_bytes(), CASES), adopt, least=0.4)


def test_sidecars_of_an_unfinished_encoding(tmp_path: Path) -> None:
    shard, sidecar = tmp_path / "shard-00000000.tar", tmp_path / "shard-00000000.tar.json"
    shard.write_bytes(b"x")
    facts = {"name": shard.name, "bytes": 1, "samples": 1, "xxh64": "0" * 16, "content": "0" * 16, "elements": 8}
    facts |= {"class_counts": [1], "first_C": [0.5], "second_C": [1.0], "source": "0" * 32, "captions": {"cut": 1}}

    def sealed(facts: Any) -> Any:
        return facts | {HASH: sidecar_hash(facts)} if isinstance(facts, dict) else facts

    sidecar.write_text(json.dumps(sealed(facts)))
    assert read_sidecar(tmp_path, shard.name) is not None

    def look() -> None:
        found = read_sidecar(tmp_path, shard.name)
        assert found is None or (isinstance(found, Sidecar) and found.row and found.sums)

    survives(sidecar, byte_damage(sidecar.read_bytes(), CASES), look)
    survives(sidecar, as_text(map(sealed, json_damage(facts, 2 * CASES))), look)


def read_images(path: Path) -> None:
    images = open_images(str(path))
    for i in range(len(images)):
        prepare(images.image(i), 16, 3, "crop")
        images.caption(i)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it can still read
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "ppm", "tif"])
def test_images(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"one.{kind}"
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    for mode in ("RGB", "L"):
        Image.fromarray(pixels).convert(mode).save(file)
        survives(file, byte_damage(file.read_bytes(), CASES), lambda: read_images(tmp_path), least=0.2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_images(tmp_path: Path, format: int) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(picture, "png")
    file = tmp_path / "images.tar"
    with tarfile.open(file, "w", format=format) as archive:
        long = "" if format == tarfile.USTAR_FORMAT else "long" * 60 + "ü"
        for name, content in (
            ("a/1.png", picture.getvalue()),
            ("a/1.txt", b"a"),
            (f"b/{long}.png", picture.getvalue()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    good = file.read_bytes()

    def headers() -> Iterable[bytes]:
        """One byte of a header replaced and its sum made right again."""
        rng = np.random.default_rng(0)
        starts = [i for i in range(0, len(good), 512) if good[i + 257 : i + 262] == b"ustar"]
        for _ in range(2 * CASES):
            bad = bytearray(good)
            start = starts[int(rng.integers(len(starts)))]
            bad[start + int(rng.integers(512))] = int(rng.integers(256))
            bad[start + 148 : start + 156] = b" " * 8
            bad[start + 148 : start + 156] = b"%06o\0 " % sum(bad[start : start + 512])
            yield bytes(bad)

    survives(file, byte_damage(good, CASES), lambda: read_images(file), least=0.3)
    survives(file, headers(), lambda: read_images(file))


def test_latents_and_weights_of_other_projects(tmp_path: Path) -> None:
    fast, archives, weights = tmp_path / "fast", tmp_path / "archives", tmp_path / "dit.pt"
    for part in (fast / "x_features", fast / "x_labels", archives):
        part.mkdir(parents=True)
    for i in range(2):
        np.save(fast / "x_features" / f"{i}.npy", np.zeros((1, 4, 2, 2), np.float32))
        np.save(fast / "x_labels" / f"{i}.npy", np.array([i]))
        np.savez_compressed(archives / f"{i}.npz", moments=np.zeros((8, 2, 2), np.float32), label=i)
    torch.save({"x_embedder.proj.weight": torch.zeros(8, 4, 2, 2)}, weights)

    def read(where: Path) -> Callable[[], None]:
        def act() -> None:
            latents = open_latents(str(where), 0.18)
            for i in range(len(latents)):
                latents.views(i, latents.flips)

        return act

    for where, name in ((fast, "x_features/0.npy"), (fast, "x_labels/1.npy"), (archives, "1.npz")):
        survives(where / name, byte_damage((where / name).read_bytes(), CASES), read(where), least=0.3)
    survives(weights, byte_damage(weights.read_bytes(), CASES), lambda: foreign.read(weights), least=0.3)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle in the place of every array: refused, and what it would have done is not done."""
    mark, evil = tmp_path / "mark", np.array([Payload(tmp_path / "mark")], object)
    file, features = tmp_path / "four.npz", tmp_path / "four.features.npy"
    np.savez(file, mu=evil, sigma=np.eye(4))
    np.save(features, evil)
    torch.save({"x_embedder.proj.weight": Payload(mark)}, tmp_path / "dit.pt")
    shards = tmp_path / "shards"
    write_shards(shards, [3])
    np.save(shards / "shards.npy", evil)
    facts = json.loads((shards / "manifest.json").read_bytes())
    facts["table_xxh64"] = xxhash.xxh64_hexdigest((shards / "shards.npy").read_bytes())
    (shards / "manifest.json").write_text(json.dumps(facts | {"head_xxh64": head_hash(facts)}))
    (tmp_path / "latents").mkdir()
    np.savez(tmp_path / "latents" / "0.npz", moments=evil, label=0)
    (tmp_path / "c.yaml").write_text(f"run_dir: !!python/object/apply:pathlib.Path.touch [{mark}]\n")
    acts: list[Callable[[], Any]] = [
        lambda: reference.load(file, FourFeatures()),  # type: ignore[arg-type]
        lambda: reference.Reference({}, 1, "x", file).features(),
        lambda: foreign.read(tmp_path / "dit.pt"),
        lambda: Manifest.load(shards),
        lambda: open_latents(str(tmp_path / "latents"), 1.0),
    ]
    for act in acts:
        with pytest.raises(InputError):
            act()
    assert main(["train", str(tmp_path / "c.yaml"), "--dry-run"]) == outcome.WRONG_INPUT
    assert not mark.exists()
    np.load(features, allow_pickle=True)
    assert mark.exists(), "the payload does nothing, so this test proves nothing"
