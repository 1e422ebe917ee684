"""Scaled dot-product attention: one function over several kernels.

`auto` takes flash-attn 2 where it is installed and the tensors suit it (CUDA, half precision), else torch's own.
`reference` is the textbook formula in float64, against which the others are tested.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldt.errors import InputError

FLASH_INSTALLED = importlib.util.find_spec("flash_attn") is not None


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that `name` means for tensors of this device and dtype."""
    assert name in ("auto", "sdpa", "flash", "reference"), name
    suits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        return "flash" if FLASH_INSTALLED and suits else "sdpa"
    if name == "flash" and not FLASH_INSTALLED:
        raise InputError(
            "model.attention=flash needs flash-attn; pip install ldt-train[flash], or use model.attention=auto"
        )
    if name == "flash" and not suits:
        raise InputError(
            f"model.attention=flash runs on CUDA in half precision, not on {device.type} in {dtype}; "
            "use engine.precision=bf16 on a GPU, or model.attention=auto"
        )
    return name


def attend(q_BKNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, kernel: str, mask_BN: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√E)·v for every head: [B, K, N, E].

    mask_BN: bool, true where there is a token; the others are seen by none, and their own rows are 0. Every sample
    needs one.
    """
    if kernel == "flash":
        return _flash(q_BKNE, k_BKNE, v_BKNE, mask_BN)
    keys_B11N = None if mask_BN is None else mask_BN[:, None, None]
    if kernel == "sdpa":
        out_BKNE = F.scaled_dot_product_attention(q_BKNE, k_BKNE, v_BKNE, attn_mask=keys_B11N)
    else:
        q, k, v = (x.double() for x in (q_BKNE, k_BKNE, v_BKNE))
        score_BKNN = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if keys_B11N is not None:
            score_BKNN = score_BKNN.masked_fill(~keys_B11N, -torch.inf)
        out_BKNE = (torch.softmax(score_BKNN, dim=-1) @ v).to(q_BKNE.dtype)
    return out_BKNE if mask_BN is None else out_BKNE * mask_BN[:, None, :, None]


def _flash(q_BKNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, mask_BN: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if mask_BN is None:
        out_BNKE = flash_attn_func(*(x.transpose(1, 2) for x in (q_BKNE, k_BKNE, v_BKNE)))
        return out_BNKE.transpose(1, 2)

    def varlen(q_TKE: Tensor, k_TKE: Tensor, v_TKE: Tensor, ends: Tensor, longest: int) -> Tensor:
        return flash_attn_varlen_func(q_TKE, k_TKE, v_TKE, ends, ends, longest, longest)

    return unpadded(varlen, q_BKNE, k_BKNE, v_BKNE, mask_BN)


def unpadded(
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor],
    q_BKNE: Tensor,
    k_BKNE: Tensor,
    v_BKNE: Tensor,
    mask_BN: Tensor,
) -> Tensor:
    """Run a kernel that takes the real tokens of all samples in one row, [T, K, E], with the ends of the samples.

    Its last two arguments are int32 [B + 1], the first 0, and the longest sample.
    """
    batch, tokens = mask_BN.shape
    place_T = mask_BN.flatten().nonzero()[:, 0]
    length_B = mask_BN.sum(1, dtype=torch.int32)
    ends = F.pad(length_B.cumsum(0, dtype=torch.int32), (1, 0))
    q_TKE, k_TKE, v_TKE = (x.transpose(1, 2).flatten(0, 1)[place_T] for x in (q_BKNE, k_BKNE, v_BKNE))
    out_TKE = kernel(q_TKE, k_TKE, v_TKE, ends, tokens)
    out = out_TKE.new_zeros(batch * tokens, *out_TKE.shape[1:]).index_copy(0, place_T, out_TKE)
    return out.view(batch, tokens, *out_TKE.shape[1:]).transpose(1, 2)
