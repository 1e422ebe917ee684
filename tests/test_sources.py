"""A run on mixed sources: what each step sees depends on the config alone, and what does not go together is named."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from contents import assert_same_rows
from shard_data import make_loader, make_validation_loader, write_shards
from training_cases import assert_same_run, refused_case, train_case

from ldt import cli
from ldt.checkpoint.checkpoint import resolve
from ldt.checkpoint.manifest import read_manifest
from ldt.config import load, to_dict
from ldt.data.digest import digest_text
from ldt.data.shards import Manifest, MixedShards, open_shards
from ldt.errors import InputError
from ldt.run.identity import identity
from ldt.training.config import TrainJob

COUNTS = {"a": [9, 5], "b": [20, 3, 8]}
WEIGHTS = {"b": 1.0, "a": 0.5}
SETTINGS = {"batch": 8, "seed": 5, "streams": 3, "window": 6, "label_drop": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sources a and b in either format, b's samples other than a's; with held-out splits of 3 and 4."""
    path = tmp_path_factory.mktemp("sources")
    for format, (k, (name, counts)) in itertools.product(("tar", "mds"), enumerate(COUNTS.items())):
        write_shards(path / format / name, counts, format, flips=True, seed=100 * k)
        write_shards(path / format / name / "validation", [3 + k], format, flips=True, seed=100 * k + 50)
    return path


def mixed(root, **formats):
    paths = {name: root / formats.get(name, "tar") / name for name in WEIGHTS}
    return MixedShards({name: open_shards(p) for name, p in paths.items()}, WEIGHTS)


def collect(shards, ranks=1, steps=40, start=0, **settings):
    rows, digests = [], [0] * steps
    for rank in range(ranks):
        with make_loader(shards, rank=rank, ranks=ranks, **(SETTINGS | settings)) as loader:
            for k, step in enumerate(itertools.islice(loader.steps(start), steps)):
                digests[k] += step.digest
                for batch in step.micro_batches:
                    real = (batch.weight_B == 1).nonzero()[:, 0]
                    rows += [{k: v[i].clone().numpy() for k, v in batch.tensors()} for i in real]
    rows.sort(key=lambda row: int(row["index_B"]))
    return rows, [digest_text(d) for d in digests]


@pytest.mark.parametrize(("ranks", "settings"), [(2, {"micro_batch": 3}), (3, {"threads": 5}), (11, {})])
def test_steps_do_not_depend_on_ranks_or_formats(root, ranks, settings):
    rows, digests = collect(mixed(root))
    assert [int(r["index_B"]) for r in rows] == list(range(320))
    others, other_digests = collect(mixed(root, a="mds"), ranks, **settings)
    assert_same_rows(rows, others)
    assert digests == other_digests
    later, _ = collect(mixed(root, b="mds"), ranks, steps=7, start=33 * 8)
    assert_same_rows(rows[33 * 8 :], later)


def test_rows_are_the_sources_samples_each_once_an_epoch(root):
    shards = mixed(root)
    shard, sample = collect_places(shards, 320)
    for name, first in (("a", 0), ("b", 2)):
        counts, source = COUNTS[name], shards.sources[name]
        mine = (shard >= first) & (shard < first + len(counts))
        assert mine.mean() == pytest.approx({"a": 1 / 3, "b": 2 / 3}[name], abs=0.01)
        ordinal = (np.cumsum(counts) - counts)[shard[mine] - first] + sample[mine]
        for epoch in range(len(ordinal) // sum(counts)):
            here = ordinal[epoch * sum(counts) : (epoch + 1) * sum(counts)]
            assert sorted(here) == list(range(sum(counts)))
        flip = np.arange(mine.sum()) % 2 == 0
        records = shards.read(shard[mine], sample[mine], flip)
        expected = source.read(shard[mine] - first, sample[mine], flip)
        np.testing.assert_array_equal(records.moments_n2CHW, expected.moments_n2CHW)
        assert records.label_n.tolist() == expected.label_n.tolist()


def collect_places(shards, samples):
    with make_loader(shards, **SETTINGS) as loader:
        return loader.order.locate(np.arange(samples))


def test_statistics_are_those_of_the_mixture(root):
    m = mixed(root).manifest
    draws = np.random.default_rng(0).standard_normal((400_000, 4))
    parts = [s.manifest for s in mixed(root).sources.values()]
    spread = [replace(p, mean_C=np.array(p.mean_C) + k, std_C=np.array(p.std_C) * (1 + k)) for k, p in enumerate(parts)]
    source = np.random.default_rng(1).random(len(draws)) < 1 / 3
    values = np.where(source[:, None], *(draws * p.std_C + p.mean_C for p in spread))
    opened = {n: open_shards(root / "tar" / n) for n in WEIGHTS}
    for one, other in zip(sorted(opened), spread, strict=True):
        opened[one].manifest = other
    both = MixedShards(opened, WEIGHTS).manifest
    np.testing.assert_allclose(both.mean_C, values.mean(0), atol=0.02)
    np.testing.assert_allclose(both.std_C, values.std(0), rtol=0.01)
    assert m.samples == 45 and sum(m.class_counts) == pytest.approx(45, abs=1)
    assert "a:" in m.fingerprint and " b:" in m.fingerprint


def test_held_out_samples_of_all_sources_come_once(root):
    shards = MixedShards({n: open_shards(root / "tar" / n / "validation") for n in WEIGHTS}, WEIGHTS)
    with make_validation_loader(shards, seed=5, micro_batch=4) as loader:
        index = [int(i) for b in loader.batches() for i, w in zip(b.index_B, b.weight_B, strict=True) if w]
    assert index == list(range(7))


def settings(root, run_dir, formats="tar"):
    return [f"run_dir={run_dir}", *(f"data.sources.{n}.path={root}/{formats}/{n}" for n in WEIGHTS),
            "data.sources.a.weight=0.5", "data.streams=3", "data.window=6"]  # fmt: skip


def test_a_run_goes_on_at_any_world_and_says_what_it_saw(pool, root, tmp_path):
    whole = pool(1).run(train_case, settings=[*settings(root, tmp_path / "whole"), "train.total_samples=240"])
    for ranks, stage, total in ((2, 1, 80), (3, 2, 160), (1, 0, 240)):
        parts = [*settings(root, tmp_path / "parts", "mds" if ranks == 3 else "tar"), "log.validation_every_samples=80"]
        log = pool(ranks).run(
            train_case, settings=[*parts, f"train.total_samples={total}", f"engine.zero_stage={stage}"]
        )
    assert_same_run(log, whole, rel=1e-5)
    manifest = read_manifest(resolve(tmp_path / "parts"))
    assert manifest["sampling"]["std_C"] == mixed(root).manifest.std_C
    assert manifest["progress"]["data_fingerprint"] == mixed(root).manifest.fingerprint
    for change, said in [
        ("data.sources.a.weight=0.6", "data.sources.a.weight: 0.5 there, 0.6 here"),
        (f"data.sources.a.path={root}/tar/a/validation", "data.sources.a holds other data"),
        (f"data.sources.c.path={root}/tar/a/validation", "data.sources.c.weight: None there, 1.0 here"),
    ]:
        message = pool(2).run(
            refused_case, settings=[*settings(root, tmp_path / "parts"), change, "train.total_samples=320"]
        )
        assert said in message and "data.sources.b" not in message, message


def test_inspect_tells_the_sources_of_a_checkpoint(pool, root, tmp_path, capsys):
    pool(1).run(train_case, settings=[*settings(root, tmp_path), "train.total_samples=16"])
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"33.33 % {root}/tar/a" in said and f"66.67 % {root}/tar/b" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent_shape": (4, 2, 3)}, "latent shape"),
        ({"autoencoder_hash": "1" * 16}, "autoencoder's hash"),
        ({"classes": ["x", "y", "z"]}, "classes"),
        ({"flips": False}, "flips"),
        ({"image_size": 16}, "image size"),
        ({"captions": True}, "captions"),
    ],
)
def test_sources_that_do_not_go_together_are_named(root, change, said):
    opened = {n: open_shards(root / "tar" / n) for n in WEIGHTS}
    opened["b"].manifest = replace(opened["b"].manifest, **change)
    with pytest.raises(InputError, match=rf"data\.sources\.a and data\.sources\.b differ in their {said}"):
        MixedShards(opened, WEIGHTS)


def test_the_same_data_twice_and_empty_sources_are_named(root, tmp_path):
    one = open_shards(root / "tar" / "a")
    with pytest.raises(InputError, match=r"data\.sources\.x and data\.sources\.y hold the same data"):
        MixedShards({"x": one, "y": open_shards(root / "mds" / "a")}, {"x": 1, "y": 2})
    write_shards(tmp_path, [0], flips=True)
    with pytest.raises(InputError, match=r"data\.sources\.y .* holds no samples"):
        MixedShards({"x": one, "y": open_shards(tmp_path)}, {"x": 1, "y": 2})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.path=x", "data.sources.a.path=y"], "data.path=x and data.sources (a) are both given"),
        ([], "data.path is not set"),
        (["data.path=x", "seed=-1"], "seed=-1 must be a whole number from 0"),
        (["data.path=x", "evaluate.seed=-1"], "seed=-1 must be a whole number from 0"),
        (["data.sources.a.path=x", "data.sources.a.weight=0"], "data.sources.a.weight=0.0 must be a number above 0"),
        (["data.sources.a.path=x", "data.sources.a.weight=-1"], "data.sources.a.weight=-1.0 must be"),
        (["data.sources.a.path=x", "data.sources.a.weight=.nan"], "data.sources.a.weight=nan is not a finite number"),
        (["data.sources.a.weight=1"], "data.sources.a.path is not set"),
        (["data.sources.a.wieght=1"], "unknown key data.sources.a.wieght"),
        (["data.sources={a b: {path: x}}"], "'a b'"),
        (["data.sources=[x, y]"], "data.sources in the command line"),
    ],
)
def test_mistakes_in_the_config_are_named(given, said, capsys):
    assert cli.main(["train", "run_dir=x", *given, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_missing_parts_are_named(pool, root, tmp_path):
    write_shards(tmp_path / "bare", [9], flips=True, seed=7)
    for change, said in [
        (f"data.sources.b.path={tmp_path}/nowhere", f"{tmp_path}/nowhere does not exist"),
        (f"data.sources.b.path={tmp_path}/bare", "data.sources.b.path={}/bare has no held-out split"),
    ]:
        given = [*settings(root, tmp_path / "run"), change, "log.validation_every_samples=8"]
        for ranks in (1, 2):
            assert said.format(tmp_path) in pool(ranks).run(refused_case, settings=given)


def test_paths_are_placement_and_weights_identity(root, capsys):
    config = to_dict(load(TrainJob, None, settings(root, "x")))
    kept = [k for k in identity(config) if k.startswith("data.")]
    assert sorted(kept) == ["data.sources.a.weight", "data.sources.b.weight", "data.streams", "data.window"]
    assert cli.main(["train", *settings(root, "x"), "--dry-run"]) == 0
    assert "weight: 0.5" in capsys.readouterr().out


def test_ranks_other_than_0_read_no_manifest(pool, root):
    assert pool(3).run(reads_case, path=str(root / "tar")) == [4, 0, 0]


def reads_case(world, path):
    """How many manifests each rank reads to open a mixture and its held-out splits."""
    from ldt.dist import all_gather
    from ldt.training.data import open_data, open_held_out

    read = []
    real = Manifest.load
    Manifest.load = classmethod(lambda cls, directory: read.append(directory) or real(directory))
    try:
        config = load(TrainJob, None, settings(path + "/..", "x")).data
        data = open_data(config, world)
        assert data.manifest.samples == 45
        assert open_held_out(config, data, world).manifest.samples == 7
    finally:
        Manifest.load = real
    return all_gather(len(read))
