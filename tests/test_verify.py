"""`ldt verify`: the same run anywhere is the same, and whatever was changed is found."""

import json
import shutil
from pathlib import Path

import forked
import pytest
from make_record import make_record
from shard_data import write_shards

from ldt.cli import main
from ldt.commands.verify import STEPS, begun_with, differences
from ldt.config import load
from ldt.errors import InputError
from ldt.log import read_jsonl
from ldt.training.attempt import attempt
from ldt.training.config import TrainJob

SETTINGS = [
    "seed=5", "model={width: 32, depth: 2, heads: 2}", "train.global_batch=8", "optimizer.lr=3e-3",
    "log.every_samples=8", "train.total_samples=80", "optimizer.decay=cosine", "checkpoint.every_samples=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A run of ten steps, made in a process of its own, as a record."""
    root = tmp_path_factory.mktemp("verify")
    write_shards(root / "data", [20, 12])
    settings = [f"run_dir={root}/run", f"data.path={root}/data", *SETTINGS]
    assert forked.run("-m", "ldt", "train", *settings).returncode == 0
    make_record(root / "run", root / "record")
    return root / "record"


def verify(record: Path, *settings: str) -> tuple[int, str]:
    done = forked.run("-m", "ldt", "verify", record, *settings)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_record_is_small_text(record):
    assert sorted(p.name for p in record.iterdir()) == [
        "config.yaml", "environment.jsonl", "hashes.json", "metrics.jsonl",
    ]  # fmt: skip


def test_the_same_run_is_the_same(record):
    """With the learning rates of the whole run: its decay is not squeezed into the samples that are trained again."""
    code, said = verify(record, "samples=40")
    assert code == 0 and f"the same run, 5 logged steps of: {record}\n" in said
    code, said = verify(record.parent / "run", "samples=24", "train.micro_batch=1", "engine.zero_stage=2")
    assert code == 0 and "the same run, 3 logged steps" in said


def begun_with_2_case(world, settings: list[str]) -> None:
    attempt(load(TrainJob, None, settings), world, rng_version=2)


@pytest.mark.parametrize("said", [True, False], ids=["said", "of before it was said"])
def test_a_record_of_older_random_numbers_is_repeated_with_them(pool, record, tmp_path, said):
    data, environment = record.parent / "data", tmp_path / "run" / "environment.jsonl"
    pool(1).run(begun_with_2_case, settings=[f"run_dir={tmp_path}/run", f"data.path={data}", *SETTINGS])
    (first,) = read_jsonl(environment)
    assert first["rng_version"] == 2
    assert next(read_jsonl(record / "environment.jsonl"))["rng_version"] == 3
    if not said:
        environment.write_text(json.dumps({k: v for k, v in first.items() if k != "rng_version"}) + "\n")
    code, told = verify(tmp_path / "run", "samples=24")
    assert code == 0 and "the same run, 3 logged steps" in told


def test_a_record_of_unknown_random_numbers_is_refused(tmp_path):
    (tmp_path / "environment.jsonl").write_text('{"rng_version": 4}\n')
    with pytest.raises(InputError, match="was trained with random numbers of version 4"):
        begun_with(tmp_path)


def test_at_another_world(record, tmp_path):
    ranks = forked.run_ranks(2, "-m", "ldt", "verify", record, "samples=24", f"output={tmp_path}/again")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert "the same run, 3 logged steps" in ranks[0].stdout
    assert len(list(read_jsonl(tmp_path / "again" / "metrics.jsonl"))) == 3


def _replace(record, file, old, new):
    path = record / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _loss(record):
    return json.loads((record / "metrics.jsonl").read_text().splitlines()[1])["loss"]


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("what", ["a digit of a digest", "a digit of a loss", "the seed", "the learning rate"])
def test_tampering_is_found(record, tmp_path, what, hashed):
    copy = shutil.copytree(record, tmp_path / "record")
    line = json.loads((copy / "metrics.jsonl").read_text().splitlines()[1])
    if what == "a digit of a digest":
        other = ("0" if line["digest"][3] != "0" else "1").join([line["digest"][:3], line["digest"][4:]])
        _replace(copy, "metrics.jsonl", line["digest"], other)
    elif what == "a digit of a loss":
        _replace(copy, "metrics.jsonl", repr(line["loss"]), repr(line["loss"] * 1.001))
    elif what == "the seed":
        _replace(copy, "config.yaml", "seed: 5", "seed: 6")
    else:
        _replace(copy, "config.yaml", "lr: 0.003", "lr: 0.004")
    if not hashed:
        (copy / "hashes.json").unlink()
    code, said = verify(copy, "samples=24")
    assert code == 1 and f"another run than: {copy}" in said
    assert ("was changed since the record was made" in said) == hashed
    assert f"at {8 if what == 'the seed' else 16} samples the" in said, said


def test_losses_count_over_the_first_steps_alone():
    def line(loss, digest="a"):
        return {"loss": loss, "digest": digest}

    edge = STEPS * 8
    then = {8: line(1.0), edge: line(1.0), edge + 8: line(1.0)}
    assert differences(then, then | {edge + 8: line(1.5)}, 8, 1e-5) == []
    assert differences(then, then | {edge: line(1.00002)}, 8, 1e-5) != []
    assert differences(then, then | {edge: line(1.000009)}, 8, 1e-5) == []
    assert differences(then, then | {8: line(float("nan"))}, 8, 1e-5) != []
    assert differences(then, then | {edge + 8: line(1.0, "b")}, 8, 1e-5) != []
    assert differences(then, {8: line(1.0)}, 8, 1e-5) == [f"at {edge} samples nothing was logged this time"]


def test_what_can_not_be_verified_is_said(record, tmp_path, capsys):
    assert main(["verify", str(record), "samples=7"]) == 2
    assert "give samples= of at least the first one's samples_seen" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
