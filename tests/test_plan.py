"""`ldt plan` against closed forms, published throughputs, and what the trainer really does."""

import pytest
from plans import ROOT, planned
from shard_data import write_shards

from ldt.cli import main
from ldt.commands import plan
from ldt.engine import memory, roofline
from ldt.errors import InputError

XL2 = ROOT / "configs/imagenet256/dit_xl2.yaml"
FOLDERS = ("imagenet256", "imagenet512", "recipes", "study", "text")
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name in FOLDERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_config_can_be_planned(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data there
    assert main(["plan", str(path), "nodes=2", "price=2"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "memory ZeRO-3", "communication", "images/s", "checkpoint", "GPU hours", "costs"):
        assert word in out
    assert out.splitlines()[-1].startswith("recommended")


def test_compute_is_a_roofline():
    """Products by their operations, what lies between them by its bytes: both three passes, or four."""
    alone = ("nodes=1", "gpus=1", "train.global_batch=128", "device=a100")
    config, model, at = planned(XL2, *alone, "engine.compile=false")
    assert at.products + 0.2 / 3.5 * 3 / 0.55 * at.attention == pytest.approx(
        128 * 3 * 2 * 118.62e9 / (0.55 * 312e12), rel=1e-2
    )
    assert at.traffic == 0 and at.communication == 0, "one rank sends nothing"
    passes = 101  # over a token's numbers in each block, counted by hand for eager adaLN-Zero blocks
    assert at.between == pytest.approx(passes * 28 * 128 * 256 * 1152 * 2 / (0.8 * 2.039e12), rel=0.05)
    _, _, again = planned(XL2, *alone, "engine.compile=false", "model.activation_checkpointing=true")
    assert again.products == pytest.approx(at.products * 4 / 3) and again.attention == pytest.approx(
        at.attention * 9 / 7
    )
    assert at.between < again.between < at.between * 4 / 3 and again.memory < 0.4 * at.memory
    _, _, compiled = planned(XL2, *alone, "engine.compile=true")
    assert compiled.between == pytest.approx(0.63 * at.between) and compiled.products == at.products


@pytest.mark.parametrize(
    ("name", "recomputed", "images_per_second"),  # theirs, of one A100 and batch 128, by the READMEs of the two
    [("dit_xl2", "true", 107.5), ("uvit_h2", "false", 146.0), ("uvit_h2", "true", 111.0)],
)
def test_published_steps_are_met_within_a_tenth(name, recomputed, images_per_second):
    settings = (
        "nodes=1",
        "gpus=1",
        "device=a100",
        "train.global_batch=128",
        "autocast=true",
        "latent=4x32x32",
        "engine.compile=false",
    )
    path = XL2.with_name(f"{name}.yaml")
    _, _, at = planned(path, *settings, f"model.activation_checkpointing={recomputed}")
    assert 128 / at.step == pytest.approx(images_per_second, rel=0.1)


def test_a_ring_leaves_each_node_once():
    """Between nodes over all of its network at a time, and never faster than the GPUs' own links."""
    _, _, one = planned(XL2, "nodes=1")
    _, _, two = planned(XL2, "nodes=2")
    _, _, slow = planned(XL2, "nodes=2", "network_gb=5")
    assert two.communication / two.traffic == pytest.approx(1 / 400e9)
    assert one.communication / one.traffic == pytest.approx(1 / 450e9)
    assert slow.communication == pytest.approx(10 * two.communication)
    _, _, fast = planned(XL2, "nodes=2", "network_gb=400")
    assert fast.communication == pytest.approx(fast.traffic / 450e9)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_the_optimizers_bytes_are_shared(precision, stage):
    """Adam's 28 and an average's 12 bytes a parameter are a rank's share of the work, but for stage 0's replicas."""
    few, many = (roofline.optimizer_bytes(10**9, stage, precision, ranks, 1) for ranks in (2, 1 << 20))
    saved = 2 * (few - many) / 1e9
    assert saved == pytest.approx(12 if stage == 0 else 12 + 28 + 8 + (2 if precision == "bf16" else 4), abs=8.1)
    assert roofline.optimizer_bytes(10**9, stage, precision, 2, 2) - few == 6 * 10**9
    assert few >= 36e9


@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_has_the_bytes_of_the_stage_that_is_run(stage):
    """In float32 it runs stage 0; in bf16 it has a float32 copy to write."""
    for count in (roofline.optimizer_bytes, memory.state_bytes):
        assert count(10**9, stage, "fp32", 1, 1) == count(10**9, 0, "fp32", 1, 1)
    replica = roofline.optimizer_bytes(10**9, 0, "fp32", 1, 1)
    assert roofline.optimizer_bytes(10**9, stage, "bf16", 1, 1) != replica


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_traffic_is_that_of_ring_algorithms(stage, passes):
    assert plan.traffic_bytes(10**9, stage, "fp32", 4) == passes * 4 * 10**9 * 3 // 4
    if stage > 1:
        assert plan.traffic_bytes(10**9, stage, "bf16", 4) == passes * 2 * 10**9 * 3 // 4


@pytest.mark.parametrize(("stage", "sent"), [(0, 4 * 10**9), (1, 2 * 10**9), (3, 2 * 10**9)])
def test_muon_sends_its_share_of_the_updates(stage, sent):
    """At stage 0 all are gathered."""
    plain, muon = (plan.traffic_bytes(10**9, stage, "bf16" if stage else "fp32", 4, m) for m in (False, True))
    assert muon - plain == sent * 3 // 4


def test_it_splits_as_the_trainer_does():
    _, model, at = planned(XL2, "nodes=3", "train.global_batch=250", "train.micro_batch=4")
    assert (at.ranks, at.share.count, at.share.size) == (24, 3, 4)
    config, model, at = planned(XL2, "nodes=1", "train.global_batch=4096", "train.micro_batch=auto")
    assert at.share.size > 32 and plan.fits(config, at), "as many as the device holds"
    _, _, at = planned(
        XL2, "nodes=1", "train.global_batch=4096", "train.micro_batch=64", "engine.activation_memory_gb=20"
    )
    assert 0 < at.recomputed < 28 and model.activations.of(64, at.recomputed) <= 20e9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("nodes=64",), "is less than 512 ranks"),
        (("nodes=12",), "of the rows are padding"),
        (("nodes=4", "network_gb=1"), "of the step is communication"),
        (("engine.zero_stage=3",), "engine.zero_stage=3 without need: ZeRO-2 fits"),
        (("train.global_batch=4096",), "GB of 80: train.micro_batch=auto"),
        (("checkpoint.every_samples=25600", "disk_gb=0.5"), "raise checkpoint.every_samples"),
        (
            (
                "model={width: 64, depth: 2, heads: 2}",
                "train.global_batch=2048",
                "device_memory_gb=500",
                "gpus=1",
                "data.threads=1",
                "latent=32x32x32",
                "engine.compile=true",
            ),
            "raise data.threads=1",
        ),
    ],
)
def test_it_warns_of_what_will_hurt(settings, words):
    config, model, at = planned(XL2, *settings)
    assert any(words in line for line in plan.warnings(config, model, at))
    quiet, model, at = planned(XL2, "nodes=1", "train.global_batch=256")
    assert not list(plan.warnings(quiet, model, at))


def test_it_recommends_a_stage_that_fits_and_no_idle_nodes():
    fast, model, _ = planned(XL2, "train.global_batch=2048", "train.micro_batch=auto", "network_gb=400")
    assert plan.recommendation(fast, model).startswith("engine.zero_stage=2 train.micro_batch=32, up to 8 nodes")
    slow, _, _ = planned(XL2, "train.global_batch=2048", "train.micro_batch=auto", "network_gb=1")
    assert "1 node of" in plan.recommendation(slow, model)
    few, model, _ = planned(XL2, "train.global_batch=4")
    assert plan.recommendation(few, model).startswith("engine.zero_stage=2 train.micro_batch=1, 1 node of 8 GPUs")
    tiny, model, _ = planned(XL2, "device_memory_gb=1", "train.micro_batch=1")
    assert plan.recommendation(tiny, model).startswith("nothing fits")


def test_it_says_whose_shape_it_took(tmp_path, capsys):
    write_shards(tmp_path / "data", [30])
    for path, latent, words in (
        (tmp_path / "data", "4x32x32", f"latents 4x2x2 in 3 classes (as in {tmp_path}/data)"),
        (
            tmp_path / "no",
            "4x8x8",
            f"latents 4x8x8 in 1,000 classes (by latent= and classes=: {tmp_path}/no is not here)",
        ),
    ):
        assert main(["plan", f"data.path={path}", "run_dir=x", f"latent={latent}"]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("nodes=0", "nodes=0 must be at least 1"),
        ("device=h1000", "device=h1000 is not one of h100, .* did you mean h100"),
        ("latent=4x32", "latent=4x32 must be channels, height and width"),
        ("latent=4x²x32", "latent=4x²x32 must be channels, height and width"),
        ("disk_gb=0", "disk_gb=0.0 must be a number above 0"),
        ("network_gb=.nan", "network_gb=nan is not a finite number"),
        ("device_tflops=-5", "device_tflops=-5.0 must be a number from 0"),
        ("device_memory_gb=-1", "device_memory_gb=-1.0 must be a number from 0"),
        ("price=-2", "price=-2.0 must be a number from 0"),
        ("latent=4x31x31", "model.patch=2 does not divide the latent size 31x31"),
    ],
)
def test_bad_plans_are_refused(setting, words):
    with pytest.raises(InputError, match=words):
        planned(XL2, setting)
