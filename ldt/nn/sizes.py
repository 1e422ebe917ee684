"""The named sizes of published denoisers, and what a forward pass costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldt.diffusion.condition import Condition
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import HeadConfig, ModelConfig
from ldt.nn.text_shape import TextShape

PATCHES = (2, 4, 8)
DIT = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads: Peebles and Xie 2212.09748, table 1."""

UVIT = {"S": (512, 13, 8), "S-deep": (512, 17, 8), "M": (768, 17, 12), "L": (1024, 21, 16), "H": (1152, 29, 16)}
"""Bao et al. 2209.12152, table 1."""


def dit(name: str) -> ModelConfig:
    """DiT-`name`, such as XL/2: adaLN-Zero on an integer clock of 1000 steps, with learned sigma as published."""
    return dit_of(*_find("DiT", DIT, name))


def dit_of(width: int, depth: int, heads: int, patch: int) -> ModelConfig:
    """A DiT of any size."""
    return ModelConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        conditioning="adaln_zero",
        positions="sincos",
        norm="layer",
        qk_norm=False,
        mlp="gelu",
        time="steps",
        learned_sigma=True,
    )


def uvit(name: str) -> ModelConfig:
    """U-ViT-`name`, such as H/2: time and class in context, long skips, an output convolution."""
    width, depth, heads, patch = _find("U-ViT", UVIT, name)
    return ModelConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        long_skips=True,
        positions="learned",
        norm="layer",
        qk_norm=False,
        qkv_bias=False,
        mlp="gelu_erf",
        time_embedding="sinusoids",
        output_convolution=True,
        init="uvit",
    )


def dit_dh(name: str, patch: int = 1) -> ModelConfig:
    """DiT^DH-`name` of RAE (Zheng et al. 2510.11690), such as XL: a DiT of today's parts with a wide head."""
    if name not in DIT:
        raise InputError(f"DiT^DH-{name} is not a known size; sizes are {', '.join(DIT)}")
    width, depth, heads = DIT[name]
    return ModelConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        conditioning="adaln_zero",
        qk_norm=False,
        head=HeadConfig(depth=2, width=2048, heads=16),
    )


def _find(family: str, table: dict[str, tuple[int, int, int]], name: str) -> tuple[int, int, int, int]:
    size, _, patch = name.partition("/")
    if size not in table or patch not in map(str, PATCHES):
        raise InputError(f"{family}-{name} is not a known size; sizes are {', '.join(table)}, each with /2, /4 or /8")
    return *table[size], int(patch)


def flops(
    config: ModelConfig, latent_shape: tuple[int, int, int], text: TextShape | None = None, token: int = 0
) -> int:
    """Floating-point operations of one sample's forward pass, two a multiply-add; training costs three times as many.

    Matrix products, attention and convolutions; norms, activations and embeddings are left out. (DiT's and U-ViT's
    tables count a multiply-add as one.) A Transformer's come from the formula below, a UNet's from running it on the
    meta device. token: features of the class token that is denoised beside the image.
    """
    if config.name == "unet":
        return _counted(config, latent_shape, text)
    channels, height, width = latent_shape
    D, p = config.width, config.patch
    image = (height // p) * (width // p)
    text = text if config.uses_text else None
    in_context = config.conditioning == "in_context"
    extra = (1 + config.uses_class + (text.length if text else 0)) if in_context else 0
    N = image + extra + (token > 0)
    output = channels * (2 if config.learned_sigma else 1)
    total = config.depth * _block(config, N, D, 0 if in_context else 1) + image * p * p * channels * D
    if config.head.depth:
        W = config.head.width
        total += config.head.depth * _block(config, image, W, image) + image * (D * W + 2 * W * W)
        total += image * p * p * (channels + output) * W
    else:
        total += image * p * p * output * D + (0 if in_context else 2 * D * D)
    if config.inner_head:
        total += image * p * p * output * D + (0 if in_context else 2 * D * D)
    if token:
        total += 2 * token * D + (0 if in_context else 2 * D * D)
    total += ((config.time_embedding == "mlp") + config.interval) * (256 * D + D * D)
    if config.size_conditioning:
        total += 512 * D + D * D
    if config.long_skips:
        total += config.depth // 2 * N * 2 * D * D
    if config.output_convolution:
        total += (2 if config.inner_head else 1) * 9 * output * output * height * width
    if text and not text.vocabulary:
        total += text.length * text.width * D
    return 2 * total


def attention_flops(
    config: ModelConfig, latent_shape: tuple[int, int, int], text: TextShape | None = None, token: int = 0
) -> int:
    """What of `flops` is scores and weighted sums of a Transformer's attention; a UNet's, which are few, count as 0."""
    if config.name == "unet":
        return 0
    image = (latent_shape[1] // config.patch) * (latent_shape[2] // config.patch)
    tokens = image + (token > 0)
    if config.conditioning == "in_context":
        tokens += 1 + config.uses_class + (text.length if text and config.uses_text else 0)
    return 4 * (config.depth * tokens * tokens * config.width + config.head.depth * image * image * config.head.width)


def _block(config: ModelConfig, tokens: int, width: int, modulations: int) -> int:
    """Multiply-adds of a block; modulations: by how many vectors its tokens are modulated."""
    hidden = -(-int(width * config.mlp_ratio * 2 / 3) // 16) * 16
    mlp = 3 * width * hidden if config.mlp == "swiglu" else 2 * width * int(width * config.mlp_ratio)
    return tokens * (4 * width * width + mlp) + 2 * tokens * tokens * width + modulations * 6 * width * width


def _counted(config: ModelConfig, latent_shape: tuple[int, int, int], text: TextShape | None) -> int:
    with torch.device("meta"):
        model = build(config, latent_shape, classes=1, seed=0, text=text)
        x_BCHW, t_B, label_B = torch.zeros(1, *latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        tokens = None
        if text is not None:
            tokens = torch.zeros(1, text.length, *([] if text.vocabulary else [text.width]), dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x_BCHW, t_B, Condition(label_B, tokens), **({"inner": True} if config.inner_head else {}))
    return counter.get_total_flops()
