"""Data of several latent shapes in one run: whitened alike, killed and resumed elsewhere, refused where unfit."""

import contextlib
import dataclasses
import itertools
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from invariance_cases import STEPS, train_case
from pool import CaseFailed, Pool
from shard_data import make_loader, write_bucket_shards, write_shards

from ldt.data.batch import Batch
from ldt.data.buffer import RankSlice
from ldt.data.shards import BucketShards, Manifest, open_shards
from ldt.data.shards.buckets import read_buckets, write_buckets
from ldt.diffusion.config import ObjectiveConfig
from ldt.diffusion.objectives import Objective
from ldt.dist import World
from ldt.errors import InputError
from ldt.files import write_json
from ldt.log import read_jsonl

COUNTS = {"8x8": [20, 13], "8x16": [17], "12x4": [11]}


def open_buckets(path: Path) -> BucketShards:
    return BucketShards(path, {name: open_shards(path / name) for name in sorted(read_buckets(path) or {})})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_bucket_shards(root, COUNTS, {"8x8": [7]}, flips=True)
    return root


def test_a_step_holds_the_samples_of_one_bucket_whitened_by_the_statistics_of_all(tmp_path):
    write_bucket_shards(tmp_path, {"8x8": [30], "8x16": [10]}, posterior=False, dtype="fp32")
    moved = dataclasses.replace(Manifest.load(tmp_path / "8x16"), mean_C=[4.0] * 4, std_C=[2.0] * 4)
    moved.save(tmp_path / "8x16")
    shards = open_buckets(tmp_path)
    mean = 0.75 * np.linspace(-0.5, 0.5, 4) + 0.25 * 4
    square = 0.75 * (np.linspace(0.5, 2, 4) ** 2 + np.linspace(-0.5, 0.5, 4) ** 2) + 0.25 * (4 + 16)
    std = np.sqrt(square - mean**2)
    assert shards.manifest.mean_C == pytest.approx(mean, rel=1e-6)
    assert shards.manifest.std_C == pytest.approx(std, rel=1e-6)
    assert shards.manifest.latent_shape == (4, 4, 8)  # the largest
    raw = {name: open_shards(tmp_path / name) for name in shards.names}
    with make_loader(shards, batch=8, seed=3) as loader:
        for step in itertools.islice(loader.steps(), 12):
            (batch,) = step.micro_batches
            shard_n, sample_n = loader.order.locate(batch.index_B.numpy())
            inside_n = shard_n - shards.first_S[shards.names.index(step.bucket)]
            records = raw[step.bucket].read(inside_n, sample_n)
            expected = (records.mean_nCHW - mean[:, None, None]) / std[:, None, None]
            assert batch.latent_BCHW.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert batch.label_B.tolist() == records.label_n.tolist()
            assert batch.noise_BCHW.shape == batch.latent_BCHW.shape


@pytest.mark.parametrize("ranks", [1, 3])
def test_smaller_latents_come_in_fewer_and_larger_micro_batches_on_every_rank_alike(data, ranks):
    shards = open_buckets(data)
    seen: dict[int, list[tuple[str, int, int]]] = {}
    for rank in range(ranks):
        with make_loader(shards, batch=10, seed=3, rank=rank, ranks=ranks, micro_batch=1) as loader:
            steps = [(s.bucket, s.micro_batches) for s in itertools.islice(loader.steps(), 9)]
            seen[rank] = [(bucket, len(batches), len(batches[0])) for bucket, batches in steps]
            assert max(len(batches) for _, batches in steps) == loader.micro_batches
    assert all(s == seen[0] for s in seen.values())
    largest = -(-10 // ranks)
    for bucket, count, size in seen[0]:
        at_most = {"8x16": 1, "8x8": 2, "12x4": 2}[bucket]  # of 32, 16 and 12 numbers a channel
        assert size <= at_most and count == -(-largest // at_most)


def test_padding_holds_nothing_of_another_bucket(tmp_path):
    """Two ranks of three samples: one row is padding, where a step before has left a latent that is not finite."""
    write_bucket_shards(tmp_path, {"8x8": [9], "8x16": [9]}, spoiled=dict.fromkeys(range(9), float("nan")))
    with make_loader(open_buckets(tmp_path), batch=3, seed=0, rank=0, ranks=2, ahead=1) as loader:
        for step in itertools.islice(loader.steps(), 40):
            (batch,) = step.micro_batches
            padding: Batch = batch.rows(int(batch.weight_B.sum()), len(batch))
            assert len(padding) == 1 and not padding.latent_BCHW.any() and not padding.noise_BCHW.any()


def test_rows_of_micro_batches_follow_the_size_of_latents():
    shapes = [(4, 64, 64), (4, 32, 32), (4, 64, 32)]
    assert [s.size for s in RankSlice.by_bucket(256, 0, 4, 8, shapes)] == [8, 32, 16]
    assert [s.count for s in RankSlice.by_bucket(256, 0, 4, 8, shapes)] == [8, 2, 4]
    assert [s.rows for s in RankSlice.by_bucket(256, 0, 4, 0, shapes)] == [64, 64, 64]


def test_times_are_shifted_by_each_shape():
    objective = Objective(ObjectiveConfig(shift_base=64), (4, 8, 8))
    uniform = torch.linspace(0.1, 0.9, 5)
    expected = Objective(ObjectiveConfig(shift_base=64), (4, 2, 2)).timesteps(uniform)
    assert torch.equal(objective.at((4, 2, 2)).timesteps(uniform), expected)
    assert not torch.allclose(objective.timesteps(uniform), expected)


def test_a_killed_run_goes_on_at_another_world_size_with_the_same_steps(pool, data, tmp_path):
    """kill -9 of one of two ranks in the middle; then on three ranks at another stage: the uninterrupted digests."""
    settings = [f"data.path={data}", "checkpoint.every_samples=24", "log.validation_every_samples=0"]
    whole = pool(1).run(train_case, settings=[*settings, f"run_dir={tmp_path}/whole", "engine.zero_stage=0"])
    run_dir, victims = tmp_path / "killed", Pool(2)
    first = [*settings, f"run_dir={run_dir}", "engine.zero_stage=2", "train.micro_batch=1"]
    failed: list[str] = []

    def train() -> None:
        try:
            victims.run(train_case, settings=first)
        except CaseFailed as error:
            failed.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    deadline = time.monotonic() + 150
    while len(_steps(run_dir)) < 8 and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    victims.workers[1].kill()
    thread.join()
    assert failed and 8 <= len(_steps(run_dir)) < STEPS, "it was not killed in the middle"
    again = [*settings, f"run_dir={run_dir}", "engine.zero_stage=3", "train.micro_batch=2"]
    records = pool(3).run(train_case, settings=again)
    assert {r["world_size"] for r in records} == {2, 3}
    facts = [(r["samples_seen"], r["bucket"], r["digest"]) for r in records]
    assert facts == [(r["samples_seen"], r["bucket"], r["digest"]) for r in whole]
    assert len(facts) == STEPS
    for a, b in zip(records, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def _steps(run_dir: Path) -> list[dict]:
    with contextlib.suppress(FileNotFoundError):
        return list(read_jsonl(run_dir / "metrics.jsonl"))
    return []


def refuse(make, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"by_element": True}, "bucket a of .* is whitened by element.*whitening=channel"),
        ({"classes": ("ant", "bee")}, "bucket a of .* and bucket b of .* differ in their classes"),
        ({"posterior": False}, "bucket a of .* and bucket b of .* differ in their posterior"),
        ({"latent_shape": (8, 4, 4)}, "bucket a of .* and bucket b of .* differ in their channels"),
        ({"latent_shape": (4, 6, 2)}, "buckets a and b of .* have the same latent shape"),
    ],
)
def test_buckets_that_do_not_go_together_are_refused_by_name(tmp_path, how, words):
    write_shards(tmp_path / "a", [5], **({"latent_shape": (4, 4, 4)} | how))
    write_shards(tmp_path / "b", [5], latent_shape=(4, 6, 2), seed=9)
    manifests = {name: Manifest.load(tmp_path / name) for name in ("a", "b")}
    refuse(lambda: write_buckets(tmp_path, manifests, {}), words)
    refuse(lambda: BucketShards(tmp_path, {name: open_shards(tmp_path / name) for name in ("a", "b")}), words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.global_batch=16"], "bucket 12x4 of .* has 11 images, and a global batch is of one bucket; lower"),
        (["model.patch=4"], "model.patch=4 does not divide the latent size 6x2 of 12x4"),
        (["model.positions=learned"], "model.positions=learned is made for one latent shape"),
        (["model.name=unet"], "model.name=unet is made for one latent shape"),
    ],
)
def test_what_a_run_on_buckets_can_not_do_is_refused(pool, data, tmp_path, settings, words):
    settings = [f"run_dir={tmp_path}", f"data.path={data}", *settings]
    assert re.search(words, pool(1).run(refusal, settings=settings))


def test_remote_buckets_are_the_same_run(pool, data, tmp_path):
    settings = ["log.validation_every_samples=80", "train.total_samples=80"]
    local, remote = [f"data.path={data}"], [f"data.path=file://{data}", f"data.cache_dir={tmp_path}/cache"]
    runs = [
        pool(ranks).run(train_case, settings=[*settings, f"run_dir={tmp_path}/{ranks}", *where])
        for ranks, where in ((1, local), (2, remote))
    ]
    facts = [[(r["bucket"], r["digest"]) for r in run if "digest" in r] for run in runs]
    assert len(facts[0]) == 10 and facts[0] == facts[1]
    assert runs[0][-1]["validation_loss"] == pytest.approx(runs[1][-1]["validation_loss"], rel=1e-5)


def test_losses_at_fixed_times_are_by_bucket_too(pool, data, tmp_path):
    validation = ["log.validation_every_samples=80", "log.validation_times=7"]
    settings = [f"data.path={data}", "train.total_samples=80", *validation]
    runs = [pool(ranks).run(train_case, settings=[*settings, f"run_dir={tmp_path}/{ranks}"]) for ranks in (1, 2)]
    one, two = (run[-1] for run in runs)
    assert one["validation_loss_by_bucket"] == {"8x8": pytest.approx(one["validation_loss"], rel=1e-6)}  # it alone has
    assert two["validation_loss_by_bucket"]["8x8"] == pytest.approx(one["validation_loss"], rel=1e-5)


def test_one_of_several_sources_can_not_have_buckets(pool, data, tmp_path):
    settings = [f"run_dir={tmp_path}", f"data.sources.a.path={data}"]
    assert "give one of them here: 12x4, 8x16, 8x8" in pool(1).run(refusal, settings=settings)


def refusal(world: World, settings: list[str]) -> str:
    try:
        train_case(world, settings)
    except InputError as error:
        return str(error)
    return ""


def test_no_run_goes_on_in_the_middle_of_a_batch(data):
    with make_loader(open_buckets(data), batch=10, seed=3) as loader:
        loader.check_position(40)
        refuse(lambda: loader.check_position(48), r"none of train.global_batch=10 begins at 48 samples; go on with")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda head: head | {"version": 2}, "not a list of buckets of version 1"),
        (lambda head: head | {"buckets": {}}, "does not belong to its own hash"),
        (lambda head: [], "not a list of buckets"),
    ],
)
def test_a_damaged_list_of_buckets_is_refused(tmp_path, change, words):
    write_bucket_shards(tmp_path, {"8x8": [3]})
    path = tmp_path / "buckets.json"
    write_json(path, change(json.loads(path.read_text())))
    refuse(lambda: read_buckets(tmp_path), words)
    path.write_text("{")
    refuse(lambda: read_buckets(tmp_path), "not readable as JSON")
