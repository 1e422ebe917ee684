"""Alignment: targets in the shards are the network's own, tokens of the right block are drawn to them for as long as
asked, runs are the same at any world, and what samples has no projector."""

import json

import numpy as np
import pytest
import torch
from peers import peer
from plans import ROOT, planned
from run_data import randomised
from safetensors.torch import save_file
from shard_data import write_shards
from training_cases import assert_same_run, refused_case, train_case, trained_in_parts

from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.config import load
from ldt.data.images import prepare
from ldt.data.images.open import open_images
from ldt.data.shards import open_shards, open_validation
from ldt.data.split import Split
from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.metrics.patch_features import make_patch_net
from ldt.models import efficientnet
from ldt.nn import align
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.training.config import TrainJob

# ------------------------------------------------------------------------------------------------------ the mathematics


def test_the_target_is_normalised_over_patches_and_the_distance_is_one_minus_the_cosine():
    target = 3 + 2 * torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    flat = align.normalised(target).flatten(2)
    torch.testing.assert_close(flat.mean(2), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(flat.std(2, correction=0), torch.ones(2, 5), atol=1e-4, rtol=0)
    shift, scale = torch.randn(1, 5, 1, 1), 1 + torch.rand(1, 5, 1, 1)
    torch.testing.assert_close(align.normalised(target * scale + shift), align.normalised(target), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(align.distance(7 * align.normalised(target), target), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(align.distance(-align.normalised(target), target), torch.full((2,), 2.0))
    feature = torch.randn(2, 5, 4, 4)
    u, v = feature.double().flatten(2), align.normalised(target).double().flatten(2)
    expected = 1 - ((u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))).mean(1)
    torch.testing.assert_close(align.distance(feature, target).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keys", [{}, {"conditioning": "adaln_zero"}, {"inner_head": 1}, {"inner_head": 2}])
def test_the_projector_reads_the_blocks_before_it_and_changes_nothing_else(keys):
    config = ModelConfig(width=32, depth=4, heads=2, **keys)
    model = randomised(build(config, (4, 4, 4), 3, seed=0))
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.8]), Condition(torch.tensor([0, 2]))
    inner = {"inner": True} if config.inner_head else {}
    plain = model(*inputs, **inner)
    align.add_projector(model, 32, 7, block=2, seed=3)
    *outputs, feature = model(*inputs, **inner, aligned=True)
    for a, b in zip(outputs, plain if inner else (plain,), strict=True):
        assert torch.equal(a, b)
    assert feature.shape == (2, 7, 2, 2)
    feature.square().sum().backward()
    touched = [any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in model.blocks]
    assert touched == [True, True, False, False]


def test_its_place_in_the_grid_is_the_patchs():
    """A token moves only the features around its own patch."""
    model = build(ModelConfig(width=16, depth=1, heads=1), (4, 12, 16), 3, seed=0)
    align.add_projector(model, 16, 3, block=1, seed=0)
    model.blocks[0] = torch.nn.Identity()
    model._run_blocks = lambda h, *_: (h, {1: h})
    x, t, condition = torch.zeros(1, 4, 12, 16), torch.tensor([0.5]), Condition(torch.tensor([0]))
    moved = x.clone()
    moved[:, :, 8:10, 2:4] = 1  # the patch of row 4 and column 1
    change = (model(moved, t, condition, aligned=True)[1] - model(x, t, condition, aligned=True)[1]).abs().sum(1)[0]
    assert sorted(map(tuple, change.nonzero().tolist())) == [(r, c) for r in (3, 4, 5) for c in (0, 1, 2)]


# ----------------------------------------------------------------------------------------------- targets in the shards


@pytest.mark.parametrize("format", ["tar", "mds"])
@pytest.mark.parametrize("flips", [False, True])
def test_encode_stores_the_networks_features_of_each_view(encode, images, tmp_path, format, flips):
    out = tmp_path / "out"
    assert encode(out, format=format, flips=flips, target="efficientnet_lite0", target_grid=2) == 0
    source, net = open_images(str(images)), make_patch_net("efficientnet_lite0", "", 2)
    split = Split(len(source), 0.2, 0)
    for directory, numbers in (
        (out, split.training(np.arange(18))),
        (open_validation(out), split.validation(np.arange(5))),
    ):
        shards = open_shards(directory)
        assert shards.manifest.target == {
            "name": "efficientnet_lite0", "hash": net.hash, "shape": [112, 2, 2], "dtype": "fp16"
        }  # fmt: skip
        shard_n = np.repeat(np.arange(len(shards.manifest.counts)), shards.manifest.counts)
        sample_n = np.concatenate([np.arange(n) for n in shards.manifest.counts])
        pixels = torch.from_numpy(np.stack([prepare(source.image(i), 8, 1, "pad") for i in numbers]))
        for flip in (False, True)[: 1 + flips]:
            flip_n = np.full(len(shard_n), flip) if flips else None
            records = shards.read(shard_n, sample_n, flip_n, target=True)
            expected = net(pixels.flip(2) if flip else pixels).numpy()
            np.testing.assert_allclose(records.target_n, expected, rtol=2e-3, atol=2e-3)
    plain = tmp_path / "plain"
    assert encode(plain, format=format, flips=flips) == 0
    mean, same = (open_shards(p).read(np.zeros(5), np.arange(5)).mean_nCHW for p in (out, plain))
    assert np.array_equal(mean, same), "latents are as without a target"
    assert json.loads((plain / "manifest.json").read_text())["version"] == 2
    assert open_shards(out).manifest.fingerprint != open_shards(plain).manifest.fingerprint
    assert encode(out, format=format, flips=flips, target="efficientnet_lite0", target_grid=1) == 2, "other settings"


def test_both_formats_hold_the_same_data(encode, tmp_path):
    for format in ("tar", "mds"):
        assert encode(tmp_path / format, format=format, flips=True, target="efficientnet_lite0", target_grid=1) == 0
    one, other = (open_shards(tmp_path / format).manifest for format in ("tar", "mds"))
    assert one.fingerprint == other.fingerprint
    assert main(["inspect", str(tmp_path / "tar")]) == 0


def test_the_offline_networks_features_are_those_of_its_own_layers():
    """A patch's feature is a place of the last map of a sixteenth of the size, and pooling goes on from there."""
    net = make_patch_net("efficientnet_lite0", "", 3)
    image = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = efficientnet.load()
    large = torch.nn.functional.interpolate(
        image.permute(0, 3, 1, 2).float(), (48, 48), mode="bicubic", antialias=True
    ).clamp(0, 255)
    x = torch.nn.functional.relu6(whole._bn0(whole._conv_stem((large / 255 - 0.498) / 0.502)))
    for block in whole._blocks[:11]:
        x = block(x)
    assert net.shape == (112, 3, 3)
    torch.testing.assert_close(net(image), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["resnet10t", "vit_tiny_patch16_224"])
def test_any_timm_model_can_be_the_target(model, tmp_path):
    """Maps and tokens, without those that belong to no patch, averaged to the grid."""
    timm = peer("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(model, pretrained=False, num_classes=0).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    net = make_patch_net(f"timm:{model}", str(tmp_path / "weights.safetensors"), 2)
    image = torch.randint(0, 256, (1, 32, 32, 1), dtype=torch.uint8)
    settings = theirs.pretrained_cfg
    x = image.expand(-1, -1, -1, 3).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, settings["input_size"][1:], mode="bicubic", antialias=True).clamp(0, 255)
    mean, std = (torch.tensor(settings[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        out = theirs.forward_features((x / 255 - mean) / std)
    if out.ndim == 3:
        out = out[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    side = out.shape[-1] // 2
    expected = torch.stack([
        torch.stack([out[0, :, r : r + -(-out.shape[-1] // 2), c : c + -(-out.shape[-1] // 2)].mean((1, 2))
                     for c in (0, side)], 1) for r in (0, side)], 1)  # fmt: skip
    torch.testing.assert_close(net(image)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="target=timm:resnet9000: .* is not a model of timm"):
        make_patch_net("timm:resnet9000", "x", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "resnet50"}, "target=resnet50 is neither efficientnet_lite0 nor timm:NAME"),
        ({"target": "efficientnet_lite0", "target_grid": 0}, "target_grid=0 must be at least 1"),
        (
            {"target": "efficientnet_lite0", "latents": "x", "images.path": ""},
            "is made from images, and latents=x has none",
        ),
    ],
)
def test_bad_targets_are_refused(encode, tmp_path, settings, message, capsys):
    assert encode(tmp_path / "out", **settings) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- whole runs

ALIGN = ["model.depth=3", "align.weight=0.5", "align.block=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for format in ("tar", "mds"):
        write_shards(root / format, [40, 23], format, flips=True, latent_shape=(4, 4, 4), target=(5, 2, 2))
    return root


@pytest.fixture(scope="module")
def reference(pool, data, tmp_path_factory):
    """Aligned for 84 of 120 samples, that is until the middle of a step."""
    run = tmp_path_factory.mktemp("runs") / "reference"
    settings = [f"run_dir={run}", f"data.path={data}/tar", "engine.zero_stage=0", "train.total_samples=120"]
    return run, pool(1).run(train_case, settings=[*settings, *ALIGN, "align.until_samples=84"])


@pytest.mark.parametrize(("ranks", "stage", "micro_batch"), [(1, 1, 3), (2, 0, 0), (2, 3, 1), (3, 2, 0)])
def test_training_is_the_same_at_any_world_and_stage(pool, data, reference, tmp_path, ranks, stage, micro_batch):
    """… also when another world ends what this one has begun, three steps after the alignment is over."""
    settings = [f"run_dir={tmp_path}/run", f"data.path={data}/mds", f"engine.zero_stage={stage}", *ALIGN]
    settings += [f"train.micro_batch={micro_batch}", "align.until_samples=84"]
    assert_same_run(trained_in_parts(pool, ranks, settings, 112, 120), reference[1])


def test_it_is_off_from_exactly_the_sample_that_was_asked_for(pool, data, tmp_path):
    """The second step's loss with none, 4 and 8 of its 8 samples aligned: the weights before it are the same."""
    loss = []
    for until in (8, 12, 16):
        settings = [f"run_dir={tmp_path}/{until}", f"data.path={data}/tar", "train.total_samples=24", *ALIGN]
        records = pool(1).run(train_case, settings=[*settings, f"align.until_samples={until}"])
        loss.append([r["loss"] for r in records])
    first, second, _ = np.array(loss).T
    assert len(set(first)) == 1
    half, whole = second[1] - second[0], second[2] - second[0]
    assert 0.3 < whole < 0.7 and 0.35 < half / whole < 0.65  # 0.5 · (1 − a cosine near 0)


def test_what_samples_has_no_projector_and_starts_another_run(pool, data, reference, tmp_path):
    run = reference[0]
    denoiser = load_denoiser(run).denoiser
    assert not [k for k, _ in denoiser.named_parameters() if k.startswith(align.PREFIX)]
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    exported = load_denoiser(tmp_path / "model").denoiser
    for (name, a), b in zip(denoiser.named_parameters(), exported.parameters(), strict=True):
        assert torch.equal(a, b), name
    start = [f"data.path={data}/tar", f"train.init_from={run}", "train.total_samples=8", "optimizer.lr=1e-30"]
    for name, settings in (("plain", ["model.depth=3"]), ("aligned", ALIGN)):
        pool(1).run(train_case, settings=[f"run_dir={tmp_path}/{name}", *start, *settings])
        begun = load_denoiser(tmp_path / name, "master").denoiser
        for (key, a), b in zip(denoiser.named_parameters(), begun.named_parameters(), strict=True):
            assert torch.equal(a, b[1]), (name, key)


def test_alignment_goes_with_the_mean_flow_and_the_inner_head(pool, data, tmp_path):
    """… also in a process that has had an engine of stage 3, which leaves a linear function of its own behind."""
    pool(1).run(train_case, settings=[f"run_dir={tmp_path}/3", f"data.path={data}/tar", "engine.zero_stage=3",
                                      "train.total_samples=8"])  # fmt: skip
    for change in (["objective.mean_flow=0.5", "model.interval=true"], ["model.inner_head=1"]):
        settings = [f"data.path={data}/tar", "train.total_samples=16", *ALIGN, *change]
        logs = [
            pool(ranks).run(train_case, settings=[f"run_dir={tmp_path}/{change[0]}-{ranks}", *settings])
            for ranks in (1, 2)
        ]
        assert [r["loss"] for r in logs[0]] == pytest.approx([r["loss"] for r in logs[1]], rel=1e-5)


def test_data_without_a_fitting_target_are_refused(pool, data, tmp_path):
    write_shards(tmp_path / "plain", [40], latent_shape=(4, 4, 4))
    write_shards(tmp_path / "large", [40], latent_shape=(4, 4, 4), target=(5, 4, 4))
    messages = {"plain": "and {} has none; encode the images with target=", "large": "a grid of 4x4 patches, and the"}
    for name, message in messages.items():
        path = tmp_path / name
        settings = [f"run_dir={tmp_path}/run", f"data.path={path}", "train.total_samples=8", *ALIGN]
        assert message.format(path) in pool(1).run(refused_case, settings=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align.weight=0.5"], "align.weight=0.5 needs align.block=0 to be the number of a transformer's block"),
        (["align.weight=0.5", "align.block=13"], "from 1 to model.depth=12"),
        (["align.weight=0.5", "align.block=1", "model.name=unet"], "a transformer's block"),
        (["align.weight=-1"], "align.weight=-1.0 must be positive"),
        (["align.until_samples=-1"], "align.until_samples=-1 must be"),
    ],
)
def test_impossible_alignments_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load(TrainJob, None, ["run_dir=x", "data.path=y", *settings])


def test_the_plan_counts_the_projector():
    """Where the data are not there, for features of a ViT-B."""
    path, shape = ROOT / "configs" / "study" / "align.yaml", ("data.path=not_there", "latent=4x8x8")
    (_, on, _), (_, off, _) = (planned(path, *shape, f"align.weight={w}") for w in (0.5, 0))
    product = 9 * 192 * 768
    assert on.parameters - off.parameters == product + 768
    assert on.flops - off.flops == 2 * product * 16
    assert on.sample_bytes - off.sample_bytes == 2 * 768 * 16
