"""From a config to a denoiser."""

import torch
from torch import nn

from ldt.errors import InputError
from ldt.nn.config import ModelConfig
from ldt.nn.transformer import Transformer


def build(config: ModelConfig, latent_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """The denoiser with its initial weights, which depend on the seed alone; the global generator is left as it was."""
    if classes < 1:
        raise InputError("the data have no classes; encode images with at least one, or name the classes of the shards")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config, latent_shape, classes)


def parameter_count(model: nn.Module) -> int:
    """Trainable parameters, also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
