"""Scaled dot-product attention: one function over several kernels.

`auto` takes, of tensors in half precision on CUDA, the fastest that is there: on Hopper flash-attn 3, else cuDNN's
before torch's others (2 times as fast as flash-attn 2 by others' measurements); before Hopper flash-attn 2. Everything
else is torch's own. `reference` is the textbook formula in float64, against which the others are tested.

With a mask torch's flash kernel is out; cuDNN's and the memory-efficient one take it. flash-attn takes the padding as
sequences of their own, see `Padding`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldt.errors import InputError

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Flash(NamedTuple):
    """The functions of an installed flash-attn: of equally long samples, and of a row of samples of any length."""

    dense: Callable[..., Any]
    varlen: Callable[..., Any]


PACKAGES = ("flash_attn", "flash_attn_interface")

FLASH: dict[str, Flash] = {}
"""The flash-attn in use by its name, flash2 or flash3, once `choose_kernel` has found it."""


def _flash3() -> Flash:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return Flash(flash_attn_func, flash_attn_varlen_func)


def _flash2() -> Flash:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return Flash(flash_attn_func, flash_attn_varlen_func)


@functools.cache
def find_flash(hopper: bool) -> tuple[str, str]:
    """The name of the best flash-attn that can be imported, or nothing and why: tried once, at the start.

    A leftover directory of that name, or a wheel for another torch, would otherwise fail at the first forward pass.
    """
    problem = "it is not installed"
    for name, load in [("flash3", _flash3)] * hopper + [("flash2", _flash2)]:
        try:
            FLASH[name] = load()
            return name, ""
        except (ImportError, OSError, RuntimeError) as error:  # the last from operators made for another torch
            if getattr(error, "name", "") not in PACKAGES or not isinstance(error, ModuleNotFoundError):
                problem = f"it can't be imported: {' '.join(str(error).split())[:200]}"
    return "", problem


_differentiable = False
"""Whether all kernels but the reference give way to torch's plain one."""


def forward_differentiable(denoiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The denoiser with attention by products and a softmax, for derivatives in forward mode.

    The fused kernels have none, and neither have compiled blocks, which run eagerly here.
    """

    def plain(*arguments: Any, **options: Any) -> Tensor:
        global _differentiable
        before, _differentiable = _differentiable, True
        try:
            with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                return denoiser(*arguments, **options)
        finally:
            _differentiable = before

    return plain


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that `name` means for tensors of this device and dtype: flash2 or flash3 for flash."""
    suits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if name in ("flash", "cudnn") and not suits:
        raise InputError(
            f"model.attention={name} runs on CUDA in half precision, not on {device.type} in {dtype}; "
            "use engine.precision=bf16 on a GPU, or model.attention=auto"
        )
    if _differentiable and name != "reference":
        return "sdpa"
    if name not in ("auto", "flash"):
        return name
    if not suits:
        return "sdpa"
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    flash, problem = find_flash(hopper)
    if name == "flash" and not flash:
        raise InputError(
            f"model.attention=flash needs flash-attn, and {problem}; pip install ldt-train[flash] builds it for this "
            "torch, or use model.attention=auto"
        )
    if name == "flash" or flash == "flash3":
        return flash
    return "cudnn" if hopper else flash or "sdpa"


class Padding(NamedTuple):
    """Which tokens are real, made once a forward pass. place_T, ends: for flash-attn, which takes all tokens in a row.

    mask_BN: bool, true where there is a token. place_T: where each token of the row is in [B·N], in every sample the
    real ones first. ends: int32 [2B + 1], where the real ones and the padding of each sample end. As many tokens as
    without padding, so no shape depends on the texts: the host waits for nothing and nothing is compiled again.
    """

    mask_BN: Tensor
    place_T: Tensor | None = None
    ends: Tensor | None = None


def padding_of(mask_BN: Tensor, kernel: str) -> Padding:
    """What a kernel needs to know about padding."""
    if not kernel.startswith("flash"):
        return Padding(mask_BN)
    batch, tokens = mask_BN.shape
    order_BN = torch.argsort((~mask_BN).to(torch.int32), dim=1, stable=True)
    first_B1 = tokens * torch.arange(batch, device=mask_BN.device)[:, None]
    real_B = mask_BN.sum(1, dtype=torch.int32)
    lengths = torch.stack([real_B, tokens - real_B], dim=1).flatten()
    return Padding(mask_BN, (order_BN + first_B1).flatten(), F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)))


def attend(q_BKNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, kernel: str, padding: Padding | None = None) -> Tensor:
    """softmax(q·kᵀ/√E)·v for every head: [B, K, N, E].

    What is padding is seen by no token, and its own rows are 0. Every sample needs a real token.
    """
    if kernel.startswith("flash"):
        out_BKNE = _flash(FLASH[kernel], q_BKNE, k_BKNE, v_BKNE, padding)
    else:
        mask = None if padding is None else padding.mask_BN[:, None, None]
        if kernel == "cudnn":
            with sdpa_kernel(CUDNN_FIRST, set_priority=True):
                out_BKNE = F.scaled_dot_product_attention(q_BKNE, k_BKNE, v_BKNE, attn_mask=mask)
        elif kernel == "sdpa":
            out_BKNE = F.scaled_dot_product_attention(q_BKNE, k_BKNE, v_BKNE, attn_mask=mask)
        else:
            out_BKNE = _reference(q_BKNE, k_BKNE, v_BKNE, mask)
    return out_BKNE if padding is None else out_BKNE * padding.mask_BN[:, None, :, None]


def _reference(q_BKNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, mask_B11N: Tensor | None) -> Tensor:
    q, k, v = (x.double() for x in (q_BKNE, k_BKNE, v_BKNE))
    score_BKNN = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask_B11N is not None:
        score_BKNN = score_BKNN.masked_fill(~mask_B11N, -torch.inf)
    return (torch.softmax(score_BKNN, dim=-1) @ v).to(q_BKNE.dtype)


def _flash(flash: Flash, q_BKNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, padding: Padding | None) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()  # its backward pass adds in any order otherwise
    qkv = [x.transpose(1, 2) for x in (q_BKNE, k_BKNE, v_BKNE)]
    if padding is None:
        return _output(flash.dense(*qkv, deterministic=deterministic)).transpose(1, 2)
    assert padding.place_T is not None
    batch, tokens = padding.mask_BN.shape
    rows = [x.flatten(0, 1)[padding.place_T] for x in qkv]
    ends = (padding.ends, padding.ends, tokens, tokens)
    out_TKE = _output(flash.varlen(*rows, *ends, deterministic=deterministic))
    out = torch.empty_like(out_TKE).index_copy(0, padding.place_T, out_TKE)
    return out.view(batch, tokens, *out.shape[1:]).transpose(1, 2)


def _output(result: Any) -> Tensor:
    """Early versions of flash-attn 3 return the softmax's sums too."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
