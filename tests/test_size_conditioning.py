"""`model.size_conditioning`: the denoiser is told how high and wide the latent is, by its shape alone."""

import numpy as np
import pytest
import torch
from invariance_cases import train_case
from run_data import randomised
from shard_data import write_bucket_shards

from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.config import load
from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.embedding import SizeEmbedding
from ldt.training.config import TrainJob

TOLD = {"width": 32, "depth": 2, "heads": 2, "size_conditioning": True}
INPUTS = torch.randn(2, 4, 4, 6), torch.tensor([0.4, 0.8]), Condition(torch.tensor([0, 1]))


def test_the_embedding_is_that_of_its_formula():
    """In numpy and float64: cosines and sines of both sides at 128 frequencies, through the perceptron."""
    torch.manual_seed(0)
    ours = SizeEmbedding(16)
    frequency = 10_000.0 ** (-np.arange(128) / 128)
    for height, width in ((4, 6), (6, 4), (64, 96)):
        waves = [np.concatenate([np.cos(side * frequency), np.sin(side * frequency)]) for side in (height, width)]
        up, down = (
            (p.weight.detach().double().numpy(), p.bias.detach().double().numpy()) for p in (ours.up, ours.down)
        )
        hidden = up[0] @ np.concatenate(waves) + up[1]
        expected = down[0] @ (hidden / (1 + np.exp(-hidden))) + down[1]
        assert ours(height, width).detach().numpy()[0] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "keys", [{}, {"conditioning": "adaln_zero"}, {"head": HeadConfig(1, 64, 2)}, {"interval": True, "time": "unit"}]
)
def test_what_it_says_is_added_to_the_time(keys):
    """The same as in a model that is not told of sizes, whose time's last bias is larger by so much."""
    told = randomised(build(ModelConfig(**TOLD | keys), (4, 4, 4), 2, seed=0))
    plain = build(ModelConfig(**TOLD | keys | {"size_conditioning": False}), (4, 4, 4), 2, seed=0)
    plain.load_state_dict({k: v for k, v in told.state_dict().items() if not k.startswith("size.")})
    with torch.no_grad():
        assert not torch.allclose(told(*INPUTS), plain(*INPUTS), atol=1e-2)
        plain.time.down.bias += told.size(4, 6)[0]
        torch.testing.assert_close(told(*INPUTS), plain(*INPUTS), atol=1e-5, rtol=1e-5)


def test_a_fresh_model_is_not_yet_moved_by_it():
    model = build(ModelConfig(**TOLD), (4, 4, 4), 2, seed=0)
    assert not model.size(4, 6).any()
    assert {name for name, _ in model.named_parameters() if name.startswith("size.")} == {
        f"size.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")
    }


def test_a_unet_is_refused():
    with pytest.raises(InputError, match="model.size_conditioning=true needs model.name=transformer"):
        load(TrainJob, None, ["run_dir=x", "data.path=y", "model.name=unet", "model.size_conditioning=true"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_bucket_shards(root, {"8x8": [33], "8x16": [17], "12x4": [11]})
    return root


def test_a_run_that_is_told_is_the_same_on_any_ranks_and_keeps_it_when_exported(pool, data, tmp_path):
    told = ["model.size_conditioning=true", f"data.path={data}", "log.validation_every_samples=0"]
    told += ["train.total_samples=80", "checkpoint.every_samples=80"]
    cases = [(1, 0, 0), (2, 3, 1), (3, 2, 2)]
    runs = [
        pool(ranks).run(
            train_case,
            settings=[*told, f"run_dir={tmp_path}/{ranks}", f"engine.zero_stage={z}", f"train.micro_batch={m}"],
        )
        for ranks, z, m in cases
    ]
    plain = pool(1).run(train_case, settings=[*told, f"run_dir={tmp_path}/0", "model.size_conditioning=false"])
    for other in runs[1:]:
        assert [r["digest"] for r in other] == [r["digest"] for r in runs[0]]
        for a, b in zip(other, runs[0], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert [r["digest"] for r in plain] == [r["digest"] for r in runs[0]], "it draws nothing"
    assert abs(plain[-1]["loss"] - runs[0][-1]["loss"]) > 1e-6
    loaded = load_denoiser(tmp_path / "1")
    assert loaded.denoiser.size(4, 4).any(), "it has learned something"
    assert main(["export", str(tmp_path / "1"), "--to", str(tmp_path / "model")]) == 0
    exported = load_denoiser(tmp_path / "model")
    with torch.no_grad():
        for shape in ((2, 4, 4, 4), (2, 4, 4, 8), (2, 4, 6, 2)):
            inputs = torch.randn(shape), torch.tensor([0.4, 0.8]), Condition(torch.tensor([0, 1]))
            assert torch.equal(exported.denoiser(*inputs), loaded.denoiser(*inputs))
