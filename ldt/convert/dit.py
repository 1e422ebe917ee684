"""DiT's public weights (`DiT-XL-2-256x256.pt` and others of that layout) as a model of ours: `ldt import`.

The file is read as tensors only. What comes out is an exported model as `ldt export` writes it, learned sigma included:
the model keeps those channels to itself. DiT's latents are an autoencoder's times 0.18215, which here is the whitening.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldt.autoencoder import Autoencoder
from ldt.checkpoint import Sampling
from ldt.checkpoint.denoiser import save_exported
from ldt.config import to_dict
from ldt.diffusion.objectives import ObjectiveConfig
from ldt.errors import InputError
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.nn.embedding import sincos_2d
from ldt.nn.sizes import DIT, dit_of
from ldt.options import required

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


@dataclass
class Config:
    """`weights`: the .pt file; `to`: a directory that does not exist yet; `autoencoder`: the one it was trained with.

    `class_names`: a text file with one name a line, empty for numbers; `heads`: 0 for those of DiT's own sizes.
    """

    weights: str = required()
    to: str = required()
    autoencoder: str = required()
    class_names: str = ""
    heads: int = 0


def run(config: Config) -> int:
    """Write the directory."""
    target = Path(config.to)
    if target.exists():
        raise InputError(f"to={target} exists; give a directory that does not")
    theirs = read(Path(config.weights))
    model = model_config(theirs, config.heads)
    tensors = convert(theirs, model)
    channels, side = tensors["patchify.weight"].shape[1] // model.patch**2, _rows(theirs) * model.patch
    classes = _class_names(config.class_names, len(tensors["label.weight"]) - 1)
    with torch.device("meta"):
        shapes = build(model, (channels, side, side), len(classes), seed=0).state_dict()
    for name, tensor in tensors.items():
        if name not in shapes or shapes[name].shape != tensor.shape:
            raise InputError(f"{config.weights}: {name} of shape {list(tensor.shape)} is no part of a DiT of this size")
    autoencoder = Autoencoder.load(config.autoencoder)
    if autoencoder.latent_channels != channels:
        raise InputError(
            f"autoencoder={config.autoencoder} has {autoencoder.latent_channels} latent channels, {config.weights} "
            f"{channels}; give the one it was trained with"
        )
    sampling = Sampling(
        latent_shape=(channels, side, side),
        classes=classes,
        mean_C=[0.0] * channels,
        std_C=[1 / SCALE] * channels,
        autoencoder=config.autoencoder,
        autoencoder_hash=autoencoder.hash,
        image_size=side * autoencoder.downsample,
        image_channels=autoencoder.image_channels,
    )
    objective = ObjectiveConfig(prediction="eps", schedule="ddpm", timesteps="uniform")
    facts: dict[str, Any] = {
        "config": {"model": to_dict(model), "objective": to_dict(objective)},
        "sampling": asdict(sampling),
        "samples_seen": 0,
        "weights": "imported",
        "made_from": {Path(config.weights).name: "DiT"},
    }
    save_exported(target, tensors, json.loads(json.dumps(facts)))
    millions = sum(t.numel() for t in tensors.values()) / 1e6
    print(f"{millions:.2f} M parameters imported from {config.weights}: {target}")
    return 0


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a DiT file, of the average where it is a training checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights={path} does not exist; give DiT's .pt file") from None
    except Exception as error:  # torch raises a dozen types over a damaged file
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0][:150]
        raise InputError(
            f"weights={path} can't be read as plain tensors ({reason}); save it again as a dictionary of tensors alone"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or "x_embedder.proj.weight" not in content:
        raise InputError(f"weights={path} holds no DiT: there is no x_embedder.proj.weight in it")
    return content


def model_config(theirs: dict[str, Tensor], heads: int = 0) -> ModelConfig:
    """The architecture that the shapes tell; `heads` is the only thing they don't, so it comes from DiT's table."""
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
            _check_positions(tensor, model.width, _rows(theirs))
            continue
        ours = _renamed(name)
        if ours is None:
            raise InputError(f"{name} is no part of a DiT")
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


def _rows(theirs: dict[str, Tensor]) -> int:
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
        raise InputError(f"class_names={path} can't be read ({error.strerror}); give a text file") from None
    if len(names) != classes:
        raise InputError(f"class_names={path} has {len(names)} lines, the weights know {classes} classes")
    return names
