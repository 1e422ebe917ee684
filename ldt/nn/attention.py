"""Scaled dot-product attention: one function over several kernels.

`auto` takes flash-attn 2 where it is installed and the tensors suit it (CUDA, half precision), else torch's own.
`reference` is the textbook formula in float64, against which the others are tested.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from ldt.errors import InputError

KERNELS = ("auto", "sdpa", "flash", "reference")


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that `name` means for tensors of this device and dtype."""
    assert name in KERNELS, name
    installed = importlib.util.find_spec("flash_attn") is not None
    suits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        return "flash" if installed and suits else "sdpa"
    if name == "flash" and not installed:
        raise InputError(
            "model.attention=flash needs flash-attn; pip install ldt-train[flash], or use model.attention=auto"
        )
    if name == "flash" and not suits:
        raise InputError(
            f"model.attention=flash runs on CUDA in half precision, not on {device.type} in {dtype}; "
            "use engine.precision=bf16 on a GPU, or model.attention=auto"
        )
    return name


def attend(q_BKNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, kernel: str) -> Tensor:
    """softmax(q·kᵀ/√E)·v for every head: [B, K, N, E]."""
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q_BKNE, k_BKNE, v_BKNE)
    if kernel == "flash":
        from flash_attn import flash_attn_func

        out_BNKE = flash_attn_func(*(x.transpose(1, 2) for x in (q_BKNE, k_BKNE, v_BKNE)))
        return out_BNKE.transpose(1, 2)
    q, k, v = (x.double() for x in (q_BKNE, k_BKNE, v_BKNE))
    weights_BKNN = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights_BKNN @ v).to(q_BKNE.dtype)
