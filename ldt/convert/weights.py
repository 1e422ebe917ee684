"""Files of weights as plain tensors, and what the converters of several projects share."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldt.diffusion.config import ObjectiveConfig
from ldt.errors import InputError, by_reason
from ldt.nn.config import ModelConfig


@dataclass
class Converted:
    """A model of another project in our terms: its config and objective, tensors under our names, rows of its tokens.

    left_out: what of its file is not part of a denoiser.
    """

    model: ModelConfig
    objective: ObjectiveConfig
    tensors: dict[str, Tensor]
    rows: int
    left_out: list[str] = field(default_factory=list)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, of the average where it is a training checkpoint. Nothing else in it is looked at."""
    if path.exists() and not path.is_file():
        raise InputError(f"weights={path} is not a file; give a .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments in DiT's and REPA's checkpoints
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights={path} does not exist; give a .pt, .pth or .safetensors file") from None
    except Exception as error:  # torch raises a dozen types over a damaged file
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0][:150]
        raise by_reason(
            f"weights={path} can't be read as plain tensors ({reason}); save it again as a dictionary of tensors alone",
            error,
        ) from None
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise InputError(f"weights={path} holds no dictionary of tensors; give a model's state dict")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def rename(name: str, prefix: str, names: Mapping[str, str]) -> str | None:
    """A name by a table of beginnings, the prefix before it kept; None if the table has none of them."""
    inner = name.removeprefix(prefix)
    for theirs, ours in names.items():
        if inner.startswith(theirs):
            return prefix + ours + inner.removeprefix(theirs)
    return None


def as_ours(name: str, tensor: Tensor, patch: int) -> Tensor:
    """A tensor in the shape and order that it has under our name: those of the first and of the last layer differ."""
    if name == "patchify.weight":
        return tensor.flatten(1)
    return channels_first(tensor, patch) if name.startswith("unpatchify.") else tensor


def channels_first(tensor: Tensor, patch: int) -> Tensor:
    """Rows of a last layer, whose patches have their channels last, in our order: channels, row, column."""
    return tensor.unflatten(0, (patch, patch, -1)).movedim(2, 0).flatten(0, 2)


def class_names(path: str, classes: int) -> list[str]:
    """The names in a text file, one a line; numbers without one."""
    if not path:
        return [str(i) for i in range(classes)]
    try:
        names = Path(path).read_text().splitlines()
    except OSError as error:
        raise by_reason(f"class_names={path} can't be read ({error.strerror}); give a text file", error) from None
    if len(names) != classes:
        raise InputError(f"class_names={path} has {len(names)} lines, the weights know {classes} classes")
    return names


def read_statistics(path: str, channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, as LightningDiT's latents_stats.pt has them: [1, C, 1, 1] or [C] each."""
    held = read(Path(path))
    if not {"mean", "std"} <= held.keys() or any(held[k].numel() != channels for k in ("mean", "std")):
        shapes = {name: list(tensor.shape) for name, tensor in held.items()}
        raise InputError(f"statistics={path} holds {shapes}; expected are mean and std of {channels} channels")
    mean, std = (held[k].flatten().double().tolist() for k in ("mean", "std"))
    if min(std) <= 0:
        raise InputError(f"statistics={path} has a deviation of {min(std):g}; it must be positive")
    return mean, std
