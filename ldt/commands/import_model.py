"""Public weights of DiT, SiT, REPA, LightningDiT and U-ViT as a model of ours: `ldt import`.

Files are read as tensors only. What comes out is an exported model as `ldt export` writes it. The latents of most are
an autoencoder's times 0.18215, which here is the whitening; LightningDiT's have statistics in a file beside them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldt import log
from ldt.checkpoint.load import save_exported
from ldt.config import to_dict
from ldt.config_fields import choice, path_field, required_path_field
from ldt.convert.kinds import CONVERTERS, kind_of
from ldt.convert.weights import class_names, read, read_statistics
from ldt.data.latent_spec import LatentSpec
from ldt.errors import InputError
from ldt.models.autoencoder import Autoencoder
from ldt.nn.build import build
from ldt.nn.config import ModelConfig
from ldt.progress import pluralize

logger = log.get_logger(__name__)
SCALE = 0.18215


@dataclass
class ImportJob:
    """`weights`: the .pt, .pth or .safetensors file; `kind`: whose they are, where the file does not say it itself;
    `to`: a directory that does not exist yet; `autoencoder`: the one it was trained with.

    `statistics`: a file with mean and deviation of each channel of the latents, as LightningDiT's latents_stats.pt has
    them; empty where they were multiplied with 0.18215. `class_names`: a text file with one name a line, empty for
    numbers; `heads`: 0 for those of the published sizes.
    """

    weights: str = required_path_field()
    to: str = required_path_field()
    autoencoder: str = required_path_field()
    kind: str = choice("auto", *CONVERTERS)
    statistics: str = path_field()
    class_names: str = path_field()
    heads: int = 0


def run(config: ImportJob) -> int:
    """Convert the weights and write the exported model into the directory `to`."""
    target = Path(config.to)
    if target.exists():
        raise InputError(f"to={target} exists; give a directory that does not")
    theirs = read(Path(config.weights))
    kind = kind_of(theirs, Path(config.weights)) if config.kind == "auto" else config.kind
    try:
        converted = CONVERTERS[kind](theirs, config.heads)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:  # names or shapes that no such model has
        reason = (str(error).splitlines() or [""])[0][:150]
        raise InputError(f"{config.weights} can't be read as kind={kind} ({type(error).__name__}: {reason})") from None
    model, tensors, side = converted.model, converted.tensors, converted.rows * converted.model.patch
    channels = tensors["patchify.weight"].shape[1] // model.patch**2
    classes = class_names(config.class_names, len(tensors["label.weight"]) - 1)
    check_fit(config.weights, kind, tensors, model, (channels, side, side), len(classes))
    if kind == "lightningdit" and not config.statistics:
        raise InputError(
            "LightningDiT's latents were whitened by statistics that its weights do not hold; give its "
            "latents_stats.pt as statistics="
        )
    mean, std = [0.0] * channels, [1 / SCALE] * channels
    if config.statistics:
        mean, std = read_statistics(config.statistics, channels)
    autoencoder = Autoencoder.load(config.autoencoder)
    if autoencoder.latent_channels != channels:
        raise InputError(
            f"autoencoder={config.autoencoder} has {autoencoder.latent_channels} latent channels, {config.weights} "
            f"{channels}; give the one it was trained with"
        )
    spec = LatentSpec(
        latent_shape=(channels, side, side),
        classes=classes,
        mean_C=mean,
        std_C=std,
        autoencoder=config.autoencoder,
        autoencoder_hash=autoencoder.hash,
        image_size=side * autoencoder.downsample,
        image_channels=autoencoder.image_channels,
    )
    facts: dict[str, Any] = {
        "config": {"model": to_dict(model), "objective": to_dict(converted.objective)},
        "sampling": spec.to_json(),
        "samples_seen": 0,
        "weights": "imported",
        "made_from": {Path(config.weights).name: kind},
    }
    save_exported(target, tensors, json.loads(json.dumps(facts)))
    millions = sum(t.numel() for t in tensors.values()) / 1e6
    if converted.left_out:
        parts = pluralize(len(converted.left_out), "tensor", "tensors")
        logger.info("left out, as they serve training alone: %s (%s, …)", parts, converted.left_out[0])
    print(f"{millions:.2f} M parameters of {kind} imported from {config.weights}: {target}")
    return 0


def check_fit(
    file: str, kind: str, tensors: dict[str, Tensor], model: ModelConfig, shape: tuple[int, int, int], classes: int
) -> None:
    """Refuse tensors that are not just the parameters of the model that they are to be."""
    with torch.device("meta"):
        parameters = build(model, shape, classes, seed=0).named_parameters()
    shapes = {name: p.shape for name, p in parameters if p.requires_grad}
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            raise InputError(f"{file}: {name} {list(tensor.shape)} is not part of a model of kind={kind} of this size")
    if missing := [name for name in shapes if name not in tensors]:
        raise InputError(f"{file} is not a whole model of kind={kind}: there is nothing for {missing[0]} in it")
