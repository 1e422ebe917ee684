"""The Transformer and its parts."""

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.nn.build import build, parameter_count
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.embedding import AxialRotary, network_time, rotate, sincos_2d, sinusoids
from ldt.nn.sizes import dit, uvit
from ldt.nn.text_shape import TextShape

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
    dataclasses.replace(dit("S/2"), width=32, depth=2, heads=2, learned_sigma=False),
    dataclasses.replace(uvit("S/2"), width=32, depth=3, heads=2),
    ModelConfig(width=32, depth=3, heads=2, value_residual=True),
    ModelConfig(width=32, depth=2, heads=2, positions="rope_sincos", rope_base=10_000.0, time="unit", norm_eps=1e-5),
    ModelConfig(width=32, depth=2, heads=2, value_residual=True, head=HeadConfig(2, 48, 2)),
    ModelConfig(width=32, depth=2, heads=2, conditioning="adaln_zero", positions="sincos", head=HeadConfig(1, 48, 3)),
    dataclasses.replace(uvit("S/2"), width=32, depth=3, heads=2, head=HeadConfig(1, 48, 2)),
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
    h, c = torch.randn(2, 16, 32), torch.randn(2, 1, 32)
    for block in model.blocks:
        assert torch.equal(block(h, c, None)[0], h)


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
    rotation = AxialRotary(8, 5, 5, prefix=2).at(5, 5)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=g), torch.randn(8, generator=g)
    everywhere = (27, 8)
    q_BKNE, k_BKNE = (rotate(x.expand(1, 1, *everywhere), rotation) for x in (q, k))
    scores = q_BKNE @ k_BKNE.transpose(-1, -2)
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


def test_values_are_mixed_with_the_first_blocks():
    """With nothing of the first's it is the model without; with nothing of their own, the blocks' own don't matter."""
    plain = awake(dataclasses.replace(VARIANTS[0], depth=3))
    mixing = build(dataclasses.replace(VARIANTS[0], depth=3, value_residual=True), SHAPE, CLASSES, seed=0)
    missing = mixing.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["blocks.1.attention.mix", "blocks.2.attention.mix"]

    def run(own, first):
        for block in mixing.blocks[1:]:
            block.attention.mix.data = torch.tensor([own, first])
        return mixing(*inputs())

    torch.testing.assert_close(run(1.0, 0.0), plain(*inputs()))
    before = run(0.0, 1.0)
    assert (before - plain(*inputs())).abs().max() > 1e-3
    with torch.no_grad():
        for block in mixing.blocks[1:]:
            block.attention.qkv.weight[64:] = 7.0
        assert torch.equal(run(0.0, 1.0), before)
        mixing.blocks[0].attention.qkv.weight[64:] *= 2
        assert not torch.equal(run(0.0, 1.0), before)


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
        ({"head": HeadConfig(1, 36, 6)}, "not 6 in the wide head; change model.head.width or model.head.heads"),
        ({"head": HeadConfig(1, 6, 1), "positions": "sincos"}, "model.head.width divisible by 4, not 6"),
        ({"head": HeadConfig(1), "name": "unet"}, "model.head.depth=1 is the transformer's; with model.name=unet"),
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


TEXT = TextShape(6, vocabulary=257)
FEATURES = TextShape(6, width=9)


def text_inputs(shape):
    x, t, condition = inputs()
    g = torch.Generator().manual_seed(3)
    there = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    if shape.vocabulary:
        return x, t, condition._replace(text=torch.randint(1, 257, (3, 6), generator=g) * there)
    return x, t, condition._replace(text=torch.randn(3, 6, 9, generator=g) * there[..., None])


@pytest.mark.parametrize("shape", [TEXT, FEATURES])
@pytest.mark.parametrize("conditioning", ["in_context", "adaln_zero"])
@pytest.mark.parametrize("condition_on", ["text", "class_and_text"])
def test_captions_matter_and_padding_does_not(shape, conditioning, condition_on):
    config = ModelConfig(width=32, depth=2, heads=2, conditioning=conditioning, condition_on=condition_on)
    model = build(config, SHAPE, CLASSES, 0, shape)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    x, t, condition = text_inputs(shape)
    y = model(x, t, condition)
    assert not torch.allclose(y, model(x, t, condition._replace(text=condition.text.flip(0))), atol=1e-5)
    assert torch.equal(y, model(x, t, condition._replace(label_B=condition.label_B.flip(0)))) == (
        condition_on == "text"
    )
    with torch.no_grad():
        model.text.position[2:] += 1
        moved = model(x, t, condition)
    torch.testing.assert_close(moved[0], y[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved[1], y[1], atol=1e-4)
    torch.testing.assert_close(moved[2], y[2], rtol=1e-5, atol=1e-5)
    model(x, t, condition).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_no_condition_at_all():
    _, _, condition = text_inputs(TEXT)
    nothing = condition.unconditional(CLASSES)
    assert (nothing.label_B == CLASSES).all() and not nothing.text.any()
    both = condition.followed_by(nothing)
    assert torch.equal(both.label_B[3:], nothing.label_B) and torch.equal(both.text[:3], condition.text)


def test_text_needs_captions():
    with pytest.raises(InputError, match="model.condition_on=text needs encoded captions, and the data have none"):
        build(ModelConfig(width=32, depth=1, heads=2, condition_on="text"), SHAPE, CLASSES, 0)


@pytest.mark.parametrize("config", VARIANTS)
def test_checkpointing_changes_memory_only(config):
    results = []
    for checkpointing in (False, True):
        model = awake(dataclasses.replace(config, activation_checkpointing=checkpointing))
        y = model(*inputs())
        y.square().mean().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_keeps_only_what_enters_each_block():
    def saved(checkpointing):
        kept = []
        model = awake(dataclasses.replace(VARIANTS[0], depth=6, activation_checkpointing=checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            model(*inputs())
        return sum(kept)

    assert saved(True) < saved(False) / 4


def test_the_networks_clock_hits_every_step_exactly():
    k = torch.arange(1000)
    assert torch.equal(network_time((k + 1).double() / 1000, "steps"), k.float())
    assert torch.equal(network_time(((k + 1).double() / 1000).float(), "steps"), k.float())
    halfway = network_time(torch.tensor([0.5005]), "steps")
    torch.testing.assert_close(halfway, torch.tensor([499.5]))
    torch.testing.assert_close(network_time(torch.tensor([0.25]), "continuous"), torch.tensor([250.0]))


def test_frequencies_run_from_one_to_their_end():
    at_zero_and_one = [sinusoids(torch.tensor([1.0]), 256, spacing) for spacing in ("dit", "diffusers")]
    for waves, last in zip(at_zero_and_one, (1e4 ** (-127 / 128), 1e-4), strict=True):
        torch.testing.assert_close(waves[0, 128], torch.tensor(1.0).sin())
        torch.testing.assert_close(waves[0, -1], torch.tensor(last).sin())


def test_learned_sigma_is_the_models_own_affair():
    config = dataclasses.replace(VARIANTS[2], learned_sigma=True)
    model = awake(config)
    assert model.unpatchify.out_features == 2 * SHAPE[0] * 4
    assert model(*inputs()).shape == inputs()[0].shape


def test_bare_sinusoids_need_a_token():
    with pytest.raises(InputError, match="model.time_embedding=sinusoids is a token of its own"):
        ModelConfig(conditioning="adaln_zero", time_embedding="sinusoids")


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("positions", ["rope", "sincos"])
@pytest.mark.parametrize("conditioning", ["in_context", "adaln_zero"])
def test_another_grid_is_as_in_a_model_made_for_it(positions, conditioning, head):
    config = ModelConfig(
        width=32, depth=2, heads=2, positions=positions, conditioning=conditioning, inner_head=1,
        head=HeadConfig(depth=head, width=32, heads=2),
    )  # fmt: skip
    model, made_for_it = awake(config), build(config, (SHAPE[0], 4, 10), CLASSES, seed=0)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    made_for_it.load_state_dict(weights, strict=False)
    generator = torch.Generator().manual_seed(0)
    _, t, condition = inputs(2)
    for _ in range(2):  # the second time from what was kept
        x = torch.randn(2, SHAPE[0], 4, 10, generator=generator)
        for a, b in zip(model(x, t, condition, inner=True), made_for_it(x, t, condition, inner=True), strict=True):
            assert a.shape == x.shape and torch.equal(a, b) and a.any()
    turned = model(x.transpose(2, 3), t, condition)
    assert not torch.allclose(turned.transpose(2, 3), model(x, t, condition), atol=1e-3)  # rows are not columns


def test_other_sizes_that_a_model_does_not_take_are_refused():
    _, t, condition = inputs(2)
    with pytest.raises(InputError, match=r"learned knows the grid of 4x4 tokens alone, not 2x5"):
        awake(ModelConfig(width=32, depth=1, heads=2, positions="learned"))(torch.zeros(2, 4, 4, 10), t, condition)
    with pytest.raises(InputError, match=r"model.patch=2 does not divide the latent size 4x9"):
        awake(ModelConfig(width=32, depth=1, heads=2))(torch.zeros(2, 4, 4, 9), t, condition)
