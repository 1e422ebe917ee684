"""LightningDiT's weights (2501.01423): a DiT with RMSNorm, SwiGLU and rotary positions beside the fixed ones.

Its norms have weights in front of a modulation, which goes into the modulation: w·(1 + s) is 1 + (w·s + w − 1). Its
rotary positions turn neighbours, ours the two halves of a head, so queries and keys change their order. As SiT's, its
time runs from noise to data. All of it is exact.
"""

import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldt.convert.dit import from_dit, model_config, turned_round
from ldt.convert.weights import Converted
from ldt.diffusion.config import ObjectiveConfig
from ldt.errors import InputError
from ldt.nn.embedding import AxialRotary

BASE = 10_000.0
STEP = 16  # of the hidden width of our SwiGLU
LARGE = {(1536, 24): 24, (1792, 28): 28}
"""Heads of the sizes that DiT has not, by width and depth."""


def from_lightningdit(theirs: dict[str, Tensor], heads: int = 0) -> Converted:
    width = theirs["x_embedder.proj.weight"].shape[0]
    depth = 1 + max(int(m[1]) for name in theirs if (m := re.match(r"blocks\.(\d+)\.", name)))
    rotary = theirs.get("feat_rope.freqs_cos")
    heads = width // rotary.shape[-1] if rotary is not None else heads or LARGE.get((width, depth), 0)
    swiglu, rms = "blocks.0.mlp.w12.weight" in theirs, "blocks.0.norm1.weight" in theirs
    plain = _as_dit(theirs, width, rms)
    if rotary is not None:
        _check_rotary(theirs, width // heads)
        plain = {name: _reordered(name, tensor, heads) for name, tensor in plain.items()}
    found = model_config(plain, heads)
    model = replace(
        found,
        time="unit",
        norm="rms" if rms else "layer",
        mlp="swiglu" if swiglu else "gelu",
        mlp_ratio=1.5 * plain["blocks.0.mlp.fc2.weight"].shape[1] / width if swiglu else found.mlp_ratio,
        positions="sincos" if rotary is None else "rope_sincos",
        rope_base=BASE if rotary is not None else found.rope_base,
    )
    converted = from_dit(plain, found.heads)
    return replace(converted, model=model, objective=ObjectiveConfig(), tensors=turned_round(converted.tensors))


def _as_dit(theirs: dict[str, Tensor], width: int, rms: bool) -> dict[str, Tensor]:
    """The same network in DiT's layout."""
    out = {}
    for name, tensor in theirs.items():
        if name.startswith("feat_rope.") or re.search(r"(norm1|norm2|norm_final)\.weight$", name):
            continue
        if ".adaLN_modulation.1." in name:
            tensor = _modulation(name, tensor, theirs, width, rms)
        elif ".mlp.w12." in name:
            tensor = torch.cat([_padded(half, 0) for half in tensor.chunk(2)])
        elif name.endswith(".mlp.w3.weight"):
            tensor = _padded(tensor, 1)
        out[name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = tensor
    return out


def _modulation(name: str, tensor: Tensor, theirs: dict[str, Tensor], width: int, rms: bool) -> Tensor:
    """The layer of shifts, scales and gates, with zero shifts where it has none and with the norms' weights in it."""
    parts = list(tensor.double().split(width))
    if len(parts) == 4:  # trained without shifts
        zero = torch.zeros_like(parts[0])
        parts = [zero, *parts[:2], zero, *parts[2:]]
    prefix = name.partition("adaLN_modulation")[0]
    scales = {1: "norm_final"} if len(parts) == 2 else {1: "norm1", 4: "norm2"}
    for at, norm in scales.items() if rms else ():
        weight = theirs[f"{prefix}{norm}.weight"].double()
        is_bias = name.endswith(".bias")
        parts[at] = weight * parts[at] + weight - 1 if is_bias else weight[:, None] * parts[at]
    return torch.cat(parts).float()


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """Zeros behind, up to a hidden width that our SwiGLU can have: they add nothing."""
    missing = -tensor.shape[dim] % STEP
    after = [0, 0] * (tensor.ndim - 1 - dim) + [0, missing]
    return F.pad(tensor, after) if missing else tensor


def _reordered(name: str, tensor: Tensor, heads: int) -> Tensor:
    """Queries and keys with the first of each pair of a head before the second of all."""
    if re.search(r"\.attn\.[qk]_norm\.weight$", name):
        return torch.cat([tensor[::2], tensor[1::2]])
    if ".attn.qkv." not in name:
        return tensor
    query, key, value = tensor.chunk(3)
    parts = [x.unflatten(0, (heads, -1)) for x in (query, key)]
    return torch.cat([*(torch.cat([x[:, ::2], x[:, 1::2]], dim=1).flatten(0, 1) for x in parts), value])


def _check_rotary(theirs: dict[str, Tensor], head_dim: int) -> None:
    rows = round(theirs["pos_embed"].shape[1] ** 0.5)
    if theirs["feat_rope.freqs_cos"].is_meta:
        return
    ours = AxialRotary(head_dim, rows, rows, 0, BASE)
    for kind, expected in (("cos", ours.cos_NE), ("sin", ours.sin_NE)):
        found = theirs[f"feat_rope.freqs_{kind}"].float()
        if found.shape != expected.shape or not torch.allclose(found[:, ::2], expected.chunk(2, 1)[0], atol=1e-4):
            raise InputError(f"feat_rope.freqs_{kind} are not LightningDiT's rotary positions; this is another model")
