"""U-ViT's weights (2209.12152), such as its ImageNet models: eps at step n of 1000 on a scaled-linear schedule.

Its sequence begins with the class and the time, ours with the time and the class, so two rows of its positions change
places; attention does not care for order.
"""

import re

import torch
from torch import Tensor

from ldt.convert.weights import Converted, as_ours, rename
from ldt.diffusion.config import ObjectiveConfig
from ldt.errors import InputError
from ldt.nn.config import ModelConfig
from ldt.nn.sizes import UVIT

NAMES = {
    "patch_embed.proj.": "patchify.",
    "label_emb.weight": "label.weight",
    "pos_embed": "position",
    "norm.": "norm.",
    "decoder_pred.": "unpatchify.",
    "final_layer.": "convolution.",
}
BLOCK_NAMES = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.qkv.": "attention.qkv.",
    "attn.proj.": "attention.out.",
    "mlp.fc1.": "mlp.up.",
    "mlp.fc2.": "mlp.down.",
    "skip_linear.": "skip.",
}
EXTRAS = 2  # the class and the time


def from_uvit(theirs: dict[str, Tensor], heads: int = 0) -> Converted:
    model = model_config(theirs, heads)
    objective = ObjectiveConfig(prediction="eps", schedule="scaled_linear", timesteps="uniform")
    rows = round((theirs["pos_embed"].shape[1] - EXTRAS) ** 0.5)
    return Converted(model, objective, convert(theirs, model), rows)


def model_config(theirs: dict[str, Tensor], heads: int = 0) -> ModelConfig:
    """The architecture that the shapes tell, with the heads of the published sizes."""
    if "label_emb.weight" not in theirs:
        raise InputError("this U-ViT is told no class, and ldt has no models without a condition; import another one")
    if any(name.startswith("time_embed.") for name in theirs):
        raise InputError(
            "this U-ViT embeds the time by a perceptron of four times its width, which ldt has not; only those with "
            "mlp_time_embed=False can be imported"
        )
    width, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    depth = 2 * _half(theirs) + 1
    heads = heads or {(w, d): h for w, d, h in UVIT.values()}.get((width, depth), 0)
    if not heads:
        raise InputError(f"a U-ViT of width {width} and depth {depth} is none of the published ones; give its heads=")
    return ModelConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        long_skips="out_blocks.0.skip_linear.weight" in theirs,
        positions="learned",
        norm="layer",
        norm_eps=1e-5,
        qk_norm=False,
        qkv_bias="mid_block.attn.qkv.bias" in theirs,
        mlp="gelu_erf",
        mlp_ratio=theirs["mid_block.mlp.fc1.weight"].shape[0] / width,
        time_embedding="sinusoids",
        output_convolution="final_layer.weight" in theirs,
        init="uvit",
    )


def convert(theirs: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Their tensors under our names, float32."""
    half, out = _half(theirs), {}
    for name, tensor in theirs.items():
        ours = _renamed(name, half)
        if ours is None:
            raise InputError(f"{name} is not part of a U-ViT")
        tensor = as_ours(ours, tensor, model.patch)
        if ours == "position":
            label, time = tensor[0, :1], tensor[0, 1:2]
            tensor = torch.cat([time, label, tensor[0, 2:]])
        out[ours] = tensor.float().contiguous()
    return out


def _half(theirs: dict[str, Tensor]) -> int:
    """Blocks before the middle one, and after it."""
    return 1 + max((int(m[1]) for name in theirs if (m := re.match(r"in_blocks\.(\d+)\.", name))), default=-1)


def _renamed(name: str, half: int) -> str | None:
    block = re.match(r"(?:in_blocks\.(\d+)|mid_block|out_blocks\.(\d+))\.", name)
    if not block:
        return rename(name, "", NAMES)
    number = int(block[1]) if block[1] else half + 1 + int(block[2]) if block[2] else half
    prefix = f"blocks.{number}."
    return rename(prefix + name.removeprefix(block[0]), prefix, BLOCK_NAMES)
