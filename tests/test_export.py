"""Exported models: the right weights, readable by safetensors alone, by sampling, evaluation and as a start."""

import json

import numpy as np
import pytest
import torch
import xxhash
from checkpoint_files import tensors
from safetensors.torch import load_file
from shard_data import write_shards
from training_cases import refused_case, train_case

from ldt.checkpoint.checkpoint import resolve, results_of
from ldt.checkpoint.load import load_denoiser
from ldt.cli import main

TRACKED = 0.07


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [40, 23])
    return path


@pytest.fixture(scope="module")
def run_dir(pool, data, tmp_path_factory):
    """A run that stores snapshots of two averages often, and tracks a third one for comparison."""
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = [f"run_dir={path}", f"data.path={data}", "train.total_samples=2400", "optimizer.lr=1e-3"]
    settings += [f"ema.widths=[0.05,0.1,{TRACKED}]", "ema.snapshot_every_samples=80", "checkpoint.keep=1"]
    pool(2).run(train_case, settings=settings)
    return path


def test_the_averages_are_exported_in_their_shapes(run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), "--to", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.endswith(f"at 2400 samples: {tmp_path / 'model'}\n")
    exported, expected = load_file(tmp_path / "model" / "model.safetensors"), tensors(run_dir)["ema"]
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[k], expected[k]) for k in expected)
    facts = json.loads((tmp_path / "model" / "model.json").read_text())
    assert facts["samples_seen"] == 2400 and facts["sampling"]["classes"] == ["ant", "bee", "cat"]
    assert facts["config"]["model"]["width"] == 32
    assert main(["export", str(resolve(run_dir)), f"--to={tmp_path}/plain", "weights=master"]) == 0
    plain, master = load_file(tmp_path / "plain" / "model.safetensors"), tensors(run_dir)["master"]
    assert all(torch.equal(plain[k], master[k]) for k in master)


def test_an_average_between_is_the_one_that_was_tracked(run_dir, tmp_path):
    """The third average was tracked through training; reconstructed from the other two it is nearly the same."""
    for path in [resolve(run_dir), *sorted((run_dir / "ema").iterdir())]:
        forget_average(path, f"ema_{TRACKED:g}")
    assert len(list((run_dir / "ema").iterdir())) == 30
    assert main(["export", str(run_dir), f"--ema-width={TRACKED}", f"--to={tmp_path}/model"]) == 0
    made = flat(load_file(tmp_path / "model" / "model.safetensors"))
    saved = tensors(run_dir)
    narrow, wide, tracked = (flat(saved[k]) for k in ("ema", "ema_0.1", f"ema_{TRACKED:g}"))
    assert np.linalg.norm(made - tracked) < 0.03 * np.linalg.norm(narrow - wide)
    facts = json.loads((tmp_path / "model" / "model.json").read_text())
    assert facts["weights"] == "power average of width 0.07" and len(facts["made_from"]) == 60


def flat(weights):
    return torch.cat([weights[k].double().flatten() for k in sorted(weights)]).numpy()


def forget_average(path, kind):
    """Leave an average out of what the manifest says can be used for reconstruction."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["averages"].pop(kind, None)
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.xxh64").write_text(xxhash.xxh64(text).hexdigest())


def test_it_is_a_model_of_its_own(pool, run_dir, data, tmp_path):
    """As a denoiser without the run, and as the start of another run: the same as from the checkpoint itself."""
    assert main(["export", str(run_dir), f"--to={tmp_path}/model"]) == 0
    a, b = load_denoiser(run_dir), load_denoiser(tmp_path / "model")
    assert all(torch.equal(x, y) for x, y in zip(a.denoiser.parameters(), b.denoiser.parameters(), strict=True))
    assert a.spec == b.spec and results_of(b.path) == tmp_path / "model"
    logs = []
    for name, source in (("a", run_dir), ("b", tmp_path / "model")):
        settings = [f"run_dir={tmp_path}/{name}", f"data.path={data}", f"train.init_from={source}"]
        logs.append(pool(2).run(train_case, settings=[*settings, "train.total_samples=8"]))
    assert logs[0][0]["loss"] == logs[1][0]["loss"]


def test_bad_requests_are_explained(run_dir, tmp_path, capsys):
    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    (tmp_path / "there").mkdir()
    assert "exists; give a directory that does not" in refused(run_dir, "--to", tmp_path / "there")
    assert "0.3 lies outside of the widths" in refused(run_dir, "--ema-width=0.3", f"--to={tmp_path}/x")
    assert "argument --to: expected one argument" in refused(run_dir, "--to")
    assert "unrecognized arguments: --ema=0.1" in refused(run_dir, "--ema=0.1", f"--to={tmp_path}/x")
    assert "to is not set" in refused(run_dir)
    assert main(["export", str(run_dir), f"--to={tmp_path}/model"]) == 0
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "model"), f"output={tmp_path}/x.png"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_another_average_than_the_checkpoint_has_is_explained(pool, run_dir, data):
    settings = [f"run_dir={run_dir}", f"data.path={data}", "optimizer.lr=1e-3", "train.total_samples=2480"]
    settings += ["ema.widths=[0.05,0.2]", "train.accept_changes=[ema.widths]"]
    message = pool(1).run(refused_case, settings=settings)
    assert "ema.widths can't change from" in message and "an average can't begin there" in message
