"""Weights files of feature nets, read without running anything that is in them."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldt.errors import InputError, by_reason


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or PyTorch file; `InputError` if it holds anything else."""
    if not path.is_file():
        raise InputError(f"detector weights {path} do not exist; give a file, or none for the library's own download")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise by_reason(
            f"detector weights {path} are not a file of tensors ({reason}); download it again", error
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"detector weights {path} hold no state dict; give the weights of the detector alone")
    return state
