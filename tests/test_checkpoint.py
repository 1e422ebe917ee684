"""Saving and resuming: exact at the same world, elastic across ranks and stages, and never from damaged bytes."""

import json
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
import torch
from checkpoint_files import rewrite_manifest, spoil, tensors
from safetensors import safe_open
from safetensors.torch import load_file
from shard_data import write_shards
from training_cases import BATCH, SETTINGS, refused_case, train_case

from ldt.checkpoint.checkpoint import Checkpoint, resolve
from ldt.checkpoint.load import load_denoiser
from ldt.checkpoint.manifest import Damaged, listed, read_manifest
from ldt.checkpoint.tensors import write_safetensors
from ldt.cli import INTERRUPTED, main
from ldt.errors import InputError
from ldt.log import read_jsonl
from ldt.run.outcome import STOPPED


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [40, 23])
    return path


@pytest.fixture(scope="module")
def straight(pool, data, tmp_path_factory):
    """An uninterrupted run of 160 samples on one process: its directory and its log."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    settings = [f"run_dir={run_dir}", f"data.path={data}", "train.total_samples=160", "engine.zero_stage=1"]
    return run_dir, pool(1).run(train_case, settings=settings)


@pytest.fixture
def copy(straight, tmp_path):
    """A copy of that run to spoil."""
    return Path(shutil.copytree(straight[0], tmp_path / "run"))


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    [(1, 0, "fp32"), (2, 1, "fp32"), (2, 3, "fp32"), (3, 1, "bf16"), (3, 2, "bf16"), (3, 3, "bf16")],
)
def test_resumed_at_the_same_world_is_bitwise_the_same(pool, data, tmp_path, ranks, stage, precision):
    def run(name, total):
        settings = [f"run_dir={tmp_path}/{name}", f"data.path={data}", f"train.total_samples={total}"]
        settings += [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
        return pool(ranks).run(train_case, settings=settings)

    whole = run("whole", 160)
    run("parts", 80)
    parts = run("parts", 160)
    for key in ("samples_seen", "digest", "loss", "grad_norm", "lr"):
        assert [r[key] for r in parts] == [r[key] for r in whole], key
    assert [r["attempt"] for r in parts] == [0] * 10 + [1] * 10
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert set(a) == {"master", "exp_avg", "exp_avg_sq", "ema", "ema_0.1"}
    assert all(torch.equal(a[kind][name], b[kind][name]) for kind in a for name in a[kind])


@pytest.fixture(scope="module")
def fifty(pool, data, tmp_path_factory):
    """The losses and digests of 50 uninterrupted steps of each kind."""
    logs = {}
    for kind, settings in KINDS.items():
        run_dir = tmp_path_factory.mktemp("fifty")
        settings = [f"run_dir={run_dir}", f"data.path={data}", f"train.total_samples={50 * BATCH}", *settings]
        logs[kind] = pool(1).run(train_case, settings=settings)
    return logs


KINDS = {"fp32": ["engine.precision=fp32"], "bf16": ["engine.precision=bf16"], "muon": ["optimizer.muon_lr=0.02"]}


@pytest.mark.parametrize(("kind", "digits"), [("fp32", 1e-5), ("bf16", 1e-2), ("muon", 1e-5)])
def test_resumed_on_other_ranks_and_stages_is_the_same_run(pool, data, fifty, tmp_path, kind, digits):
    """4 → 2 → 3 → 1 ranks at stages 1 → 3 → 2 → 0 (1 in bf16), each from the last one's checkpoint, over 50 steps."""
    last_stage = 1 if kind == "bf16" else 0
    for ranks, stage, total in ((4, 1, 104), (2, 3, 200), (3, 2, 304), (1, last_stage, 400)):
        settings = [f"run_dir={tmp_path}/run", f"data.path={data}", f"train.total_samples={total}"]
        log = pool(ranks).run(train_case, settings=[*settings, f"engine.zero_stage={stage}", *KINDS[kind]])
    assert [r["digest"] for r in log] == [r["digest"] for r in fifty[kind]]
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in fifty[kind]], rel=digits)
    assert [r["world_size"] for r in log] == [4] * 13 + [2] * 12 + [3] * 13 + [1] * 12


def test_precision_and_shard_format_may_change_too(pool, data, fifty, tmp_path):
    """bf16 from tar on two ranks, then fp32 from mds on one: the same data, and nearly the same losses."""
    write_shards(tmp_path / "mds", [40, 23], format="mds")
    for ranks, path, precision, total in ((2, data, "bf16", 200), (1, tmp_path / "mds", "fp32", 400)):
        settings = [f"run_dir={tmp_path}/run", f"data.path={path}", f"train.total_samples={total}"]
        log = pool(ranks).run(train_case, settings=[*settings, f"engine.precision={precision}"])
    assert [r["digest"] for r in log] == [r["digest"] for r in fifty["fp32"]]
    mixed, half, full = ([r["loss"] for r in lines] for lines in (log, fifty["bf16"], fifty["fp32"]))
    assert mixed[:25] == pytest.approx(half[:25], rel=1e-2)
    spread = max(abs(a / b - 1) for a, b in zip(half, full, strict=True))  # what rounding to bf16 does to a run: 2.4 %
    assert mixed == pytest.approx(full, rel=2 * spread) and spread < 5e-2


def as_format_2(path: Path) -> None:
    """Rewrite a checkpoint as it was before format version 3: zeros in the place of what is absent."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        kept = {key: tensor.clone() for key, tensor in load_file(path / name).items()}  # not of the mapped file
        for kind, parameters in manifest["absent"].items():
            kept |= {f"{kind}/{p}": torch.zeros_like(kept[f"master/{p}"]) for p in parameters if p in entry["ranges"]}
        entry.update(write_safetensors(path / name, kept))
    rewrite_manifest(path, without="absent", version=2, files=manifest["files"])


def test_muon_s_matrices_have_no_second_moment(pool, data, tmp_path):
    """Nothing is stored of it, and a checkpoint that still holds its zeros goes on the same way."""
    settings = [f"data.path={data}", "optimizer.muon_lr=0.02", "train.total_samples=80"]
    pool(2).run(train_case, settings=[f"run_dir={tmp_path}/new", "engine.zero_stage=1", *settings])
    path = resolve(tmp_path / "new")
    absent = read_manifest(path)["absent"]["exp_avg_sq"]
    stored = {key for file in path.glob("*.safetensors") for key in load_file(file)}
    assert "blocks.0.mlp.down.weight" in absent and "patchify.weight" not in absent
    assert {f"exp_avg/{name}" for name in absent} <= stored and not {f"exp_avg_sq/{name}" for name in absent} & stored
    assert "exp_avg_sq/patchify.weight" in stored
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    as_format_2(resolve(tmp_path / "old"))
    logs = []
    for name in ("new", "old"):
        further = [f"run_dir={tmp_path}/{name}", *settings[:-1], "train.total_samples=120"]
        logs.append(pool(1).run(train_case, settings=further))
    for key in ("samples_seen", "loss", "digest"):
        assert [r[key] for r in logs[0]] == [r[key] for r in logs[1]]


def test_it_can_be_read_alone(straight):
    """By safetensors alone, and as a denoiser without process group, data or DeepSpeed."""
    path = resolve(straight[0])
    manifest = Checkpoint.read(path).verify().manifest
    (name,) = manifest["files"]
    with safe_open(path / name, framework="pt") as f:
        ema = f.get_tensor("ema/patchify.weight")
    loaded = load_denoiser(straight[0])
    assert torch.equal(loaded.denoiser.patchify.weight.flatten(), ema)
    master = load_denoiser(path, weights="master")
    assert not torch.equal(loaded.denoiser.patchify.weight, master.denoiser.patchify.weight)
    assert loaded.samples_seen == 160
    assert loaded.spec.classes == ["ant", "bee", "cat"] and loaded.spec.std_C == [0.5, 1.0, 1.5, 2.0]


def test_every_flipped_cut_or_missing_byte_is_found(copy):
    path = resolve(copy)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for _ in range(20):
            at = int(torch.randint(len(content), (1,), generator=generator))
            bit = 1 << int(torch.randint(8, (1,), generator=generator))
            file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            with pytest.raises(Damaged, match=path.name):
                Checkpoint.read(path).verify()
            file.write_bytes(content[:at])
            with pytest.raises(Damaged, match=path.name):
                Checkpoint.read(path).verify()
        file.unlink()
        with pytest.raises(Damaged, match=path.name):
            Checkpoint.read(path).verify()
        file.write_bytes(content)
        Checkpoint.read(path).verify()


def test_inspection_says_whole_damaged_or_not_ours(copy, tmp_path, capsys):
    newest_checkpoint = resolve(copy)
    assert main(["inspect", str(newest_checkpoint)]) == 0
    assert capsys.readouterr().out.strip().endswith(f"whole: {newest_checkpoint}")
    assert main(["inspect", str(copy)]) == 0
    spoil(newest_checkpoint)
    assert main(["inspect", str(newest_checkpoint)]) == 1
    assert "safetensors differs from its hash" in capsys.readouterr().out
    assert main(["inspect", str(copy)]) == 1
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds neither latent shards nor a checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(pool, data, straight, copy):
    spoil(copy / "checkpoints" / "000000000160")
    settings = [f"run_dir={copy}", f"data.path={data}", "train.total_samples=160", "engine.zero_stage=1"]
    log = pool(2).run(train_case, settings=settings)
    assert [r["digest"] for r in log] == [r["digest"] for r in straight[1]]
    assert [r["attempt"] for r in log] == [0] * 10 + [1] * 10
    assert (copy / "checkpoints" / "000000000160.damaged").is_dir()
    assert len(list(read_jsonl(copy / "metrics.cut.jsonl"))) == 10, "the lines after the checkpoint are kept aside"


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(pool, data, copy):
    for checkpoint in (copy / "checkpoints").iterdir():
        spoil(checkpoint)
    settings = [f"run_dir={copy}", f"data.path={data}", "train.total_samples=160", "engine.zero_stage=1"]
    for _ in range(2):  # also the second time, when all have been set aside
        assert "is whole (2 damaged)" in pool(1).run(refused_case, settings=settings)


def test_a_start_that_left_no_checkpoint_is_set_aside(pool, data, straight, tmp_path):
    """Killed before its first checkpoint: the run begins again, and its log has every step once."""
    settings = [f"run_dir={tmp_path}", f"data.path={data}", "train.total_samples=160", "engine.zero_stage=1"]
    pool(1).run(train_case, settings=settings)
    shutil.rmtree(tmp_path / "checkpoints")
    log = pool(1).run(train_case, settings=settings)
    assert [r["digest"] for r in log] == [r["digest"] for r in straight[1]]
    assert {r["attempt"] for r in log} == {1}


def test_another_run_is_not_continued(pool, data, copy, tmp_path):
    def refused(*settings):
        return pool(1).run(refused_case, settings=[f"run_dir={copy}", f"data.path={data}", *settings])

    message = refused("optimizer.lr=1e-3", "seed=6")
    assert "optimizer.lr: 0.003 there, 0.001 here" in message and "seed: 5 there, 6 here" in message
    assert "model.width: 32 there, 64 here" in refused("model.width=64")
    assert "train.accept_changes=[optimizer.lr,seed]" in message, "the explicit way to go on"
    message = refused("optimizer.lr=1e-3", "seed=6", "train.accept_changes=[optimizer.lr]")
    assert "seed: 5 there" in message and "optimizer.lr" not in message
    write_shards(tmp_path / "other", [40, 24])
    assert "holds other data (fingerprint" in refused(f"data.path={tmp_path}/other")


def test_a_change_that_was_accepted_goes_on(pool, data, copy):
    settings = [f"run_dir={copy}", f"data.path={data}", "train.total_samples=168", "optimizer.lr=1e-3"]
    log = pool(1).run(train_case, settings=[*settings, "train.accept_changes=[optimizer.lr]"])
    assert [r["lr"] for r in log] == [3e-3] * 20 + [1e-3]


def test_a_newer_format_is_refused(copy):
    path = resolve(copy)
    rewrite_manifest(path, version=99)
    with pytest.raises(InputError, match="format version 99; this ldt reads up to 3: upgrade ldt"):
        Checkpoint.read(path).verify()


def test_a_run_of_other_random_numbers_is_not_continued(pool, data, copy):
    """It would go on with other noise, and say nothing."""
    rewrite_manifest(resolve(copy), rng_version=1)
    settings = [f"run_dir={copy}", f"data.path={data}", "train.total_samples=168"]
    told = pool(1).run(refused_case, settings=settings)
    assert "with random numbers of version 1, this ldt draws version 2 or 3" in told


def test_starting_from_other_weights(pool, data, straight, tmp_path):
    settings = [f"run_dir={tmp_path}/run", f"data.path={data}", f"train.init_from={straight[0]}"]
    log = pool(2).run(train_case, settings=[*settings, "train.total_samples=8"])
    assert log[0]["loss"] < straight[1][0]["loss"] - 0.05, "not from nothing"
    assert log[0]["digest"] == straight[1][0]["digest"], "but from the first sample"
    write_shards(tmp_path / "larger", [40], latent_shape=(8, 2, 2))
    settings = [f"run_dir={tmp_path}/two", f"data.path={tmp_path}/larger", f"train.init_from={straight[0]}"]
    message = pool(1).run(refused_case, settings=settings)
    assert (
        "holds another model: " in message and "patchify.weight has the shape [32, 16] there, [32, 32] here" in message
    )


def test_old_checkpoints_are_removed(pool, data, tmp_path):
    settings = [f"run_dir={tmp_path}", f"data.path={data}", "train.total_samples=160"]
    pool(1).run(train_case, settings=[*settings, "checkpoint.every_samples=40", "checkpoint.keep=2"])
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000000120", "000000000160"]


def start(run_dir, data, *settings):
    """A training that doesn't end by itself, in a real process that has begun to train."""
    arguments = [*SETTINGS, f"run_dir={run_dir}", f"data.path={data}", "train.total_samples=800000", *settings]
    process = forked.Forked("-m", "ldt", "train", *arguments)
    end = time.monotonic() + 90
    while not (run_dir / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    return process


def check_stopped(run_dir, straight):
    """A checkpoint at the last step of the log, and the beginning of the run that was never stopped."""
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "stopped"
    log = [r for r in read_jsonl(run_dir / "metrics.jsonl") if "loss" in r]
    assert resolve(run_dir).name == f"{log[-1]['samples_seen']:012d}"
    n = min(len(log), len(straight[1]))
    assert [r["digest"] for r in log[:n]] == [r["digest"] for r in straight[1][:n]]
    assert not (run_dir / "owner.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_ends_in_a_checkpoint_and_75(data, straight, tmp_path, number):
    process = start(tmp_path / "run", data)
    process.send_signal(number)
    process.send_signal(number)  # a second one changes nothing
    done = process.finish(timeout=90)
    assert done.returncode == STOPPED, done.stderr
    check_stopped(tmp_path / "run", straight)


def test_the_time_limit_ends_in_a_checkpoint_and_75(data, straight, tmp_path):
    process = start(tmp_path / "run", data, "train.time_limit_minutes=0.02")
    done = process.finish(timeout=90)
    assert done.returncode == STOPPED, done.stderr
    assert "time limit" in (tmp_path / "run" / "outcome.json").read_text()
    check_stopped(tmp_path / "run", straight)


def test_one_ctrl_c_saves_and_a_second_aborts(data, straight, tmp_path):
    process = start(tmp_path / "run", data)
    process.send_signal(signal.SIGINT)
    done = process.finish(timeout=90)
    assert done.returncode == STOPPED, done.stderr
    check_stopped(tmp_path / "run", straight)
    # two within a long step: nothing waits for its end
    process = start(tmp_path / "two", data, "train.global_batch=2048", "train.micro_batch=1", "log.every_samples=2048")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)  # so that they are two
    process.send_signal(signal.SIGINT)
    done = process.finish(timeout=90)
    assert done.returncode == INTERRUPTED and "ldt train: interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(int(p.name) <= 2048 for p in listed(tmp_path / "two" / "checkpoints")), "at most of the step before"
    assert json.loads((tmp_path / "two" / "outcome.json").read_text())["outcome"] == "failed"


def test_a_second_job_in_the_same_directory_is_refused(data, tmp_path):
    process = start(tmp_path / "run", data)
    second = forked.run("-m", "ldt", "train", *SETTINGS, f"run_dir={tmp_path}/run", f"data.path={data}")
    assert second.returncode == 2 and f"is in use by process {process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "running"
    process.kill()


@pytest.mark.parametrize("place", ["/dev/null/run", "/sys/run"])
def test_an_unwritable_run_directory_is_named(data, place):
    """Below a file and on a file system that takes no directories: these stop root too."""
    done = forked.run("-m", "ldt", "train", *SETTINGS, f"run_dir={place}", f"data.path={data}")
    assert done.returncode == 2 and f"run_dir={place} can't be written" in done.stderr
    assert "Traceback" not in done.stderr
