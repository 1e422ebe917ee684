"""DiT's public weights (`DiT-XL-2-256x256.pt` and others of that layout) as a model of ours: `ldt import`.

The file is read as tensors only. What comes out is an exported model as `ldt export` writes it, learned sigma included:
the model keeps those channels to itself. DiT's latents are an autoencoder's times 0.18215, which here is the whitening.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldt.checkpoint.load import save_exported
from ldt.config import to_dict
from ldt.config_fields import path_field, required_path_field
from ldt.convert.dit import SCALE, _class_names, convert, grid_rows, model_config, read
from ldt.data.latent_spec import LatentSpec
from ldt.diffusion.config import ObjectiveConfig
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder
from ldt.nn.build import build


@dataclass
class ImportJob:
    """`weights`: the .pt file; `to`: a directory that does not exist yet; `autoencoder`: the one it was trained with.

    `class_names`: a text file with one name a line, empty for numbers; `heads`: 0 for those of DiT's own sizes.
    """

    weights: str = required_path_field()
    to: str = required_path_field()
    autoencoder: str = required_path_field()
    class_names: str = path_field()
    heads: int = 0


def run(config: ImportJob) -> int:
    """Convert the weights and write the exported model into the directory `to`."""
    target = Path(config.to)
    if target.exists():
        raise InputError(f"to={target} exists; give a directory that does not")
    theirs = read(Path(config.weights))
    model = model_config(theirs, config.heads)
    tensors = convert(theirs, model)
    channels, side = tensors["patchify.weight"].shape[1] // model.patch**2, grid_rows(theirs) * model.patch
    classes = _class_names(config.class_names, len(tensors["label.weight"]) - 1)
    with torch.device("meta"):
        shapes = build(model, (channels, side, side), len(classes), seed=0).state_dict()
    for name, tensor in tensors.items():
        if name not in shapes or shapes[name].shape != tensor.shape:
            raise InputError(f"{config.weights}: {name} {list(tensor.shape)} is not part of a DiT of this size")
    autoencoder = Autoencoder.load(config.autoencoder)
    if autoencoder.latent_channels != channels:
        raise InputError(
            f"autoencoder={config.autoencoder} has {autoencoder.latent_channels} latent channels, {config.weights} "
            f"{channels}; give the one it was trained with"
        )
    spec = LatentSpec(
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
        "sampling": spec.to_json(),
        "samples_seen": 0,
        "weights": "imported",
        "made_from": {Path(config.weights).name: "DiT"},
    }
    save_exported(target, tensors, json.loads(json.dumps(facts)))
    millions = sum(t.numel() for t in tensors.values()) / 1e6
    print(f"{millions:.2f} M parameters imported from {config.weights}: {target}")
    return 0
