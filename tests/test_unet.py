"""The UNet arm behind the same protocol as the Transformer."""

import pytest
import torch

from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import ModelConfig, UNetConfig
from ldt.nn.text_shape import TextShape

SHAPE, CLASSES, TEXT = (4, 8, 8), 10, TextShape(5, vocabulary=11)
SMALL = UNetConfig(channels=16, multipliers=[1, 2], blocks=1, head_channels=8, context=12)


def awake(condition_on="class", **settings):
    model = build(ModelConfig(name="unet", unet=SMALL, condition_on=condition_on, **settings), SHAPE, CLASSES, 0, TEXT)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.1, generator=generator)
    return model


def inputs():
    g = torch.Generator().manual_seed(1)
    words = torch.tensor([[3, 1, 0, 0, 0], [4, 5, 6, 7, 8], [0, 0, 0, 0, 0]])
    return torch.randn(3, *SHAPE, generator=g), torch.rand(3, generator=g), Condition(torch.tensor([0, 9, 10]), words)


@pytest.mark.parametrize("condition_on", ["class", "text", "class_and_text"])
def test_everything_it_is_told_matters(condition_on):
    model = awake(condition_on)
    x, t, condition = inputs()
    y = model(x, t, condition)
    assert y.shape == x.shape and y.isfinite().all()
    assert not torch.allclose(y, model(x, t.flip(0), condition), atol=1e-5)
    other_class = condition._replace(label_B=torch.tensor([1, 2, 3]))
    other_text = condition._replace(text=condition.text.flip(0))
    assert torch.equal(y, model(x, t, other_class)) == (condition_on == "text")
    assert torch.equal(y, model(x, t, other_text)) == (condition_on == "class")


def test_samples_do_not_see_each_other_nor_padding():
    model = awake("class_and_text")
    x, t, condition = inputs()
    alone = model(x[:1], t[:1], Condition(condition.label_B[:1], condition.text[:1]))
    torch.testing.assert_close(model(x, t, condition)[:1], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        before = model(x, t, condition)
        model.text.token.weight[0] += 1
        model.text.position[3:] += 1
        after = model(x, t, condition)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_it_starts_at_zero_and_every_parameter_learns():
    fresh = build(ModelConfig(name="unet", unet=SMALL), SHAPE, CLASSES, 0)
    assert not fresh(*inputs()).any()
    model = awake("class_and_text")
    model(*inputs()).square().mean().backward()
    # with one class token softmax is trivial, with several it is not
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_checkpointing_changes_memory_only():
    results = []
    for checkpointing in (False, True):
        model = awake("class", activation_checkpointing=checkpointing).train()
        model(*inputs()).square().mean().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_impossible_shapes_are_refused():
    with pytest.raises(InputError, match="size 6x6 is not a multiple of 4"):
        build(ModelConfig(name="unet"), (4, 6, 6), CLASSES, 0)
    with pytest.raises(InputError, match="model.unet.head_channels=5 does not divide model.unet.channels=16"):
        UNetConfig(channels=16, head_channels=5)
    assert [UNetConfig(channels=c, head_channels=8).groups for c in (256, 48, 40)] == [32, 16, 8]
    with pytest.raises(InputError, match="model.unet.blocks=0 must be at least 1"):
        UNetConfig(blocks=0)
    with pytest.raises(InputError, match="model.unet.multipliers"):
        UNetConfig(multipliers=[])
