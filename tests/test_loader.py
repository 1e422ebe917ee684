"""The loader: what a step holds depends on the config alone, never on ranks, threads, micro-batches or the format."""

import itertools
import threading

import numpy as np
import pytest
import torch
from contents import assert_same_rows
from shard_data import make_loader, make_validation_loader, write_shards

from ldt import rng
from ldt.data import philox
from ldt.data.batch import Located, SampleDraws
from ldt.data.buffer import Buffer, RankSlice
from ldt.data.digest import digest_text
from ldt.data.order import Order
from ldt.data.shards import open_shards
from ldt.errors import InputError
from ldt.rng import Purpose

COUNTS = [7, 12, 1, 10]  # 30 samples: with a batch of 8 the epoch ends within a batch
SETTINGS = {"batch": 8, "seed": 5, "streams": 3, "window": 6, "label_drop": 0.3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for format in ("tar", "mds"):
        write_shards(root / format, COUNTS, format, "fp16", flips=True)
    return root


def collect(path, ranks=1, steps=8, start=0, **settings):
    """All real rows of all ranks, in global order, and the digest of each step."""
    rows, digests = [], [0] * steps
    for rank in range(ranks):
        with make_loader(open_shards(path), rank=rank, ranks=ranks, **(SETTINGS | settings)) as loader:
            for k, step in enumerate(itertools.islice(loader.steps(start), steps)):
                assert step.first == start + k * settings.get("batch", SETTINGS["batch"])
                assert len(step.micro_batches) == loader.micro_batches
                digests[k] += step.digest
                for batch in step.micro_batches:
                    assert all(torch.isfinite(v).all() for _, v in batch.tensors())
                    real = batch.weight_B == 1
                    assert (batch.index_B[~real] == -1).all() and (batch.weight_B[~real] == 0).all()
                    rows += [{k: v[i].clone().numpy() for k, v in batch.tensors()} for i in real.nonzero()[:, 0]]
    rows.sort(key=lambda row: int(row["index_B"]))
    return rows, [digest_text(d) for d in digests]


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 11])
def test_steps_do_not_depend_on_ranks_or_micro_batches(data, ranks, micro_batch):
    rows, digests = collect(data / "tar")
    assert [int(r["index_B"]) for r in rows] == list(range(64))
    others, other_digests = collect(data / "tar", ranks=ranks, micro_batch=micro_batch)
    assert_same_rows(rows, others)
    assert digests == other_digests


@pytest.mark.parametrize("settings", [{"threads": 1, "ahead": 1}, {"threads": 7, "ahead": 9}])
def test_steps_do_not_depend_on_threads_or_format(data, settings):
    rows, digests = collect(data / "tar")
    others, other_digests = collect(data / "mds", **settings)
    assert_same_rows(rows, others)
    assert digests == other_digests


def test_resume_anywhere_with_other_ranks(data):
    rows, digests = collect(data / "tar", steps=12)
    for start in (1, 3, 4, 9):
        others, other_digests = collect(data / "mds", ranks=3, steps=12 - start, start=start * 8, micro_batch=2)
        assert_same_rows(rows[start * 8 :], others)
        assert digests[start:] == other_digests


@pytest.mark.parametrize("start", [8, 7, 13, 30])
def test_another_global_batch_from_any_index_on(data, start):
    """The same steps at any world size, and from the next epoch on every sample once: the order is of the index."""
    steps = (90 - start) // 5
    alone, digests = collect(data / "tar", steps=steps, start=start, batch=5)
    together, other_digests = collect(data / "mds", ranks=3, steps=steps, start=start, batch=5, micro_batch=1)
    assert digests == other_digests
    assert_same_rows(alone, together)
    index = [int(row["index_B"]) for row in alone]
    assert index == list(range(start, start + 5 * steps))
    order = Order(COUNTS, SETTINGS["seed"], 5, SETTINGS["streams"], SETTINGS["window"])
    shard_n, sample_n = order.locate([i for i in index if i // 30 == 1])
    assert len(set(zip(shard_n.tolist(), sample_n.tolist(), strict=True))) == 30


@pytest.mark.parametrize("change", [{"seed": 6}, {"window": 5}, {"streams": 2}, {"label_drop": 0.6}])
def test_the_digest_sees_every_identity_key(data, change):
    assert collect(data / "tar")[1] != collect(data / "tar", **change)[1]


@pytest.mark.parametrize(("version", "numbers"), [(2, rng), (3, philox)])
def test_each_row_is_what_the_formulas_say(data, version, numbers):
    """Recomputed sample by sample, in float64, from the stored moments."""

    def normal(purpose, g):
        out = np.empty((1, 16), np.float32)
        numbers.fill_normal(5, purpose, [g], out)
        return out.reshape(shape)

    shards = open_shards(data / "tar")
    manifest = shards.manifest
    order = Order(manifest.counts, SETTINGS["seed"], SETTINGS["batch"], SETTINGS["streams"], SETTINGS["window"])
    rows, _ = collect(data / "tar", version=version)
    flips, drops = [], []
    for g, row in enumerate(rows):
        shard, sample = order.locate([g])
        flip = numbers.uniform(5, Purpose.FLIP, [g], 1)[0] >= 0.5
        record = shards.read(shard, sample, flip)
        shape = record.mean_nCHW[0].shape
        eps = normal(Purpose.POSTERIOR, g)
        draw = record.mean_nCHW[0].astype(np.float64) + record.std_nCHW[0] * eps.astype(np.float64)
        white = (draw - np.array(manifest.mean_C)[:, None, None]) / np.array(manifest.std_C)[:, None, None]
        np.testing.assert_allclose(row["latent_BCHW"], white, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(row["noise_BCHW"], normal(Purpose.NOISE, g))
        uniform = numbers.uniform(5, Purpose.TIMESTEP, [g], 1)[0, 0]
        assert 0 < row["uniform_B"] < 1 and abs(row["uniform_B"] - uniform) <= 2**-23
        dropped = numbers.uniform(5, Purpose.CONDITION_DROP, [g], 1)[0, 0] < 0.3
        assert row["label_B"] == (3 if dropped else record.label_n[0])
        flips.append(flip[0])
        drops.append(dropped)
    assert 0.25 < np.mean(flips) < 0.75 and 0.1 < np.mean(drops) < 0.5


@pytest.mark.parametrize("kind", ["flips", "no posterior", "by element", "token"])
@pytest.mark.parametrize("real", [0, 5, 8])
def test_drawing_on_the_device_makes_the_same_batch(data, tmp_path, kind, real):
    """The way of CUDA, on the CPU: mean and deviation are copied, latent, noise and digest are made of them there."""
    if kind != "flips":
        how = {"posterior": kind != "no posterior", "by_element": kind == "by element"}
        write_shards(tmp_path, COUNTS, target=(5, 1, 1) if kind == "token" else None, **how)
    shards = open_shards(data / "tar" if kind == "flips" else tmp_path)
    draws = SampleDraws(5, 0.3, "class", shards.manifest.flips, target=kind == "token", token=kind == "token")
    numbers, made = np.arange(real) + 40, []
    shard_n = numbers % len(COUNTS)
    samples = Located(numbers + 1000, shard_n, numbers % np.array(COUNTS)[shard_n])
    for on_device in (False, True):
        buffer = Buffer([RankSlice(0, 8, 2, 4)], [shards], torch.device("cpu"), draws)
        for n in (8, real):  # reused, with other rows of padding
            fewer = Located(*(array[:n] for array in samples))
            how = (draws, fewer, numbers[:n], 7 * numbers[:n])
            buffer._draw_on_device(*how) if on_device else buffer.load(0, *how)
        rows = [dict(batch.tensors()) for batch in buffer.batches()]
        made.append(({k: torch.cat([r[k] for r in rows]) for k in rows[0]}, buffer.digest))
    (host, hash_of_host), (device, hash_of_device) = made
    assert hash_of_host == hash_of_device and (real == 0) == (hash_of_host == 0)
    for name in host:
        assert torch.equal(host[name][:real], device[name][:real]), name
    assert (device["weight_B"] == (torch.arange(8) < real)).all() and (device["index_B"][real:] == -1).all()
    assert all(torch.isfinite(v).all() for v in device.values())


def test_share_gives_every_row_once_and_equal_shapes():
    for total, ranks, micro in itertools.product((1, 7, 8, 64), (1, 2, 3, 9), (0, 1, 3, 100)):
        shares = [RankSlice.of(total, r, ranks, micro) for r in range(ranks)]
        assert [i for s in shares for i in range(s.start, s.stop)] == list(range(total))
        assert len({(s.count, s.size) for s in shares}) == 1
        assert all(s.stop - s.start <= s.rows and (micro == 0 or s.size <= micro) for s in shares)


@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
@pytest.mark.parametrize("limit", [0, 11])
def test_validation_shows_each_sample_once_with_fixed_draws(data, ranks, limit):
    def passes(ranks, rank, micro_batch):
        shards = open_shards(data / "tar")
        with make_validation_loader(
            shards, seed=5, micro_batch=micro_batch, rank=rank, ranks=ranks, limit=limit
        ) as loader:
            return [[[{k: v[i].clone() for k, v in b.tensors()} for i in range(len(b))] for b in loader.batches()]
                    for _ in range(2)]  # fmt: skip

    def real(batches):
        return sorted((r for b in batches for r in b if r["weight_B"] == 1), key=lambda r: int(r["index_B"]))

    reference = real(passes(1, 0, 4)[0])
    assert [int(r["index_B"]) for r in reference] == list(range(limit or sum(COUNTS)))
    by_rank = [passes(ranks, rank, 3) for rank in range(ranks)]
    assert len({tuple(map(len, p[0])) for p in by_rank}) == 1  # same number, same shapes
    for turn in range(2):
        rows = real([b for p in by_rank for b in p[turn]])
        assert_same_rows(reference, rows)
    records = open_shards(data / "tar").read(*[np.array(v) for v in zip(*LOCATIONS[: len(reference)], strict=True)])
    assert [int(r["label_B"]) for r in reference] == records.label_n.tolist()


LOCATIONS = [(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)]


def test_damage_surfaces_in_the_consumer_and_threads_end(tmp_path):
    write_shards(tmp_path, [20, 20], "mds")
    path = tmp_path / "shard-00000001.mds"
    path.write_bytes(path.read_bytes()[:-1])
    before = threading.active_count()
    with (
        make_loader(open_shards(tmp_path), batch=4, seed=0, streams=1, window=4) as loader,
        pytest.raises(InputError, match="shard-00000001"),
    ):
        for _ in itertools.islice(loader.steps(), 20):
            pass
    assert threading.active_count() == before


def test_a_second_run_over_the_same_loader_starts_clean(data):
    with make_loader(open_shards(data / "tar"), **SETTINGS) as loader:
        first = [s.digest for s in itertools.islice(loader.steps(), 3)]
        assert [s.digest for s in itertools.islice(loader.steps(), 3)] == first
        assert [s.digest for s in itertools.islice(loader.steps(16), 1)] == first[2:]
