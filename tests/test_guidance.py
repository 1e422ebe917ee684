"""Guidance from inside, from no class and from another model: closed forms, composition, and whole runs."""

import json
import shutil

import pytest
import torch
from resume_cases import resume_case
from run_data import randomised, shared_run
from shard_data import write_shards

from ldt.checkpoint.checkpoint import resolve
from ldt.checkpoint.load import load_denoiser
from ldt.cli import main
from ldt.diffusion.condition import Condition
from ldt.diffusion.config import ObjectiveConfig, SamplerConfig
from ldt.diffusion.guidance import Guide, as_predict, class_guided, inner_guided
from ldt.diffusion.objectives import Objective
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import HeadConfig, ModelConfig

SHAPE, CLASSES = (4, 4, 4), 3
FLOW = Objective(ObjectiveConfig())


def toy(x_BCHW, t_B, condition, inner=False):
    """Full: 3x + label; inner: x. The null label is 3."""
    label_B111 = condition.label_B[:, None, None, None].to(x_BCHW)
    full = 3 * x_BCHW + label_B111
    return (full, x_BCHW) if inner else full


@pytest.fixture
def inputs():
    x_BCHW = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x_BCHW, torch.full((5,), 0.4), Condition(torch.arange(5) % CLASSES)


def test_the_formulas(inputs):
    x, t, condition = inputs
    label = condition.label_B[:, None, None, None]
    torch.testing.assert_close(inner_guided(toy, 1.5)(*inputs), x + 1.5 * (2 * x + label))
    torch.testing.assert_close(class_guided(toy, 3, 2.0)(*inputs), 3 * x + 3 + 2 * (label - 3.0))


def test_inner_and_class_guidance_compose(inputs):
    """The inner head's acts on both predictions, then that of the class between them."""
    x, t, condition = inputs
    label = condition.label_B[:, None, None, None]
    y = class_guided(inner_guided(toy, 1.5), 3, 2.0)(*inputs)
    with_class, without = x + 1.5 * (2 * x + label), x + 1.5 * (2 * x + 3.0)
    torch.testing.assert_close(y, without + 2 * (with_class - without))


@pytest.mark.parametrize("t", [0.1, 0.2, 0.5, 0.8, 0.9])
def test_all_guidance_keeps_to_its_interval(inputs, t):
    x, _, condition = inputs
    config = SamplerConfig(guidance=2.0, guidance_inner=1.5, guidance_low=0.2, guidance_high=0.8)
    guide = Guide(lambda x_BCHW, t_B, c: 0 * x_BCHW, FLOW, 3.0, "")
    got = as_predict(toy, FLOW, condition, 3, config, guide)(x, t)
    t_B = torch.full((5,), t)
    if 0.2 < t <= 0.8:
        y = class_guided(inner_guided(toy, 1.5), 3, 2.0)(x, t_B, condition)
        expected = FLOW.predict(3 * y, x, t_B)  # the guide says 0, and in flow a prediction is linear in y
    else:
        expected = FLOW.predict(toy(x, t_B, condition), x, t_B)
    torch.testing.assert_close(got.x0_BCHW, expected.x0_BCHW)
    torch.testing.assert_close(got.eps_BCHW, expected.eps_BCHW)


def test_a_guide_may_predict_something_else(inputs):
    """Its x0 and ε count, so a guide that says the same in another parametrisation guides nowhere."""
    x, t, condition = inputs
    x0, eps = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    xt = 0.6 * x0 + 0.4 * eps
    as_x = Objective(ObjectiveConfig(prediction="x"))
    guide = Guide(lambda *_: x0, as_x, 2.5, "")
    better = FLOW.predict(eps - x0, xt, t)
    same = guide.extrapolate(better, xt, t, condition)
    torch.testing.assert_close(same.x0_BCHW, x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same.eps_BCHW, eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "keys",
    [{}, {"conditioning": "adaln_zero", "norm": "layer"}, {"long_skips": True}, {"head": HeadConfig(1, 64, 2)},
     {"activation_checkpointing": True, "value_residual": True}, {"learned_sigma": True}],
)  # fmt: skip
def test_the_inner_head_reads_the_blocks_before_it(keys, inputs):
    """The full output is that of the model without the inner head; the inner one does not see the later blocks."""
    plain = ModelConfig(width=32, depth=4, heads=2, **keys)
    with_inner = ModelConfig(width=32, depth=4, heads=2, inner_head=2, **keys)
    model = build(with_inner, SHAPE, CLASSES, seed=0)
    assert not model(*inputs, inner=True)[1].any(), "zero at first"
    randomised(model)
    without = build(plain, SHAPE, CLASSES, seed=0)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("inner.")})
    full, inner = model(*inputs, inner=True)
    torch.testing.assert_close(full, without(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(full, model(*inputs), rtol=0, atol=0)
    assert inner.shape == full.shape == inputs[0].shape
    inner.square().sum().backward()
    touched = [any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in model.blocks]
    assert touched == [True, True, False, False]


def test_the_loss_is_of_both_outputs(inputs):
    x0, t, condition = inputs
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    model = randomised(build(ModelConfig(width=32, depth=4, heads=2, inner_head=2), SHAPE, CLASSES, seed=0))
    xt = 0.6 * x0 + 0.4 * eps
    full, inner = model(xt, t, condition, inner=True)
    expected = (full - (eps - x0)).square().mean((1, 2, 3)) + (inner - (eps - x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(FLOW.loss(model, x0, eps, t, condition, inner=True), expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_shards(path, [20, 12])
    return path


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_with_an_inner_head_is_the_same_at_any_world_and_stage(pool, data, tmp_path, stage):
    logs = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        settings = [f"run_dir={run}", f"data.path={data}", "model.depth=3", "model.inner_head=1"]
        end, lines, _ = pool(ranks).run(resume_case, settings=[*settings, f"engine.zero_stage={stage}"])
        assert not end
        logs.append(lines)
        assert any(k.startswith("inner.") for k, _ in load_denoiser(run).denoiser.named_parameters())
    for seen, (loss, _, digest) in logs[0].items():
        assert digest == logs[1][seen][2] and loss == pytest.approx(logs[1][seen][0], rel=1e-5)


@pytest.mark.parametrize("inner", [3, -1])
def test_an_inner_head_lies_inside(inner):
    with pytest.raises(InputError, match=f"model.inner_head={inner} must be 0"):
        ModelConfig(width=32, depth=3, heads=2, inner_head=inner)


# --------------------------------------------------------------------------------------------------------- from a run


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    return shutil.copytree(shared_run(tmp_path_factory), tmp_path / "run")


def results(run):
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_a_guide_of_another_age_changes_the_score_and_is_named_in_the_result(run, capsys):
    older = run / "checkpoints" / "000000001000"
    assert main(["evaluate", str(run)]) == 0
    assert main(["evaluate", str(run), f"evaluate.guide={older}", "evaluate.guide_scale=2"]) == 0
    plain, guided = sorted(results(run), key=lambda r: "guide_hash" in r)
    assert "guide_scale" not in plain and guided["guide_scale"] == 2.0
    assert guided["guide_hash"] == (older / "manifest.xxh64").read_text()
    assert guided["moments_hash"] != plain["moments_hash"]
    assert main(["evaluate", str(run), f"evaluate.guide={run}", "evaluate.guide_scale=3"]) == 0
    itself = next(r for r in results(run) if r.get("guide_scale") == 3.0)
    score = "fd_efficientnet_lite0"
    assert itself[score] == pytest.approx(plain[score], rel=1e-3), "the model itself guides nowhere"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluate.guidance_inner=1.5"], "needs a model with an inner head"),
        (["evaluate.guide_scale=1.5"], "belong together"),
        (["evaluate.guide=RUN"], "belong together"),
        (["evaluate.guide=nowhere", "evaluate.guide_scale=2"], "nowhere does not exist"),
        (["evaluate.guide=RUN", "evaluate.guide_scale=2", "evaluate.guide_weights=0.1"], "no power averages"),
        (["evaluate.guide=RUN", "evaluate.guide_scale=2", "evaluate.guide_weights=best"], "holds no best weights"),
    ],
)
def test_bad_guidance_is_refused(run, settings, message, capsys):
    assert main(["evaluate", str(run), *(s.replace("RUN", str(run)) for s in settings)]) == 2
    assert message in capsys.readouterr().err


def test_a_guide_of_other_data_is_refused(run, pool, data, tmp_path, capsys):
    end, *_ = pool(1).run(resume_case, settings=[f"run_dir={tmp_path}/other", f"data.path={data}"])
    assert not end
    assert main(["evaluate", str(run), f"evaluate.guide={tmp_path}/other", "evaluate.guide_scale=2"]) == 2
    assert "has another latent_shape than" in capsys.readouterr().err


def test_a_width_is_reconstructed_from_the_guides_own_run(pool, data, tmp_path):
    """Nobody else can choose it afterwards: as `ldt export --ema-width` gives it."""
    run = tmp_path / "run"
    settings = [f"run_dir={run}", f"data.path={data}", "ema.snapshot_every_samples=8", "optimizer.lr=1e-2"]
    end, *_ = pool(1).run(resume_case, settings=[*settings, "train.total_samples=160"])
    assert not end
    assert main(["export", str(run), "--ema-width", "0.07", "--to", str(tmp_path / "model")]) == 0
    exported, reconstructed = load_denoiser(tmp_path / "model"), load_denoiser(run, "0.07")
    for (name, a), b in zip(exported.denoiser.named_parameters(), reconstructed.denoiser.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert reconstructed.hash == f"{(resolve(run) / 'manifest.xxh64').read_text()}-0.07"


# ------------------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_is_one_result_each_and_a_table(run, capsys):
    assert main(["evaluate", str(run), "evaluate.guidance=1,1.5", "evaluate.steps=2,3"]) == 0
    out = capsys.readouterr().out
    found = {(r["guidance"], r["steps"]) for r in results(run)}
    assert found == {(1.0, 2), (1.0, 3), (1.5, 2), (1.5, 3)}
    table = [line.split() for line in out.splitlines()[-6:-1]]
    assert table[0] == ["steps", "guidance", "samples_seen", "fd_efficientnet_lite0"]
    assert [row[:3] for row in table[1:]] == [[s, g, "2000"] for g in ("1", "1.5") for s in ("2", "3")]
    assert out.splitlines()[-1].endswith("evaluations.jsonl"), "last, where the results are"


def test_a_sweep_is_checked_before_any_of_it_is_run(run, capsys):
    assert main(["evaluate", str(run), "evaluate.guidance=1,x"]) == 2
    assert "evaluate.guidance" in capsys.readouterr().err and not (run / "evaluations.jsonl").exists()
