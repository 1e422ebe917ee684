"""DiT's public weights (`DiT-XL-2-256x256.pt` and others of that layout) as a model of ours: `ldt import`.

The file is read as tensors only. What comes out is an exported model as `ldt export` writes it, learned sigma included:
the model keeps those channels to itself. DiT's latents are an autoencoder's times 0.18215, which here is the whitening.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldt.errors import InputError, by_reason
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import sincos_2d
from ldt.nn.sizes import DIT, dit_of

SCALE = 0.18215

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
    "attn.proj.": "attention.out.",
    "mlp.fc1.": "mlp.up.",
    "mlp.fc2.": "mlp.down.",
    "adaLN_modulation.1.": "modulation.",
}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a DiT file, of the average where it is a training checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights={path} does not exist; give DiT's .pt file") from None
    except Exception as error:  # torch raises a dozen types over a damaged file
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0][:150]
        raise by_reason(
            f"weights={path} can't be read as plain tensors ({reason}); save it again as a dictionary of tensors alone",
            error,
        ) from None
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or "x_embedder.proj.weight" not in content:
        raise InputError(f"weights={path} holds no DiT: there is no x_embedder.proj.weight in it")
    return content


def model_config(theirs: dict[str, Tensor], heads: int = 0) -> ModelConfig:
    """The architecture, read off the shapes; only the number of heads is not in them and comes from DiT's table."""
    width, channels, patch, _ = theirs["x_embedder.proj.weight"].shape
    depth = 1 + max(int(m[1]) for name in theirs if (m := re.match(r"blocks\.(\d+)\.", name)))
    known = {(w, d): h for w, d, h in DIT.values()}
    heads = heads or known.get((width, depth), 0)
    if not heads:
        raise InputError(f"a DiT of width {width} and depth {depth} is none of the published ones; give its heads=")
    return replace(
        dit_of(width, depth, heads, patch),
        mlp_ratio=theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        learned_sigma=theirs["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
    )


def convert(theirs: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Their tensors under our names, float32. Output channels lie last in their patches and first in ours."""
    out: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name == "pos_embed":
            _check_positions(tensor, model.width, grid_rows(theirs))
            continue
        ours = _renamed(name)
        if ours is None:
            raise InputError(f"{name} is not part of a DiT")
        if ours == "patchify.weight":
            tensor = tensor.flatten(1)
        elif ours.startswith("unpatchify."):
            p = model.patch
            tensor = tensor.unflatten(0, (p, p, -1)).movedim(2, 0).flatten(0, 2)
        out[ours] = tensor.float().contiguous()
    return out


def _renamed(name: str) -> str | None:
    block = re.match(r"blocks\.\d+\.", name)
    prefix = block[0] if block else ""
    for theirs, ours in (BLOCK_NAMES if block else NAMES).items():
        if name.removeprefix(prefix).startswith(theirs):
            return prefix + ours + name.removeprefix(prefix + theirs)
    return None


def grid_rows(theirs: dict[str, Tensor]) -> int:
    return round(theirs["pos_embed"].shape[1] ** 0.5)


def _check_positions(tensor_1ND: Tensor, width: int, rows: int) -> None:
    if tensor_1ND.is_meta:
        return
    if tensor_1ND.shape != (1, rows * rows, width) or not torch.allclose(
        tensor_1ND[0].float(), sincos_2d(width, rows, rows), atol=1e-4
    ):
        raise InputError("pos_embed is not the fixed sine-cosine grid of DiT; this file is of another model")


def _class_names(path: str, classes: int) -> list[str]:
    if not path:
        return [str(i) for i in range(classes)]
    try:
        names = Path(path).read_text().splitlines()
    except OSError as error:
        raise by_reason(f"class_names={path} can't be read ({error.strerror}); give a text file", error) from None
    if len(names) != classes:
        raise InputError(f"class_names={path} has {len(names)} lines, the weights know {classes} classes")
    return names
