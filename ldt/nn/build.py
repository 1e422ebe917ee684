"""From a config to a denoiser."""

import importlib
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ldt.errors import InputError
from ldt.nn.attention import choose_kernel
from ldt.nn.block import Attention, Block, Modulation, SwiGLU
from ldt.nn.config import ModelConfig
from ldt.nn.entangled import ClassToken
from ldt.nn.text_shape import TextShape
from ldt.nn.transformer import Transformer
from ldt.nn.unet import UNet

CODES = 1024
"""Compiled versions of a block: 4 kinds of block (first, with a skip from before, with one, last), each in training,
validation and previews with and without guidance, and all of these for every bucket of latents. Beyond dynamo's own
limits, 8 and 256, it would run them eagerly."""


def build(
    config: ModelConfig,
    latent_shape: tuple[int, int, int],
    classes: int,
    seed: int,
    text: TextShape | None = None,
    token: int = 0,
) -> nn.Module:
    """The denoiser with its initial weights, which depend on the seed alone; the global generator is left as it was.

    text: of the data's captions, None where they have none; token: features of the class token that a Transformer
    denoises beside the image (`ldt.nn.entangled`), 0 for none, which leaves all other weights as they are.
    """
    if config.uses_class and classes < 1:
        raise InputError("the data have no classes; encode images with at least one, or name the classes of the shards")
    if config.uses_text and text is None:
        raise InputError(
            f"model.condition_on={config.condition_on} needs encoded captions, and the data have none; encode "
            "them with text.encoder=bytes or another, or use model.condition_on=class"
        )
    make = UNet if config.name == "unet" else Transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = make(config, latent_shape, classes, text if config.uses_text else None)
        if token:
            denoiser.class_token = ClassToken(config, token)
    return denoiser


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, int, int]]) -> None:
    """Refuse buckets of latents, by name, that a denoiser can't be trained on together."""
    several = ", ".join(filter(None, shapes))
    if config.name == "unet" and len(shapes) > 1:
        raise InputError(
            f"model.name=unet is made for one latent shape, not for several ({several}); use model.name=transformer, "
            "or the data of one bucket"
        )
    if config.positions == "learned" and len(shapes) > 1:
        raise InputError(
            f"model.positions=learned is made for one latent shape, not for several ({several}); use "
            "model.positions=rope or sincos, or the data of one bucket"
        )
    for name, (_, height, width) in shapes.items():
        if height % config.patch or width % config.patch:
            raise InputError(
                f"model.patch={config.patch} does not divide the latent size {height}x{width} of {name or 'the data'}; "
                "choose another patch, or other sizes"
            )


def parameter_count(model: nn.Module) -> int:
    """Trainable parameters, also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def matrices_of(denoiser: nn.Module) -> dict[str, int]:
    """The weight matrices in a denoiser's blocks by name, and how many are stacked in each (3 in qkv).

    The wide head's blocks are among them, a UNet's convolutions too; embeddings, first and last layers and what adds
    or multiplies the condition (modulations, a UNet's time projections) are not.
    """
    assert isinstance(denoiser, (Transformer, UNet))
    return _matrices_of_transformer(denoiser) if isinstance(denoiser, Transformer) else _matrices_of_unet(denoiser)


def _matrices_of_transformer(denoiser: Transformer) -> dict[str, int]:
    out = {}
    for name, module in denoiser.named_modules():
        inside_blocks = name.startswith(("blocks.", "head.blocks."))
        if inside_blocks and isinstance(module, nn.Linear) and not isinstance(module, Modulation):
            inside = denoiser.get_submodule(name.rpartition(".")[0])
            halves = 2 if isinstance(inside, SwiGLU) and module is inside.up else 1
            out[f"{name}.weight"] = 3 if isinstance(inside, Attention) and module is inside.qkv else halves
    return out


def _matrices_of_unet(denoiser: UNet) -> dict[str, int]:
    out = {}
    for name, module in denoiser.net.named_modules():
        inside_blocks = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
        if inside_blocks and isinstance(module, (nn.Linear, nn.Conv2d)) and not name.endswith(".time_emb_proj"):
            gated = name.endswith(".ff.net.0.proj")  # GEGLU's, twice as wide as what follows
            out[f"net.{name}.weight"] = 2 if gated else 1
    return out


def checkpoint_blocks(denoiser: nn.Module, blocks: int) -> None:
    """Keep only what enters the first `blocks` blocks, and compute the rest of them again in the backward pass.

    A wide head's blocks are the last ones. A UNet does so everywhere or, with 0, nowhere.
    """
    if isinstance(denoiser, Transformer):
        denoiser.checkpointed = blocks
    elif isinstance(denoiser, UNet):
        denoiser.net.enable_gradient_checkpointing() if blocks else denoiser.net.disable_gradient_checkpointing()


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile a Transformer's blocks, one code for all that are alike, or a UNet; their hooks stay outside.

    Against a whole Transformer at once: equally fast, and ready four times as soon (BENCHMARKS.md).
    """
    # the compiler imports parts of torch that complain about themselves, and looks at every tensor's gradient
    warnings.filterwarnings("ignore", r"`torch.jit.\w+` is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", r"The .grad attribute of a Tensor that is not a leaf", UserWarning)
    dynamo = importlib.import_module("torch._dynamo")  # slow to import
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, CODES)
    dynamo.config.accumulated_recompile_limit = max(dynamo.config.accumulated_recompile_limit, CODES)
    dynamo.assume_constant_result(choose_kernel)  # as a decorator it would import the compiler at every start
    parts = [m for m in denoiser.modules() if isinstance(m, Block)] if isinstance(denoiser, Transformer) else [denoiser]
    for block in parts:
        block.forward = torch.compile(block.forward, dynamic=False)
