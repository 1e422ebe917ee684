"""Published sizes: parameters and multiply-adds on the meta device; our formula against torch's counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.nn.build import build, parameter_count
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.sizes import dit, dit_dh, flops, uvit
from ldt.nn.text_shape import TextShape

LATENT = (4, 32, 32)

# Peebles and Xie 2212.09748, table 4: millions of parameters, Gflops (a multiply-add is one)
DIT = {
    "S/8": (33, 0.36), "S/4": (33, 1.41), "S/2": (33, 6.06),
    "B/8": (131, 1.42), "B/4": (130, 5.56), "B/2": (130, 23.01),
    "L/8": (459, 5.01), "L/4": (458, 19.70), "L/2": (458, 80.71),
    "XL/8": (676, 7.39), "XL/4": (675, 29.05), "XL/2": (675, 118.64),
}  # fmt: skip


def on_meta(config, shape=LATENT, classes=1000, text=None):
    with torch.device("meta"):
        return build(config, shape, classes, seed=0, text=text)


@pytest.mark.parametrize("name", DIT)
def test_dit_has_its_published_size(name):
    millions, gflops = DIT[name]
    parameters = parameter_count(on_meta(dit(name)))
    assert abs(parameters / 1e6 - millions) < 1
    assert flops(dit(name), LATENT) / 2e9 == pytest.approx(gflops, rel=1e-3, abs=6e-3)


def test_dit_at_512_has_its_published_cost():
    assert flops(dit("XL/2"), (4, 64, 64)) / 2e9 == pytest.approx(524.60, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "millions"),
    [  # Bao et al. 2209.12152, table 1: S at CIFAR-10, M at ImageNet 64, L and H at latents of ImageNet 256
        ("S/2", (3, 32, 32), 10, 44),
        ("S-deep/2", (4, 32, 32), 10, 58),
        ("M/4", (3, 64, 64), 1000, 131),
        ("L/2", LATENT, 1000, 287),
        ("H/2", LATENT, 1000, 501),
    ],
)
def test_uvit_has_its_published_size(name, shape, classes, millions):
    assert abs(parameter_count(on_meta(uvit(name), shape, classes)) / 1e6 - millions) < 0.6


def test_the_wide_head_has_its_published_size():
    """RAE's DiT^DH-XL (2510.11690) has 839 M parameters on DINOv2-B's latents of 768×16×16."""
    assert abs(parameter_count(on_meta(dit_dh("XL"), (768, 16, 16))) / 1e6 - 839) < 3


def test_uvit_has_its_published_cost():
    assert flops(uvit("H/2"), LATENT) / 2e9 == pytest.approx(133, rel=5e-3)


def test_the_unet_is_latent_diffusions():
    """LDM-8 of 2112.10752, table 13, has 395 M parameters."""
    assert abs(parameter_count(on_meta(ModelConfig(name="unet"))) / 1e6 - 395) < 1


TEXT = TextShape(7, vocabulary=257)
FEATURES = TextShape(5, width=24)
COUNTED = [
    (dit("S/4"), None),
    (uvit("S/4"), None),
    (ModelConfig(width=48, depth=3, heads=4, long_skips=True), None),
    (ModelConfig(width=48, depth=2, heads=4, condition_on="text"), TEXT),
    (ModelConfig(width=48, depth=3, heads=4, inner_head=1), None),
    (ModelConfig(width=48, depth=3, heads=4, interval=True), None),
    (ModelConfig(width=48, depth=3, heads=4, size_conditioning=True), None),
    (ModelConfig(width=48, depth=3, heads=4, inner_head=1, head=HeadConfig(1, 64, 2)), None),
    (dataclasses.replace(uvit("S/4"), inner_head=2), None),
    (ModelConfig(width=48, depth=3, heads=4, inner_head=1, conditioning="adaln_zero", learned_sigma=True), None),
    (ModelConfig(width=48, depth=2, heads=4, condition_on="class_and_text", mlp_ratio=3), FEATURES),
    (ModelConfig(width=48, depth=2, heads=4, conditioning="adaln_zero", condition_on="text"), FEATURES),
    (ModelConfig(width=48, depth=2, heads=4, condition_on="text", head=HeadConfig(2, 64, 4)), TEXT),
    (ModelConfig(width=48, depth=2, heads=4, conditioning="adaln_zero", mlp="gelu", head=HeadConfig(1, 64, 2)), None),
]


@pytest.mark.parametrize(("config", "text"), COUNTED)
def test_the_formula_counts_what_torch_counts(config, text):
    model = on_meta(config, text=text)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        words = None
        if text:
            words = torch.zeros(1, text.length, dtype=torch.int64)
            words = words if text.vocabulary else torch.zeros(1, text.length, text.width)
        inputs = torch.zeros(1, *LATENT), torch.zeros(1), Condition(torch.zeros(1, dtype=torch.int64), words)
        model(*inputs, inner=True) if config.inner_head else model(*inputs)
    assert flops(config, LATENT, text) == counter.get_total_flops()


def test_unknown_sizes_are_refused():
    with pytest.raises(
        InputError, match="DiT-XXL/2 is not a known size; sizes are S, B, L, XL, each with /2, /4 or /8"
    ):
        dit("XXL/2")
    with pytest.raises(InputError, match=r"DiT\^DH-XXL is not a known size; sizes are S, B, L, XL"):
        dit_dh("XXL")
    with pytest.raises(InputError, match="U-ViT-H/3 is not a known size"):
        uvit("H/3")
