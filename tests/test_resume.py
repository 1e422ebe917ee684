"""A changed config on resume: every accepted change is carried out rightly, or refused in a sentence."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from resume_cases import resume_case
from shard_data import write_shards

from ldt.checkpoint.checkpoint import Checkpoint, resolve
from ldt.checkpoint.tensors import Reader
from ldt.config import load, to_dict
from ldt.engine.config import OptimizerConfig
from ldt.engine.learning_rate import learning_rate
from ldt.run.identity import identity
from ldt.training.config import TrainJob
from ldt.training.resume import describe_changes

OTHER_MODEL = "holds another model"
UNTRACKED = "an average can't begin there"
GOES_ON = ""

TABLE = {
    "seed": ("6", GOES_ON),
    "data.streams": ("2", GOES_ON),
    "data.window": ("16", GOES_ON),
    "data.sources": ("{a: {path: DATA}}", "data.sources.a holds other data"),
    "model.name": ("unet", "is not a multiple of 4"),
    "model.width": ("64", OTHER_MODEL),
    "model.depth": ("3", OTHER_MODEL),
    "model.heads": ("1", OTHER_MODEL),  # the norms of queries and keys are as long as a head
    "model.patch": ("1", OTHER_MODEL),
    "model.condition_on": ("text", "needs encoded captions, and the data have none"),
    "model.conditioning": ("adaln_zero", OTHER_MODEL),
    "model.long_skips": ("true", OTHER_MODEL),
    "model.positions": ("learned", OTHER_MODEL),
    "model.rope_base": ("10000", GOES_ON),
    "model.norm": ("layer", OTHER_MODEL),
    "model.norm_eps": ("1e-5", GOES_ON),
    "model.qk_norm": ("false", OTHER_MODEL),
    "model.qkv_bias": ("false", OTHER_MODEL),
    "model.mlp": ("gelu", OTHER_MODEL),
    "model.mlp_ratio": ("2", OTHER_MODEL),
    "model.value_residual": ("true", OTHER_MODEL),
    "model.time": ("steps", GOES_ON),
    "model.time_frequencies": ("diffusers", GOES_ON),
    "model.time_embedding": ("sinusoids", OTHER_MODEL),
    "model.output_convolution": ("true", OTHER_MODEL),
    "model.learned_sigma": ("true", OTHER_MODEL),
    "model.init": ("uvit", GOES_ON),  # has done its work
    "model.unet.channels": ("128", GOES_ON),  # plays no part
    "model.unet.multipliers": ("[1, 2]", GOES_ON),
    "model.unet.blocks": ("1", GOES_ON),
    "model.unet.head_channels": ("16", GOES_ON),
    "model.unet.context": ("64", GOES_ON),
    "model.interval": ("true", OTHER_MODEL),
    "model.size_conditioning": ("true", OTHER_MODEL),
    "model.inner_head": ("1", OTHER_MODEL),
    "model.head.depth": ("1", OTHER_MODEL),
    "model.head.width": ("64", GOES_ON),  # plays no part without a head
    "model.head.heads": ("4", GOES_ON),
    "objective.prediction": ("v", GOES_ON),
    "objective.loss": ("x", GOES_ON),
    "objective.schedule": ("cosine", GOES_ON),
    "objective.timesteps": ("uniform", GOES_ON),
    "objective.logit_mean": ("0.5", GOES_ON),
    "objective.logit_std": ("2", GOES_ON),
    "objective.weighting": ("min_snr", GOES_ON),
    "objective.min_snr_gamma": ("1", GOES_ON),
    "objective.condition_drop": ("0.5", GOES_ON),
    "objective.shift_base": ("16", GOES_ON),
    "objective.time_floor": ("0.05", GOES_ON, "objective.prediction=x", "objective.loss=flow"),
    "objective.mean_flow": ("0.5", OTHER_MODEL, "model.interval=true"),
    "objective.mean_flow_guidance": ("1.5", OTHER_MODEL, "model.interval=true", "objective.mean_flow=0.5"),
    "align.weight": ("0.5", "needs data with targets", "align.block=1"),
    "align.block": ("1", GOES_ON),  # plays no part
    "align.until_samples": ("48", GOES_ON),
    "align.token_weight": ("0.03", "needs data with targets"),
    "train.global_batch": ("6", GOES_ON),
    "train.bad_steps": ("2", GOES_ON),
    "train.spike_factor": ("20", GOES_ON),
    "optimizer.lr": ("1e-3", GOES_ON),
    "optimizer.betas": ("[0.9, 0.95]", GOES_ON),
    "optimizer.eps": ("1e-6", GOES_ON),
    "optimizer.weight_decay": ("0.1", GOES_ON),
    "optimizer.clip": ("0.5", GOES_ON),
    "optimizer.warmup_samples": ("80", GOES_ON),
    "optimizer.decay": ("linear", GOES_ON),
    "optimizer.final_lr": ("1e-5", GOES_ON),
    "optimizer.muon_lr": ("0.03", "start a new run from these weights by train.init_from"),
    "ema.kind": ("half_life", UNTRACKED),
    "ema.widths": ("[0.1]", GOES_ON),
    "ema.half_life": ("8", GOES_ON),  # plays no part
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [20, 12])
    return path


@pytest.fixture(scope="module")
def run_dir(pool, data, tmp_path_factory):
    """A run of 40 samples."""
    path = tmp_path_factory.mktemp("runs") / "run"
    end, lines, _ = pool(1).run(resume_case, settings=[f"run_dir={path}", f"data.path={data}"])
    assert not end and len(lines) == 5
    return path


def test_the_table_has_every_key_that_defines_a_run():
    config = to_dict(load(TrainJob, None, ["run_dir=x", "data.path=y"]))
    assert identity(config).keys() == TABLE.keys()


@pytest.mark.parametrize("key", TABLE)
def test_an_accepted_change_is_carried_out_or_refused(key, pool, data, run_dir, tmp_path):
    value, refusal, *needed = TABLE[key]
    copy = shutil.copytree(run_dir, tmp_path / "run")
    settings = [f"run_dir={copy}", f"{key}={value}".replace("DATA", str(data)), "train.total_samples=64", *needed]
    settings += [] if key == "data.sources" else [f"data.path={data}"]
    accept = ["data.sources", "data.sources.a.weight" if key == "data.sources" else key]
    accept += [word.split("=")[0] for word in needed]
    end, lines, said = pool(1).run(resume_case, settings=[*settings, f"train.accept_changes=[{','.join(accept)}]"])
    if refusal:
        assert refusal in end
        assert max(map(int, lines)) == 40
        return
    assert end == "" and all(math.isfinite(loss) for loss, *_ in lines.values())
    assert max(map(int, lines)) >= 64
    assert any(line.startswith(f"changed at 40 samples: {key} from") for line in said), said
    assert ("the samples come in another order from here on" in " ".join(said)) == (
        key in ("seed", "data.streams", "data.window", "train.global_batch")
    )


def test_without_being_accepted_the_change_is_refused_with_the_way_to_accept_it(pool, data, run_dir):
    settings = [f"run_dir={run_dir}", f"data.path={data}"]
    end, *_ = pool(1).run(resume_case, settings=[*settings, "seed=6", "train.bad_steps=2"])
    assert "train.accept_changes=[seed,train.bad_steps]" in end
    end, *_ = pool(1).run(resume_case, settings=[*settings, "ema.widths=[0.05,0.1,0.2]"])
    assert UNTRACKED in end and "accept_changes" not in end, "what would not help is not recommended"


@pytest.mark.parametrize("widths", ["[0.1]", "[0.1,0.05]"])
def test_averages_are_found_by_what_they_are_and_not_by_their_names(widths, pool, data, run_dir, tmp_path):
    """The average of width 0.1 is called `ema` from now on; dropping the other one must not mix the two up."""
    copy = shutil.copytree(run_dir, tmp_path / "run")
    settings = [f"run_dir={copy}", f"data.path={data}", f"ema.widths={widths}", "train.accept_changes=[ema.widths]"]
    end, *_ = pool(1).run(
        resume_case,
        settings=[
            *settings,
            "train.total_samples=48",
            "optimizer.lr=1e-30",
            "train.accept_changes=[ema.widths,optimizer.lr]",
            "optimizer.weight_decay=0.01",
        ],
    )
    assert not end
    before, after = (Checkpoint.read(resolve(path)) for path in (run_dir, copy))
    assert after.manifest["averages"]["ema"] == {"kind": "power", "width": 0.1}
    old, new = Reader(before.path, before.manifest), Reader(after.path, after.manifest)
    master = torch.cat([t.flatten() for t in old.full("master").values()])
    wide = torch.cat([t.flatten() for t in old.full("ema_0.1").values()])
    now = torch.cat([t.flatten() for t in new.full("ema").values()])
    expected = wide + (master - wide) * _step_weight(0.1, 48, 8)
    assert torch.allclose(now, expected, atol=1e-6)


def _step_weight(width: float, samples_seen: int, batch: int) -> float:
    """1 − decay of one step of a power profile, by bisection of the definition of γ."""
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        narrow = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) < width**2
        low, high = (low, gamma) if narrow else (gamma, high)
    return 1 - (1 - batch / samples_seen) ** (low + 1)


def test_another_global_batch_goes_on_alike_at_any_world(pool, data, run_dir, tmp_path):
    """From 40 samples, which 6 does not divide: the digests of one process and of two are the same."""
    logs = []
    for ranks in (1, 2):
        copy = shutil.copytree(run_dir, tmp_path / str(ranks))
        settings = [f"run_dir={copy}", f"data.path={data}", "train.global_batch=6", "train.total_samples=100"]
        settings += ["log.every_samples=1"]
        end, lines, _ = pool(ranks).run(resume_case, settings=[*settings, "train.accept_changes=[train.global_batch]"])
        assert not end
        logs.append({seen: digest for seen, (_, _, digest) in lines.items()})
    assert logs[0] == logs[1]
    assert [int(s) for s in logs[0] if int(s) > 40] == list(range(46, 101, 6))


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_longer_run_says_where_its_decaying_rate_jumps_to_and_how_to_keep_it(decay):
    optimizer = OptimizerConfig(lr=1e-3, decay=decay, final_lr=1e-5, muon_lr=0.03)
    base = load(TrainJob, None, ["run_dir=x", "data.path=y", "train.global_batch=64", "train.total_samples=6400"])
    saved = replace(base, optimizer=optimizer)
    longer = replace(saved, train=replace(base.train, total_samples=9600))
    (line,) = describe_changes(saved, longer, 6400)
    now = learning_rate(optimizer, 6464, 9600)
    assert f"goes from 1e-05 to {now:.3g} here; to keep it: " in line
    keys = dict(word.split("=", 1) for word in line.split("to keep it: ")[1].split())
    accepted = keys.pop("train.accept_changes").strip("[]").split(",")
    kept = load(TrainJob, None, ["run_dir=x", "data.path=y", *(f"{k}={v}" for k, v in keys.items())]).optimizer
    assert accepted == list(keys)
    assert learning_rate(kept, 6464, 9600) == pytest.approx(1e-5)
    assert kept.muon_lr / kept.lr == pytest.approx(optimizer.muon_lr / optimizer.lr)
    assert list(describe_changes(saved, saved, 3200)) == []
    ended = replace(saved, optimizer=replace(optimizer, final_lr=0.0))
    (line,) = describe_changes(ended, replace(ended, train=longer.train), 6400)
    assert "goes from 0 to" in line and "optimizer.decay=constant with another optimizer.lr" in line
