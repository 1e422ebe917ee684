"""Promise 1: ranks, ZeRO stage, micro-batch, shard format and loader threads change nothing but the last digits.

A selection of cases such that every pair of values of any two dimensions occurs, each trained for 20 steps and compared
with one process at stage 0 on the whole batch: identical digests, the same fp32 losses to 5 digits.
"""

import itertools

import pytest
from invariance_cases import BATCH, STEPS, train_case
from shard_data import write_bucket_shards, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for format in ("tar", "mds"):
        write_shards(root / format, [40, 17, 23], format, flips=True)
        write_shards(root / format / "validation", [11], format, flips=True)
    counts, held_out = {"8x8": [20, 13], "8x16": [17], "12x4": [11]}, {"8x8": [7], "8x16": [4]}
    write_bucket_shards(root / "buckets", counts, held_out, flips=True)
    return root


@pytest.fixture(scope="module")
def reference(pool, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    return pool(1).run(train_case, settings=[f"run_dir={run_dir}", f"data.path={data}/tar", "engine.zero_stage=0"])


CASES = [
    # ranks, stage, micro-batch (0: all), format, threads
    (1, 1, 1, "mds", 1),
    (1, 2, 2, "tar", 3),
    (1, 3, 0, "mds", 3),
    (2, 0, 2, "mds", 1),
    (2, 1, 0, "tar", 3),
    (2, 2, 1, "mds", 3),
    (2, 3, 2, "tar", 1),
    (3, 0, 1, "tar", 3),
    (3, 1, 2, "mds", 3),
    (3, 2, 0, "tar", 1),
    (3, 3, 1, "mds", 1),
]


@pytest.mark.parametrize(("ranks", "stage", "micro_batch", "format", "threads"), CASES)
def test_the_run_is_the_same(pool, data, reference, tmp_path, ranks, stage, micro_batch, format, threads):
    placement = [
        f"run_dir={tmp_path}",
        f"data.path={data}/{format}",
        f"data.threads={threads}",
        f"engine.zero_stage={stage}",
        f"train.micro_batch={micro_batch}",
    ]
    assert_the_same(pool(ranks).run(train_case, settings=placement), reference, ranks)


@pytest.fixture(scope="module")
def bucket_reference(pool, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "buckets"
    return pool(1).run(train_case, settings=[f"run_dir={run_dir}", f"data.path={data}/buckets", "engine.zero_stage=0"])


BUCKET_CASES = [
    # ranks, stage, micro-batch of the largest latents (0: all), threads
    (1, 1, 2, 3),
    (1, 2, 0, 1),
    (1, 3, 3, 1),
    (2, 0, 1, 3),
    (2, 1, 0, 1),
    (2, 2, 2, 1),
    (2, 3, 1, 3),
    (3, 0, 2, 1),
    (3, 1, 1, 1),
    (3, 2, 0, 3),
    (3, 3, 1, 3),
]


@pytest.mark.parametrize(("ranks", "stage", "micro_batch", "threads"), BUCKET_CASES)
def test_a_run_on_buckets_is_the_same(pool, data, bucket_reference, tmp_path, ranks, stage, micro_batch, threads):
    placement = [
        f"run_dir={tmp_path}",
        f"data.path={data}/buckets",
        f"data.threads={threads}",
        f"engine.zero_stage={stage}",
        f"train.micro_batch={micro_batch}",
    ]
    records = pool(ranks).run(train_case, settings=placement)
    assert_the_same(records, bucket_reference, ranks)
    buckets = [r["bucket"] for r in _training(records)]
    assert buckets == [r["bucket"] for r in _training(bucket_reference)] and len(set(buckets)) == 3
    for ours, theirs in zip(_validations(records), _validations(bucket_reference), strict=True):
        assert set(ours["validation_loss_by_bucket"]) == {"8x8", "8x16"}
        for name, loss in ours["validation_loss_by_bucket"].items():
            assert loss == pytest.approx(theirs["validation_loss_by_bucket"][name], rel=1e-5)
        mean = sum(n * ours["validation_loss_by_bucket"][name] for name, n in (("8x8", 7), ("8x16", 4))) / 11
        assert ours["validation_loss"] == pytest.approx(mean, rel=1e-6)


def assert_the_same(records, reference, ranks):
    ours, theirs = _training(records), _training(reference)
    assert [r["samples_seen"] for r in ours] == [BATCH * (i + 1) for i in range(STEPS)]
    assert [r["digest"] for r in ours] == [r["digest"] for r in theirs]
    assert [r["lr"] for r in ours] == [r["lr"] for r in theirs]
    assert {r["world_size"] for r in ours} == {ranks}
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    validation = [(r["validation_loss"], r["validation_loss_by_time"]) for r in _validations(records)]
    expected = [(r["validation_loss"], r["validation_loss_by_time"]) for r in _validations(reference)]
    assert len(validation) == 2
    for (a, bins_a), (b, bins_b) in zip(validation, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert [x is None for x in bins_a] == [x is None for x in bins_b]
        assert [x or 0.0 for x in bins_a] == pytest.approx([x or 0.0 for x in bins_b], rel=1e-4)


def test_buckets_have_every_world_at_every_stage():
    assert {case[:2] for case in BUCKET_CASES} | {(1, 0)} == set(itertools.product((1, 2, 3), range(4)))


def test_the_cases_cover_every_pair():
    values = [sorted({case[i] for case in CASES}) for i in range(4)]
    for i in range(4):
        for j in range(i):
            missing = {(a, b) for a in values[i] for b in values[j]} - {(c[i], c[j]) for c in CASES}
            if (i, j) == (1, 0):
                missing -= {(0, 1)}  # the reference
            if (i, j) == (2, 1):
                missing -= {(0, 0)}  # the reference
            assert not missing, (i, j, missing)


def test_digests_tell_runs_apart(pool, data, reference, tmp_path):
    """A digest that never changes would pass everything above: another seed or drop rate gives others at every step."""
    for i, change in enumerate(("seed=6", "objective.condition_drop=0.9")):
        settings = [f"run_dir={tmp_path}/{i}", f"data.path={data}/tar", "engine.zero_stage=0", change]
        other = _training(pool(1).run(train_case, settings=settings))
        same = [a["digest"] == b["digest"] for a, b in zip(other, _training(reference), strict=True)]
        assert not any(same)
    assert len({r["digest"] for r in _training(reference)}) == STEPS


def _training(records):
    return [r for r in records if "loss" in r]


def _validations(records):
    return [r for r in records if "validation_loss" in r]
