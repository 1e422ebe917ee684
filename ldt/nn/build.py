"""From a config to a denoiser."""

import warnings

import torch
from torch import nn

from ldt.errors import InputError
from ldt.nn.condition import TextShape
from ldt.nn.config import ModelConfig
from ldt.nn.transformer import Transformer
from ldt.nn.unet import UNet


def build(
    config: ModelConfig, latent_shape: tuple[int, int, int], classes: int, seed: int, text: TextShape | None = None
) -> nn.Module:
    """The denoiser with its initial weights, which depend on the seed alone; the global generator is left as it was.

    text: of the data's captions, None where they have none.
    """
    if config.told_class and classes < 1:
        raise InputError("the data have no classes; encode images with at least one, or name the classes of the shards")
    if config.told_text and text is None:
        raise InputError(
            f"model.condition_on={config.condition_on} needs captions, and the data have none; encode them with "
            "text.encoder=bytes or another, or use model.condition_on=class"
        )
    make = UNet if config.name == "unet" else Transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(config, latent_shape, classes, text if config.told_text else None)


def parameter_count(model: nn.Module) -> int:
    """Trainable parameters, also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The parts that are compiled, and gathered under ZeRO-3, as a unit: a Transformer's blocks, or a whole UNet."""
    return list(denoiser.blocks) if isinstance(denoiser, Transformer) else [denoiser]


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile the blocks' forward passes, one code for all that are alike; hooks of theirs stay outside of it.

    Against a whole Transformer at once: equally fast, and ready four times as soon (BENCHMARKS.md).
    """
    # the compiler imports parts of torch that complain about themselves, and looks at every tensor's gradient
    warnings.filterwarnings("ignore", r"`torch.jit.\w+` is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", r"The .grad attribute of a Tensor that is not a leaf", UserWarning)
    for block in blocks_of(denoiser):
        block.forward = torch.compile(block.forward, dynamic=False)
