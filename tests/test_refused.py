"""A start that is refused leaves its run as it was: every file, and every name in the directory."""

import json
import shutil
from pathlib import Path

import forked
import pytest
from checkpoint_files import rewrite_manifest, spoil
from contents import everything
from shard_data import write_shards
from training_cases import SETTINGS, refused_case, train_case

from ldt.checkpoint.manifest import listed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path / "data", [40, 23])
    write_shards(path / "other", [40, 24])
    return path


@pytest.fixture(scope="module")
def trained(pool, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    pool(1).run(train_case, settings=[f"run_dir={run_dir}", f"data.path={data}/data", "train.total_samples=160"])
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def nothing(run_dir: Path) -> None:
    pass


def spoil_all(run_dir: Path) -> None:
    for path in listed(run_dir / "checkpoints"):
        spoil(path)


def spoil_newest(run_dir: Path) -> None:
    spoil(listed(run_dir / "checkpoints")[-1])


def other_random_numbers(run_dir: Path) -> None:
    for path in listed(run_dir / "checkpoints"):
        rewrite_manifest(path, rng_version=1)


def tear(name: str):
    def damage(run_dir: Path) -> None:
        spoil_newest(run_dir)  # so that there are lines to cut
        (run_dir / name).write_text("{\n" + (run_dir / name).read_text())

    return damage


def make_file(name: str):
    def damage(run_dir: Path) -> None:
        (run_dir / name).write_text("")

    return damage


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (nothing, ["model.width=64", "evaluate.guidance=7"], "model.width: 32 there, 64 here"),
        (nothing, ["seed=6"], "seed: 5 there, 6 here"),
        (nothing, ["model.width=64", "train.accept_changes=[model.width]"], "holds another model: parameter"),
        (nothing, ["ema.widths=[0.05,0.2]", "train.accept_changes=[ema.widths]"], "ema"),
        (nothing, ["data.path={data}/other"], "holds other data (fingerprint"),
        (nothing, ["data.path={data}/nowhere"], "does not exist"),
        (nothing, ["log.validation_every_samples=80"], "has no held-out split"),
        (nothing, ["log.samples_every_samples=80"], "autoencoder"),
        (spoil_all, [], "is whole (2 damaged)"),
        (spoil_newest, ["seed=6"], "seed: 5 there, 6 here"),
        (other_random_numbers, [], "with random numbers of version 1"),
        (tear("metrics.jsonl"), [], "metrics.jsonl line 1 is not a JSON object"),
        (tear("environment.jsonl"), [], "environment.jsonl line 1 is not a JSON object"),
        (make_file("samples"), [], "samples can't be written (Not a directory)"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x))[:40],
)
def test_a_refused_start_changes_nothing(pool, data, run_dir, damage, settings, message):
    damage(run_dir)
    before = everything(run_dir)
    given = [f"run_dir={run_dir}", f"data.path={data}/data", "train.total_samples=400"]
    told = pool(1).run(refused_case, settings=[*given, *(s.format(data=data) for s in settings)])
    assert message in told
    assert everything(run_dir) == before


def test_a_refused_first_start_leaves_no_directory(pool, data, tmp_path):
    told = pool(1).run(refused_case, settings=[f"run_dir={tmp_path}/a/run", f"data.path={data}/nowhere"])
    assert "does not exist" in told and not (tmp_path / "a" / "run").exists()


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "."])
def test_what_may_not_be_written_is_found_before_the_first_step(data, run_dir, name):
    """As another user's file or directory; it used to be found when the first checkpoint was due, maybe at the end."""
    (run_dir / name).chmod(0o555)
    before = everything(run_dir)
    arguments = [*SETTINGS, f"run_dir={run_dir}", f"data.path={data}/data", "train.total_samples=400"]
    done = forked.run("-m", "ldt", "train", *arguments, unprivileged=True)
    (run_dir / name).chmod(0o755)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{run_dir / name} can't be written (Permission denied)" in done.stderr
    assert everything(run_dir) == before
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "done"
