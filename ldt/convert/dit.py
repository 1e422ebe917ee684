"""DiT's layout: `DiT-XL-2-256x256.pt`, and the same names in SiT's and REPA's files.

SiT has DiT's network, but is told the time itself, from noise at 0 to data at 1, and predicts data minus noise. Both
are turned round in the first and last layer, exactly. REPA's is told our time and predicts our velocity; its projectors
serve its training alone.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ldt.convert.weights import Converted, as_ours, rename
from ldt.diffusion.config import ObjectiveConfig
from ldt.errors import InputError
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import FREQUENCIES, sincos_2d
from ldt.nn.sizes import DIT, dit_of

NAMES = {
    "x_embedder.proj.weight": "patchify.weight",
    "x_embedder.proj.bias": "patchify.bias",
    "t_embedder.mlp.0.": "time.up.",
    "t_embedder.mlp.2.": "time.down.",
    "y_embedder.embedding_table.weight": "label.weight",
    "final_layer.linear.": "unpatchify.",
    "final_layer.adaLN_modulation.1.": "modulation.",
}
BLOCK_NAMES = {
    "attn.qkv.": "attention.qkv.",
    "attn.q_norm.": "attention.q_norm.",
    "attn.k_norm.": "attention.k_norm.",
    "attn.proj.": "attention.out.",
    "mlp.fc1.": "mlp.up.",
    "mlp.fc2.": "mlp.down.",
    "adaLN_modulation.1.": "modulation.",
}


def from_dit(theirs: dict[str, Tensor], heads: int = 0) -> Converted:
    model = model_config(theirs, heads)
    objective = ObjectiveConfig(prediction="eps", schedule="ddpm", timesteps="uniform")
    return Converted(model, objective, convert(theirs, model), grid_rows(theirs))


def from_sit(theirs: dict[str, Tensor], heads: int = 0) -> Converted:
    model = replace(model_config(theirs, heads), time="unit")
    tensors = turned_round(convert(theirs, model))
    return Converted(model, ObjectiveConfig(timesteps="uniform"), tensors, grid_rows(theirs))


def from_repa(theirs: dict[str, Tensor], heads: int = 0) -> Converted:
    left_out = [name for name in theirs if name.startswith("projectors.")]
    theirs = {name: tensor for name, tensor in theirs.items() if name not in left_out}
    model = replace(model_config(theirs, heads), time="unit")
    return Converted(model, ObjectiveConfig(timesteps="uniform"), convert(theirs, model), grid_rows(theirs), left_out)


def model_config(theirs: dict[str, Tensor], heads: int = 0) -> ModelConfig:
    """The architecture that the shapes tell; `heads` is the only thing they don't, so it comes from DiT's table."""
    for needed in ("x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight", "pos_embed"):
        if needed not in theirs:
            raise InputError(f"the weights are no DiT's: there is no {needed} in them")
    width, channels, patch, _ = theirs["x_embedder.proj.weight"].shape
    depth = 1 + max(int(m[1]) for name in theirs if (m := re.match(r"blocks\.(\d+)\.", name)))
    known = {(w, d): h for w, d, h in DIT.values()}
    heads = heads or known.get((width, depth), 0)
    if not heads:
        raise InputError(f"a DiT of width {width} and depth {depth} is none of the published ones; give its heads=")
    if "blocks.0.attn.q_norm.bias" in theirs:
        raise InputError(
            "these weights normalise queries and keys by a LayerNorm, which ldt has not (model.qk_norm is an RMSNorm); "
            "only models trained without qk-norm can be imported"
        )
    return replace(
        dit_of(width, depth, heads, patch),
        mlp_ratio=theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qk_norm="blocks.0.attn.q_norm.weight" in theirs,
        learned_sigma=theirs["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
    )


def convert(theirs: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Their tensors under our names, float32. Output channels lie last in their patches and first in ours."""
    out: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name == "pos_embed":
            _check_positions(tensor, model.width, grid_rows(theirs))
            continue
        block = re.match(r"blocks\.\d+\.", name)
        ours = rename(name, block[0], BLOCK_NAMES) if block else rename(name, "", NAMES)
        if ours is None:
            raise InputError(f"{name} is not part of a DiT")
        out[ours] = as_ours(ours, tensor, model.patch).float().contiguous()
    return out


def turned_round(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network that is told t where it was told 1 − t, and predicts noise minus data where it did the opposite.

    A·cos((1 − t)f) + B·sin((1 − t)f) is (A·cos f + B·sin f)·cos(tf) + (A·sin f − B·cos f)·sin(tf).
    """
    half = FREQUENCIES // 2
    f = 10_000 ** -(torch.arange(half, dtype=torch.float64) / half)
    a, b = tensors["time.up.weight"].double().chunk(2, dim=1)
    up = torch.cat([a * f.cos() + b * f.sin(), a * f.sin() - b * f.cos()], dim=1).float()
    last = {name: -tensor for name, tensor in tensors.items() if name.startswith("unpatchify.")}
    return tensors | last | {"time.up.weight": up}


def grid_rows(theirs: dict[str, Tensor]) -> int:
    return round(theirs["pos_embed"].shape[1] ** 0.5)


def _check_positions(tensor_1ND: Tensor, width: int, rows: int) -> None:
    if tensor_1ND.is_meta:
        return
    if tensor_1ND.shape != (1, rows * rows, width) or not torch.allclose(
        tensor_1ND[0].float(), sincos_2d(width, rows, rows), atol=1e-4
    ):
        raise InputError("pos_embed is not the fixed sine-cosine grid of DiT; this file is of another model")
