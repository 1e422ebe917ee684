"""The Transformer and its parts."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ldt.errors import InputError
from ldt.nn.attention import attend, choose_kernel
from ldt.nn.build import build, parameter_count
from ldt.nn.condition import Condition
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import AxialRotary, sincos_2d

SHAPE, CLASSES = (4, 8, 8), 10


def inputs(batch=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *SHAPE, generator=g)
    return x, torch.rand(batch, generator=g), Condition(torch.tensor([0, 9, 10])[:batch])


def awake(config):
    """A model whose zero-initialised layers have been given weights, so that everything has an effect."""
    model = build(config, SHAPE, CLASSES, seed=0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.1, generator=g)
    return model


VARIANTS = [
    ModelConfig(width=32, depth=3, heads=2),
    ModelConfig(width=32, depth=3, heads=2, long_skips=True, positions="learned"),
    ModelConfig(width=32, depth=2, heads=2, conditioning="adaln_zero", positions="sincos", norm="layer", mlp="gelu"),
    ModelConfig(width=32, depth=2, heads=2, patch=4, qk_norm=False),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_everything_it_is_told_matters(config):
    model = awake(config)
    x, t, condition = inputs()
    y = model(x, t, condition)
    assert y.shape == x.shape
    assert not torch.allclose(y, model(x, t.flip(0), condition))
    assert not torch.allclose(y, model(x, t, Condition(torch.tensor([1, 2, 3]))))
    moved = x.clone()
    moved[:, :, 0, 0] += 1
    assert not torch.allclose(y[:, :, 7, 7], model(moved, t, condition)[:, :, 7, 7])


@pytest.mark.parametrize("config", VARIANTS)
def test_samples_do_not_see_each_other(config):
    model = awake(config)
    x, t, condition = inputs()
    alone = model(x[1:2], t[1:2], Condition(condition.label_B[1:2]))
    torch.testing.assert_close(model(x, t, condition)[1:2], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS)
def test_every_parameter_gets_a_gradient(config):
    model = awake(config)
    model(*inputs()).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_initial_output_is_zero_and_weights_depend_on_the_seed_alone():
    config = VARIANTS[0]
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first, again, other = (build(config, SHAPE, CLASSES, seed=s) for s in (0, 0, 1))
    assert (torch.random.get_rng_state() == before).all()
    assert not first(*inputs()).any()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.patchify.weight, other.patchify.weight)


def test_adaln_zero_blocks_start_as_the_identity():
    model = build(VARIANTS[2], SHAPE, CLASSES, seed=0)
    h, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(h, c, None), h)


def test_patches_go_in_and_out_at_the_same_place():
    """With blocks that do nothing, output patch n depends on input patch n alone."""
    model = awake(ModelConfig(width=32, depth=1, heads=2, conditioning="adaln_zero"))
    with torch.no_grad():
        model.blocks[0].modulation.weight.zero_()
        model.blocks[0].modulation.bias.zero_()
    x, t, condition = inputs(1)
    moved = x.clone()
    moved[:, 1, 5, 2] += 1
    changed = (model(moved, t, condition) - model(x, t, condition)).abs().amax((0, 1)) > 1e-7
    assert changed[4:6, 2:4].all() and changed.sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_kernels_agree_forward_and_backward(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, 3, 17, 8, generator=g, dtype=dtype) for _ in range(4))
    results = []
    for kernel in ("sdpa", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, kernel)
        (out * weight).sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_kernel_choice():
    cpu = torch.device("cpu")
    assert choose_kernel("auto", cpu, torch.float32) == "sdpa"
    with pytest.raises(InputError, match="model.attention=flash"):
        choose_kernel("flash", cpu, torch.float32)


def test_the_named_kernel_is_the_one_that_runs():
    class Calls(TorchFunctionMode):
        names: list[str] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model = awake(ModelConfig(width=32, depth=1, heads=2, attention="reference"))
    with Calls() as calls:
        model(*inputs())
    assert "softmax" in calls.names and "scaled_dot_product_attention" not in calls.names


def test_rotary_scores_depend_on_the_offset_only_and_prefix_does_not_turn():
    rotary = AxialRotary(8, 5, 5, prefix=2)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=g), torch.randn(8, generator=g)
    everywhere = (27, 8)
    scores = rotary(q.expand(1, 1, *everywhere)) @ rotary(k.expand(1, 1, *everywhere)).transpose(-1, -2)
    grid = scores[0, 0, 2:, 2:].view(5, 5, 5, 5)
    torch.testing.assert_close(grid[0, 0, 2, 1], grid[2, 3, 4, 4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0, 0, 0, 1], q @ k)


def test_sincos_positions_are_distinct():
    p = sincos_2d(32, 4, 4)
    assert p.shape == (16, 32)
    assert (torch.cdist(p, p) + 10 * torch.eye(16)).min() > 0.5


def test_long_skips_join_the_matching_halves():
    model = build(ModelConfig(width=32, depth=5, heads=2, long_skips=True), SHAPE, CLASSES, seed=0)
    assert [b.skip is not None for b in model.blocks] == [False, False, False, True, True]


def test_swiglu_has_the_parameters_of_gelu():
    sizes = [
        parameter_count(build(ModelConfig(width=192, depth=2, heads=3, mlp=m), SHAPE, CLASSES, 0))
        for m in ("swiglu", "gelu")
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "model.heads=5 does not divide model.width=384"),
        ({"width": 36, "heads": 6}, "model.positions=rope needs a head size divisible by 4"),
        ({"depth": 0}, "model.depth=0 must be at least 1"),
        ({"width": 6, "heads": 1, "positions": "sincos"}, "model.positions=sincos needs model.width divisible by 4"),
    ],
)
def test_impossible_models_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**settings)


def test_no_classes_are_refused():
    with pytest.raises(InputError, match="the data have no classes"):
        build(VARIANTS[0], SHAPE, 0, 0)


def test_patch_must_divide_the_latent():
    with pytest.raises(InputError, match="model.patch=3 does not divide the latent size 8x8"):
        build(ModelConfig(width=32, depth=1, heads=2, patch=3), SHAPE, CLASSES, 0)
