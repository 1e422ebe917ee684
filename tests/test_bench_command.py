"""`ldt bench`: every stage runs alone, and does what training and encoding do; how fast is not for tests to say."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from run_data import make_autoencoder, make_images
from shard_data import make_loader, write_shards

from ldt import rng
from ldt.cli import main
from ldt.commands.bench_data import describe
from ldt.commands.bench_encode import describe as describe_encoding
from ldt.data.batch import Batch, SampleDraws
from ldt.data.buffer import RankSlice
from ldt.data.digest import digest
from ldt.data.loader import make_order
from ldt.data.shards import open_shards
from ldt.data.stages import WHOLE, loader_stages, rate, table

FAST = ["threads=[1,2]", "seconds=0.01"]


def rows(out):
    """The table as {stage: numbers}, and the lines below it."""
    lines = out.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("bottleneck"))
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[1:end]]
    return {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in cells}, lines[end:]


def test_a_directory_of_shards_and_a_run(tmp_path, capsys):
    write_shards(tmp_path / "data", [40, 23], flips=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(
        f"run_dir: {tmp_path}/run\ndata: {{path: {tmp_path}/data, threads: 3}}\ntrain: {{global_batch: 16}}\n"
    )
    for path, batch, threads in (("data", 256, 2), ("run", 16, 3)):
        assert main(["bench", "data", str(tmp_path / path), *FAST]) == 0
        found, said = rows(capsys.readouterr().out)
        assert list(found) == ["locate", "read", "draws", "digest", WHOLE]
        assert all(len(numbers) == 2 and min(numbers) > 0 for numbers in found.values())
        assert re.fullmatch(r"bottleneck: (locate|read|draws|digest), \d+% of a sample's time", said[0])
        assert said[1].endswith(f"the loader has data.threads={threads}") and f"in batches of {batch}:" in said[2]
    assert main(["bench", "data", str(tmp_path / "data"), "batch=8", *FAST]) == 0
    assert "in batches of 8:" in capsys.readouterr().out


def test_the_stages_together_are_what_the_loader_does(tmp_path):
    write_shards(tmp_path, [40, 23], flips=True)
    shards = open_shards(tmp_path)
    order, draws = make_order(shards, 5, 16, 8, 1 << 16), SampleDraws(5, 0.3, flips=True)
    samples = order.locate(np.arange(16))
    with make_loader(shards, batch=16, seed=5, label_drop=0.3) as loader:
        step = next(loader.steps())
        made = [torch.clone(v) for _, v in step.micro_batches[0].tensors()]
    from ldt.data.batch import Located

    located = Located(np.arange(16), *samples)
    batch = Batch.padding(16, shards.manifest, pin=False)
    draws.draw(batch, shards.manifest, draws.read(shards, located, text=False), located.key_n)
    assert all(torch.equal(a, b) for a, (_, b) in zip(made, batch.tensors(), strict=True))
    ordinal_n = np.array([0, 40])[located.shard_n] + located.sample_n
    assert digest(batch, ordinal_n, rng.VERSION) == step.digest
    for make in loader_stages(shards, order, RankSlice.of(16, 0, 1, 0), draws).values():
        make()()


def test_every_thread_works_and_counts():
    done = []
    assert rate(lambda: lambda: done.append(1), 10, 3, 0.0) > 0
    assert len(done) == 4, "once to warm up, then once a thread"


def test_the_bottleneck_is_the_slowest():
    rates = {"locate": {1: 900.0}, "read": {1: 50.0}, "draws": {1: 100.0}, WHOLE: {1: 30.0, 4: 90.0}}
    assert describe(rates, 2) == [
        "bottleneck: read, 64% of a sample's time",
        "4 threads do 3.0 times what 1 does; the loader has data.threads=2",
    ]
    encoding = {"read": {1: 9.0, 4: 9.0}, "read and decode": {1: 5.0, 2: 10.0, 4: 20.0}, "autoencoder": {1: 12.0}}
    assert describe_encoding(encoding | {"write": {1: 99.0}}, 2).startswith("bottleneck: read and decode, 10 images")
    assert describe_encoding(encoding | {"write": {1: 99.0}}, 4).startswith("bottleneck: autoencoder, 12 images")
    assert table({"read": {1: 1234.0, 4: 5.0}, "write": {1: 2.0}}, "a second").splitlines() == [
        "a second    1 thread   4 threads",
        "read           1,234           5",
        "write              2            ",
    ]


@pytest.mark.parametrize("latents", [False, True])
def test_encoding(latents, tmp_path, capsys):
    make_autoencoder(tmp_path / "vae")
    make_images(tmp_path / "images", 20)
    words = [f"autoencoder={tmp_path}/vae", f"output={tmp_path}/out", "batch=4", "validation_fraction=0"]
    if latents:
        (tmp_path / "latents").mkdir()
        for i in range(8):
            moments = np.random.default_rng(i).standard_normal((8, 8, 8)).astype(np.float32)
            np.savez(tmp_path / "latents" / f"{i}.npz", moments=moments, label=np.int64(0))
        words += [f"latents={tmp_path}/latents"]
    else:
        words += [f"images.path={tmp_path}/images", "images.size=32", "images.fit=pad"]
    assert main(["bench", "encode", *words, "measured_threads=[1,2]", "seconds=0.01"]) == 0
    found, said = rows(capsys.readouterr().out)
    stages = ["read and decode", "write"] if latents else ["read", "read and decode", "autoencoder", "write"]
    assert list(found) == stages and len(found["read and decode"]) == 2 and len(found["write"]) == 1
    assert "images a second with threads=2" in said[0]
    assert {p.name for p in tmp_path.iterdir()} <= {"vae", "images", "latents"}, "nothing is left"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "nowhere"], "nowhere"),
        (["data", "x", "threads=[0]"], "threads=[0] must be one or more positive numbers"),
        (["data", "x", "seconds=0"], "seconds=0.0 must be above 0"),
        (["data", "x", "batch=-1"], "batch=-1 must be positive"),
        (["data"], "it needs arguments; usage: ldt bench data RUN|DIR"),
        (["encode", "index=x", "autoencoder=y"], "encodes nothing"),
        (
            ["encode", "images.path=x", "images.buckets=[32x32]", "autoencoder=y", "output=z", "images.fit=crop"],
            "images.buckets are measured one by one",
        ),
        ([], "there is no such command"),
    ],
)
def test_mistakes_are_sentences(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(Path().iterdir())
